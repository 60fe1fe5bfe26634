"""Builds a CUDA kernel as plain C++ and runs it block by block on this machine (device.h beside this file)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import subprocess
from pathlib import Path

import torch

from anybits.kernels.cuda import plan
from anybits.kernels.cuda.layout import DTYPES, CudaWeight

HERE = Path(__file__).parent
DEFAULT = plan.Tuning()
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fno-gnu-unique", "-Wl,-Bsymbolic", "-ffp-contract=off", "-w")


RACES = ("-DRACES", f"-I{HERE}", "-fsanitize=thread,alignment", "-fno-threadsafe-statics")


class Emulator:
    """Kernels compiled into `folder`, each variant once.

    races: every access to shared memory is checked against the barriers that order it (races.h); several times slower.
    changed: a text of a kernel's source -> what stands in its place, to show that an error is found.
    """

    def __init__(self, folder: Path, races: bool = False, changed: tuple[str, str] = ("", "")) -> None:
        self.folder, self.races, self.changed = folder, races, changed
        self._built: dict[plan.Kernel, ctypes.CDLL] = {}

    def build(self, kernel: plan.Kernel) -> ctypes.CDLL:
        if kernel not in self._built:
            header = (HERE / "device.h").read_text()
            whole = kernel.text(header)
            mine = whole[whole.index(header) + len(header) :]
            assert self.changed[0] in mine, self.changed
            text = whole[: -len(mine)] + mine.replace(*self.changed, 1)
            text += f"#define KERNEL_NAME {kernel.entry}\n" + (HERE / "run.h").read_text()
            base = self.folder / hashlib.sha256(f"{self.races}{text}".encode()).hexdigest()[:16]
            base.with_suffix(".cpp").write_text(text)
            source, made, library = (str(base.with_suffix(end)) for end in (".cpp", ".o", ".so"))
            flags = (*FLAGS, *(RACES if self.races else ()))
            # Linked apart: the sanitizer's own library must not come along, its hooks are in races.h.
            for command in ([*flags, "-c", source, "-o", made], [*FLAGS, "-shared", made, "-o", library]):
                done = subprocess.run([COMPILER, *command], capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
            loaded = ctypes.CDLL(library)
            loaded.emulate.restype = ctypes.c_char_p
            loaded.emulate.argtypes = [
                ctypes.c_char_p, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_int, ctypes.c_longlong,
                ctypes.c_void_p, ctypes.c_int, ctypes.c_uint,
            ]  # fmt: skip
            self._built[kernel] = loaded
        return self._built[kernel]

    def launch(
        self, launch: plan.Launch, arguments: bytes, read: list[torch.Tensor], written: list[torch.Tensor]
    ) -> None:
        """Run all blocks; the kernel may touch the given tensors and nothing else."""
        buffers = []
        for tensor in [t for t in read if t.numel()]:
            start = tensor.untyped_storage().data_ptr()
            buffers += [start, start + tensor.untyped_storage().nbytes(), 0]
        for tensor in written:
            buffers += [tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize, 1]
        packed = (ctypes.c_uint64 * len(buffers))(*buffers)
        library, seed = self.build(launch.kernel), random.getrandbits(31)
        said = library.emulate(
            arguments, *launch.grid, launch.threads, launch.shared_bytes, packed, len(buffers) // 3, seed
        )
        assert not said, said.decode()

    def product(
        self, x: torch.Tensor, weight: CudaWeight, precision: int | torch.Tensor, device: plan.Device,
        tuning: plan.Tuning = DEFAULT,
    ) -> torch.Tensor:  # fmt: skip
        """Return x @ W.T, launched as the CUDA backend launches it; outputs begin as NaN."""
        shape, rows = weight.shape, None if isinstance(precision, int) else precision
        wanted = precision if isinstance(precision, int) else 0
        dtype = DTYPES[x.dtype]
        y = torch.full((x.shape[0], shape.out_features), torch.nan, dtype=x.dtype)
        planned = plan.product(shape, x.shape[0], dtype, wanted, device, tuning)
        for first in range(0, x.shape[0], planned.rows_at_once):
            part, here = x[first : first + planned.rows_at_once], y[first : first + planned.rows_at_once]
            count = part.shape[0]
            if count != planned.rows_at_once:
                planned = plan.product(shape, count, dtype, wanted, device, tuning)
            levels = weight.walsh if planned.walsh else weight.levels
            mine = rows[first : first + count].clone() if rows is not None else torch.empty(0, dtype=torch.int32)
            out = torch.full_like(here, torch.nan)
            if planned.splits > 1:
                out = torch.full((planned.splits, count, shape.out_features), torch.nan)
            pointers = (part, weight.planes, levels, mine, weight.row_scale, out)
            at = tuple(t.data_ptr() for t in pointers)
            self.launch(
                planned.launch, planned.launch.arguments(shape, count, x.stride(0), at), list(pointers[:-1]), [out]
            )
            if planned.splits > 1:
                parts, out = out, torch.full_like(here, torch.nan)
                reduction = planned.reduction(shape, count, dtype)
                at = (parts.data_ptr(), 0, 0, 0, 0, out.data_ptr())
                arguments = reduction.arguments(shape, count, 0, at, planned.splits)
                self.launch(reduction, arguments, [parts], [out])
            here.copy_(out)
        return y

    def dequantize(self, weight: CudaWeight, precision: int, dtype: torch.dtype) -> torch.Tensor:
        """Return W at `precision`."""
        shape = weight.shape
        w = torch.full((shape.out_features, shape.in_features), torch.nan, dtype=dtype)
        launch = plan.dequantization(shape, DTYPES[dtype], precision)
        at = (0, weight.planes.data_ptr(), weight.levels.data_ptr(), 0, weight.row_scale.data_ptr(), w.data_ptr())
        self.launch(launch, launch.arguments(shape, 0, 0, at), [weight.planes, weight.levels, weight.row_scale], [w])
        return w
