"""The GPUs of this machine: what of each decides a launch, and how a kernel is started on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from anybits.kernels.cuda import plan, toolchain


@dataclass(frozen=True)
class Gpu:
    """One GPU: its index, sm_NN, and what decides a launch."""

    index: int
    arch: int
    device: plan.Device


@cache
def of(index: int) -> Gpu:
    """Return the GPU that torch calls cuda:`index`."""
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 99 << 10
    arch = toolchain.architecture((properties.major, properties.minor))
    return Gpu(index, arch, plan.Device(properties.multi_processor_count, shared))


def launch(gpu: Gpu, planned: plan.Launch, arguments: bytes) -> None:
    """Start a kernel on the current stream of its device, which need not be the current device."""
    with torch.cuda.device(gpu.index):
        capturing = torch.cuda.is_current_stream_capturing()
        kernel = toolchain.loaded(planned, gpu.index, gpu.arch, capturing)
        toolchain.ensure_context(gpu.index)
        kernel(planned, arguments, torch.cuda.current_stream(gpu.index).cuda_stream)
