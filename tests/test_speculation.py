"""Drafts change no token when greedy and no probability when sampling; schedules run each token where they say."""

import random
from pathlib import Path

import pytest
import torch
import transformers

import anybits
from anybits import AnybitsError, Recipe
from anybits.decode.acceptance import accept_greedy, accept_sampled
from anybits.decode.choice import Choice
from anybits.decode.draft_length import AdaptiveLength
from anybits.decode.schedule import ByEntropy, ByLength, Split, Step, parse_schedule
from anybits.decode.speculation import speculate
from anybits.decode.statistics import Statistics
from anybits.integrations import transformers as hf
from anybits.integrations.generation import ModelStepper
from anybits.integrations.quantizing import quantize_model
from anybits.integrations.row_invariance import BASES, row_invariant
from conftest import save_tiny

PROMPT = torch.tensor([[5, 9, 33, 7, 12, 40, 8, 21]])
NO_END = {"eos_token_id": None, "pad_token_id": 0}


def quantized(folder: Path, architecture: str, method: str = "anybcq") -> transformers.PreTrainedModel:
    save_tiny(folder / "float", architecture)
    recipe = Recipe(method=method, preset="fast", group_size=32, precisions=(2, 3, 4))
    quantize_model(str(folder / "float"), folder / "any", recipe)
    return hf.load_model(folder / "any", dtype=torch.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedModel:
    """A tiny Llama with precisions 2, 3 and 4."""
    return quantized(tmp_path_factory.mktemp("speculation"), "llama")


@pytest.mark.parametrize("draft_tokens", [4, None])
def test_greedy_drafts_change_no_token_on_200_prompts(
    model: transformers.PreTrainedModel, draft_tokens: int | None
) -> None:
    statistics = Statistics()
    generator = torch.Generator().manual_seed(1)
    for i in range(200 if draft_tokens else 20):
        prompt = torch.randint(3, 64, (1, 1 + i % 9), generator=generator)
        settings = {"input_ids": prompt, "max_new_tokens": 7, "do_sample": False, "precision": 4} | NO_END
        drafts = {"draft_precision": 3, "draft_tokens": draft_tokens, "statistics": statistics}
        assert torch.equal(model.generate(**settings, **drafts), model.generate(**settings))
    assert not draft_tokens or 0.2 < statistics.acceptance < 0.95  # some stand and some fall


@pytest.mark.parametrize("architecture", ["llama-tied-bias", "qwen3", "mistral", "gemma2", "opt", "qwen3-moe"])
def test_greedy_drafts_change_no_token_of_other_architectures(tmp_path: Path, architecture: str) -> None:
    """Among them windows of 16 positions, which the text leaves behind, and soft-capped eager attention."""
    model = quantized(tmp_path, architecture, "any-precision" if architecture == "qwen3" else "anybcq")
    for prompt in (PROMPT, PROMPT.repeat(1, 3)[:, :21]):
        settings = {"input_ids": prompt, "max_new_tokens": 24, "do_sample": False, "precision": 4} | NO_END
        plain = model.generate(**settings)
        assert torch.equal(model.generate(**settings, draft_precision=2, draft_tokens=3), plain)
        again = model.generate(**settings)
        assert torch.equal(again, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verifying_rows_have_the_bits_of_plain_passes(model: transformers.PreTrainedModel, dtype: torch.dtype) -> None:
    cast = (
        model
        if dtype == torch.float32
        else transformers.AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype=dtype)
    )
    new = [7, 9, 11, 40, 3, 21, 8]
    with torch.no_grad(), row_invariant(cast, True, False):
        alone, together = (ModelStepper(cast, transformers.DynamicCache(config=cast.config)) for _ in range(2))
        alone.prefill(PROMPT, 4), together.prefill(PROMPT, 4)
        rows = torch.cat([alone.forward([token], 4) for token in new])
        at_once = together.forward(new, 4)
    for one, other in zip(alone.cache.layers, together.cache.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    assert torch.equal(rows.argmax(-1), at_once.argmax(-1))


def test_a_near_tie_is_settled_as_in_a_plain_pass(model: transformers.PreTrainedModel) -> None:
    """Two tokens with the same head row tie exactly; every row of a verifying pass is then computed alone."""
    head = model.get_output_embeddings()
    kept = head.weight.data.clone()
    try:
        head.weight.data[32:] = head.weight.data[:32]
        settings = {"input_ids": PROMPT, "max_new_tokens": 12, "do_sample": False, "precision": 4} | NO_END
        assert torch.equal(model.generate(**settings, draft_precision=2, draft_tokens=5), model.generate(**settings))
    finally:
        head.weight.data.copy_(kept)


def test_penalties_and_ends_are_those_of_plain_generation(model: transformers.PreTrainedModel) -> None:
    settings = {"input_ids": PROMPT, "max_new_tokens": 20, "do_sample": False, "precision": 4, "pad_token_id": 0}
    drafts = {"draft_precision": 3, "draft_tokens": 5}
    penalised = settings | {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "eos_token_id": None}
    plain = model.generate(**penalised)
    assert torch.equal(model.generate(**penalised, **drafts), plain)
    for end in plain[0, 9:16].tolist():
        ended = penalised | {"eos_token_id": end}
        assert torch.equal(model.generate(**ended, **drafts), model.generate(**ended))
    out = model.generate(**penalised, **drafts, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    assert out.past_key_values.get_seq_length() == plain.shape[1] - 1
    with anybits.precision(4):
        one = model.generate(**(penalised | {"max_new_tokens": 1, "precision": None}), **drafts)
    assert torch.equal(one, plain[:, : PROMPT.shape[1] + 1])


def chi_square_p(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the chance of a fit as bad as this one (Wilson and Hilferty's normal approximation)."""
    assert (observed[expected == 0] == 0).all()
    some = expected > 5
    observed, expected = observed[some].double(), expected[some].double()
    freedom = len(expected) - 1
    x = float(((observed - expected) ** 2 / expected).sum())
    z = ((x / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    return float(0.5 * torch.special.erfc(torch.tensor(z / 2**0.5)))


def warped(temperature: float, top_k: int, top_p: float) -> transformers.LogitsProcessorList:
    return transformers.LogitsProcessorList(
        [
            transformers.TemperatureLogitsWarper(temperature),
            transformers.TopKLogitsWarper(top_k),
            transformers.TopPLogitsWarper(top_p),
        ]
    )


def test_accepted_tokens_of_a_model_follow_the_target(model: transformers.PreTrainedModel) -> None:
    """20 000 first tokens of rounds whose p and q are a model's at 4 and 2 bits, cut by top-k and top-p."""
    torch.manual_seed(0)
    with torch.no_grad():
        logits = {p: ModelStepper(model, transformers.DynamicCache()).prefill(PROMPT, p) for p in (2, 4)}
    choice = Choice(True, warped(0.9, 40, 0.95))
    tokens = PROMPT[0].tolist()
    q, p = (choice.probabilities(tokens, logits[precision][None]) for precision in (2, 4))
    counts = torch.zeros(64)
    drafts = torch.multinomial(q[0], 20_000, replacement=True).tolist()
    kept, twice = 0, p.repeat(2, 1)
    for draft in drafts:
        n, token = accept_sampled([draft], q, twice)
        counts[draft if n else token] += 1
        kept += n
    assert kept / 20_000 == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.02)
    assert chi_square_p(counts, 20_000 * p[0]) > 0.001
    assert not torch.allclose(p, q, atol=0.01)


class Chain:
    """A Markov chain as a model: logits depend on the last token and the precision; passes take uneven times."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(3)
        target = torch.randn(size, size, generator=generator)
        self.logits = {4: target, 2: target + 0.7 * torch.randn(size, size, generator=generator)}
        self.length, self.now, self.random = 0, 0.0, random.Random(4)

    def forward(self, tokens: list[int], precision: int) -> torch.Tensor:
        self.length += len(tokens)
        self.now += (0.2 if precision == 2 else 1 + 0.05 * len(tokens)) * self.random.uniform(0.7, 1.3)
        return self.logits[precision][tokens]

    def drop(self, count: int) -> None:
        self.length -= count


def top_five(_: object, rows: torch.Tensor) -> torch.Tensor:
    """Temperature 0.8 and top-k 5; transformers' own list would take most of the test's time."""
    return (rows / 0.8).masked_fill(rows < rows.topk(5).values[:, -1:], -torch.inf)


def test_a_sampled_text_is_distributed_as_plain_decoding() -> None:
    """20 000 tokens of the whole loop with adaptive drafts: pairs of neighbours against the target's chain."""
    torch.manual_seed(5)
    size, count = 6, 500
    model, choice, length, statistics = Chain(size), Choice(True, top_five), AdaptiveLength(), Statistics()
    pairs = torch.zeros(size, size)
    for start in range(40):
        tokens, model.length = [start % size], 0
        passes = speculate(model, choice, tokens, 4, 2, length, count + 1, statistics, clock=lambda: model.now)
        for _ in passes:
            assert model.length == len(tokens) - 1
        where = torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])
        pairs.index_put_(where, torch.ones(count), accumulate=True)
    assert pairs.sum() == 20_000
    assert statistics.rounds > 3000
    assert 0.3 < statistics.acceptance < 0.95
    wanted = top_five(None, model.logits[4]).softmax(-1) * pairs.sum(1, keepdim=True)
    assert all(chi_square_p(pairs[row], wanted[row]) > 0.001 for row in range(size))


def test_greedy_acceptance_stops_at_the_first_difference() -> None:
    assert accept_greedy([1, 2, 3], [1, 2, 3, 4]) == 3
    assert accept_greedy([1, 2, 3], [1, 5, 3, 4]) == 1
    assert accept_greedy([9], [1, 2]) == 0


def test_a_draft_without_the_targets_support_is_refused() -> None:
    p, q = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    assert all(accept_sampled([0], q, p) == (0, 1) for _ in range(50))
    assert all(accept_sampled([1], q.flip(-1), p) == (1, 0) for _ in range(50))


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("split:8,4", Split(8, 4)),
        ("length:4,3@64,2@256", ByLength(4, ((64, 3), (256, 2)))),
        ("entropy:2,4@1.5", ByEntropy(2, ((1.5, 4),))),
    ],
)
def test_schedules_are_read(text: str, schedule: object) -> None:
    assert parse_schedule(text) == schedule


@pytest.mark.parametrize(
    "text", ["", "split:4", "split:4,2,3", "length:4", "length:4,3", "length:4,3@9,2@5", "entropy:2,4@-1", "x:1,2@3"]
)
def test_a_wrong_schedule_is_refused(text: str) -> None:
    with pytest.raises(AnybitsError, match=r"cannot be read: write split:8,4"):
        parse_schedule(text)


def test_built_in_schedules_choose() -> None:
    flat, peaked = torch.zeros(64), torch.zeros(64).index_fill(0, torch.tensor([3]), 30.0)
    assert Step(1, 5, flat).entropy == pytest.approx(4.158883, abs=1e-5)
    assert Step(1, 5, peaked).entropy == pytest.approx(0.0, abs=1e-6)
    assert Step(1, 5, peaked.index_fill(0, torch.tensor([5]), -torch.inf)).entropy == pytest.approx(0.0, abs=1e-6)
    entropy = ByEntropy(2, ((1.0, 3), (2.0, 4)))
    assert (entropy.prefill(), entropy.decode(Step(1, 5, flat)), entropy.decode(Step(1, 5, peaked))) == (4, 4, 2)
    length = ByLength(4, ((2, 3), (4, 2)))
    assert [length.decode(Step(n, 5, flat)) for n in range(6)] == [4, 4, 3, 3, 2, 2]
    assert (Split(8, 4).prefill(), Split(8, 4).decode(Step(1, 5, flat))) == (8, 4)


def test_a_schedule_changes_precision_at_every_token(model: transformers.PreTrainedModel) -> None:
    """Against passes that are written out here, each inside its own scope over one cache."""

    class Turns:
        precisions = (2, 3, 4)

        def prefill(self) -> int:
            return 3

        def decode(self, step: Step) -> int:
            return (2, 4, 3)[step.generated % 3]

    statistics = Statistics()
    settings = {"input_ids": PROMPT, "max_new_tokens": 12, "do_sample": False} | NO_END
    found = model.generate(**settings, schedule=Turns(), statistics=statistics)
    cache, tokens, rest = transformers.DynamicCache(config=model.config), PROMPT, PROMPT
    with torch.no_grad():
        for step in range(12):
            with anybits.precision(3 if step == 0 else (2, 4, 3)[step % 3]):
                logits = model(input_ids=rest, past_key_values=cache).logits
            rest = logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, rest], 1)
    assert torch.equal(found, tokens)
    assert statistics.steps_at == {2: 3, 3: 4, 4: 4}
    same = model.generate(**settings, schedule="split:4,4")
    assert torch.equal(same, model.generate(**settings, precision=4))


BAD = {
    "is not stored: choose one of 2, 3, 4": {"draft_precision": 8},
    "is the precision itself": {"precision": 3, "draft_precision": 3},
    "names its precisions itself": {"precision": 4, "schedule": "split:4,2"},
    "contradict each other": {"draft_precision": 2, "schedule": "split:4,2"},
    "needs a draft_precision": {"draft_tokens": 2},
    "must be 1 to 6": {"draft_precision": 2, "draft_tokens": 7},
    "one sequence at a time, and the batch has 2": {"draft_precision": 2, "input_ids": PROMPT.repeat(2, 1)},
    "without padding": {"draft_precision": 2, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])},
    "run one beam": {"schedule": "split:4,2", "num_beams": 2},
    "tokens only": {"draft_precision": 2, "output_scores": True, "return_dict_in_generate": True},
    "need the KV cache": {"draft_precision": 2, "use_cache": False},
    "that grows, not StaticCache": {"draft_precision": 2, "cache_implementation": "static"},
    "not one for each row": {"draft_precision": 2, "precision": [4]},
    "precision 5 is not stored": {"schedule": "entropy:2,5@1"},
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_gets_one_sentence(model: transformers.PreTrainedModel, message: str) -> None:
    settings = {"input_ids": PROMPT, "max_new_tokens": 3, "do_sample": False} | NO_END | BAD[message]
    with pytest.raises(AnybitsError, match=message) as caught:
        model.generate(**settings)
    assert "\n" not in str(caught.value)
    assert model.config._attn_implementation in BASES
