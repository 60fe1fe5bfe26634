"""Races in the CUDA kernels' shared memory, found without a GPU: tests/cuda_emulation/races.h.

Every barrier of the sources, left out, must be found missing: that is what shows that the ones there are enough. The
ordinary run takes a choice of products; `make test-cuda-emulation` takes the whole matrix.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from anybits.kernels.cuda import backend, layout, plan
from anybits.kernels.cuda.plan import Tuning
from cuda_emulation.emulator import Emulator
from test_cuda_emulation import (  # noqa: F401  (fixtures)
    ALL,
    BF16,
    F16,
    F32,
    HOPPER,
    PRECISIONS,
    SMALL,
    TOLERANCE,
    all_tensors,
    emulated,
    error,
    fresh,
    on_emulator,
    weight_of,
)

pytestmark = emulated
SHORT = Tuning(stages=2, warps=2)  # a warp's ring turns several times in a tile


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("races"), races=True)


def product(emulator: Emulator, group: int | None, p: int, m: int, **more) -> float:
    """Run one product of 70 outputs and 1500 columns; return its error. p: 0 for one precision a row."""
    precisions = PRECISIONS if group is not None else PRECISIONS[1:]
    weight = weight_of(70, 1500, group, precisions=precisions)
    dtype = more.pop("dtype", F32)
    x = torch.randn(m, 1500).to(dtype)
    wanted = p or torch.tensor([precisions[i % len(precisions)] for i in range(3, 3 + m)], dtype=torch.int32)
    y = emulator.product(x, layout.prepare(weight), wanted, more.pop("device", HOPPER), more.pop("tuning", SHORT))
    return error(y, x, weight, wanted) / TOLERANCE[dtype]


# group or None for codebooks, precision or 0, rows, what differs
CASES = [
    (128, 2, 1, {}), (32, 3, 5, {"dtype": F16}), (-1, 0, 1, {}), (128, 0, 3, {}), (None, 3, 2, {}), (None, 5, 9, {}),
    (None, 0, 3, {"dtype": BF16}), (64, 4, 2, {"device": SMALL, "tuning": Tuning()}), (128, 2, 1, {"tuning": Tuning()}),
]  # fmt: skip
EVERY = [
    (group, p, m, {"dtype": dtype})
    for group in (32, 64, 96, 128, 256, -1, None)
    for p in (0, *PRECISIONS[1:])
    for m, dtype in ((1, BF16), (2, F32), (5, F16), (17, F16), (33, BF16))
]


@pytest.mark.parametrize(("group", "p", "m", "more"), [*CASES, *EVERY] if ALL else CASES)
def test_products_are_free_of_races(emulator: Emulator, group: int | None, p: int, m: int, more: dict) -> None:
    assert product(emulator, group, p, m, **dict(more)) < 1


@pytest.mark.parametrize(("group", "p"), [(128, 2), (64, 0), (None, 5)])
def test_one_launch_for_several_weights_is_free_of_races(on_emulator, group: int | None, p: int) -> None:  # noqa: F811
    precisions = PRECISIONS[1:]
    prepared = [layout.prepare(weight_of(n, 700, group, precisions=precisions)) for n in (33, 70)]
    x, wanted = torch.randn(2, 700), p or torch.tensor([3, 5], dtype=torch.int32)
    launches = on_emulator(x, *([] if p else [wanted]), *all_tensors(*prepared))
    assert all(y.isfinite().all() for y in backend.CudaBackend().products(x, prepared, wanted))
    assert dict(launches[0].kernel.macros)["PARTS"] == 2


SUMS = ("    block_barrier();\n    write_tile", "    write_tile")
BROKEN = {
    "levels and activations of other lanes": (128, 3, 1, ("warp_barrier();", "")),
    "a copy that was not waited for": (128, 2, 1, ("copy_wait<STAGES - 2>", "copy_wait<STAGES - 1>")),
    "a copy over a slot in use": (128, 2, 1, ("slot ? slot - 1 : STAGES - 1", "slot")),
    "sums of other warps": (128, 2, 1, SUMS),
    "sums of the tile before": (128, 2, 1, ("parity ^= 1", "parity ^= 0")),
    "codebooks of other warps": (None, 5, 3, ("next.put(tables);\n    block_barrier();", "next.put(tables);")),
    "a copy over a slot of a codebook's planes": (None, 5, 3, ("slot ? slot - 1 : STAGES - 1", "slot")),
    "sums of other warps, codebooks": (None, 5, 3, SUMS),
    "sums of the tile before, codebooks": (None, 5, 3, ("parity ^= 1", "parity ^= 0")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_a_barrier_is_for_is_found_when_it_is_gone(tmp_path: Path, name: str) -> None:
    group, p, m, changed = BROKEN[name]
    with pytest.raises(AssertionError, match=r"race: |read of shared memory that nothing was written to"):
        product(Emulator(tmp_path, races=True, changed=changed), group, p, m)


def test_accesses_off_their_alignment_and_behind_the_end_are_found(tmp_path: Path) -> None:
    moved = ("u8 *ring = shared + warp", "u8 *ring = shared + 4 + warp")
    with pytest.raises(AssertionError, match="off its type|misaligned"):
        product(Emulator(tmp_path, races=True, changed=moved), 128, 2, 1)
    late = ("sums + parity * WARPS", "sums + (parity + 1) * WARPS")
    with pytest.raises(AssertionError, match="behind the end of shared memory"):
        product(Emulator(tmp_path, races=True, changed=late), 128, 2, 1)


def test_threads_that_write_the_same_output_are_found(tmp_path: Path) -> None:
    everyone = ("for (int i = thread_index(); i < size; i += WARPS * LANES)", "for (int i = 0; i < size; i++)")
    with pytest.raises(AssertionError, match="race: two threads use what one of them writes"):
        product(Emulator(tmp_path, races=True, changed=everyone), 128, 2, 1)


@pytest.mark.parametrize("changed", [("", ""), ("block_barrier();", "")])
def test_norms(tmp_path: Path, changed: tuple[str, str]) -> None:
    x, weight = torch.randn(2, 500), torch.rand(500)
    y = torch.empty(2, 500)
    launch = plan.Launch(plan.Kernel("norm.cu", (("DTYPE", 2), ("THREADS", 64))), (2, 1), 64, 8)
    arguments = struct.pack("<3Qqd", x.data_ptr(), weight.data_ptr(), y.data_ptr(), 500, 1e-5)
    one = Emulator(tmp_path, races=True, changed=changed)
    if changed[0]:
        with pytest.raises(AssertionError, match="race: |nothing was written"):
            one.launch(launch, arguments, [x, weight], [y])
        return
    one.launch(launch, arguments, [x, weight], [y])
    torch.testing.assert_close(y, weight * torch.nn.functional.rms_norm(x, (500,), eps=1e-5))
