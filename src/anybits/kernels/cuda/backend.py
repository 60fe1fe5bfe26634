"""The CUDA backend: kernels that read p planes at precision p (csrc/cuda/, docs/cuda.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from anybits.errors import AnybitsError
from anybits.kernels import cpu as _cpu  # noqa: F401  (registered before: this backend is asked first)
from anybits.kernels.backend import register
from anybits.kernels.cuda import gpu as gpus
from anybits.kernels.cuda import plan, toolchain
from anybits.kernels.cuda.layout import DTYPES, CudaWeight, Shape, prepare
from anybits.weight import PlaneWeight, check_precision


class CudaBackend:
    """Multiplies straight from repacked planes on an NVIDIA GPU of compute capability 8.0 or newer."""

    name = "cuda"
    device_type: str | None = "cuda"

    def unsupported(self, weight: PlaneWeight, device: torch.device) -> str | None:
        """Return why not, or None: any PlaneWeight on a GPU that the installed compiler and driver serve."""
        if device.type != "cuda":
            return f"it runs on an NVIDIA GPU, not on {device.type}"
        if torch.version.cuda is None:
            return "this torch was not built for CUDA"
        return toolchain.unsupported(torch.cuda.get_device_capability(device))

    def prepare(self, weight: PlaneWeight) -> CudaWeight:
        """Return `weight` repacked on its own device; nothing in it refers to `weight`."""
        return prepare(weight)

    def matmul(self, x: torch.Tensor, prepared: CudaWeight, precision: int | torch.Tensor) -> torch.Tensor:
        """Return x `[M, K]` @ W_p.T as `[M, N]` in x's dtype (fp16, bf16 or fp32), accumulated in float32.

        A tensor of precisions must hold stored ones: it is read on the GPU and not checked, so that nothing waits.
        """
        rows = None if isinstance(precision, int) else _on_device(precision, x)
        wanted = precision if isinstance(precision, int) else 0
        weight = (prepared.planes, prepared.levels, prepared.walsh, prepared.row_scale, prepared.shape.ints())
        if x.requires_grad and torch.is_grad_enabled():
            return _Product.apply(x, weight, wanted, rows)
        compiling = torch.compiler.is_compiling() or type(x) is not torch.Tensor
        run = torch.ops.anybits.cuda_matmul if compiling else _matmul
        return run(x, *weight, wanted, rows)

    def products(
        self, x: torch.Tensor, weights: Sequence[CudaWeight], precision: int | torch.Tensor
    ) -> list[torch.Tensor]:
        """Return `matmul` of x with each weight, with the same bits, in one launch where they allow it.

        They do when they differ in their rows alone and x `[M, K]` has few rows; otherwise each has its own launch.
        """
        rows = None if isinstance(precision, int) else _on_device(precision, x)
        wanted = precision if isinstance(precision, int) else 0
        if not _goes_together(x, weights, wanted, rows):
            return [self.matmul(x, weight, precision if rows is None else rows) for weight in weights]
        return _multiply_together(x, weights, wanted, rows)


def _on_device(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return int32 `[M]` on x's device; a copy from the CPU may wait, so a decoding loop keeps its own on the GPU."""
    if rows.shape != (x.shape[0],) or rows.dtype != torch.int32:
        raise AnybitsError(
            f"precision of {x.shape[0]} rows must be int32 [{x.shape[0]}], got {rows.dtype} {list(rows.shape)}"
        )
    if rows.device.type == "cpu" and x.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise AnybitsError("while a CUDA graph is captured the precision of the rows must lie on the GPU")
        return rows.to(x.device)
    return rows.contiguous()


def _matmul(
    x: torch.Tensor,
    planes: torch.Tensor,
    levels: torch.Tensor,
    walsh: torch.Tensor,
    row_scale: torch.Tensor,
    shape: list[int],
    precision: int,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """The body of anybits::cuda_matmul."""
    weight = CudaWeight(Shape(*shape), planes, levels, walsh, row_scale)
    _check(x, weight, precision, rows)
    count, sizes = x.shape[0], weight.shape
    tuning = plan.active_tuning()
    if not tuning.kernel and count >= _dense_rows(precision):
        return _dense(x, weight, precision, rows)
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty((count, sizes.out_features), dtype=x.dtype, device=x.device)
    if count == 0:
        return y
    gpu, dtype = gpus.of(x.device.index), DTYPES[x.dtype]
    planned = plan.product(sizes, count, dtype, precision, gpu.device, tuning)
    for first in range(0, count, planned.rows_at_once):
        here = min(planned.rows_at_once, count - first)
        if here != planned.rows_at_once:
            planned = plan.product(sizes, here, dtype, precision, gpu.device, tuning)
        part = None if rows is None else rows[first : first + here]
        _multiply(gpu, planned, [weight], x[first : first + here], part, [y[first : first + here]])
    return y


def _dense_rows(precision: int) -> int:
    return plan.DENSE_ROWS[precision] if precision else plan.DENSE_ROWS_MIXED


def _goes_together(x: torch.Tensor, weights: Sequence[CudaWeight], precision: int, rows: torch.Tensor | None) -> bool:
    """Return whether one launch can multiply x by all `weights`; AnybitsError for what none can."""
    for weight in weights:
        _check(x, weight, precision, rows)
    alike = len({replace(weight.shape, out_features=1) for weight in weights}) == 1
    plain = type(x) is torch.Tensor and not torch.compiler.is_compiling()
    plain = plain and not (x.requires_grad and torch.is_grad_enabled())
    few = 0 < x.shape[0] < _dense_rows(precision) and plan.active_tuning().kernel != "simple"
    return alike and plain and few and 1 < len(weights) <= plan.MAX_PARTS


def _multiply_together(
    x: torch.Tensor, weights: Sequence[CudaWeight], precision: int, rows: torch.Tensor | None
) -> list[torch.Tensor]:
    """Launch one pass over all weights for each slice of rows that the kernel takes."""
    if x.stride(1) != 1:
        x = x.contiguous()
    count, shapes = x.shape[0], tuple(weight.shape for weight in weights)
    made = [torch.empty((count, sizes.out_features), dtype=x.dtype, device=x.device) for sizes in shapes]
    gpu, dtype, tuning = gpus.of(x.device.index), DTYPES[x.dtype], plan.active_tuning()
    planned = plan.together(shapes, count, dtype, precision, gpu.device, tuning)
    for first in range(0, count, planned.rows_at_once):
        here = slice(first, min(first + planned.rows_at_once, count))
        if here.stop - first != planned.rows_at_once:
            planned = plan.together(shapes, here.stop - first, dtype, precision, gpu.device, tuning)
        part = None if rows is None else rows[here]
        _multiply(gpu, planned, weights, x[here], part, [y[here] for y in made])
    return made


def _multiply(
    gpu: gpus.Gpu,
    planned: plan.Product,
    weights: Sequence[CudaWeight],
    x: torch.Tensor,
    rows: torch.Tensor | None,
    made: Sequence[torch.Tensor],
) -> None:
    """Launch one pass over the weights, and the sum of its parts when the columns are split over blocks."""
    count, outs = x.shape[0], made
    if planned.splits > 1:
        outs = [torch.empty((planned.splits, *y.shape), device=x.device) for y in made]
    own = [
        (
            weight.planes.data_ptr(), (weight.walsh if planned.walsh else weight.levels).data_ptr(),
            weight.row_scale.data_ptr(), out.data_ptr(),
        )
        for weight, out in zip(weights, outs, strict=True)
    ]  # fmt: skip
    (planes, levels, row_scale, out), *more = own
    pointers = (x.data_ptr(), planes, levels, 0 if rows is None else rows.data_ptr(), row_scale, out)
    others = [(weight.shape, at) for weight, at in zip(weights[1:], more, strict=True)]
    arguments = planned.launch.arguments(weights[0].shape, count, x.stride(0), pointers, more=others)
    gpus.launch(gpu, planned.launch, arguments)
    if planned.splits > 1:
        for weight, part, y in zip(weights, outs, made, strict=True):
            reduction = planned.reduction(weight.shape, count, DTYPES[x.dtype])
            pointers = (part.data_ptr(), 0, 0, 0, 0, y.data_ptr())
            gpus.launch(gpu, reduction, reduction.arguments(weight.shape, count, 0, pointers, planned.splits))


def _check(x: torch.Tensor, weight: CudaWeight, precision: int, rows: torch.Tensor | None) -> None:
    if rows is None:
        check_precision(precision, weight.shape.precisions)
    if x.dtype not in DTYPES:
        raise AnybitsError(f"activations are {x.dtype} where float16, bfloat16 or float32 is needed")
    if x.ndim != 2 or x.shape[1] != weight.shape.in_features:
        raise AnybitsError(f"activations have shape {list(x.shape)} where [M, {weight.shape.in_features}] is needed")
    if x.device != weight.planes.device:
        raise AnybitsError(f"activations lie on {x.device} and the weight on {weight.planes.device}")


def dequantize(weight: CudaWeight, precision: int, dtype: torch.dtype) -> torch.Tensor:
    """Return W_p as `[N, K]` in `dtype`, rounded once from float32."""
    check_precision(precision, weight.shape.precisions)
    sizes = weight.shape
    device = weight.planes.device
    w = torch.empty((sizes.out_features, sizes.in_features), dtype=dtype, device=device)
    launch = plan.dequantization(sizes, DTYPES[dtype], precision)
    pointers = (
        0, weight.planes.data_ptr(), weight.levels.data_ptr(), 0, weight.row_scale.data_ptr(), w.data_ptr(),
    )  # fmt: skip
    gpus.launch(gpus.of(device.index), launch, launch.arguments(sizes, 0, 0, pointers))
    return w


def _dense(x: torch.Tensor, weight: CudaWeight, precision: int, rows: torch.Tensor | None) -> torch.Tensor:
    """Dequantize and let cuBLAS multiply; with precisions by row, once for each stored one, so that nothing waits."""
    if rows is None:
        return torch.nn.functional.linear(x, dequantize(weight, precision, x.dtype))
    y = torch.zeros((x.shape[0], weight.shape.out_features), dtype=x.dtype, device=x.device)
    for p in weight.shape.precisions:
        part = torch.nn.functional.linear(x, dequantize(weight, p, x.dtype))
        y = torch.where((rows == p)[:, None], part, y)
    return y


class _Product(torch.autograd.Function):
    """The kernel's product, differentiable in x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, precision: int, rows: torch.Tensor | None) -> Any:
        ctx.saved = weight, precision, rows
        planes, levels, walsh, row_scale, shape = weight
        return _matmul(x, planes, levels, walsh, row_scale, shape, precision, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (*tensors, ints), precision, rows = ctx.saved
        weight, gradient = CudaWeight(Shape(*ints), *tensors), gradients[0]
        if rows is None:
            return gradient @ dequantize(weight, precision, gradient.dtype), None, None, None
        out = gradient.new_zeros(gradient.shape[0], weight.shape.in_features)
        for p in weight.shape.precisions:
            out = torch.where((rows == p)[:, None], gradient @ dequantize(weight, p, gradient.dtype), out)
        return out, None, None, None


def _fake_matmul(
    x: torch.Tensor,
    planes: torch.Tensor,
    levels: torch.Tensor,
    walsh: torch.Tensor,
    row_scale: torch.Tensor,
    shape: list[int],
    precision: int,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], shape[0])


_operators = torch.library.Library("anybits", "FRAGMENT")
_operators.define(
    "cuda_matmul(Tensor x, Tensor planes, Tensor levels, Tensor walsh, Tensor row_scale, int[] shape, "
    "int precision, Tensor? rows) -> Tensor"
)
_operators.impl("cuda_matmul", _matmul, "CUDA")
torch.library.register_fake("anybits::cuda_matmul", _fake_matmul, lib=_operators)

register(CudaBackend())
