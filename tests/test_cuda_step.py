"""The small kernels of a captured decode step, emulated, beside what transformers computes."""

import os
import shutil
import sys

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from anybits.kernels.cuda import gpu as gpus
from anybits.kernels.cuda import plan
from anybits.kernels.cuda import step as small
from cuda_emulation.emulator import COMPILER, Emulator

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None or sys.platform != "linux", reason=f"the emulator needs {COMPILER} on Linux"
)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CLOSE = {BF16: {"rtol": 8e-3, "atol": 1e-3}, F16: {"rtol": 1e-3, "atol": 1e-3}, F32: {"rtol": 1e-5, "atol": 1e-5}}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def reads(emulator, monkeypatch):
    """The emulator in the driver's place; give it what kernels may read and, as `writes=`, what else they may write."""
    readable, writable, empty_like = [], [], torch.empty_like

    def poisoned(like):
        writable.append(empty_like(like).fill_(torch.nan))
        return writable[-1]

    def begin(*tensors, writes=()):
        readable[:], writable[:] = tensors, list(writes)

    monkeypatch.setattr(torch, "empty_like", poisoned)
    monkeypatch.setattr(gpus, "of", lambda index: gpus.Gpu(0, 90, plan.Device(3, 227 << 10)))
    monkeypatch.setattr(
        gpus, "launch", lambda _, launch, arguments: emulator.launch(launch, arguments, readable, writable)
    )
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    return begin


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("shape", [(1, 1, 100), (2, 3, 2048), (5, 31)])
def test_norms(reads, dtype, shape):
    x = torch.randn(shape).to(dtype) * 3
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    norm.weight.data.copy_(torch.rand(shape[-1]) + 0.5)
    reads(x, norm.weight)
    torch.testing.assert_close(small.rms_norm(x, norm.weight, 1e-5), norm(x).detach(), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_gated_activations(reads, dtype):
    gate, up = (torch.randn(2, 1, 777).to(dtype) * 20 for _ in range(2))
    reads(gate, up)
    y = small.silu_mul(gate, up)
    torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("each", [False, True])
def test_rotations_go_into_their_slots(reads, dtype, each):
    batch, rows, heads, kv_heads, dim, value_dim, size = 2, 3, 6, 2, 32, 24, 11
    query, key = torch.randn(batch, rows, heads * dim).to(dtype), torch.randn(batch, rows, kv_heads * dim).to(dtype)
    value = torch.randn(batch, rows, kv_heads * value_dim).to(dtype)
    turns = torch.rand(batch if each else 1, rows, dim // 2).repeat(1, 1, 2) * 6
    cos, sin = turns.cos().to(dtype), turns.sin().to(dtype)
    slots = torch.tensor([9, 10, 0])
    keys, values = (
        torch.randn(batch, kv_heads, size, dim).to(dtype),
        torch.randn(batch, kv_heads, size, value_dim).to(dtype),
    )
    wanted_keys, wanted_values = keys.clone(), values.clone()
    reads(query, key, value, cos, sin, slots, writes=(keys, values))
    rotated = small.rotate_into((query, key, value), (cos, sin), (keys, values), slots)
    q, k = (t.view(batch, rows, -1, dim).transpose(1, 2) for t in (query, key))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    wanted_keys.index_copy_(2, slots, k)
    wanted_values.index_copy_(2, slots, value.view(batch, rows, kv_heads, value_dim).transpose(1, 2))
    torch.testing.assert_close(rotated, q, **CLOSE[dtype])
    torch.testing.assert_close(keys, wanted_keys, **CLOSE[dtype])
    assert torch.equal(values, wanted_values)


def test_they_are_used_only_where_a_step_was_checked():
    x = torch.ones(1, 4)
    assert not small.usable(x)
    with small.small_kernels(), torch.no_grad():
        assert not small.usable(x)  # on a CPU
