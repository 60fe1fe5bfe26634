"""Where a model's weights come from: the model itself, or files that are read one decoder block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from anybits.quantize.targets import find_blocks

_SAMPLES = 64
"""Places of each tensor that its fingerprint reads, so many elements at each."""


class Source:
    """A causal language model with its weights, in memory or not.

    model: where a parameter lies on the meta device it is a placeholder; weights: name -> tensor for those,
    read anew at each access. A model that is wholly in memory needs none.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        self.model = model
        self._weights = weights or {}
        self.prefix, self.blocks = find_blocks(model)
        self.tensors = model.state_dict()
        """Every parameter and buffer by name; those on the meta device tell their shape and dtype only."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's parameters."""
        return next(self.model.parameters()).dtype

    def hidden_size(self) -> int:
        """Return the width of what goes from block to block."""
        return int(self.model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]

    def shared(self) -> str | None:
        """Return the name of a weight that several blocks share, None where there is none."""
        within = f"{self.prefix}."
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        names = (name for name, other in tied.items() if name.startswith(within) and other.startswith(within))
        return next(names, None)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor called `name`."""
        tensor = self.tensors[name]
        return self._weights[name] if tensor.is_meta else tensor

    def sample(self, name: str) -> bytes:
        """Return bytes from all over a tensor: all of a small one, some thousand elements of a large one."""
        flat = self.read(name).detach().flatten()
        if flat.numel() > _SAMPLES * _SAMPLES:
            starts = torch.linspace(0, flat.numel() - _SAMPLES, _SAMPLES, dtype=torch.float64).long()
            flat = torch.cat([flat[s : s + _SAMPLES] for s in starts.tolist()])
        return flat.float().contiguous().numpy().tobytes()

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Give block `index` with its weights in memory, which are let go at the end."""
        names = [f"{self.prefix}.{index}.{name}" for name in self.blocks[index].state_dict()]
        with self._filled(names):
            yield self.blocks[index]

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Hold the weights of all that is not in a block: embeddings, norms, head."""
        with self._filled(self.rest_names()):
            yield

    def rest_names(self) -> list[str]:
        """Return the names of all tensors that are not in a block."""
        return [name for name in self.tensors if not name.startswith(f"{self.prefix}.")]

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """Give the model ready to run: each block holds its weights only while it runs, the rest all the time."""
        entered: list[AbstractContextManager[nn.Module]] = []

        def enter(index: int) -> None:
            leave()  # a forward that ended early has left its block behind
            context = self.block(index)
            context.__enter__()
            entered.append(context)

        def leave() -> None:
            while entered:
                entered.pop().__exit__(None, None, None)

        hooks = []
        for index, block in enumerate(self.blocks):
            hooks.append(block.register_forward_pre_hook(lambda *_, index=index: enter(index)))
            hooks.append(block.register_forward_hook(lambda *_: leave()))
        try:
            with self.rest():
                yield self.model
        finally:
            leave()
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _filled(self, names: list[str]) -> Iterator[None]:
        filled: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for name in names:
                if not self.tensors[name].is_meta:
                    continue
                owner, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(owner)
                placeholder = module._parameters[leaf]
                assert placeholder is not None
                filled.append((module, leaf, placeholder))
                module._parameters[leaf] = nn.Parameter(self._weights[name], requires_grad=False)
            yield
        finally:
            for module, leaf, placeholder in filled:
                module._parameters[leaf] = placeholder
