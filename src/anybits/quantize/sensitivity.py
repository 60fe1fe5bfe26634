"""The sensitivity of each weight, block after block: memory for one block, however large the model.

Forward, the input of every block goes to a file; backward, each block runs again from its input and hands the
gradient to the block before it. Every file is whole or absent, so a killed measurement goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybits.checkpoint import CheckpointReader, CheckpointWriter
from anybits.config import StoredConfig
from anybits.quantize.activations import Activations
from anybits.quantize.blocks import block_arguments, bypassed, embedded
from anybits.quantize.source import Source
from anybits.quantize.targets import Target

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Sensitivity:
    """The diagonal Fisher information of every target: the sum over windows of the squared gradient of the loss.

    Any-Precision LLM (arXiv 2402.10517, section 3.2) and SqueezeLLM (arXiv 2306.07629, equation 3) use it as
    the sensitivity of a weight. Files: 4 bytes a weight, and the inputs of all blocks in the model's dtype.

    targets: those of each block; tokens: int64 `[windows, tokens]`; folder: for the files.
    """

    def __init__(self, source: Source, targets: Sequence[list[Target]], tokens: torch.Tensor, folder: Path) -> None:
        self._source, self._targets, self._windows = source, targets, tokens.split(1)
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self._sums = CheckpointWriter(folder)

    def has(self, index: int) -> bool:
        """Return whether the sums of block `index` are on disk."""
        return self._sums.has_shard(_name("sums", index))

    def read(self, index: int) -> dict[str, torch.Tensor]:
        """Return parameter name in block `index` -> float32 sums of the parameter's shape."""
        stored = StoredConfig("any-precision", (2,), ())
        reader = CheckpointReader([self._sums.path(_name("sums", index))], stored)
        return {name: reader.read_tensor(name) for name in reader.names()}

    def forget(self, index: int) -> None:
        """Remove the sums of block `index`."""
        self._sums.path(_name("sums", index)).unlink(missing_ok=True)

    def measure(self, blocks: Iterable[int], progress: Callable[[int, int], None]) -> None:
        """Have the sums of `blocks` on disk, going on from whatever files there are."""
        missing = [index for index in blocks if not self.has(index)]
        if not missing:
            return
        count = len(self._source.blocks)
        with self._source.running() as model:
            arguments = block_arguments(model, self._source.blocks, self._windows[0])
        last = next((i for i in range(count) if self._path("gradients", i).exists() and self.has(i)), count)
        if last == count and not self._path("gradients", count).exists():
            self._forward(arguments, progress)
        for index in reversed(range(missing[0], last)):
            self._backward(index, arguments[index])
            progress(2 * count - index, 2 * count)
        for file in self._folder.glob("*.activations"):
            file.unlink()

    def _forward(self, arguments: list[Arguments], progress: Callable[[int, int], None]) -> None:
        count = len(self._source.blocks)
        if not self._path("inputs", 0).exists():
            with self._source.running() as model:
                self._write("inputs", 0, embedded(model, self._source.blocks, self._windows))
        for index in range(count):
            if not self._path("inputs", index + 1).exists():
                with self._source.block(index) as block, torch.no_grad():
                    outputs = (_run(block, x, arguments[index]) for x in self._open("inputs", index))
                    self._write("inputs", index + 1, outputs)
            progress(index + 1, 2 * count)
        with self._source.block(count - 1) as block, torch.no_grad():
            positional, keywords = arguments[-1]
            whole = block(self._open("inputs", count - 1)[0], *positional, **keywords)
        with self._source.rest():
            self._write("gradients", count, self._head_gradients(isinstance(whole, tuple)))
        self._path("inputs", count).unlink()

    def _head_gradients(self, as_tuple: bool) -> Iterator[torch.Tensor]:
        """Yield the gradient of each window's loss with respect to the last block's output."""
        model, blocks = self._source.model, self._source.blocks
        # The loss of the text alone: balance among experts belongs to training, and blocks that are bypassed have none.
        alone = {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}
        for window, output in zip(self._windows, self._open("inputs", len(blocks)), strict=True):
            leaf = output.requires_grad_(True)
            with bypassed(blocks, (leaf,) if as_tuple else leaf), torch.enable_grad():
                loss = model(input_ids=window, labels=window, use_cache=False, **alone).loss
            yield torch.autograd.grad(loss, leaf)[0]

    def _backward(self, index: int, arguments: Arguments) -> None:
        """Write the sums of one block and the gradients with respect to its inputs."""
        names = [target.parameter for target in self._targets[index]]
        with self._source.block(index) as block:
            parameters = [block.get_parameter(name) for name in names]
            sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
            required = [(p, p.requires_grad) for p in block.parameters()]

            def gradients() -> Iterator[torch.Tensor]:
                for x, above in zip(self._open("inputs", index), self._open("gradients", index + 1), strict=True):
                    x.requires_grad_(True)
                    with torch.enable_grad():
                        y = _run(block, x, arguments)
                    found = torch.autograd.grad(y, [x, *parameters], above, allow_unused=True)
                    for total, gradient in zip(sums, found[1:], strict=True):
                        if gradient is not None:  # an expert that no token reached
                            total += gradient.float().square()
                    assert found[0] is not None
                    yield found[0]

            try:
                for parameter, _ in required:
                    parameter.requires_grad_(any(parameter is p for p in parameters))
                self._write("gradients", index, gradients())
            finally:
                for parameter, was_required in required:
                    parameter.requires_grad_(was_required)
        self._sums.write_shard(_name("sums", index), dict(zip(names, sums, strict=True)))
        self._path("inputs", index).unlink()
        self._path("gradients", index + 1).unlink()

    def _path(self, kind: str, index: int) -> Path:
        return self._folder / f"{_name(kind, index)}.activations"

    def _write(self, kind: str, index: int, batches: Iterable[torch.Tensor]) -> None:
        Activations.named(self._path(kind, index), batches)

    def _open(self, kind: str, index: int) -> Activations:
        return Activations.opened(self._path(kind, index))


def _name(kind: str, index: int) -> str:
    return f"{kind}-{index:05d}"


def _run(block: nn.Module, hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
    positional, keywords = arguments
    output = block(hidden, *positional, **keywords)
    return output[0] if isinstance(output, tuple) else output
