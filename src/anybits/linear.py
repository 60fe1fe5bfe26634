"""PlaneLinear and PlaneStack: a linear layer, and a stack of expert matrices, made of bit-planes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import nn

from anybits.config import Single, check_single, precision_order
from anybits.errors import AnybitsError
from anybits.kernels import backend as kernels
from anybits.kernels import cpu, step  # cpu registers the backend
from anybits.kernels import reference as _reference  # noqa: F401  (registers the backend)
from anybits.kernels.cuda import backend as _cuda  # noqa: F401  (registers the backend)
from anybits.mapped import Pages
from anybits.precision import FIRST_PROFILE, ModelPrecision, Precision, active, per_row
from anybits.weight import PlaneWeight, check_precision, from_tensors


class PlaneModule(nn.Module):
    """Holds a PlaneWeight as parameters whose names and shapes are those of the checkpoint.

    `weight` is an empty sentinel: a loader that does not know anybits expects a full matrix there and
    fails instead of running on random numbers; code that asks for `weight.dtype` gets the compute dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int | None,
        default: ModelPrecision,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.default = default
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self.level_names: tuple[str, ...] = ()
        self.stored_precisions: tuple[int, ...] = ()
        self.profiles: Mapping[str, int] = {}
        """Profile -> the precision of this module under it, in the order of `default.profiles`."""
        self._plane_weight: PlaneWeight | None = None
        self._pages: Pages | None = None
        self._table: torch.Tensor | None = None

    def own_precision(self, wanted: Precision) -> int | torch.Tensor:
        """Return what `wanted` means here: an int, or an int32 tensor with the precision of each code in `wanted`.

        Raises AnybitsError for profiles that are not stored.
        """
        if isinstance(wanted, str):
            if wanted not in self.profiles:
                check_single(wanted, tuple(sorted((*self.stored_precisions, *self.profiles), key=precision_order)))
            return self.profiles[wanted]
        if isinstance(wanted, int) or not self.profiles:
            return wanted
        if self._table is None or self._table.device != wanted.device:
            codes = [*range(FIRST_PROFILE), *self.profiles.values()]
            self._table = torch.tensor(codes, dtype=torch.int32, device=wanted.device)
        try:
            return self._table.index_select(0, wanted.reshape(-1))
        except IndexError:
            most = FIRST_PROFILE + len(self.profiles) - 1
            raise AnybitsError(
                f"codes of precisions must be stored precisions or {FIRST_PROFILE} to {most} for profiles"
            ) from None

    def weight_bytes(self, single: Single) -> int:
        """Return the bytes of planes and levels read at a precision or profile."""
        own = self.own_precision(single)
        assert isinstance(own, int)
        return self.plane_weight.weight_bytes(own)

    def set_plane_weight(self, weight: PlaneWeight, pages: Pages | None = None) -> None:
        """Take `weight` over; its tensors become this module's parameters without a copy.

        pages: where `weight` lies when it is mapped from a file. Once a backend has its own copy their memory is let
        go; the parameters stay as they are and are read from the file when somebody looks at them.
        """
        if (weight.out_features, weight.in_features) != (self.out_features, self.in_features):
            raise AnybitsError(
                f"the weight is {weight.out_features} x {weight.in_features} where the layer is "
                f"{self.out_features} x {self.in_features}"
            )
        for name in self.level_names:
            delattr(self, name)
        tensors = weight.tensors()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.level_names = tuple(tensors)
        self.stored_precisions = weight.precisions
        self._forget()
        self._pages = pages

    @property
    def plane_weight(self) -> PlaneWeight:
        """The weight that the present parameters hold."""
        if self._plane_weight is None:
            if not self.level_names:
                raise AnybitsError("this layer has no weight yet: load a checkpoint or call set_plane_weight")
            tensors = {name: getattr(self, name).data for name in self.level_names}
            self._plane_weight = from_tensors(tensors, self.in_features, self.group_size)
        return self._plane_weight

    def _forget(self) -> None:
        """Drop all that was derived from the parameters."""
        self._plane_weight = self._table = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move with the model, but keep planes and levels in their stored dtypes under `.to(dtype)`."""
        stored: dict[str, nn.Parameter | None] = {}
        for name in self.level_names:
            parameter = self._parameters[name]
            assert parameter is not None
            moved = fn(parameter.data)
            if moved.dtype != parameter.dtype:
                moved = parameter.data.to(moved.device)
            stored[name] = nn.Parameter(moved, requires_grad=False)
            self._parameters[name] = None
        super()._apply(fn, recurse)
        self._parameters.update(stored)
        self._forget()
        return self

    def extra_repr(self) -> str:
        """Return the shape and precisions for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, precisions={self.stored_precisions}"


class PlaneLinear(PlaneModule):
    """nn.Linear over a PlaneWeight: y = x @ W_p.T + bias at the active precision p.

    transposed: whether it stands for transformers' Conv1D, whose weight is `[K, N]`; it computes the same.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int | None,
        default: ModelPrecision,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, group_size, default, dtype)
        self.transposed = transposed
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self._backend: kernels.Backend | None = None
        self._prepared: Any = None
        self._siblings: Siblings | None = None

    def _forget(self) -> None:
        super()._forget()
        self._backend = self._prepared = None

    def prepare(self, device: torch.device) -> kernels.Backend:
        """Choose the backend and repack the weight for it, once."""
        if self._backend is None:
            self._backend = kernels.choose(self.plane_weight, device)
            self._prepared = self._backend.prepare(self.plane_weight)
            if self._pages is not None:
                self._pages.give_back()
        return self._backend

    @property
    def prepared(self) -> Any:
        """The weight as its backend has it, None before the first product; another object once it was made anew."""
        return self._prepared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., N]` in x's dtype for x `[..., K]`."""
        backend = self._backend or self.prepare(x.device)
        wanted = self.own_precision(active(self.default))
        if isinstance(wanted, int):
            check_precision(wanted, self.stored_precisions)
            if type(backend) is cpu.CpuBackend and step.few_rows(x, self.in_features):
                y = self._few_rows(x, wanted, backend)
                return y if self.bias is None else y + self.bias
        if self._siblings is not None and _together.get():
            shared = self._siblings.shared(self, x, wanted, backend)
            if shared is not None:
                return shared if self.bias is None else shared + self.bias
        wanted = per_row(wanted, x.shape[:-1])
        y = backend.matmul(x.reshape(-1, self.in_features), self._prepared, wanted)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _few_rows(self, x: torch.Tensor, wanted: int, backend: cpu.CpuBackend) -> torch.Tensor:
        """Return the product of a decode step's rows, at the precision `wanted` of this layer."""
        if self._siblings is not None:
            return self._siblings.product(self, x, wanted, backend)
        return step.products(x, [self._prepared], [wanted], backend)[0]


_together: ContextVar[bool] = ContextVar("anybits_products_together", default=False)


@contextmanager
def products_together(wanted: bool = True) -> Iterator[None]:
    """Let siblings share launches on a GPU in the body, which must not change an x between them: nobody looks there."""
    token = _together.set(wanted)
    try:
        yield
    finally:
        _together.reset(token)


class Siblings:
    """Layers that get the same x one after another, as query, key and value: the first asked multiplies for all.

    What the others will return is kept until they are asked with that very x, unchanged, at that precision.
    """

    def __init__(self, layers: Sequence[PlaneLinear]) -> None:
        if len({layer.in_features for layer in layers}) != 1:
            raise AnybitsError("layers that multiply one x together must have the same number of columns")
        self.layers = tuple(layers)
        self._kept: tuple[torch.Tensor, torch.Tensor, dict[PlaneLinear, tuple[int, torch.Tensor]]] | None = None
        self._shared: tuple[torch.Tensor, int | torch.Tensor, dict[PlaneLinear, torch.Tensor]] | None = None
        for layer in layers:
            layer._siblings = self

    def product(self, asked: PlaneLinear, x: torch.Tensor, wanted: int, backend: cpu.CpuBackend) -> torch.Tensor:
        """Return `asked`'s product of x, without its bias."""
        kept = self._kept
        if kept is not None and kept[0] is x and step.same_bytes(x, kept[1]):
            precision, y = kept[2].pop(asked, (0, x))
            if not kept[2]:
                self._kept = None
            if precision == wanted:
                return y
        if not x.is_contiguous() or not self._prepared(x.device):
            return step.products(x, [asked._prepared], [wanted], backend)[0]
        scope = active(asked.default)
        precisions = []
        for layer in self.layers:
            precisions.append(int(layer.own_precision(scope)))
            check_precision(precisions[-1], layer.stored_precisions)
        made = step.products(x, [layer._prepared for layer in self.layers], precisions, backend)
        results = dict(zip(self.layers, zip(precisions, made, strict=True), strict=True))
        _, y = results.pop(asked)
        self._kept = x, x.clone(), results
        return y

    def shared(
        self, asked: PlaneLinear, x: torch.Tensor, wanted: int | torch.Tensor, backend: kernels.Backend
    ) -> torch.Tensor | None:
        """Return `asked`'s product of x, without its bias, from one call of `backend` for all layers.

        None where the backend has no such call, or where a profile gives the layers precisions of their own.
        """
        products = getattr(backend, "products", None)
        if products is None:
            return None
        kept = self._shared
        if kept is not None and kept[0] is x and (kept[1] is wanted or _equal(kept[1], wanted)) and asked in kept[2]:
            y = kept[2].pop(asked)
            if not kept[2]:
                self._shared = None
            return y
        if not self._one_precision(asked, wanted):
            return None
        if any((layer._backend or layer.prepare(x.device)) is not backend for layer in self.layers):
            return None
        rows = per_row(wanted, x.shape[:-1])
        made = products(x.reshape(-1, asked.in_features), [layer._prepared for layer in self.layers], rows)
        results = {layer: y.view(*x.shape[:-1], layer.out_features) for layer, y in zip(self.layers, made, strict=True)}
        y = results.pop(asked)
        self._shared = x, wanted, results
        return y

    def _one_precision(self, asked: PlaneLinear, wanted: int | torch.Tensor) -> bool:
        """Return whether what `asked` runs at is what every layer runs at."""
        if isinstance(wanted, torch.Tensor):
            return not any(layer.profiles for layer in self.layers)
        scope = active(asked.default)
        return all(_equal(layer.own_precision(scope), wanted) for layer in self.layers)

    def _prepared(self, device: torch.device) -> bool:
        """Prepare all layers and return whether the CPU backend serves each."""
        return all(type(layer._backend or layer.prepare(device)) is cpu.CpuBackend for layer in self.layers)


def _equal(a: int | torch.Tensor, b: int | torch.Tensor) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a == b


class PlaneStack(PlaneModule):
    """The matrices of fused experts, `[E, N, K]`: `stack[e]` is expert e at the active precision.

    It stands where the 3-D parameter stood, so the experts module's own forward runs unchanged: one that indexes it, or
    multiplies with all of it by `torch.bmm`. The rows of all experts lie one after another in one PlaneWeight.
    transposed: whether the parameter was `[E, K, N]`; so is then what this gives.
    """

    def __init__(
        self,
        shape: torch.Size,
        group_size: int | None,
        default: ModelPrecision,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        experts, rows, columns = (shape[0], shape[2], shape[1]) if transposed else shape
        super().__init__(columns, experts * rows, group_size, default, dtype)
        self.experts, self.rows, self.shape, self.transposed = experts, rows, shape, transposed

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype of the dequantized matrices."""
        return self.weight.dtype

    def __len__(self) -> int:
        return self.experts

    def __getitem__(self, expert: int | torch.Tensor) -> torch.Tensor:
        """Return expert `expert` as the parameter had it, `[N, K]` or `[K, N]`, in the compute dtype."""
        wanted = self.own_precision(active(self.default))
        if not isinstance(wanted, int):
            raise AnybitsError(
                "fused experts need one precision for the whole batch: rows of one batch reach an expert mixed"
            )
        start = int(expert) * self.rows
        matrix = self.plane_weight.rows(start, start + self.rows).dequantize(wanted).to(self.dtype)
        return matrix.mT if self.transposed else matrix

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Multiply x `[E, M, K]` with every expert, as `torch.bmm` does with the dense stack; nothing else is known."""
        if func is not torch.bmm or len(args) != 2 or kwargs or not isinstance(args[1], cls):
            return NotImplemented
        x, stack = args
        out = x.new_zeros(stack.experts, x.shape[1], stack.shape[2])
        for expert, rows in enumerate(x):
            chosen = (rows != 0).any(-1).nonzero()[:, 0]  # a token that goes elsewhere is zeros here
            if len(chosen):
                out[expert, chosen] = rows[chosen] @ stack[expert]
        return out
