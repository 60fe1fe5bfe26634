"""End-to-end tuning: each precision's levels are moved until the model says what the float model says.

Planes stay. Adam moves the scales and offsets, or the centroids, of one precision in all blocks at once against the
Kullback-Leibler divergence of the next-token distribution from the float model's. EfficientQAT (arXiv 2407.11062,
section 3.3) trains step sizes end to end on the text itself; with the float model as the teacher every token says more.

Blocks run one after another, forward and, from their kept inputs, backward. In memory are the levels of all blocks with
their moments, the output layer, and one block's matrices; planes are read from the finished shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from anybits.config import Recipe
from anybits.quantize import block_tuning
from anybits.quantize.blocks import BlockInputs, BlockRunner, bypassed
from anybits.quantize.source import Source
from anybits.quantize.targets import Target
from anybits.weight import AffineLevels, PlaneWeight

Weights = dict[str, PlaneWeight]
"""Module in a block -> its planes and levels."""

WARM_UP = 10
"""Steps in which the rate grows to its full size: Adam's moments are a guess until then."""

BETAS = 0.9, 0.95

HELD_OUT = 16
"""One batch of so many is not trained on but tells whether the new levels are better; no batch of fewer than 8."""


@dataclass(frozen=True)
class Outcome:
    """What tuning one precision did: the mean divergence on the batches held out, before and after, in nats a token."""

    precision: int
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether the tuned levels are better, and so were taken."""
        return self.after < self.before


class Distillation:
    """Tunes a finished model against its float self, one precision after another.

    source: the float model; targets: those of each block; inputs: what the blocks are called with, all batches; taught:
    the float model's last outputs for the same batches; as_tuple: how blocks return; read: block index -> its
    weights, asked for anew each time; head: the output layer's weight where it is quantized, by its parameter's name.
    """

    def __init__(
        self,
        source: Source,
        targets: Sequence[list[Target]],
        recipe: Recipe,
        inputs: BlockInputs,
        taught: Sequence[torch.Tensor],
        as_tuple: bool,
        read: Callable[[int], Weights],
        head: Mapping[str, PlaneWeight],
    ) -> None:
        assert len(taught) == len(inputs.hidden.batches), "no batch may be left out on the way"
        self._source, self._targets, self._recipe, self._as_tuple = source, targets, recipe, as_tuple
        self._first, self._taught, self._read, self._head = inputs.hidden.batches, taught, read, head
        self._runners = []
        for index, arguments in enumerate(inputs.arguments):
            with source.block(index) as block:
                self._runners.append(BlockRunner(block, arguments, [t.parameter for t in targets[index]]))
        self._rest = _behind(source)

    def tune(self, precision: int, progress: Callable[[int, int], None]) -> tuple[list[Weights], Outcome]:
        """Return every block's weights with the levels of `precision` tuned, and how much closer the model came.

        progress: called with the steps done and their number.
        """
        recipe = self._recipe
        numbers = list(range(len(self._first)))
        held = numbers[::HELD_OUT] if len(numbers) >= HELD_OUT // 2 else []
        seen = [number for number in numbers if number not in held]
        blocks = range(len(self._runners))
        trained = [{m: block_tuning.trainable(w, precision) for m, w in self._read(i).items()} for i in blocks]
        rated = [
            (leaf, recipe.distillation_rate * _spacing(weight, precision))
            for weights in trained
            for weight in weights.values()
            for leaf in weight.levels.tensors(precision).values()
        ]
        optimizer = torch.optim.Adam([{"params": [leaf], "lr": rate} for leaf, rate in rated], betas=BETAS)
        generator = torch.Generator().manual_seed(recipe.seed)
        order: list[int] = []
        with self._source.rest():
            before = self._divergence(trained, precision, held or seen)
            for step in range(recipe.distillation_steps):
                order = order or [seen[i] for i in torch.randperm(len(seen), generator=generator).tolist()]
                share = min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / recipe.distillation_steps)) / 2
                for group, (_, rate) in zip(optimizer.param_groups, rated, strict=True):
                    group["lr"] = rate * share
                self._accumulate(trained, precision, order.pop())
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                progress(step + 1, recipe.distillation_steps)
            found = []
            for i in blocks:
                stored = self._read(i)
                found.append({m: block_tuning.frozen(trained[i][m], w, precision) for m, w in stored.items()})
            outcome = Outcome(precision, before, self._divergence(found, precision, held or seen))
        return found if outcome.kept else [self._read(i) for i in blocks], outcome

    def _accumulate(self, weights: list[Weights], precision: int, number: int) -> None:
        """Add the gradient of one batch's mean divergence to that of the levels."""
        inputs = []
        x = self._first[number]
        for i in range(len(self._runners)):
            inputs.append(x)
            x = self._forward(i, weights[i], precision, x)
        _, gradient = self._compared(x, self._taught[number], precision, True)
        for i in reversed(range(len(self._runners))):
            leaf = inputs.pop().detach().requires_grad_(i > 0)
            with torch.enable_grad():
                y = self._runners[i](leaf, self._dense(i, weights[i], precision))
            torch.autograd.backward(y, gradient)
            if i:
                assert leaf.grad is not None
                gradient = leaf.grad

    def _divergence(self, weights: list[Weights], precision: int, numbers: Sequence[int]) -> float:
        """Return the mean divergence of the model with `weights` from the float model over some batches."""
        total = 0.0
        for number in numbers:
            x = self._first[number]
            for i in range(len(self._runners)):
                x = self._forward(i, weights[i], precision, x)
            total += self._compared(x, self._taught[number], precision, False)[0]
        return total / len(numbers)

    @torch.no_grad()
    def _forward(self, index: int, weights: Weights, precision: int, x: torch.Tensor) -> torch.Tensor:
        return self._runners[index](x, self._dense(index, weights, precision))

    def _dense(self, index: int, weights: Weights, precision: int) -> dict[str, torch.Tensor]:
        return block_tuning.dense(weights, self._targets[index], precision)

    def _compared(
        self, hidden: torch.Tensor, taught: torch.Tensor, precision: int, differentiate: bool
    ) -> tuple[float, torch.Tensor]:
        """Return the mean divergence a token, and its gradient with respect to `hidden`, empty unless asked for.

        hidden, taught: last outputs `[batch, tokens, hidden]`. One sequence at a time: logits are the widest
        tensors of all.
        """
        own = self._rest | {name: weight.dequantize(precision) for name, weight in self._head.items()}
        total, gradients = 0.0, []
        for student, teacher in zip(hidden.split(1), taught.split(1), strict=True):
            with torch.no_grad():
                wanted = self._logits(teacher, self._rest).log_softmax(-1)
            leaf = student.detach().requires_grad_(differentiate)
            with torch.set_grad_enabled(differentiate):
                said = self._logits(leaf, own).log_softmax(-1)
                loss = torch.nn.functional.kl_div(said, wanted, reduction="sum", log_target=True)
                loss = loss / (hidden.shape[0] * hidden.shape[1])
            if differentiate:
                gradients.append(torch.autograd.grad(loss, leaf)[0])
            total += float(loss.detach())
        return total, torch.cat(gradients) if gradients else hidden.new_empty(0)

    def _logits(self, hidden: torch.Tensor, rest: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the logits float32 `[1, tokens, vocabulary]` that follow from the last block's output."""
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long)
        arguments = {"input_ids": tokens, "use_cache": False}
        with bypassed(self._source.blocks, (hidden,) if self._as_tuple else hidden):
            # Parameters that a model shares are named one by one.
            output = torch.func.functional_call(
                self._source.model, dict(rest), kwargs=arguments, tie_weights=False, strict=False
            )
        return output.logits.float()


def _behind(source: Source) -> dict[str, torch.Tensor]:
    """Return in float32 what the model holds outside of blocks, except an embedding that is no output layer."""
    tied: dict[str, str] = dict(getattr(source.model, "all_tied_weights_keys", None) or {})
    embedding = source.model.get_input_embeddings()  # type: ignore[operator]
    name = next(name for name, module in source.model.named_modules() if module is embedding)
    unused = {f"{name}.weight"} - set(tied.values())
    found = {
        name: source.read(name).float()
        for name in source.rest_names()
        if name not in tied and name not in unused and source.tensors[name].is_floating_point()
    }
    return found | {name: found[other] for name, other in tied.items() if other in found}


def _spacing(weight: PlaneWeight, precision: int) -> float:
    """Return half the mean distance of neighbouring levels: what a level's step is measured in."""
    if isinstance(weight.levels, AffineLevels):
        return float(weight.levels.scales[precision][precision - 1].detach().abs().mean())
    centroids = weight.levels.centroids[precision].detach()
    return float((centroids.amax(1) - centroids.amin(1)).mean()) / (2**precision - 1) / 2
