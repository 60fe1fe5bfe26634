"""What a linear layer sees: second moments of its inputs, collected block by block on the quantized path.

A layer that becomes Q answers a quantized input x' where the float model gave W x. The squared error summed over
tokens, |Q X' - W X|^2, has the Hessian H = X'^T X' and its minimum not at W but at W (I + D H^-1) with the drift
D = (X - X')^T X' (GPTAQ, arXiv 2504.02692, uses the same shift): a layer makes up for what the layers before it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from anybits.quantize.blocks import BlockRunner, HiddenStates, together
from anybits.quantize.targets import Target, is_linear, linear_shape


@dataclass
class Moments:
    """Second moments of a layer's inputs X' on each precision's path, and how far these are from the float path's X.

    hessian: X'^T X' / tokens, float32 `[P, K, K]`; drift: (X - X')^T X' / tokens, over the tokens that ran on both
    paths, `[P, K, K]`; None where it is not wanted.
    """

    hessian: torch.Tensor
    drift: torch.Tensor | None

    def reorder(self, order: torch.Tensor) -> Moments:
        """Return the moments with columns permuted, column i of the result being column order[i]."""
        if torch.equal(order, torch.arange(len(order), device=order.device)):
            return self
        drift = None if self.drift is None else self.drift[:, order][:, :, order]
        return Moments(self.hessian[:, order][:, :, order], drift)


@dataclass(frozen=True)
class Problem:
    """A layer's quadratic problem at each precision: minimise (q - w*) H (q - w*)^T for each row.

    hessians: damped, of mean diagonal 1, float32 `[P, K, K]`; factors: upper Cholesky factors of their inverses; shifts
    `[P, K, K]` or None: w* = shift @ w for column vectors w.
    """

    hessians: torch.Tensor
    factors: torch.Tensor
    shifts: torch.Tensor | None

    def targets(self, weight: torch.Tensor) -> torch.Tensor:
        """Return w* `[P, K, N]` of rows `[N, K]`."""
        columns = weight.T.contiguous()
        if self.shifts is None:
            return columns.expand(len(self.hessians), -1, -1)
        return torch.matmul(self.shifts, columns)


def problem(moments: Moments, damping: float, correction: float) -> Problem:
    """Return the quadratic problem of moments.

    damping: added to the diagonal, relative to its mean, so that directions the text never showed keep the weights
    near their values; correction: share of the way from W to W (I + D H^-1) that the target goes. Hessians are replaced
    by the problem's, and drifts by its shifts, in the same memory: they are the largest thing that a run holds.
    """
    hessians, factors = moments.hessian, torch.empty_like(moments.hessian)
    shifts = moments.drift if correction else None
    for i, moment in enumerate(hessians):
        # A layer that saw nothing is as good as one that saw white noise.
        mean = moment.diagonal().double().mean()
        mean = mean if mean > 0 else mean + 1
        h = moment.double().div_(mean)
        h.diagonal().add_(damping if moment.any() else 1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        if shifts is not None:
            shift = inverse @ (correction / mean * shifts[i].double().T)
            shift.diagonal().add_(1.0)
            shifts[i] = shift
            del shift  # of float64, as large as all that follows
        moment.copy_(h)
        del h
        factors[i] = torch.linalg.cholesky(inverse, upper=True)
    return Problem(hessians, factors, shifts)


@dataclass(frozen=True)
class Layout:
    """The order in which a matrix's columns are chosen: column i of the pass is column order[i] of the matrix.

    bounds: the columns of each group in the pass; groups: which group of the matrix each is.
    """

    order: torch.Tensor
    bounds: tuple[slice, ...]
    groups: torch.Tensor

    def group_of(self) -> list[int]:
        """Return for each column of the pass the number of its group in the pass."""
        return [g for g, part in enumerate(self.bounds) for _ in range(part.start, part.stop)]


def layout(hessians: torch.Tensor, size: int, by_energy: bool) -> Layout:
    """Return the columns in groups of `size`, as they are or by falling energy, the mean diagonal of `[P, K, K]`.

    By energy means GPTQ's act-order kept inside of groups, so that one group's levels at a time are needed:
    groups by the mean of their columns, then the columns of each.
    """
    diagonal = hessians.diagonal(dim1=1, dim2=2).mean(0)
    parts = diagonal.split(size)
    groups = torch.arange(len(parts), device=diagonal.device)
    columns = [torch.arange(len(part), device=diagonal.device) for part in parts]
    if by_energy:
        groups = torch.stack([part.mean() for part in parts]).argsort(descending=True, stable=True)
        columns = [part.argsort(descending=True, stable=True) for part in parts]
    ends = torch.tensor([len(parts[g]) for g in groups.tolist()]).cumsum(0).tolist()
    bounds = tuple(slice(a, b) for a, b in zip([0, *ends], ends, strict=False))
    return Layout(torch.cat([columns[g] + g * size for g in groups.tolist()]), bounds, groups)


class _Reached(Exception):
    """Raised by a hook once all inputs that are wanted are known."""


class Watch:
    """Collects the inputs of some linear layers of a block while it runs."""

    def __init__(self, runner: BlockRunner, modules: list[str]) -> None:
        self.runner, self.modules = runner, modules

    @torch.no_grad()
    def inputs(
        self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] | None, whole: bool = False
    ) -> dict[str, torch.Tensor]:
        """Return module -> its input as rows `[tokens, K]`, in the order of the calls; modules never called are absent.

        whole: run the block to its end; otherwise stop once every module has been called.
        """
        seen: dict[str, torch.Tensor] = {}

        def hook(name: str, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            seen[name] = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
            if not whole and len(seen) == len(self.modules):
                raise _Reached

        handles = [
            self.runner.block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kwargs, name=name: hook(name, args, kwargs), with_kwargs=True
            )
            for name in self.modules
        ]
        try:
            self.runner(hidden, weights)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen


def stages(
    runner: BlockRunner, targets: Sequence[Target], hidden: torch.Tensor, alone: Sequence[str] = ()
) -> list[list[str]]:
    """Return the block's linear layers in the order of their calls, those with the same input together.

    alone: other modules to find the places of, each by itself. Layers that this input does not reach, and stacks of
    experts, are left out.
    """
    modules = dict(runner.block.named_modules())
    linear = [t.module for t in targets if is_linear(modules.get(t.module))]
    seen = Watch(runner, [*linear, *alone]).inputs(hidden, None, whole=True)
    found: dict[tuple[int | str, torch.Size], list[str]] = {}
    for name, x in seen.items():  # all alive, so equal addresses mean the same tensor
        found.setdefault((name if name in alone else x.data_ptr(), x.shape), []).append(name)
    return list(found.values())


def collect(
    runner: BlockRunner,
    groups: list[list[str]],
    float_path: HiddenStates,
    paths: Sequence[HiddenStates],
    replaced: Sequence[Mapping[str, torch.Tensor]],
    drift: bool,
) -> list[Moments]:
    """Return the moments of the inputs that the linear layers of each of `groups` share.

    float_path: the block's inputs from the float model; paths: for each precision those from the model quantized at it
    so far; replaced: for each of these the weights of this block that are quantized already; drift: whether it is
    wanted. A layer that does not see all tokens, on either path, counts as if both paths were equal there.
    """
    firsts = [group[0] for group in groups]
    watch = Watch(runner, firsts)
    sums = [Sums(_width(runner, name), len(paths), drift) for name in firsts]
    for plain, batches in together(float_path if drift else None, paths):
        wanted = {} if plain is None else watch.inputs(plain, None)
        for i, hidden in batches:
            found = watch.inputs(hidden, replaced[i])
            for name, own in zip(firsts, sums, strict=True):
                if name in found:
                    own.add(i, found[name], wanted.get(name), plain is not None)
    return [own.moments() for own in sums]


def _width(runner: BlockRunner, name: str) -> int:
    return linear_shape(runner.block.get_submodule(name))[1]


class Sums:
    """Moments of one layer's inputs while batches come."""

    def __init__(self, width: int, paths: int, drift: bool) -> None:
        self.hessian = torch.zeros(paths, width, width)
        self.drift = torch.zeros_like(self.hessian) if drift else None
        self.tokens, self.shared = [0.0] * paths, [0.0] * paths

    def add(
        self, i: int, x: torch.Tensor, wanted: torch.Tensor | None, shared: bool, weights: torch.Tensor | None = None
    ) -> None:
        """Count rows `[tokens, K]` of path i; wanted: those of the float path, if it came to this layer.

        shared: whether the float path ran; weights: what each token counts `[tokens]`, None for 1.
        """
        weighted = x if weights is None else x * weights[:, None]
        count = float(len(x) if weights is None else weights.sum())
        self.hessian[i].addmm_(weighted.T, x)
        self.tokens[i] += count
        if self.drift is not None and shared:
            self.shared[i] += count
            if wanted is not None and wanted.shape == x.shape:
                apart = wanted - x
                self.drift[i].addmm_((apart if weights is None else apart.mul_(weights[:, None])).T, x)

    def moments(self) -> Moments:
        """Return the means."""
        for i, (tokens, shared) in enumerate(zip(self.tokens, self.shared, strict=True)):
            self.hessian[i] /= tokens or 1.0
            if self.drift is not None:
                self.drift[i] /= shared or 1.0
        return Moments(self.hessian, self.drift)
