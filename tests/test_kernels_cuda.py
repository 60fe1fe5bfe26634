"""The CUDA backend on a real GPU: the whole matrix, CUDA graphs, streams, torch.compile. `make test-gpu` runs it."""

import itertools
import os

import pytest
import torch

from anybits import bits
from anybits.errors import AnybitsError
from anybits.kernels.backend import choose
from anybits.kernels.cuda import backend as cuda
from anybits.kernels.cuda import gpu as gpus
from anybits.kernels.cuda import plan
from anybits.linear import PlaneLinear
from anybits.precision import ModelPrecision
from anybits.weight import AffineLevels, CodebookLevels, PlaneWeight, group_count

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {F32: 2.5e-4, BF16: 3e-3, F16: 5e-4}
PRECISIONS = tuple(range(1, 9))
GROUPS = (32, 64, 96, 128, 256, -1, None)


def reason():
    """Why these tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is here"
    return cuda.toolchain.unsupported(torch.cuda.get_device_capability())


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(reason() is not None, reason=f"CUDA backend: {reason()}")]


@pytest.fixture(autouse=True)
def fresh():
    """Fill every torch.empty with NaN, and draw fresh inputs."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    yield
    torch.use_deterministic_algorithms(False)


def weight_of(n, k, group, symmetric=False, dtype=F16):
    precisions = PRECISIONS[1:] if group is None else PRECISIONS
    planes = torch.randint(-(2**31), 2**31 - 1, (8, n, bits.words(k)), dtype=torch.int32)
    if group is None:
        levels = CodebookLevels({p: torch.randn(n, 2**p).to(dtype) for p in precisions})
    else:
        groups = group_count(group, k)
        scales = {p: (torch.rand(p, n, groups) * 0.1 + 0.01).to(dtype) for p in precisions}
        offsets = None if symmetric else {p: (torch.randn(n, groups) * 0.05).to(dtype) for p in precisions}
        levels = AffineLevels(group, scales, offsets)
    return PlaneWeight(planes, k, levels).to("cuda")


def error(y, x, weight, precision):
    rows = torch.full((x.shape[0],), precision) if isinstance(precision, int) else precision.cpu()
    wanted = torch.empty(y.shape, dtype=torch.float64, device=y.device)
    for p in rows.unique().tolist():
        chosen = (rows == p).nonzero()[:, 0].to(y.device)
        wanted[chosen] = x[chosen].double() @ weight.dequantize(p).double().t()
    return ((y.double() - wanted).norm() / wanted.norm()).item()


def mixed_rows(m, weight):
    stored = torch.tensor(weight.precisions, dtype=torch.int32)
    return stored[torch.randint(len(stored), (m,))].cuda()


def compile_ahead(shape, rows):
    """Compile what products of `rows` rows with a weight need, on all cores: one by one it takes half an hour."""
    gpu, tuning, kernels = gpus.of(0), plan.active_tuning(), set()
    for dtype, p, m in itertools.product(range(3), (*shape.precisions, 0), rows):
        planned = plan.product(shape, m, dtype, p, gpu.device, tuning)
        for count in {m, m % planned.rows_at_once or m}:
            planned = plan.product(shape, count, dtype, p, gpu.device, tuning)
            kernels |= {planned.launch.kernel, planned.reduction(shape, count, dtype).kernel}
    cuda.toolchain.compile_ahead(kernels, gpu.arch)


ROWS = (1, 2, 3, 5, 8, 16, 33, 64)


@pytest.mark.parametrize("kernel", ["", "simple"])
@pytest.mark.parametrize("group", GROUPS)
def test_products(group, kernel, monkeypatch):
    monkeypatch.setenv("ANYBITS_CUDA_KERNEL", kernel)
    backend = cuda.CudaBackend()
    for n, k in ((70, 1000), (512, 2048)):
        for symmetric in (False, True) if group is not None else (False,):
            weight = weight_of(n, k, group, symmetric)
            prepared = backend.prepare(weight)
            compile_ahead(prepared.shape, ROWS)
            for dtype, bound in TOLERANCE.items():
                for m in ROWS:
                    x = torch.randn(m, k, device="cuda").to(dtype)
                    for p in (*weight.precisions, mixed_rows(m, weight)):
                        y = backend.matmul(x, prepared, p)
                        assert y.dtype == dtype
                        assert y.shape == (m, n)
                        assert error(y, x, weight, p) < bound, (n, k, symmetric, dtype, m, p)


@pytest.mark.parametrize("levels", [BF16, F32])
@pytest.mark.parametrize("group", [128, None])
def test_other_levels(group, levels):
    weight = weight_of(100, 700, group, dtype=levels)
    prepared = cuda.prepare(weight)
    x = torch.randn(3, 700, device="cuda")
    for p in weight.precisions:
        assert error(cuda.CudaBackend().matmul(x, prepared, p), x, weight, p) < TOLERANCE[F32] * 2


@pytest.mark.parametrize("group", [128, None])
def test_many_rows_become_a_dense_product(group):
    weight = weight_of(300, 700, group)
    prepared = cuda.prepare(weight)
    for dtype in (F16, BF16):
        x = torch.randn(300, 700, device="cuda").to(dtype)
        for p in (3, mixed_rows(300, weight)):
            assert error(cuda.CudaBackend().matmul(x, prepared, p), x, weight, p) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("group", [128, None])
def test_ten_runs_give_the_same_bits(group):
    weight = weight_of(1000, 8192, group)
    prepared = cuda.prepare(weight)
    for m, p in ((1, 2), (1, 5), (12, 4), (12, mixed_rows(12, weight))):
        x = torch.randn(m, 8192, device="cuda").bfloat16()
        first = cuda.CudaBackend().matmul(x, prepared, p)
        for _ in range(9):
            assert torch.equal(cuda.CudaBackend().matmul(x, prepared, p), first)


@pytest.mark.parametrize("group", [128, None])
def test_graph_replay_takes_new_inputs_and_precisions(group):
    weight = weight_of(200, 512, group)
    prepared, backend = cuda.prepare(weight), cuda.CudaBackend()
    x, rows = torch.randn(4, 512, device="cuda").half(), mixed_rows(4, weight)
    backend.matmul(x, prepared, rows), backend.matmul(x, prepared, 3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed, uniform = backend.matmul(x, prepared, rows), backend.matmul(x, prepared, 3)
    for _ in range(3):
        x.copy_(torch.randn(4, 512, device="cuda"))
        rows.copy_(mixed_rows(4, weight))
        graph.replay()
        torch.cuda.synchronize()
        assert error(mixed, x, weight, rows) < TOLERANCE[F16]
        assert error(uniform, x, weight, 3) < TOLERANCE[F16]


@pytest.mark.parametrize("group", [128, 32, -1, None])
def test_one_launch_gives_the_bits_of_separate_ones(group):
    weights = [weight_of(n, 2048, group) for n in (2048, 500, 33)]
    prepared, backend = [cuda.prepare(weight) for weight in weights], cuda.CudaBackend()
    for m in (1, 2, 4, 9, 16, 40):
        x = torch.randn(m, 2048, device="cuda").bfloat16()
        for p in (2, 3, 4, 8, mixed_rows(m, weights[0])):
            for weight, one, y in zip(weights, prepared, backend.products(x, prepared, p), strict=True):
                assert torch.equal(y, backend.matmul(x, one, p)), (m, p)
                assert error(y, x, weight, p) < TOLERANCE[BF16]


def test_capturing_an_unloaded_kernel_is_refused_in_a_sentence(monkeypatch):
    weight = weight_of(48, 512, 128)
    prepared, x = cuda.prepare(weight), torch.randn(1, 512, device="cuda").half()
    monkeypatch.setattr(cuda.toolchain, "_loaded", {})
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(AnybitsError, match="before capturing"), torch.cuda.graph(graph):
        cuda.CudaBackend().matmul(x, prepared, 2)


def test_runs_on_the_current_stream():
    weight = weight_of(2000, 4096, 128)
    prepared, stream = cuda.prepare(weight), torch.cuda.Stream()
    x = torch.zeros(1, 4096, device="cuda")
    cuda.CudaBackend().matmul(x, prepared, 4)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.normal_()
        y = cuda.CudaBackend().matmul(x, prepared, 4)
    stream.synchronize()
    assert error(y, x, weight, 4) < TOLERANCE[F32]


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="one GPU is here")
def test_runs_on_the_tensors_own_device():
    weight = weight_of(64, 512, 128).to("cuda:1")
    x = torch.randn(1, 512, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert error(cuda.CudaBackend().matmul(x, cuda.prepare(weight), 2), x, weight, 2) < TOLERANCE[F32]


def test_compiles_whole_and_passes_opcheck():
    weight = weight_of(96, 256, 128)
    layer = PlaneLinear(256, 96, 128, ModelPrecision(3))
    layer.set_plane_weight(weight)
    x = torch.randn(2, 5, 256, device="cuda")
    wanted = layer(x)
    assert layer._backend.name == "cuda"
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), wanted)
    prepared = cuda.prepare(weight)
    tensors = (prepared.planes, prepared.levels, prepared.walsh, prepared.row_scale, prepared.shape.ints())
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.anybits.cuda_matmul, (x[0], *tensors, 3, None), test_utils=utilities)


def test_gradients_reach_x():
    weight = weight_of(96, 256, 128)
    prepared = cuda.prepare(weight)
    x = torch.randn(3, 256, device="cuda", requires_grad=True)
    for p in (2, mixed_rows(3, weight)):
        (mine,) = torch.autograd.grad(cuda.CudaBackend().matmul(x, prepared, p).sum(), x)
        rows = [p] * 3 if isinstance(p, int) else p.tolist()
        wanted = torch.stack([weight.dequantize(q).sum(0) for q in rows])
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3)


def test_bad_input_is_named():
    weight = weight_of(32, 256, 128)
    prepared, backend = cuda.prepare(weight), cuda.CudaBackend()
    assert choose(weight, torch.device("cuda")).name == "cuda"
    x = torch.randn(2, 256, device="cuda")
    for bad, precision, said in (
        (x, 9, "precision 9 is not stored"),
        (x[:, :200], 2, r"shape \[2, 200\] where \[M, 256\]"),
        (x.double(), 2, "float64 where float16, bfloat16 or float32"),
        (x.cpu(), 2, "activations lie on cpu"),
        (x, torch.ones(3, dtype=torch.int32, device="cuda"), r"must be int32 \[2\]"),
    ):
        with pytest.raises(AnybitsError, match=said):
            backend.matmul(bad, prepared, precision)
