"""Mixtures of experts: which tokens the router sends to each expert, and what an expert's matrices see.

Two layouts are known. Stacked: a module holds matrices `[E, N, K]` and is called with all tokens, the experts that each
goes to, and the router's weights, as those of transformers are. Listed: each expert is a module that is called with its
tokens. Either way one expert can be run by itself on any tokens, at any precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from anybits.quantize.blocks import BlockRunner
from anybits.quantize.targets import Target


@dataclass(frozen=True)
class Routing:
    """Which tokens of one batch go to which expert.

    tokens: int64 `[S]`, their numbers, expert after expert; weights: the router's float32 `[S]`, None where the layout
    does not tell; ends: of each expert's tokens.
    """

    tokens: torch.Tensor
    weights: torch.Tensor | None
    ends: tuple[int, ...]

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the numbers of an expert's tokens, and their weights."""
        part = slice(self.ends[expert - 1] if expert else 0, self.ends[expert])
        return self.tokens[part], None if self.weights is None else self.weights[part]

    @classmethod
    def of_choices(cls, chosen: torch.Tensor, weights: torch.Tensor, experts: int) -> Routing:
        """Return the routing of int `[T, k]`, the experts of each token; numbers that are no expert's are left out."""
        flat = chosen.reshape(-1).long()
        order = flat.argsort(stable=True)
        ends = flat.bincount(minlength=experts)[:experts].cumsum(0).tolist()
        order = order[: ends[-1]]
        return cls(order // chosen.shape[1], weights.reshape(-1)[order].float(), tuple(ends))


@dataclass(frozen=True)
class Part:
    """Rows start ... stop - 1 of a target: a matrix of one expert."""

    target: Target
    start: int
    stop: int


class Unsupported(Exception):
    """Says why the tokens of each expert cannot be told."""


class _Reached(Exception):
    """Raised once all that is wanted is known."""


class Mixture(ABC):
    """One layer of experts in a block.

    name: of the module whose call begins it; count: of experts; stages: for each input that an expert's matrices see,
    in order, the names of those matrices, the same in every expert.
    """

    def __init__(self, runner: BlockRunner, name: str, count: int) -> None:
        self.runner, self.name, self.count = runner, name, count
        self.stages: list[list[str]] = []

    @abstractmethod
    def parts(self, stage: int, expert: int) -> list[Part]:
        """Return an expert's matrices of a stage."""

    @abstractmethod
    def routed(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] | None) -> tuple[torch.Tensor, Routing]:
        """Return the layer's input `[T, K]` and the routing when the block gets `hidden`; weights: as of BlockRunner.

        Raises Unsupported.
        """

    @abstractmethod
    def _run(self, expert: int, x: torch.Tensor, dense: Mapping[str, torch.Tensor], stop: str | None) -> _Listener:
        """Run one expert up to its matrix `stop` and return what was heard."""

    def inputs(self, stage: int, expert: int, x: torch.Tensor, dense: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return `[n, K]`, what the matrices of `stage` see when an expert is given tokens x `[n, H]`.

        dense: parameter name -> matrix `[N, K]` in place of the expert's own.
        """
        name = self.stages[stage][0]
        return self._run(expert, x, dense, name).heard[name]

    def targets(self) -> list[Target]:
        """Return all targets of the mixture, without repeats."""
        stages = range(len(self.stages))
        return list(dict.fromkeys(p.target for s in stages for e in range(self.count) for p in self.parts(s, e)))

    def explore(self, hidden: torch.Tensor) -> None:
        """Find the stages, and raise Unsupported when a matrix has no place in them."""
        x, _ = self.routed(hidden, None)
        try:
            heard = self._run(0, x[:2], {}, None).heard
        except Exception as error:  # whatever the model's own code makes of a call that it does not expect
            raise Unsupported(f"one expert cannot be run by itself: {error}") from None
        found: dict[int, list[str]] = {}
        for name, seen in heard.items():  # all alive, so equal addresses mean the same tensor
            found.setdefault(seen.data_ptr(), []).append(name)
        missing = set(self._names()) - set(heard)
        if missing:
            raise Unsupported(f"{', '.join(sorted(missing))} multiplies in another way than linear layers")
        self.stages = list(found.values())

    @abstractmethod
    def _names(self) -> list[str]:
        """Return the names of an expert's matrices."""


class Stacked(Mixture):
    """Experts whose matrices lie in stacks of one module."""

    def __init__(self, runner: BlockRunner, name: str, targets: Sequence[Target]) -> None:
        """targets: the module's stacks, all of them."""
        super().__init__(runner, name, targets[0].experts)
        self.stacks = {t.parameter.rpartition(".")[2]: t for t in targets}

    def _names(self) -> list[str]:
        return list(self.stacks)

    def parts(self, stage: int, expert: int) -> list[Part]:
        """Return an expert's matrices of a stage."""
        found = []
        for name in self.stages[stage]:
            rows = self.stacks[name].out_features // self.count
            found.append(Part(self.stacks[name], expert * rows, (expert + 1) * rows))
        return found

    def routed(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] | None) -> tuple[torch.Tensor, Routing]:
        """Return the layer's input `[T, K]` and the routing."""
        found: list[tuple[Any, ...]] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((*args, *kwargs.values()))
            raise _Reached

        _until(self.runner, [self.runner.block.get_submodule(self.name)], stop, hidden, weights)
        x, chosen, scores = _call(found[0])
        return x, Routing.of_choices(chosen, scores, self.count)

    def _run(self, expert: int, x: torch.Tensor, dense: Mapping[str, torch.Tensor], stop: str | None) -> _Listener:
        module = self.runner.block.get_submodule(self.name)
        # A stack of which only this expert's matrix is read.
        own = {leaf: dense[t.parameter] for leaf, t in self.stacks.items() if t.parameter in dense}
        turned = {leaf: self.stacks[leaf].turned(matrix) for leaf, matrix in own.items()}
        stacks = {leaf: matrix.expand(self.count, *matrix.shape) for leaf, matrix in turned.items()}
        listener = _Listener({stacks.get(leaf, module.get_parameter(leaf)): leaf for leaf in self.stacks}, stop)
        chosen = torch.full((len(x), 1), expert)
        with listener:
            torch.func.functional_call(module, stacks, (x, chosen, x.new_ones(len(x), 1)), strict=False)
        return listener


class Listed(Mixture):
    """Experts that are modules in a list; they see rows of the input of the module that holds the list."""

    def __init__(self, runner: BlockRunner, name: str, experts: Sequence[str], targets: Sequence[Target]) -> None:
        """name: of the module that holds the list; experts: names of its members; targets: of the block."""
        super().__init__(runner, name, len(experts))
        self._experts = list(experts)
        self._linears = [
            {t.module.removeprefix(f"{one}."): t for t in targets if t.module.startswith(f"{one}.")} for one in experts
        ]

    def alike(self) -> bool:
        """Return whether all experts have the same linear layers, and any."""
        return bool(self._linears and self._linears[0]) and len({frozenset(own) for own in self._linears}) == 1

    def _names(self) -> list[str]:
        return list(self._linears[0])

    def parts(self, stage: int, expert: int) -> list[Part]:
        """Return an expert's matrices of a stage."""
        found = [self._linears[expert][name] for name in self.stages[stage]]
        return [Part(target, 0, target.out_features) for target in found]

    def routed(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] | None) -> tuple[torch.Tensor, Routing]:
        """Return the layer's input `[T, K]` and the routing, whose weights this layout does not tell."""
        holder = self.runner.block.get_submodule(self.name)
        members = [self.runner.block.get_submodule(name) for name in self._experts]
        seen: dict[nn.Module, torch.Tensor] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            seen[module] = rows.reshape(-1, rows.shape[-1])

        def done(*_: object) -> None:
            raise _Reached

        end = holder.register_forward_hook(done)
        try:
            _until(self.runner, [holder, *members], note, hidden, weights)
        finally:
            end.remove()
        x = seen[holder]
        tokens = [places(seen[m], x) if m in seen else torch.empty(0, dtype=torch.long) for m in members]
        ends = torch.tensor([len(t) for t in tokens]).cumsum(0).tolist()
        return x, Routing(torch.cat(tokens), None, tuple(ends))

    def _run(self, expert: int, x: torch.Tensor, dense: Mapping[str, torch.Tensor], stop: str | None) -> _Listener:
        name, linears = self._experts[expert], self._linears[expert]
        module = self.runner.block.get_submodule(name)
        own = {f"{leaf}.weight": dense[t.parameter] for leaf, t in linears.items() if t.parameter in dense}
        matrices = {own.get(f"{leaf}.weight", module.get_parameter(f"{leaf}.weight")): leaf for leaf in linears}
        listener = _Listener(matrices, stop)
        with listener:
            torch.func.functional_call(module, own, (x,), strict=False)
        return listener


_PRODUCTS = (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
"""What multiplies rows with the matrix of an expert, `[N, K]` or `[K, N]`."""


class _Listener(TorchFunctionMode):
    """Notes what products with some matrices, or with members of some stacks, get; leave it by `stop`.

    heard: name -> rows `[n, K]`, in the order of the products.
    """

    def __init__(self, matrices: Mapping[torch.Tensor, str], stop: str | None) -> None:
        super().__init__()
        self.heard: dict[str, torch.Tensor] = {}
        self._names = {matrix.data_ptr(): name for matrix, name in matrices.items()}
        self._stop, self._alive = stop, list(matrices)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            x, matrix = (*args, *kwargs.values())[:2]
            name = self._names.get(matrix.data_ptr())
            if name is not None:
                self.heard[name] = x.reshape(-1, x.shape[-1])
                if name == self._stop:
                    raise _Reached
        result = func(*args, **kwargs)
        if func is torch.Tensor.__getitem__ and args[0].ndim == 3 and args[0].data_ptr() in self._names:
            self._names[result.data_ptr()] = self._names[args[0].data_ptr()]
            self._alive.append(result)  # so that no other tensor gets its address
        return result

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> bool:
        super().__exit__(kind, value, traceback)
        return kind is _Reached


def _until(runner: BlockRunner, modules: Sequence[nn.Module], hook: Any, hidden: torch.Tensor, weights: Any) -> None:
    """Run the block, `hook` being called before each of `modules`, until one raises _Reached."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        runner(hidden, weights)
    except _Reached:
        return
    finally:
        for handle in handles:
            handle.remove()
    raise Unsupported("the block does not call it")


def _call(values: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens `[T, H]`, the experts of each and the router's weights `[T, k]` of a call of stacked experts."""
    match values:
        case (torch.Tensor() as x, torch.Tensor() as chosen, torch.Tensor() as scores, *_):
            whole = not chosen.is_floating_point() and chosen.dtype != torch.bool and scores.is_floating_point()
            if whole and x.ndim == chosen.ndim == 2 and chosen.shape == scores.shape and len(x) == len(chosen):
                return x, chosen, scores
    raise Unsupported("it is not called with tokens, their experts and the router's weights")


def places(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return int64 `[n]`: of which row of x `[T, K]` each of rows `[n, K]` is an exact copy; raise Unsupported if none.

    Of equal rows the first counts: equal states of equal tokens.
    """
    if rows.shape[1:] == x.reshape(-1, x.shape[-1]).shape[1:] and rows.dtype == x.dtype:
        ordered, order = _keys(x).sort(stable=True)
        found = order[torch.searchsorted(ordered, _keys(rows)).clamp_max(len(x) - 1)]
        if torch.equal(x[found], rows):
            return found
    raise Unsupported("experts are called with something else than rows of the layer's input")


def _keys(x: torch.Tensor) -> torch.Tensor:
    """Return int64 `[T]`, a number of each row's bits, equal for equal rows: sums that wrap around have no order."""
    factors = torch.arange(1, 2 * x.shape[1], 2, dtype=torch.long) * 0x1E3779B97F4A7C15
    return (x.contiguous().view(torch.int32).long() * factors).sum(1)


def find_mixtures(
    runner: BlockRunner, targets: Sequence[Target], hidden: torch.Tensor
) -> tuple[list[Mixture], dict[str, str]]:
    """Return the mixtures of a block, ready to use, and stack -> why the tokens of its experts cannot be told.

    hidden: an input of the block. Listed experts whose tokens cannot be told are linear layers like others.
    """
    mixtures: list[Mixture] = []
    reasons: dict[str, str] = {}
    for mixture in (*_stacked(runner, targets), *_listed(runner, targets)):
        try:
            mixture.explore(hidden)
            mixtures.append(mixture)
        except Unsupported as reason:
            if isinstance(mixture, Stacked):
                reasons.update({target.module: str(reason) for target in mixture.stacks.values()})
    return mixtures, reasons


def _stacked(runner: BlockRunner, targets: Sequence[Target]) -> list[Stacked]:
    found: dict[str, list[Target]] = {}
    for target in targets:
        if target.experts > 1:
            found.setdefault(target.parameter.rpartition(".")[0], []).append(target)
    return [Stacked(runner, name, stacks) for name, stacks in found.items()]


def _listed(runner: BlockRunner, targets: Sequence[Target]) -> list[Listed]:
    found = []
    for name, module in runner.block.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict) or "expert" not in name.rpartition(".")[2]:
            continue
        members = [f"{name}.{key}" for key, _ in module.named_children()]
        mixture = Listed(runner, name.rpartition(".")[0], members, targets)
        if mixture.alike():
            found.append(mixture)
    return found
