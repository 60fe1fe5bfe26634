"""The CUDA kernels' own source, run without a GPU against float64 `PlaneWeight.dequantize`.

tests/cuda_emulation/device.h says what the emulator checks besides the numbers: bounds, alignment, barriers, late
copies. The ordinary run takes a choice of cases; `make test-cuda-emulation` takes the whole matrix.
"""

import logging
import os
import shutil
import sys

import pytest
import torch

from anybits import bits
from anybits.errors import AnybitsError
from anybits.kernels.cuda import backend, layout, plan
from anybits.kernels.cuda import gpu as gpus
from anybits.kernels.cuda.layout import DTYPES, Shape
from anybits.weight import AffineLevels, CodebookLevels, PlaneWeight, group_count
from conftest import random_weight
from cuda_emulation.emulator import COMPILER, Emulator

ALL = os.environ.get("ANYBITS_ALL_VARIANTS", "0") not in ("", "0")
HOPPER = plan.Device(3, 227 << 10)  # few multiprocessors, so that a block takes several tiles
SMALL = plan.Device(2, 48 << 10)  # so little shared memory that the columns are split over blocks
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {F32: 2.5e-4, BF16: 3e-3, F16: 5e-4}
PRECISIONS = tuple(range(1, 9))

emulated = pytest.mark.skipif(
    shutil.which(COMPILER) is None or sys.platform != "linux", reason=f"the emulator needs {COMPILER} on Linux"
)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def fresh():
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    logging.getLogger(__name__).warning("seed %d", seed)


def weight_of(n, k, group, symmetric=False, dtype=F16, precisions=PRECISIONS):
    """Random planes, padding bits included; scales beside them, or codebooks when group is None."""
    planes = torch.randint(-(2**31), 2**31 - 1, (8, n, bits.words(k)), dtype=torch.int32)
    if group is None:
        return PlaneWeight(planes, k, CodebookLevels({p: torch.randn(n, 2**p).to(dtype) for p in precisions}))
    groups = group_count(group, k)
    if dtype == torch.int8:
        return PlaneWeight(planes, k, random_weight(n, k, precisions, group, symmetric, scale_bits=8).levels)
    scales = {p: (torch.rand(p, n, groups) * 0.1 + 0.01).to(dtype) for p in precisions}
    offsets = None if symmetric else {p: (torch.randn(n, groups) * 0.05).to(dtype) for p in precisions}
    return PlaneWeight(planes, k, AffineLevels(group, scales, offsets))


def error(y, x, weight, precision):
    rows = torch.full((x.shape[0],), precision) if isinstance(precision, int) else precision
    dense = {p: weight.dequantize(p).double() for p in rows.unique().tolist()}
    wanted = torch.stack([dense[p] @ row for p, row in zip(rows.tolist(), x.double(), strict=True)])
    return ((y.double() - wanted).norm() / wanted.norm()).item()


# name: (N, K, M, precision or 0 for mixed, group or None for codebooks, dtype of x, then what differs)
CASES = {
    "two bits, one row": (37, 700, 1, 2, 128, BF16, {}),
    "three bits, four rows, group 32": (20, 333, 4, 3, 32, F16, {"symmetric": True}),
    "four bits, 17 rows": (20, 520, 17, 4, 128, F32, {}),
    "mixed, whole row": (37, 333, 5, 0, -1, BF16, {"levels": BF16}),
    "scales in 8 bits": (20, 700, 3, 3, 128, F32, {"levels": torch.int8}),
    "split columns": (20, 2900, 2, 2, 64, F32, {"device": SMALL}),
    "short codebook": (50, 700, 1, 3, None, BF16, {}),
    "long codebook": (37, 700, 9, 5, None, F16, {}),
    "mixed codebooks": (37, 600, 5, 0, None, F32, {}),
    "plain kernel": (20, 300, 2, 0, 96, F16, {"tuning": {"kernel": "simple"}}),
}
FULL = {
    f"p {p} group {g} rows {m} {str(d)[6:]}": (37, 333, m, p, g, d, {"symmetric": (p + m) % 2 == 0})
    for p in range(9)
    for g in (32, 64, 96, 128, 256, -1, None)
    for m, d in ((1, BF16), (2, F32), (4, F16), (9, BF16), (33, F16))
    if not (p == 1 and g is None)
} | {
    f"{name}, {k}": (70, 1300, m, p, g, F32, {"tuning": t})
    for name, t in {
        "masks 1": {"masks": 1}, "masks 2": {"masks": 2}, "masks 4": {"masks": 4}, "two warps": {"warps": 2},
        "two stages": {"stages": 2, "warps": 2}, "two blocks": {"blocks": 2}, "three splits": {"splits": 3},
        "codebook": {"kernel": "codebook"}, "simple": {"kernel": "simple"},
    }.items()
    for k, (m, p, g) in {"affine": (2, 3, 128), "codebook": (3, 3, None), "mixed": (3, 0, 64)}.items()
}  # fmt: skip


@emulated
@pytest.mark.parametrize("case", CASES | FULL if ALL else CASES)
def test_products(emulator, case):
    n, k, m, p, group, dtype, extra = (CASES | FULL)[case]
    precisions = PRECISIONS if group is not None else PRECISIONS[1:]
    weight = weight_of(n, k, group, extra.get("symmetric", False), extra.get("levels", F16), precisions)
    prepared = layout.prepare(weight)
    x = torch.randn(m, k).to(dtype)
    wanted = p or torch.tensor([precisions[i % len(precisions)] for i in range(3, 3 + m)], dtype=torch.int32)
    tuning = plan.Tuning(**extra.get("tuning", {}))
    y = emulator.product(x, prepared, wanted, extra.get("device", HOPPER), tuning)
    assert y.dtype == dtype
    assert error(y, x, weight, wanted) < TOLERANCE[dtype]


@emulated
@pytest.mark.parametrize(("group", "symmetric"), [(128, False), (32, True), (-1, False), (None, False)])
def test_one_row_whose_precision_only_the_gpu_knows(emulator, group, symmetric):
    """What a captured step of one sequence runs: levels travel with the planes, up to the precision that is wanted."""
    precisions = PRECISIONS if group is not None else PRECISIONS[1:3]
    weight = weight_of(37, 700, group, symmetric, precisions=precisions)
    x = torch.randn(1, 700)
    for p in precisions if ALL else (precisions[0], precisions[1], precisions[-1]):
        rows = torch.tensor([p], dtype=torch.int32)
        prepared = layout.prepare(weight)
        planned = plan.product(prepared.shape, 1, DTYPES[F32], 0, HOPPER, plan.Tuning())
        assert dict(planned.launch.kernel.macros)["ALIKE"] == 1
        y = emulator.product(x, prepared, rows, HOPPER)
        assert error(y, x, weight, rows) < TOLERANCE[F32]
        weight.planes[p:].random_()
        assert torch.equal(emulator.product(x, layout.prepare(weight), rows, HOPPER), y)


@emulated
def test_planes_above_the_precision_do_not_matter_and_bits_repeat(emulator):
    weight = weight_of(20, 300, 128)
    x = torch.randn(1, 300).bfloat16()
    y = emulator.product(x, layout.prepare(weight), 2, HOPPER)
    weight.planes[2:].random_()
    for _ in range(2):  # each run shuffles the order of the threads anew
        assert torch.equal(emulator.product(x, layout.prepare(weight), 2, HOPPER), y)


@emulated
def test_outliers_zeros_and_strides(emulator):
    weight = weight_of(20, 300, 128)
    prepared = layout.prepare(weight)
    wide = torch.randn(2, 607)
    x = wide[:, 1:301]  # rows that are neither adjacent nor aligned
    x[0, :128] = 0
    x[1, 7] = 3000.0
    y = emulator.product(x, prepared, 2, HOPPER)
    assert error(y, x, weight, 2) < TOLERANCE[F32]
    x[1, 200] = torch.nan
    y = emulator.product(x, prepared, 2, HOPPER)
    assert y[1].isnan().all()
    assert y[0].isfinite().all()


@emulated
@pytest.mark.parametrize("group", [128, 32, -1, None] if ALL else [32, None])
@pytest.mark.parametrize("dtype", [F16, BF16, F32] if ALL else [BF16])
def test_dequantize(emulator, group, dtype):
    weight = weight_of(37, 333, group)
    wanted = weight.dequantize(5)
    if group is None:  # centroids are fp16 in any case
        assert torch.equal(emulator.dequantize(layout.prepare(weight), 5, dtype), wanted.to(dtype))
    else:
        found = emulator.dequantize(layout.prepare(weight), 5, dtype)
        torch.testing.assert_close(found, wanted.to(dtype), rtol=2e-2 if dtype == BF16 else 2e-3, atol=1e-5)


def test_layout_holds_every_bit():
    weight = weight_of(20, 300, 64, precisions=(2, 3))
    prepared = layout.prepare(weight)
    words = prepared.planes.view(torch.int32).view(3, 2, 2, 8, 4, 2, 2)  # plane, tile, step, r, t, unit, half
    for row, column in ((0, 0), (7, 33), (8, 127), (19, 299), (13, 128)):
        c = column % 128
        word = words[1, row // 16, column // 256, row % 8, c % 32 // 8, column % 256 // 128, row % 16 // 8]
        bit = c % 4 * 8 + c // 32 * 2 + c % 8 // 4
        assert (word.item() >> bit & 1) == bits.unpack(weight.planes[1], 300)[row, column]
    assert Shape(*prepared.shape.ints()) == prepared.shape


def test_a_codebook_is_a_sum_of_signs():
    weight = weight_of(16, 64, None, precisions=(2, 3))
    prepared = layout.prepare(weight)
    table = prepared.walsh[:128].view(torch.int64)
    slots = prepared.walsh[table[3] : table[3] + 8 * 16 * 4].view(torch.float32).view(8, 8, 2)  # slot, r, half
    code = 5  # planes 0, 1, 2 are 1, 0, 1
    planes = [code >> 2 & 1, code >> 1 & 1, code & 1]
    for row in range(16):
        value = slots[7, row % 8, row // 8].item()
        for v in range(1, 8):
            sign = 2 * (sum(planes[i] for i in range(3) if v >> i & 1) % 2) - 1
            value += sign * slots[v - 1, row % 8, row // 8].item()
        assert value == pytest.approx(weight.levels.centroids[3][row, code].item(), abs=1e-5)


def test_plans_fit_every_gpu():
    for shared in (99, 163, 227):
        gpu = plan.Device(132, shared << 10)
        for k in (64, 4096, 28672, 53248):
            for rows in (1, 2, 3, 8, 17, 64):
                for p in (0, 1, 2, 4, 8):
                    for shape in (
                        Shape(4096, k, 0, -(-k // 128), 1, 1, 0, 2, 1, 0x1FE),
                        Shape(4096, k, 0, -(-k // 32), 1, 4, 0, 0, 0, 0x1FE),
                        Shape(1000, k, 1, 1, 1, 1, 1, 2, 1, 0x1FC),
                    ):
                        if p == 1 and shape.codebook:
                            continue
                        planned = plan.product(shape, rows, DTYPES[F32], p, gpu, plan.Tuning())
                        assert planned.launch.shared_bytes <= shared << 10
                        assert planned.splits * planned.launch.split_steps >= shape.steps


def test_wrong_tunings_are_named():
    for text, kernel, said in (
        ("warp=8", "", "ANYBITS_CUDA_TUNING 'warp=8' is unknown"),
        ("masks=3", "", "masks=3 is unknown: choose 1, 2 or 4"),
        ("", "fast", "ANYBITS_CUDA_KERNEL=fast is unknown: choose simple, signs or codebook"),
    ):
        with pytest.raises(AnybitsError, match=said):
            plan.tuning_from_environment(text, kernel)


@pytest.fixture
def on_emulator(emulator, monkeypatch):
    """The torch side of the backend with the emulator in the driver's place; what torch.empty gives begins as NaN.

    A function of tensors that kernels may read: call it before a product; it returns the list of launches to come.
    """
    empty, read, written, launches = torch.empty, [], [], []

    def tensor(*args, **kwargs):
        written.append(empty(*args, **kwargs))
        return written[-1].fill_(torch.nan if written[-1].is_floating_point() else -1)

    def launch(_gpu, planned, arguments):
        launches.append(planned)
        emulator.launch(planned, arguments, read, written)

    def begin(*tensors):
        read[:] = tensors
        del written[:], launches[:]
        return launches

    monkeypatch.setattr(gpus, "launch", launch)
    monkeypatch.setattr(gpus, "of", lambda index: gpus.Gpu(0, 90, HOPPER))
    monkeypatch.setattr(torch, "empty", tensor)
    return begin


def all_tensors(*weights):
    return [t for w in weights for t in (w.planes, w.levels, w.walsh, w.row_scale)]


@emulated
def test_the_backend_launches_what_it_plans(on_emulator, monkeypatch):
    """Passes, slices, the dense path."""
    weight = weight_of(20, 300, 128)
    prepared, x, rows = layout.prepare(weight), torch.randn(33, 300), torch.arange(33, dtype=torch.int32) % 8 + 1
    product = backend.CudaBackend().matmul
    for count, p, dense in ((18, rows[:18], False), (3, 2, True), (3, rows[:3], True)):
        on_emulator(x, rows, *all_tensors(prepared))
        if dense:
            monkeypatch.setattr(plan, "DENSE_ROWS", dict.fromkeys(range(1, 9), 1))
            monkeypatch.setattr(plan, "DENSE_ROWS_MIXED", 1)
        assert error(product(x[:count], prepared, p), x[:count], weight, p) < TOLERANCE[F32]
    with pytest.raises(AnybitsError, match="precision 9 is not stored"):
        product(x, prepared, 9)
    with pytest.raises(AnybitsError, match=r"shape \[33, 200\] where \[M, 300\]"):
        product(x[:, :200], prepared, 2)


# name: (rows of the weights, K, M, precision or 0 for mixed, group or None, dtype of x, GPU)
TOGETHER = {
    "query, key and value": ((70, 20, 37), 700, 1, 3, 128, BF16, HOPPER),
    "gate and up, mixed": ((50, 33), 333, 5, 0, 32, F16, HOPPER),
    "one precision for each row": ((16, 1, 40, 17), 520, 1, 0, 128, BF16, HOPPER),
    "whole rows": ((40, 90), 300, 3, 4, -1, F32, HOPPER),
    "short codebooks": ((37, 20, 20), 700, 1, 2, None, BF16, HOPPER),
    "long codebooks": ((70, 33), 600, 9, 5, None, F16, HOPPER),
    "mixed codebooks, sliced rows": ((37, 50), 333, 20, 0, None, F32, HOPPER),
    "split columns": ((20, 50), 2900, 2, 2, 64, F32, SMALL),
}
TOGETHER_ALL = {
    f"p {p} group {g} rows {m} parts {len(n)}": (n, 600, m, p, g, d, HOPPER)
    for p in range(9)
    for g in (32, 96, 128, 256, -1, None)
    for m, d in ((1, BF16), (4, F16), (17, F32))
    for n in ((33, 70), (16, 50, 17))
    if not (p == 1 and g is None)
}


@emulated
@pytest.mark.parametrize("case", TOGETHER | TOGETHER_ALL if ALL else TOGETHER)
def test_one_launch_gives_the_bits_of_separate_ones(on_emulator, monkeypatch, case):
    rows, k, m, p, group, dtype, gpu = (TOGETHER | TOGETHER_ALL)[case]
    monkeypatch.setattr(gpus, "of", lambda index: gpus.Gpu(0, 90, gpu))
    precisions = PRECISIONS if group is not None else PRECISIONS[1:]
    weights = [weight_of(n, k, group, precisions=precisions) for n in rows]
    prepared, x = [layout.prepare(weight) for weight in weights], torch.randn(m, k).to(dtype)
    wanted = p or torch.tensor([precisions[i % len(precisions)] for i in range(3, 3 + m)], dtype=torch.int32)
    keep = [x, *([wanted] if not p else []), *all_tensors(*prepared)]
    launches = on_emulator(*keep)
    found = backend.CudaBackend().products(x, prepared, wanted)
    multiplied = [launch for launch in launches if launch.kernel.entry == "multiply"]
    assert all(dict(launch.kernel.macros)["PARTS"] == len(rows) for launch in multiplied)
    passes = len(multiplied)
    for weight, one, y in zip(weights, prepared, found, strict=True):
        launches = on_emulator(*keep)
        assert torch.equal(backend.CudaBackend().matmul(x, one, wanted), y)
        assert passes == sum(launch.kernel.entry == "multiply" for launch in launches)
        assert error(y, x, weight, wanted) < TOLERANCE[dtype]


@emulated
def test_weights_that_do_not_go_together_are_launched_one_by_one(on_emulator, monkeypatch):
    weights = [layout.prepare(weight_of(20, 300, group)) for group in (128, 64)]
    x = torch.randn(2, 300)
    launches = on_emulator(x, *all_tensors(*weights))
    found = backend.CudaBackend().products(x, weights, 2)
    assert len(launches) == 2
    assert torch.equal(found[1], backend.CudaBackend().matmul(x, weights[1], 2))
    monkeypatch.setenv("ANYBITS_CUDA_KERNEL", "simple")
    launches = on_emulator(x, *all_tensors(*weights))
    backend.CudaBackend().products(x, [weights[0], weights[0]], 2)
    assert [launch.kernel.source for launch in launches] == ["simple.cu"] * 2
    with pytest.raises(AnybitsError, match=r"shape \[2, 200\] where \[M, 300\]"):
        backend.CudaBackend().products(x[:, :200], weights, 2)
    with pytest.raises(AnybitsError, match="2 to 4 weights that differ in their rows alone"):
        plan.together(tuple(w.shape for w in weights), 1, 0, 2, HOPPER, plan.Tuning())
