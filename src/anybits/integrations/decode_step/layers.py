"""Decoder layers of a loaded model whose decode steps take one call: norms, products, attention, MLP and residuals.

Between two products Python costs as much as the arithmetic there: the kernels have just streamed through the caches
that the interpreter lives in. A layer is replaced where its parts are those of `modules` and `attention_layers` and
its class adds them up as Llama's does, which is asked of the layer itself. Whoever changes or watches a part of it
(a hook, another module, a forward of its own) gets the parts called one after another, as before.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from anybits.config import Single
from anybits.integrations.decode_step import attention as decode_attention
from anybits.integrations.decode_step.attention_layers import PLAIN, _Attention
from anybits.integrations.decode_step.cache import GrowingLayer
from anybits.integrations.decode_step.modules import _GatedMLP, _Norm, norm_eps, with_forward
from anybits.kernels import cpu, step
from anybits.kernels import layer as kernel
from anybits.linear import PlaneLinear
from anybits.precision import Precision, active
from anybits.weight import check_precision

_NORMS = ("input_layernorm", "post_attention_layernorm")
_CHILDREN = {"self_attn", "mlp", *_NORMS}
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_OBSERVERS = "transformers.utils.output_capturing"
"""Hooks from here collect what attention returns beside its output, which is None with decode attention."""


class _Layer:
    """h = x + attention(norm(x)), y = h + MLP(norm(h)), for one new position of each sequence without a mask."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return `[B, M, hidden]` for hidden_states `[B, M, hidden]`."""
        if hidden_states.shape[1] == 1 and not args and step.usable(hidden_states):
            y = _step(self, hidden_states, **kwargs)
            if y is not None:
                return y
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


def _step(
    layer: Any,
    x: torch.Tensor,
    position_embeddings: Any = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return the layer's output for x `[B, 1, hidden]`; None where its parts must be called."""
    if attention_mask is not None or past_key_values is None or position_embeddings is None:
        return None
    if layer.training or kwargs.get("output_attentions") or not decode_attention.is_plain(kwargs):
        return None
    plan = layer.__dict__.get("_step_plan")
    if plan is None or not plan.is_of(layer):
        plan = layer.__dict__["_step_plan"] = Plan(layer)
    if plan.linears is None or plan.is_watched() or plan.attention.config._attn_implementation not in PLAIN:
        return None
    index, layers, packed = plan.attention.layer_idx, past_key_values.layers, plan.packed()
    cache = layers[index] if len(layers) > index else None
    if packed is None or type(cache) is not GrowingLayer or not plan.takes(x, position_embeddings, cache.positions()):
        return None
    return kernel.run(packed, x, position_embeddings, *cache.next_address())


class Plan:
    """What one call needs of a layer, and whether the layer still is what it was when this was made.

    linears is None where the layer has parts that the call does not know.
    """

    def __init__(self, layer: Any) -> None:
        self.attention, self._mlp = layer.self_attn, layer.mlp
        self._children = dict(layer._modules)
        self._parts = {**self.attention._modules, **self._mlp._modules}
        watched = [*self._children.values(), *self._parts.values()]
        self._kinds = [(module, type(module)) for module in watched]
        self._own = [module.__dict__ for module in watched]
        self._hooks = [hooks for m in watched for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._scaling = self.attention.scaling
        self._packed: dict[Precision, bytes] = {}
        self._kept: list[torch.Tensor] = []
        self._addresses: list[tuple[dict[str, Any], str, torch.Tensor | None, int]] = []
        self.linears: list[PlaneLinear] | None = [self._parts[name] for name in (*_ATTENTION, *_MLP)]
        self._prepared: list[Any] = []
        norms = [*(self._children[name] for name in _NORMS), *(self._parts.get(n) for n in ("q_norm", "k_norm"))]
        if not self._known(norms):
            self.linears = None
            return
        for part, name in [*((norm, "weight") for norm in norms if norm), *((part, "bias") for part in self.linears)]:
            tensor = part._parameters.get(name)
            if tensor is not None:
                self._kept.append(tensor.data)  # no other tensor comes to lie there
            self._addresses.append((part._parameters, name, tensor, 0 if tensor is None else tensor.data_ptr()))
        self._norms = [None if norm is None else kernel.Norm(norm.weight.data, norm_eps(norm)) for norm in norms]
        self._one_default = len({id(part.default) for part in self.linears}) == 1

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the layer makes its own

    def is_of(self, layer: Any) -> bool:
        """Return whether the layer's modules, parameters and repacked weights are those of this plan."""
        return (
            layer._modules == self._children
            and {**self.attention._modules, **self._mlp._modules} == self._parts
            and all(type(module) is kind for module, kind in self._kinds)
            and all(own.get(name) is t and (t is None or t.data_ptr() == at) for own, name, t, at in self._addresses)
            and (self.linears is None or [part._prepared for part in self.linears] == self._prepared)
            and self.attention.scaling == self._scaling
        )

    def is_watched(self) -> bool:
        """Return whether somebody sees or replaces what goes in or out of a part."""
        if any(self._hooks) and not all(_only_observes(hook) for hooks in self._hooks for hook in hooks.values()):
            return True
        return any("forward" in own for own in self._own) or bool(
            nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
        )

    def packed(self) -> bytes | None:
        """Return the layer at the active precision; None where rows, or parts, have precisions of their own."""
        assert self.linears is not None
        wanted = active(self.linears[0].default)
        if not isinstance(wanted, int | str):
            return None
        if not self._one_default and any(active(part.default) != wanted for part in self.linears):
            return None
        found = self._packed.get(wanted)
        if found is None:
            found = self._packed[wanted] = self._pack(wanted)
        return found

    def takes(self, x: torch.Tensor, angles: Any, positions: tuple[int, ...] | None) -> bool:
        """Return whether x `[B, 1, hidden]`, the rotation's angles and the cache's shape are what the call takes."""
        cos, sin = angles
        batch, sizes = x.shape[0], self._sizes
        return (
            positions is not None
            and batch <= kernel.MAX_ROWS
            and x.shape[2] == sizes.hidden
            and x.is_contiguous()
            and positions[0] == batch
            and positions[1] == sizes.kv_heads
            and positions[3] == sizes.dim
            and cos.shape == sin.shape
            and cos.shape[2] == sizes.dim
            and cos.shape[0] in (1, batch)
            and step.usable(cos, sin)
            and cos.is_contiguous()
            and sin.is_contiguous()
        )

    def _known(self, norms: list[Any]) -> bool:
        """Take over the repacked weights; return whether all parts are those that the call computes."""
        assert self.linears is not None
        kinds = isinstance(self.attention, _Attention) and isinstance(self._mlp, _GatedMLP)
        if not kinds or not all(norm is None or isinstance(norm, _Norm) for norm in norms):
            return False
        if any(type(part) is not PlaneLinear for part in self.linears):
            return False
        cpu_device = torch.device("cpu")
        backends = [part._backend or part.prepare(cpu_device) for part in self.linears]
        if any(type(backend) is not cpu.CpuBackend for backend in backends):
            return False
        bits = {backend.activation_bits() for backend in backends if isinstance(backend, cpu.CpuBackend)}
        self._prepared = [part.prepared for part in self.linears]
        query, key, gate = (self._parts[name] for name in ("q_proj", "k_proj", "gate_proj"))
        dim, self._bits = self.attention.head_dim, bits.pop()
        heads = query.out_features // dim, key.out_features // dim
        self._sizes = kernel.Sizes(query.in_features, gate.out_features, *heads, dim)
        return not bits and kernel.fits(self._sizes, [(part.out_features, part.in_features) for part in self.linears])

    def _pack(self, wanted: Single) -> bytes:
        assert self.linears is not None
        matrices = []
        for part in self.linears:
            precision = int(part.own_precision(wanted))
            check_precision(precision, part.stored_precisions)
            matrices.append((part.prepared, precision, part.bias))
        return kernel.packed(matrices, self._norms, self._sizes, self._scaling, self._bits)


def _only_observes(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == _OBSERVERS


def use_step_layers(model: nn.Module) -> None:
    """Let decoder layers that add up their parts as Llama's do take the kernel; after their parts have theirs."""
    for module in model.modules():
        if _is_layer(module):
            module.__class__ = with_forward(_Layer, type(module))


def _is_layer(module: Any) -> bool:
    if isinstance(module, _Layer) or set(module._modules) != _CHILDREN or module._parameters or module._buffers:
        return False
    parts = module._modules
    if not isinstance(parts["self_attn"], _Attention) or not isinstance(parts["mlp"], _GatedMLP):
        return False
    return all(isinstance(parts[name], _Norm) for name in _NORMS) and _adds_up(module)


class _Part(nn.Module):
    """Stands for a part of a layer: something different of each x."""

    def __init__(self, factor: float, pair: bool = False) -> None:
        super().__init__()
        self.factor, self.pair = factor, pair

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        y = (hidden_states * self.factor).sin()
        return (y, None) if self.pair else y


def _adds_up(module: Any) -> bool:
    """Return whether the layer is x + attention(norm(x)), then so with the MLP, seen on other parts in their place."""
    little = copy.copy(module)
    norms, attention, mlp = (_Part(0.7), _Part(1.3)), _Part(1.9, pair=True), _Part(2.3)
    little._modules = dict(zip(_NORMS, norms, strict=True)) | {"self_attn": attention, "mlp": mlp}
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        try:
            own = little.forward(
                x, attention_mask=None, position_embeddings=(x, x), position_ids=None, past_key_values=None
            )
        except Exception:  # other arguments or parts: whatever it does, it is not this
            return False
        h = x + attention(norms[0](x))[0]
        return isinstance(own, torch.Tensor) and torch.equal(own, h + mlp(norms[1](h)))
