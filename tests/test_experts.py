"""Mixtures of experts: moments against a naive float64 loop, few tokens, budgets, both layouts, resumed runs."""

import logging
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from anybits import Recipe
from anybits.config import DataAware
from anybits.integrations import swapping
from anybits.integrations import transformers as hf
from anybits.integrations.quantizing import quantize_model
from anybits.quantize import anybcq, anyprecision, expert_moments, layerwise
from anybits.quantize.blocks import BlockRunner, HiddenStates, capture
from anybits.quantize.estimate import FACTOR_COPIES, HESSIANS, _Shape
from anybits.quantize.expert_moments import Loan, Routed, evenly
from anybits.quantize.experts import Mixture, Routing, Unsupported, find_mixtures, places
from anybits.quantize.source import Source
from anybits.quantize.targets import Target, find_blocks, find_targets, matrix
from anybits.weight import PlaneWeight
from conftest import WITH_KV, save_tiny, tiny_model

EXPERTS, WIDTH, INNER = 4, 64, 48
TEXT = ["the quick brown fox jumps over the lazy dog 0123456 " * 20]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ListOfExperts(nn.Module):
    """The same layer as the stacked one that it is made from, its experts in a list, as older models have them."""

    def __init__(self, stacked: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = stacked.gate, nn.ModuleList(Expert() for _ in range(EXPERTS))
        with torch.no_grad():
            for e, expert in enumerate(self.experts):
                gate, up = stacked.experts.gate_up_proj[e].chunk(2)
                expert.gate_proj.weight.copy_(gate)
                expert.up_proj.weight.copy_(up)
                expert.down_proj.weight.copy_(stacked.experts.down_proj[e])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        _, scores, chosen = self.gate(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen == e)
            if len(tokens):
                y.index_add_(0, tokens, expert(x[tokens]) * scores[tokens, place, None])
        return y.view(hidden.shape)


class Scene:
    """A block with experts, its inputs on the float path and on a disturbed one, and the layers of both layouts."""

    def __init__(self, layout: str, top_k: int = 2, batches: int = 4) -> None:
        model = tiny_model("qwen3-moe")
        swapping.run_experts_eagerly(model)
        _, blocks = find_blocks(model)
        self.block = blocks[0]
        self.block.mlp.gate.top_k = top_k
        self.layer = self.block.mlp
        if layout == "listed":
            self.block.mlp = ListOfExperts(self.block.mlp)
        tokens = torch.randint(3, 60, (2 * batches, 16), generator=torch.Generator().manual_seed(0))
        inputs = capture(model, blocks, list(tokens.split(2)))
        self.plain = inputs.hidden
        noise = torch.Generator().manual_seed(1)
        moved = [h + 0.1 * torch.randn(h.shape, generator=noise) for h in self.plain.batches]
        self.moved = HiddenStates(moved)
        self.runner, self.targets = BlockRunner(self.block, inputs.arguments[0]), find_targets(self.block)

    def mixture(self) -> Mixture:
        found, reasons = find_mixtures(self.runner, self.targets, self.plain.batches[0])
        assert not reasons
        return found[0]

    def start(self, method: str, precisions: tuple[int, ...]) -> dict[str, PlaneWeight]:
        weights = {t.module: matrix(self.block.get_parameter(t.parameter)) for t in self.targets}
        if method == "any-precision":
            return {name: anyprecision.quantize_matrix(w, None, precisions) for name, w in weights.items()}
        return {name: anybcq.quantize_matrix(w, precisions, 32, False) for name, w in weights.items()}

    def seen_by_the_layer(self, path: HiddenStates) -> list[torch.Tensor]:
        """What the layer of experts gets, by a hook."""
        found: list[torch.Tensor] = []
        hook = self.runner.block.mlp.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
        for batch in path.batches:
            self.runner(batch)
        hook.remove()
        return found


def inner(layer: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What the down projection of an expert sees, in float64."""
    gate, up = (x @ layer.experts.gate_up_proj[expert].double().T).chunk(2, dim=1)
    return F.silu(gate) * up


def naive(scene: Scene, expert: int, stage: int, weighted: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Hessian and drift of an expert from their definition, token after token in float64, and its number of tokens."""
    hessian, drift, total, count = 0.0, 0.0, 0.0, 0
    for x, plain in zip(scene.seen_by_the_layer(scene.moved), scene.seen_by_the_layer(scene.plain), strict=True):
        _, scores, chosen = scene.layer.gate(x)
        for t in range(len(x)):
            for k in range(chosen.shape[1]):
                if chosen[t, k] == expert:
                    h, w = x[t].double(), plain[t].double()
                    if stage == 1:
                        h, w = (inner(scene.layer, expert, v[None])[0] for v in (h, w))
                    g = scores[t, k].double() ** 2 if weighted else 1.0
                    hessian = hessian + g * torch.outer(h, h)
                    drift = drift + g * torch.outer(w - h, h)
                    total, count = total + g, count + 1
    return hessian / total, drift / total, count


def collected(scene: Scene, mixture: Mixture, stage: int, needed: int, weighted: bool = True) -> list:
    plain = Routed.along(mixture, scene.plain, {}).inputs
    paths = [Routed.along(mixture, scene.moved, {}), Routed.along(mixture, scene.moved.thinned(2), {})]
    loan = Loan([path.spread(needed) for path in paths], needed)
    experts = range(mixture.count)
    return expert_moments.collect(mixture, stage, experts, plain, paths, {}, loan, weighted)


@torch.no_grad()
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(("layout", "weighted"), [("stacked", True), ("stacked", False), ("listed", False)])
def test_each_experts_moments_are_those_of_its_tokens(layout: str, weighted: bool, stage: int) -> None:
    scene = Scene(layout)
    mixture = scene.mixture()
    assert [len(names) for names in mixture.stages] == ([1, 1] if layout == "stacked" else [2, 1])
    # Without router weights to be known, a list counts every token the same, whatever is asked for.
    found = collected(scene, mixture, stage, 0, weighted or layout == "listed")
    for e, moments in enumerate(found):
        hessian, drift, _ = naive(scene, e, stage, weighted)
        scale = float(hessian.diagonal().mean())
        torch.testing.assert_close(moments.hessian[0].double(), hessian, rtol=1e-4, atol=1e-4 * scale)
        torch.testing.assert_close(moments.drift[0].double(), drift, rtol=1e-4, atol=1e-4 * scale)
        assert not torch.equal(moments.hessian[0], moments.hessian[1])  # a path of half the batches


@torch.no_grad()
def test_the_weighted_hessian_is_the_error_of_the_layers_output() -> None:
    """One expert's down projection is off: what the block's output is off by is what its Hessian says."""
    scene = Scene("stacked")
    mixture = scene.mixture()
    moments = collected(scene, mixture, 1, 0)[1]
    own = scene.runner.block.get_parameter("mlp.experts.down_proj")
    error = 0.1 * torch.randn(own[1].shape, generator=torch.Generator().manual_seed(5))
    changed = own.clone()
    changed[1] += error
    off, total = 0.0, 0.0
    for batch, x in zip(scene.moved.batches, scene.seen_by_the_layer(scene.moved), strict=True):
        answer = scene.runner(batch, {"mlp.experts.down_proj": changed}) - scene.runner(batch)
        off += float(answer.double().square().sum())
        _, scores, chosen = scene.layer.gate(x)
        total += float(scores[chosen == 1].double().square().sum())
    expected = total * float((error @ moments.hessian[0] * error).sum())
    assert off == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("stage", [0, 1])
def test_an_expert_with_few_tokens_borrows_what_it_lacks(stage: int) -> None:
    scene = Scene("stacked")
    mixture = scene.mixture()
    needed = 60
    pool = torch.cat(scene.seen_by_the_layer(scene.moved))
    pool = pool[evenly(needed, len(pool))]
    counts = []
    for e, moments in enumerate(collected(scene, mixture, stage, needed)):
        hessian, drift, count = naive(scene, e, stage, True)
        counts.append(count)
        if count < needed:
            rows = pool[evenly(needed - count, needed)].double()
            rows = inner(scene.layer, e, rows) if stage == 1 else rows
            hessian, drift = (count * hessian + rows.T @ rows) / needed, count * drift / needed
        scale = float(hessian.diagonal().mean())
        torch.testing.assert_close(moments.hessian[0].double(), hessian, rtol=1e-4, atol=1e-4 * scale)
        torch.testing.assert_close(moments.drift[0].double(), drift, rtol=1e-4, atol=1e-4 * scale)
    assert min(counts) < needed < max(counts)  # the test sees both


def starve(scene: Scene) -> None:
    """Let the router never choose expert 3: with one expert a token, the mean of the others' scores never wins."""
    for gate in (scene.layer.gate, scene.runner.block.mlp.gate):
        gate.weight[3] = gate.weight[:3].mean(0)


@torch.no_grad()
@pytest.mark.parametrize("method", ["anybcq", "any-precision"])
@pytest.mark.parametrize("layout", ["stacked", "listed"])
@pytest.mark.parametrize("expert_tokens", [0.0, 1.0])
def test_an_expert_without_tokens_is_finite_and_no_worse(layout: str, method: str, expert_tokens: float) -> None:
    scene = Scene(layout, top_k=1)
    starve(scene)
    mixture = scene.mixture()
    assert Routed.along(mixture, scene.moved, {}).tokens(3) == 0
    start = scene.start(method, (2, 3))
    settings, reach = DataAware(expert_tokens=expert_tokens), expert_moments.Reach()
    paths = {2: scene.moved, 3: scene.plain}
    found = layerwise.improve_block(scene.runner, scene.targets, start, scene.plain, paths, settings, reach=reach)
    assert (reach.experts, reach.unreached) == (EXPERTS, 1)
    assert reach.scarce >= 1 if expert_tokens else reach.scarce == 0
    for part in (part for stage in (0, 1) for part in mixture.parts(stage, 3)):
        before, after = (w[part.target.module].rows(part.start, part.stop) for w in (start, found))
        own = matrix(scene.block.get_parameter(part.target.parameter))[part.start : part.stop]
        for p in (2, 3):
            assert after.dequantize(p).isfinite().all()
            if expert_tokens == 0:  # all inputs count the same: nothing but the weights themselves is known
                assert (after.dequantize(p) - own).norm() <= (before.dequantize(p) - own).norm() * 1.001


def routed_error(scene: Scene, weights: dict[str, PlaneWeight], precision: int) -> float:
    """How far the layer of experts is off on the tokens that the router sends to each, with its weights replaced."""
    dense = {
        t.parameter.removeprefix("mlp."): weights[t.module]
        .dequantize(precision)
        .view(scene.block.get_parameter(t.parameter).shape)
        for t in scene.targets
        if "experts" in t.module
    }
    layer = scene.runner.block.mlp
    return sum(
        float((torch.func.functional_call(layer, dense, (x[None],)) - layer(x[None])).square().sum())
        for x in scene.seen_by_the_layer(scene.plain)
    )


@torch.no_grad()
@pytest.mark.parametrize("method", ["anybcq", "any-precision"])
@pytest.mark.parametrize("layout", ["stacked", "listed"])
def test_the_error_on_routed_tokens_falls_and_no_budget_changes_the_result(layout: str, method: str) -> None:
    scene = Scene(layout, batches=16)
    precisions = (2, 3, 4)
    start = scene.start(method, precisions)
    paths = {2: scene.plain, 3: scene.plain.thinned(2), 4: scene.plain.thinned(2)}
    arguments = scene.runner, scene.targets, start, scene.plain, paths, DataAware(descents=1)
    found = layerwise.improve_block(*arguments)
    assert all(found[t.module] is not start[t.module] for t in scene.targets)
    for p in precisions:
        assert routed_error(scene, found, p) < 0.9 * routed_error(scene, start, p)
    least = layerwise.improve_block(*arguments, expert_memory=1)
    for name, weight in found.items():
        assert all(torch.equal(t, least[name].tensors()[key]) for key, t in weight.tensors().items()), name
    # Without sequence the layers see each other unquantized; without experts these keep their codes or are like others.
    layerwise.improve_block(*arguments[:-1], DataAware(sequential=False, descents=0))
    off = layerwise.improve_block(*arguments[:-1], DataAware(experts=False, descents=0))
    if layout == "stacked":
        assert all((off[t.module] is start[t.module]) == (t.experts > 1) for t in scene.targets)


@torch.no_grad()
def test_down_projections_see_the_quantized_expert_at_each_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene("stacked")
    seen: list[tuple[int, int, dict[str, torch.Tensor]]] = []
    real = expert_moments.collect

    def spy(mixture, stage, experts, plain, paths, dense, *rest):  # type: ignore[no-untyped-def]
        seen.extend((stage, e, [dense.get((e, i), {}) for i in range(len(paths))]) for e in experts)
        return real(mixture, stage, experts, plain, paths, dense, *rest)

    monkeypatch.setattr(expert_moments, "collect", spy)
    start = scene.start("anybcq", (2, 3))
    found = layerwise.improve_block(
        scene.runner, scene.targets, start, scene.plain, {2: scene.moved, 3: scene.plain}, DataAware()
    )
    finished = {p: found["mlp.experts.gate_up_proj"].dequantize(p).view(EXPERTS, 2 * INNER, WIDTH) for p in (2, 3)}
    assert sorted((stage, e) for stage, e, _ in seen) == [(s, e) for s in (0, 1) for e in range(EXPERTS)]
    for stage, e, dense in seen:
        if stage == 0:
            assert dense == [{}, {}]
        else:
            for own, p in zip(dense, (2, 3), strict=True):
                assert torch.equal(own["mlp.experts.gate_up_proj"], finished[p][e])


COMMON = WITH_KV | dict(num_hidden_layers=1)
SHARED = dict(moe_intermediate_size=48, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1)
OTHERS = {
    "mixtral": (transformers.MixtralConfig, COMMON | dict(num_local_experts=4, head_dim=16)),
    "qwen2-moe": (
        transformers.Qwen2MoeConfig,
        COMMON
        | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=32),
    ),
    "glm4-moe": (transformers.Glm4MoeConfig, COMMON | SHARED | dict(first_k_dense_replace=0, head_dim=16)),
    "granite-moe": (transformers.GraniteMoeConfig, COMMON | dict(num_local_experts=4, num_experts_per_tok=2)),
}


def block_of(config: transformers.PretrainedConfig) -> tuple[BlockRunner, list[Target], HiddenStates]:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    swapping.run_experts_eagerly(model)
    _, blocks = find_blocks(model)
    inputs = capture(model, blocks, list(torch.randint(3, 60, (4, 16)).split(2)))
    return BlockRunner(blocks[0], inputs.arguments[0]), find_targets(blocks[0]), inputs.hidden


def quantized(runner: BlockRunner, targets: list[Target]) -> dict[str, PlaneWeight]:
    weights = {t.module: matrix(runner.block.get_parameter(t.parameter)) for t in targets}
    return {name: anybcq.quantize_matrix(w, (2,), 32, False) for name, w in weights.items()}


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures_experts_follow_the_data_too(architecture: str) -> None:
    kind, settings = OTHERS[architecture]
    runner, targets, hidden = block_of(kind(**settings))
    assert sum(t.experts == 4 for t in targets) == 2
    start = quantized(runner, targets)
    found = layerwise.improve_block(runner, targets, start, hidden, {2: hidden}, DataAware(descents=0))
    assert all(found[t.module] is not start[t.module] for t in targets)


class Followed(nn.Module):
    """A layer of experts with a linear layer behind it, and one beside it."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.layer, self.behind, self.beside = experts, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        answer = self.layer(hidden)
        return self.beside(hidden) + self.behind(answer)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["stacked", "listed"])
def test_what_sees_the_experts_answers_sees_those_of_quantized_experts(layout: str) -> None:
    scene = Scene(layout)
    scene.block.mlp = Followed(scene.block.mlp)
    runner = BlockRunner(scene.block, (scene.runner.positional, scene.runner.keywords))
    targets, hidden = find_targets(scene.block), scene.plain.batches[0]
    mixture = find_mixtures(runner, targets, hidden)[0][0]
    assert layerwise._is_seen(mixture, ["mlp.behind"], hidden)
    assert not layerwise._is_seen(mixture, ["mlp.beside", "self_attn.o_proj"], hidden)
    start = quantized(runner, targets)
    found = layerwise.improve_block(runner, targets, start, scene.plain, {2: scene.plain}, DataAware(descents=0))
    assert all(found[t.module] is not start[t.module] for t in targets)


def test_experts_called_in_another_way_keep_their_codes_and_say_why(caplog: pytest.LogCaptureFixture) -> None:
    settings = COMMON | dict(num_local_experts=4, num_experts_per_tok=2, kv_channels=16)
    runner, targets, hidden = block_of(transformers.JetMoeConfig(**settings))
    start = quantized(runner, targets)
    layerwise._announced.clear()
    for _ in range(2):
        found = layerwise.improve_block(runner, targets, start, hidden, {2: hidden}, DataAware(descents=0))
    stacks = [t.module for t in targets if t.experts > 1]
    assert stacks
    assert all((found[t.module] is start[t.module]) == (t.module in stacks) for t in targets)
    told = [r.getMessage() for r in caplog.records if "without data" in r.getMessage()]
    assert len(told) == len(stacks)
    assert all("not called with tokens, their experts and the router's weights" in line for line in told)


def test_routing_lists_tokens_in_order_and_leaves_out_what_is_no_expert() -> None:
    chosen = torch.tensor([[2, 0], [0, 3], [2, 1], [3, 2]])
    scores = torch.arange(8.0).view(4, 2)
    found = Routing.of_choices(chosen, scores, 3)
    wanted = {0: ([0, 1], [1.0, 2.0]), 1: ([2], [5.0]), 2: ([0, 2, 3], [0.0, 4.0, 7.0])}
    for e, (tokens, weights) in wanted.items():
        assert [part.tolist() for part in found.of(e)] == [tokens, weights]


def test_rows_are_found_by_their_bits() -> None:
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    x[20] = x[4]
    chosen = torch.tensor([49, 0, 20, 7])
    assert places(x[chosen], x).tolist() == [49, 0, 4, 7]
    assert places(x[:0], x).tolist() == []
    for rows in (x[chosen] + 1e-6, x[:, :5], x.double()):
        with pytest.raises(Unsupported, match="something else than rows"):
            places(rows, x)


def test_evenly_spread_numbers() -> None:
    assert evenly(3, 9).tolist() == [0, 3, 6]
    assert evenly(9, 4).tolist() == [0, 1, 2, 3]
    assert evenly(0, 4).tolist() == []
    assert all(b > a for a, b in pairwise(evenly(700, 1000).tolist()))


@pytest.mark.parametrize("method", ["anybcq", "any-precision"])
def test_a_stopped_run_resumes_to_the_same_bytes_with_any_budget(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from anybits import config
    from anybits.quantize import activations
    from anybits.quantize.pipeline import Progress

    monkeypatch.setattr(config, "ENOUGH_TOKENS", 64)  # some paths run every other batch, as with much text
    source = save_tiny(tmp_path / "float", "qwen3-moe")
    recipe = Recipe(method=method, precisions=(2, 3), group_size=32, samples=8, seq_len=32, rounds=2)
    quantize_model(str(source), tmp_path / "whole", recipe, TEXT)
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "tokens" in r.getMessage()]
    assert len(told) == 1
    assert "of 8 experts got fewer than 128 calibration tokens" in told[0]

    class Stop(Exception):
        pass

    def stop(report: object) -> None:
        raise Stop

    monkeypatch.setattr(activations, "IN_MEMORY", 0)  # activations, and the inputs of experts, lie in files
    with pytest.raises(Stop):
        quantize_model(str(source), tmp_path / "cut", recipe, TEXT, progress=Progress(block_done=stop))
    quantize_model(str(source), tmp_path / "cut", recipe, TEXT, expert_memory=1)
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
    with torch.no_grad():
        assert hf.load_model(tmp_path / "cut")(input_ids=torch.tensor([[5, 9, 33]])).logits.isfinite().all()


@pytest.mark.parametrize("layout", ["stacked", "listed"])
def test_a_dry_run_knows_what_experts_take(layout: str) -> None:
    model = tiny_model("qwen3-moe")
    if layout == "listed":
        for block in model.model.layers:
            block.mlp = ListOfExperts(block.mlp)
    recipe = Recipe(precisions=(2, 3), group_size=32, samples=4, seq_len=16)
    shape = _shape(model, recipe, 1 << 30)
    first, second = shape._expert_stages()
    assert (first.columns, first.rows, first.copies, first.share) == (WIDTH, 2 * INNER, EXPERTS, 2 / EXPERTS)
    assert (second.columns, second.rows, second.copies, second.share) == (INNER, WIDTH, EXPERTS, 2 / EXPERTS)
    assert sum(s.rows * s.columns * s.copies for s in (*shape._dense_stages(), first, second)) == shape.weights / 2
    stages = [(WIDTH, 0), (INNER, 2 * INNER * WIDTH)]
    for budget in (1, 100_000, 1 << 30):
        held = []
        for columns, earlier in stages:
            one = expert_moments.bytes_of_one(columns, earlier, 2)
            held.append(min(EXPERTS * one, max(one, budget)) + 4 * columns**2 * (2 + FACTOR_COPIES))
        dense = 4 * WIDTH**2 * (2 * HESSIANS + FACTOR_COPIES)
        assert _shape(model, recipe, budget).memory()["Hessians"] == max(dense, *held)


def _shape(model: nn.Module, recipe: Recipe, budget: int) -> _Shape:
    source = Source(model)
    return _Shape(source, [find_targets(block) for block in source.blocks], 64, recipe, budget)
