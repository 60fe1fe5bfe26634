"""The loss of a quantized model under any profile, and how it changes when one matrix changes its precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import nn

from anybits.integrations import transformers as hf
from anybits.precision import precision as scoped
from anybits.quantize.allocation import Changes

TRIAL = "trial"
"""Name under which a profile that is only tried runs."""

TOP = 256
"""Tokens of the reference's distribution that are told apart; the others count as one, which needs little memory."""

Progress = Callable[[int, int], None]


@contextmanager
def tried(model: nn.Module, profile: Mapping[str, int]) -> Iterator[None]:
    """Run the body with every plane module of `model` at its precision in `profile`."""
    modules = hf.plane_modules(model)
    before = {name: module.profiles for name, module in modules.items()}
    for name, module in modules.items():
        module.profiles = {TRIAL: profile[name]}
    try:
        with scoped(TRIAL):
            yield
    finally:
        for name, module in modules.items():
            module.profiles = before[name]


class Divergence:
    """Mean KL(reference || profile) a token, in nats, over fixed windows of calibration text.

    It is the loss of profiles: far less noisy on little text than the likelihood of the tokens that happen
    to follow. Distributions are those over the reference's TOP likeliest tokens and all others taken together.
    """

    def __init__(
        self, model: nn.Module, tokens: torch.Tensor, reference: nn.Module | None = None, batch: int = 4
    ) -> None:
        """Take windows int64 `[S, T]` and run `reference` over them, or `model` at its highest precision."""
        self.model, self._parts = model, list(tokens.split(batch))
        with torch.no_grad(), scoped(next(iter(hf.plane_modules(model).values())).stored_precisions[-1]):
            self._wanted = [self._reference(reference or model, part) for part in self._parts]

    @property
    def parts(self) -> int:
        """The parts that can be measured alone."""
        return len(self._parts)

    @torch.no_grad()
    def __call__(self, profile: Mapping[str, int], part: int | None = None) -> float:
        """Return the divergence under `profile`, on all text or on one part of it."""
        chosen = range(self.parts) if part is None else [part]
        total, count = 0.0, 0
        with tried(self.model, profile):
            for index in chosen:
                top, wanted = self._wanted[index]
                found = _coarse(_log_probabilities(self.model, self._parts[index]), top)
                total += float((wanted.exp() * (wanted - found)).double().sum())
                count += wanted.shape[0] * wanted.shape[1]
        return total / count

    @staticmethod
    def _reference(model: nn.Module, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logp = _log_probabilities(model, part)
        top = logp.topk(min(TOP, logp.shape[-1] - 1), dim=-1).indices
        return top, _coarse(logp, top)


def _log_probabilities(model: nn.Module, part: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    return torch.log_softmax(model(input_ids=part.to(device), use_cache=False).logits.float(), dim=-1).cpu()


def _coarse(logp: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Return `[S, T, k + 1]`: log-probabilities of the tokens `top` and of all others together."""
    chosen = logp.gather(-1, top)
    rest = (1 - chosen.double().exp().sum(-1, keepdim=True)).clamp_min(1e-12).log().float()
    return torch.cat([chosen, rest], dim=-1)


def measure_changes(
    loss: Callable[[Mapping[str, int]], float],
    modules: Mapping[str, tuple[int, ...]],
    known: Changes,
    measured: Callable[[str, dict[tuple[int, int], float]], None],
    progress: Progress = lambda done, total: None,
) -> Changes:
    """Return, for every module and each step between neighbouring precisions, its change of the loss from both sides.

    modules: name -> stored precisions, the same for all; known: results of an earlier run, which are not measured
    again; measured(module, changes) is called after each new one. It costs 2 (P - 1) losses a module.
    """
    precisions = next(iter(modules.values()))
    steps = [pair for a, b in pairwise(precisions) for pair in ((a, b), (b, a))]
    missing = [module for module in modules if set(known.get(module, {})) != set(steps)]
    alone = {p: loss(dict.fromkeys(modules, p)) for p in precisions} if missing else {}
    changes = {module: dict(known[module]) for module in modules if module not in missing}
    for module in missing:
        changes[module] = {
            (rest, own): loss(dict.fromkeys(modules, rest) | {module: own}) - alone[rest] for rest, own in steps
        }
        measured(module, changes[module])
        progress(len(changes), len(modules))
    return {module: changes[module] for module in modules}
