"""Modules of a loaded model that run in one call each: norms, gated activations, products of one x, the output layer.

In transformers a norm is six operators and a gated activation two, and torch's bfloat16 product of one row uses one
thread. A module is replaced where its class computes the standard formula: that is asked of the module itself, by
comparing it with the kernel, or with what it computes, on random rows. It keeps its parameters, its place and its class
as a base; whatever is not bfloat16, outside autograd, on a CPU or in a captured step on a GPU (kernels/cuda/step.py),
runs as before.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import nn

from anybits.integrations.decode_step import formulas
from anybits.kernels import step
from anybits.kernels.cuda import step as small
from anybits.linear import PlaneLinear, Siblings

_PROBED_ROWS = 3
_TOLERANCE = 2 * torch.finfo(torch.bfloat16).eps


class _Norm:
    """RMSNorm: weight * x / sqrt(mean(x²) + eps)."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., K]` for x `[..., K]`."""
        if step.usable(x, self.weight):
            return step.rms_norm(x, self.weight, norm_eps(self))
        if small.usable(x, self.weight):
            return small.rms_norm(x, self.weight, norm_eps(self))
        return super().forward(x)  # type: ignore[misc]


class _GatedMLP:
    """down(silu(gate(x)) * up(x))."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., K]` for x `[..., K]`."""
        watched = self.act_fn._forward_hooks or self.act_fn._forward_pre_hooks
        if not watched and step.usable(x):
            return self.down_proj(step.silu_mul(self.gate_proj(x), self.up_proj(x)))
        if not watched and small.usable(x):
            return self.down_proj(small.silu_mul(self.gate_proj(x), self.up_proj(x)))
        return super().forward(x)  # type: ignore[misc]


class DenseHead(nn.Linear):
    """nn.Linear whose row's result is the same in every batch of up to `step.MAX_DENSE_ROWS` rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., N]` for x `[..., K]`."""
        if 0 < x.numel() <= step.MAX_DENSE_ROWS * self.in_features and step.usable(x, self.weight):
            return step.dense(x, self.weight, self.bias)
        return super().forward(x)


TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers of one parent that get the same x one after another."""


def use_step_modules(model: Any) -> None:
    """Let norms, gated MLPs and the output layer of a bfloat16 model take the kernels of a decode step.

    The output layer only on a CPU. Layers of one x become siblings on any device and in any dtype.
    """
    for module in model.modules():
        for names in TOGETHER:
            layers = [layer for name in names if type(layer := getattr(module, name, None)) is PlaneLinear]
            if len(layers) == len(names) and len({layer.in_features for layer in layers}) == 1:
                Siblings(layers)
    for module in model.modules():
        if _is_norm(module):
            module.__class__ = with_forward(_Norm, type(module))
        elif _is_gated_mlp(module):
            module.__class__ = with_forward(_GatedMLP, type(module))
    if step.isa_number() is None:
        return
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is nn.Linear and head.weight.is_contiguous() and _ours(head.weight, head.bias):
        head.__class__ = DenseHead


_made: dict[tuple[type, type], type] = {}


def with_forward(first: type, base: type) -> Any:
    """Return the class of `base`'s modules that run `first`'s forward; one for all modules, so that copies work."""
    if (first, base) not in _made:
        about = {"__module__": base.__module__, "__doc__": base.__doc__}
        _made[first, base] = types.new_class(base.__name__, (first, base), exec_body=lambda body: body.update(about))
    return _made[first, base]


def standard() -> Any:
    """Return what modules are compared with: the kernels that will run on a CPU, or what they compute."""
    return formulas if step.isa_number() is None else step


def _ours(*tensors: torch.Tensor | None) -> bool:
    return all(t is None or (t.dtype is torch.bfloat16 and t.device.type == "cpu") for t in tensors)


def norm_eps(norm: Any) -> float:
    """Return the epsilon of an RMSNorm under either of its names."""
    found = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if found is None else found)


def _is_norm(module: Any) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or isinstance(module, _Norm):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or list(module.children()):
        return False
    if weight.dtype is not torch.bfloat16 or weight.is_meta:
        return False
    if not (hasattr(module, "variance_epsilon") or hasattr(module, "eps")):
        return False
    x, here = _rows(weight.shape[0]), on_cpu(module)
    with torch.no_grad():
        return agree(here.forward(x), standard().rms_norm(x, here.weight, norm_eps(here)))


def on_cpu(module: Any) -> Any:
    """Return a small module, or where its parameters lie elsewhere a copy of it on the CPU."""
    return module if all(p.device.type == "cpu" for p in module.parameters()) else copy.deepcopy(module).cpu()


def _is_gated_mlp(module: Any) -> bool:
    names = {name for name, _ in module.named_children()}
    if names != {"gate_proj", "up_proj", "down_proj", "act_fn"} or isinstance(module, _GatedMLP):
        return False
    if not isinstance(module.act_fn, nn.SiLU) and type(module.act_fn).__name__ != "SiLUActivation":
        return False
    cls = type(module)
    if cls not in _gated:
        _gated[cls] = _computes_gated(cls)
    return _gated[cls]


_gated: dict[type, bool] = {}


def _computes_gated(cls: Any) -> bool:
    """Return whether `cls.forward` is down(silu(gate(x)) * up(x)), seen on small layers in its own layers' place."""
    like = cls.__new__(cls)
    nn.Module.__init__(like)
    like.act_fn = nn.SiLU()
    for name, sizes in (("gate_proj", (32, 48)), ("up_proj", (32, 48)), ("down_proj", (48, 32))):
        layer = nn.Linear(*sizes, bias=False, device="meta")
        layer.weight = nn.Parameter(_rows(sizes[0]).repeat(sizes[1], 1)[: sizes[1]], requires_grad=False)
        setattr(like, name, layer)
    x = _rows(32)
    with torch.no_grad():
        try:
            own = cls.forward(like, x)
        except (AttributeError, TypeError):  # it needs more than its layers
            return False
        return agree(own, like.down_proj(standard().silu_mul(like.gate_proj(x), like.up_proj(x))))


def _rows(columns: int) -> torch.Tensor:
    """Return `[3, columns]` of several magnitudes, the same each time; the caller's random state stays."""
    generator = torch.Generator().manual_seed(columns)
    rows = torch.randn(_PROBED_ROWS, columns, generator=generator) * torch.tensor([[0.01], [1.0], [30.0]])
    return rows.bfloat16()


def agree(own: Any, ours: torch.Tensor) -> bool:
    """Return whether a module's own result and the kernel's differ by rounding alone."""
    if not isinstance(own, torch.Tensor) or own.shape != ours.shape or own.dtype != ours.dtype:
        return False
    return bool(torch.allclose(own.float(), ours.float(), rtol=_TOLERANCE, atol=_TOLERANCE * float(ours.abs().max())))
