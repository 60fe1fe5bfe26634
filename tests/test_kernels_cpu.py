"""The CPU kernels against float64 `PlaneWeight.dequantize`: every instruction set, the same cases."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anybits import bits
from anybits.errors import AnybitsError
from anybits.evaluate import kernels as benchmark
from anybits.evaluate.kernels import bench_kernels, parse_shapes
from anybits.kernels import cpu, many_rows, native
from anybits.kernels.reference import ReferenceBackend
from anybits.linear import PlaneLinear
from anybits.precision import ModelPrecision
from anybits.weight import AffineLevels, CodebookLevels, PlaneWeight, group_count
from conftest import random_weight

ROOT = Path(__file__).parent.parent
LIBRARY = native.library()
ISAS = [isa for i, isa in enumerate(native.ISAS) if LIBRARY is not None and LIBRARY.isa_usable(i)]
PRECISIONS = tuple(range(1, 9))
# Relative L2 error, per dtype of x: what the kernel adds plus what rounding y to that dtype adds.
TOLERANCE = {torch.float32: 2.5e-4, torch.bfloat16: 4e-3, torch.float16: 8e-4}
TOLERANCE_OF_8_BITS = 3e-2
# Rows of x and affine levels up to which a row's result is the same to the last bit in any batch (docs/kernels.md).
LARGEST_EQUAL_BATCH = {"avx2": 15, "neon": 15}

MOST_PLANES_OF_BYTES = 6  # AVX2: affine levels that are bytes with 8-bit activations

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the CPU kernels were not compiled")


@pytest.fixture(autouse=True)
def poisoned():
    """Fill every torch.empty with NaN, and draw fresh inputs whose seed a failure shows."""
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    logging.getLogger(__name__).warning("seed %d", seed)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def random_planes(n, k):
    """Every bit random, padding included."""
    return torch.randint(-(2**31), 2**31 - 1, (8, n, bits.words(k)), dtype=torch.int32)


def affine(n, k, group_size=128, symmetric=False, dtype=torch.float16):
    groups = group_count(group_size, k)
    scales = {p: (torch.rand(p, n, groups) * 0.1 + 0.01).to(dtype) for p in PRECISIONS}
    offsets = None if symmetric else {p: (torch.randn(n, groups) * 0.05).to(dtype) for p in PRECISIONS}
    return PlaneWeight(random_planes(n, k), k, AffineLevels(group_size, scales, offsets))


def in_steps(n, k, symmetric=False, dtype=torch.float16, group_size=128):
    levels = random_weight(n, k, PRECISIONS, group_size, symmetric, dtype=dtype, scale_bits=8).levels
    return PlaneWeight(random_planes(n, k), k, levels)


def codebook(n, k):
    return PlaneWeight(random_planes(n, k), k, CodebookLevels({p: torch.randn(n, 2**p).half() for p in PRECISIONS}))


def error(y, x, weight, precision):
    """Relative L2 error of y against float64."""
    if isinstance(precision, int):
        wanted = x.double() @ weight.dequantize(precision).double().t()
    else:
        dense = {p: weight.dequantize(p).double() for p in precision.tolist()}
        wanted = torch.stack([dense[p] @ row for p, row in zip(precision.tolist(), x.double(), strict=True)])
    return ((y.double() - wanted).norm() / wanted.norm()).item()


CASES = {
    "affine": lambda: affine(70, 512),
    "affine ragged": lambda: affine(37, 1000),
    "affine symmetric": lambda: affine(64, 384, symmetric=True),
    "affine group 32": lambda: affine(45, 224, group_size=32),
    "affine group 96": lambda: affine(33, 288, group_size=96),
    "affine group 256": lambda: affine(40, 700, group_size=256),
    "affine whole row": lambda: affine(50, 333, group_size=-1),
    "affine bf16 levels": lambda: affine(48, 256, dtype=torch.bfloat16),
    "affine fp32 levels": lambda: affine(48, 256, dtype=torch.float32),
    "affine 8 bits": lambda: in_steps(37, 1000),
    "affine 8 bits symmetric": lambda: in_steps(50, 224, True, torch.float32, 32),
    "codebook": lambda: codebook(64, 512),
    "codebook ragged": lambda: codebook(37, 1300),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("isa", ISAS)
def test_products(isa, case):
    weight = CASES[case]()
    backend = cpu.CpuBackend(isa, activation_bits=16)
    packed = backend.prepare(weight)
    for p in PRECISIONS:
        for dtype, bound in TOLERANCE.items():
            for rows in (1, 2 + p % 3, 7) if dtype == torch.float32 else (1 + p % 5,):
                x = torch.randn(rows, weight.in_features).to(dtype)
                y = backend.matmul(x, packed, p)
                assert y.dtype == dtype
                assert y.shape == (rows, weight.out_features)
                assert error(y, x, weight, p) < bound, (p, dtype, rows)


@pytest.mark.parametrize("case", ["affine ragged", "affine 8 bits", "codebook ragged"])
@pytest.mark.parametrize("isa", ISAS)
def test_dense_path(isa, case, monkeypatch):
    monkeypatch.setattr(many_rows, "dense_is_faster", lambda *_: True)
    monkeypatch.setattr(many_rows, "SLAB_BYTES", 100_000)  # several slabs
    weight = CASES[case]()
    backend = cpu.CpuBackend(isa)
    packed = backend.prepare(weight)
    for p in PRECISIONS:
        for dtype in TOLERANCE:
            x = torch.randn(20, weight.in_features).to(dtype)
            assert error(backend.matmul(x, packed, p), x, weight, p) < (8e-3 if dtype == torch.bfloat16 else 8e-4), (
                p,
                dtype,
            )


@pytest.mark.parametrize("case", ["affine ragged", "affine 8 bits", "codebook ragged"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_row_count(isa, case):
    weight = CASES[case]()
    backend = cpu.CpuBackend(isa, activation_bits=16)
    packed = backend.prepare(weight)
    for rows in (0, 1, 5, 16, 23, 24, 63, 64, 65, 200):
        for dtype, bound in TOLERANCE.items():
            for p in (2, 5):
                x = torch.randn(rows, weight.in_features).to(dtype)
                y = backend.matmul(x, packed, p)
                assert y.shape == (rows, weight.out_features)
                assert not rows or error(y, x, weight, p) < bound * (2 if rows > 64 else 1), (rows, dtype, p)


@pytest.mark.parametrize("case", ["affine", "affine ragged", "affine 8 bits", "codebook ragged"])
@pytest.mark.parametrize("isa", ISAS)
def test_mixed_rows_equal_uniform_rows(isa, case):
    weight = CASES[case]()
    backend = cpu.CpuBackend(isa, activation_bits=16)
    packed = backend.prepare(weight)
    for rows in (1, 4, 13, 70):
        precision = torch.randint(1, 9, (rows,), dtype=torch.int32)
        for dtype, bound in TOLERANCE.items():
            x = torch.randn(rows, weight.in_features).to(dtype)
            y = backend.matmul(x, packed, precision)
            assert error(y, x, weight, precision) < bound * (2 if rows > 64 else 1), (rows, dtype)
        same = backend.matmul(x, packed, torch.full((rows,), 4, dtype=torch.int32))
        assert torch.equal(same, backend.matmul(x, packed, 4))


@pytest.mark.parametrize("case", ["affine ragged", "affine group 96", "affine 8 bits", "codebook ragged"])
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_does_not_depend_on_its_batch(isa, case, monkeypatch):
    monkeypatch.setattr(many_rows, "dense_is_faster", lambda *_: False)
    weight = CASES[case]()
    backend = cpu.CpuBackend(isa, activation_bits=16)
    packed = backend.prepare(weight)
    x = torch.randn(67, weight.in_features).bfloat16()
    precision = torch.randint(1, 9, (67,), dtype=torch.int32)
    alone = torch.cat([backend.matmul(x[i : i + 1], packed, p) for i, p in enumerate(precision.tolist())])
    most = 67 if case == "codebook ragged" else LARGEST_EQUAL_BATCH.get(isa, 67)
    assert torch.equal(backend.matmul(x[:most], packed, precision[:most]), alone[:most])
    for rows in (2, 4, 8, 13, min(16, most)):
        first = int(torch.randint(0, 67 - rows, ()))
        assert torch.equal(
            backend.matmul(x[first : first + rows], packed, precision[first : first + rows]),
            alone[first : first + rows],
        ), rows
        uniform = backend.matmul(x[first : first + rows], packed, int(precision[first]))
        assert torch.equal(uniform[0], alone[first]), rows


@pytest.mark.parametrize("case", ["affine ragged", "codebook ragged"])
@pytest.mark.parametrize("isa", ISAS)
def test_bf16_results_are_mostly_the_nearest(isa, case):
    weight = CASES[case]()
    backend = cpu.CpuBackend(isa, activation_bits=16)
    packed = backend.prepare(weight)
    for rows in (1, 5):
        others = []
        for p in PRECISIONS:
            x = torch.randn(16, rows, weight.in_features).bfloat16()
            x[:, 0, 3] = 40
            nearest = (x.double() @ weight.dequantize(p).double().t()).bfloat16()
            y = torch.stack([backend.matmul(one, packed, p) for one in x])
            others.append((y != nearest).float().mean().item())
        assert max(others) < 0.2, (rows, others)


@pytest.mark.skipif("amx" not in ISAS, reason="this machine has no matrix instructions")
def test_matrices_and_tables_agree_to_the_bit():
    weight = affine(70, 1000)
    x = torch.randn(9, 1000).bfloat16()
    results = []
    for isa in ("avx512", "amx"):
        backend = cpu.CpuBackend(isa, activation_bits=16)
        results.append(backend.matmul(x, backend.prepare(weight), 5))
    assert torch.equal(*results)


@pytest.mark.parametrize("make", [affine, codebook])
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_stays_in_its_row(isa, make):
    weight = make(40, 416)
    backend = cpu.CpuBackend(isa, activation_bits=16)
    packed = backend.prepare(weight)
    x = torch.randn(5, 416).bfloat16()
    good = backend.matmul(x, packed, 3)
    for wrong in (float("inf"), float("nan")):
        bad = x.clone()
        bad[2, 100] = wrong
        y = backend.matmul(bad, packed, 3)
        assert not y[2].isfinite().any()
        assert torch.equal(y[[0, 1, 3, 4]], good[[0, 1, 3, 4]])


@pytest.mark.parametrize("isa", ISAS)
def test_realistic_width_keeps_the_promised_error(isa):
    x = torch.randn(2, 4096)
    x[torch.rand_like(x) < 0.005] *= 20  # outliers, as activations have them
    for weight in (affine(64, 4096), codebook(64, 4096)):
        backend = cpu.CpuBackend(isa, activation_bits=16)
        packed = backend.prepare(weight)
        bound = 1e-4 if isinstance(weight.levels, AffineLevels) else 1e-3
        for p in PRECISIONS:
            assert error(backend.matmul(x, packed, p), x, weight, p) < bound, p


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("isa", ISAS)
def test_activations_in_8_bits(isa, case):
    weight = CASES[case]()
    backend = cpu.CpuBackend(isa, activation_bits=8)
    packed = backend.prepare(weight)
    for p in PRECISIONS:
        for rows, dtype in ((1 + p % 7, torch.float32), (7 + 3 * p, torch.bfloat16), (70, torch.float16)):
            x = torch.randn(rows, weight.in_features).to(dtype)
            y = backend.matmul(x, packed, p)
            assert y.dtype == dtype
            assert error(y, x, weight, p) < TOLERANCE_OF_8_BITS, (p, rows)
    for rows in (3, 17, 66, 150):
        x = torch.randn(rows, weight.in_features)
        for highest in (4, 6, 8):
            precision = torch.randint(1, 1 + highest, (rows,), dtype=torch.int32)
            assert error(backend.matmul(x, packed, precision), x, weight, precision) < TOLERANCE_OF_8_BITS, rows


@pytest.mark.parametrize("make", [affine, codebook])
@pytest.mark.parametrize("isa", ISAS)
def test_activations_in_8_bits_are_those_of_their_row(isa, make, monkeypatch):
    """Ten equal runs on any thread count; up to seven rows do not touch one another, nor does an infinite one."""
    monkeypatch.setattr(many_rows, "dense_is_faster", lambda *_: False)
    weight, backend = make(200, 640), cpu.CpuBackend(isa, activation_bits=8)
    packed = backend.prepare(weight)
    x = torch.randn(40, 640).bfloat16()
    for p in (2, 4, 6):
        runs = []
        for i in range(10):
            torch.set_num_threads(1 + i % 2)
            runs.append(backend.matmul(x, packed, p))
        assert all(torch.equal(runs[0], run) for run in runs)
        assert torch.equal(backend.matmul(x[:7], packed, p)[3], backend.matmul(x[3:4], packed, p)[0])
        bad = x.clone()
        bad[5, 100] = float("inf")
        y = backend.matmul(bad, packed, p)
        assert not y[5].isfinite().any()
        assert torch.equal(y[torch.arange(40) != 5], runs[0][torch.arange(40) != 5])


@pytest.mark.skipif(
    LIBRARY is None or not LIBRARY.fuses_bf16(native.ISAS.index("avx512")),
    reason="this machine has no products of bf16",
)
@pytest.mark.parametrize("case", CASES)
def test_many_rows_of_bf16(case, monkeypatch):
    """What a GEMM with bf16 weights gives, but no GEMM runs: precisions alone and together, all rows in one pass."""
    monkeypatch.setattr(many_rows, "dense_product", lambda *_: pytest.fail("a GEMM ran"))
    weight, backend = CASES[case](), cpu.CpuBackend("avx512", activation_bits=16)
    packed = backend.prepare(weight)
    for p in PRECISIONS:
        for rows in (17, 33, 130, 515):
            x = torch.randn(rows, weight.in_features).bfloat16()
            y = backend.matmul(x, packed, p)
            assert error(y, x, weight, p) < TOLERANCE[torch.bfloat16], (p, rows)
            assert torch.equal(y, backend.matmul(x, packed, p))
    x = torch.randn(600, weight.in_features).bfloat16()
    for highest in (4, 8):
        precision = torch.randint(1, 1 + highest, (600,), dtype=torch.int32)
        assert error(backend.matmul(x, packed, precision), x, weight, precision) < TOLERANCE[torch.bfloat16]
    x[7, 5] = float("nan")
    for p in (4, 8):
        y = backend.matmul(x, packed, p)
        assert not y[7].isfinite().any()
        assert y[torch.arange(600) != 7].isfinite().all()


@pytest.mark.skipif("avx2" not in ISAS, reason="this machine has no AVX2")
@pytest.mark.parametrize("case", CASES)
def test_many_rows_of_levels_in_bytes(case, monkeypatch):
    """Sums of 16 bits hold the largest that there can be; from eight rows on a row's result depends on no other row."""
    monkeypatch.setattr(many_rows, "dense_product", lambda *_: pytest.fail("a GEMM ran"))
    weight, backend = CASES[case](), cpu.CpuBackend("avx2", activation_bits=8)
    packed = backend.prepare(weight)
    for p in range(1, 5):
        x = torch.randn(40, weight.in_features)
        x[:, ::50] *= 20
        y = backend.matmul(x, packed, p)
        assert error(y, x, weight, p) < TOLERANCE_OF_8_BITS, p
        assert torch.equal(backend.matmul(x[3:12], packed, p), y[3:12]), p
    last = isinstance(weight.levels, CodebookLevels)
    for bits_of_planes in (-1, 0):
        one_level = PlaneWeight(torch.full_like(weight.planes, bits_of_planes), weight.in_features, weight.levels)
        packed = backend.prepare(one_level)
        for p in range(1, 5 if last else 7):
            for x in (torch.ones(9, weight.in_features), torch.rand(9, weight.in_features) + 1):
                for signed in (x, -x):
                    assert error(backend.matmul(signed, packed, p), signed, one_level, p) < TOLERANCE_OF_8_BITS, p


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("case", ["affine", "affine ragged", "affine symmetric", "affine bf16 levels", "affine 8 bits"])
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in LARGEST_EQUAL_BATCH])
def test_many_rows_of_levels_in_words(isa, case, bits, monkeypatch):
    """No GEMM runs; from where levels are made on, a row's result depends on no other row, infinite ones included."""
    monkeypatch.setattr(many_rows, "dense_product", lambda *_: pytest.fail("a GEMM ran"))
    weight, backend = CASES[case](), cpu.CpuBackend(isa, activation_bits=bits)
    packed = backend.prepare(weight)
    for p in PRECISIONS:
        for dtype, bound in TOLERANCE.items():
            x = torch.randn(70, weight.in_features).to(dtype)
            y = backend.matmul(x, packed, p)
            words = bits == 16 or p > (MOST_PLANES_OF_BYTES if isa == "avx2" else 3)
            assert error(y, x, weight, p) < (bound if words else TOLERANCE_OF_8_BITS), (p, dtype)
            torch.set_num_threads(2)
            assert torch.equal(y, backend.matmul(x, packed, p))
            torch.set_num_threads(1)
        if p > 1 and bits == 16:
            assert torch.equal(backend.matmul(x[10:27], packed, p), y[10:27])
    x[7, 5] = float("inf")
    bad = backend.matmul(x, packed, 8)
    assert not bad[7].isfinite().any()
    assert torch.equal(bad[torch.arange(70) != 7], y[torch.arange(70) != 7])
    x = torch.randn(600, weight.in_features)
    precision = torch.randint(1, 9, (600,), dtype=torch.int32)
    bound = TOLERANCE[torch.float32] if bits == 16 else TOLERANCE_OF_8_BITS
    assert error(backend.matmul(x, packed, precision), x, weight, precision) < bound


@pytest.mark.skipif("avx512" not in ISAS, reason="this machine has no products of bytes")
@pytest.mark.parametrize("make", [affine, codebook])
def test_8_bits_never_become_a_gemm(make, monkeypatch):
    monkeypatch.setattr(many_rows, "dense_product", lambda *_: pytest.fail("a GEMM ran"))
    weight, x = make(40, 256), torch.randn(300, 256).bfloat16()
    backend = cpu.CpuBackend("avx512", activation_bits=8)
    assert error(backend.matmul(x, backend.prepare(weight), 4), x, weight, 4) < TOLERANCE_OF_8_BITS


@pytest.mark.parametrize("make", [affine, codebook])
@pytest.mark.parametrize("isa", ISAS)
def test_higher_planes_do_not_matter(isa, make):
    weight = make(40, 416)
    backend = cpu.CpuBackend(isa, activation_bits=16)
    x = torch.randn(3, 416)
    first = backend.matmul(x, backend.prepare(weight), 3)
    other = torch.cat([weight.planes[:3], random_planes(40, 416)[3:]])
    assert torch.equal(first, backend.matmul(x, backend.prepare(PlaneWeight(other, 416, weight.levels)), 3))


@pytest.mark.parametrize("make", [affine, codebook])
@pytest.mark.parametrize("isa", ISAS)
def test_ten_runs_are_bit_identical_on_any_thread_count(isa, make):
    weight = make(200, 640)
    backend = cpu.CpuBackend(isa, activation_bits=16)
    packed = backend.prepare(weight)
    x = torch.randn(6, 640, dtype=torch.bfloat16)
    runs = []
    for i in range(10):
        torch.set_num_threads(1 + i % 2)
        backend.matmul(torch.randn(6, 640, dtype=torch.bfloat16), packed, 5)  # other tables in between
        runs.append(backend.matmul(x, packed, 5))
    assert all(torch.equal(runs[0], run) for run in runs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [32, 128, None])
def test_a_row_has_the_same_bits_among_up_to_seven(isa, dtype, group_size):
    """What speculative decoding rests on: a row verified with six others is the row that decodes alone."""
    weight = random_weight(100, 200, (2, 4, 8), group_size)
    backend, x = cpu.CpuBackend(isa=isa), torch.randn(7, 200).to(dtype)
    packed = backend.prepare(weight)
    for p in (2, 4, 8):
        alone = torch.cat([backend.matmul(row[None], packed, p) for row in x])
        for rows in range(2, 8):
            assert torch.equal(backend.matmul(x[:rows], packed, p), alone[:rows])


def test_changed_activations_are_seen():
    weight, backend = affine(32, 256), cpu.CpuBackend(activation_bits=16)
    packed = backend.prepare(weight)
    x = torch.randn(2, 256)
    backend.matmul(x, packed, 4)
    x[1, 255] += 1
    assert error(backend.matmul(x, packed, 4), x, weight, 4) < TOLERANCE[torch.float32]
    other = CASES["affine group 32"]()
    x = torch.randn(1, 224)
    wide = affine(20, 224)
    backend.matmul(x, backend.prepare(wide), 2)
    assert error(backend.matmul(x, backend.prepare(other), 2), x, other, 2) < TOLERANCE[torch.float32]


def test_rows_of_a_wider_tensor():
    weight, backend = codebook(20, 256), cpu.CpuBackend()
    packed = backend.prepare(weight)
    wide = torch.randn(4, 600)
    for x in (wide[:, 100:356], wide[:, 0:512:2], wide[:1, 3:259].expand(3, 256)):
        assert error(backend.matmul(x, packed, 4), x, weight, 4) < TOLERANCE[torch.float32]


def test_bad_arguments_are_refused_in_one_sentence():
    weight, backend = affine(32, 256), cpu.CpuBackend()
    weight = PlaneWeight(weight.planes, 256, AffineLevels(128, {p: weight.levels.scales[p] for p in (2, 4)}))
    packed = backend.prepare(weight)
    x = torch.randn(2, 256)
    for rows in (2, 100):
        with pytest.raises(AnybitsError, match="precision 3 is not stored: choose one of 2, 4"):
            backend.matmul(torch.randn(rows, 256), packed, 3)
        with pytest.raises(AnybitsError, match="250 columns where the weight has 256"):
            backend.matmul(torch.randn(rows, 250), packed, 2)
        with pytest.raises(AnybitsError, match="precision -1 is not stored"):
            backend.matmul(torch.randn(rows, 256), packed, torch.full((rows,), -1, dtype=torch.int32))
    for wrong in (torch.tensor([2]), torch.tensor([2, 2]), torch.tensor([2, 2, 2], dtype=torch.int32)):
        with pytest.raises(AnybitsError, match=r"must be int32 \[2\]"):
            backend.matmul(x, packed, wrong)
    torch.use_deterministic_algorithms(False)
    for cut in (10, 100, packed.blob.numel() - 1):
        short = cpu.PackedWeight(packed.blob[:cut].clone(), 32, 256, (2, 4))
        with pytest.raises(AnybitsError, match="packed weight"):
            backend.matmul(x, short, 2)


def test_forced_instruction_set(monkeypatch):
    weight = codebook(20, 64)
    for isa in ISAS:
        monkeypatch.setenv("ANYBITS_CPU_ISA", isa)
        assert native.header_of(cpu.CpuBackend().prepare(weight).blob).isa == native.ISAS.index(isa)
    monkeypatch.setenv("ANYBITS_CPU_ISA", "mmx")
    with pytest.raises(AnybitsError, match="instruction set 'mmx' does not run here: choose portable"):
        cpu.CpuBackend().prepare(weight)


def test_operator_is_registered_for_torch_compile():
    weight = affine(32, 256)
    backend = cpu.CpuBackend(activation_bits=16)
    packed = backend.prepare(weight)
    x = torch.randn(3, 256)
    arguments = (x, packed.blob, 32, 4, None, False)
    torch.library.opcheck(
        torch.ops.anybits.cpu_matmul.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    compiled = torch.compile(lambda x: backend.matmul(x, packed, 4) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), backend.matmul(x, packed, 4) * 2)


def test_gradients_reach_the_activations():
    for weight in (affine(32, 256), codebook(32, 256)):
        backend = cpu.CpuBackend()
        packed = backend.prepare(weight)
        x = torch.randn(3, 256, requires_grad=True)
        precision = torch.tensor([2, 4, 2], dtype=torch.int32)
        for wanted in (3, precision):
            mine = torch.autograd.grad(backend.matmul(x, packed, wanted).sum(), x)[0]
            reference = torch.autograd.grad(ReferenceBackend().matmul(x, weight, wanted).sum(), x)[0]
            assert (mine - reference).norm() < 2e-4 * reference.norm()  # the rounding of a codebook's centroids


def test_linear_layer_prefers_the_kernels():
    weight = affine(40, 256)
    layer = PlaneLinear(256, 40, 128, ModelPrecision(4))
    layer.set_plane_weight(weight)
    x = torch.randn(2, 3, 256)
    assert error(layer(x).flatten(0, 1), x.flatten(0, 1), weight, 4) < TOLERANCE[torch.float32]
    assert layer._backend.name == "cpu"


def test_without_the_library_the_reference_runs(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert "not compiled" in cpu.CpuBackend().unsupported(affine(8, 32), torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="the driver is built for Linux")
def test_arm_kernels_under_emulation():
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    done = subprocess.run([ROOT / "tests/native/run.sh", "arm"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 instruction sets, 0 failures" in done.stdout


def test_benchmark_yields_what_it_promises(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "_BEYOND_CACHE", 1 << 16)
    monkeypatch.setattr(benchmark, "_BANDWIDTH_BYTES", 1 << 20)
    file = tmp_path / "k.json"
    torch.use_deterministic_algorithms(False)
    timings = list(bench_kernels("96x160,64x64", "2,3", (1, 3), benchmark.TIMED, 32, rounds=1, json_file=file))
    assert len(timings) == 2 * 2 * 2 * 3
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    keys = "shape m precision method backend us bytes gb_per_s bandwidth_share speedup_vs_bf16".split()  # noqa: SIM905
    assert all(set(keys) <= set(line) for line in lines)
    assert lines[0]["shape"] == [96, 160]
    for wrong in ("0x4", "llama", "4096"):
        with pytest.raises(AnybitsError, match=f"shapes '{wrong}' are unknown"):
            parse_shapes(wrong)
