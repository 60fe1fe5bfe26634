"""The active precision: scopes, rows, and a layer's output under them."""

import threading

import pytest
import torch

from anybits.errors import AnybitsError
from anybits.linear import PlaneLinear, PlaneStack
from anybits.precision import ModelPrecision, active, per_row, precision
from conftest import random_weight


def layer(group_size: int | None = 32) -> PlaneLinear:
    made = PlaneLinear(64, 5, group_size, ModelPrecision(4), bias=True)
    made.set_plane_weight(random_weight(5, 64, (2, 3, 4), group_size))
    assert made.bias is not None
    torch.nn.init.normal_(made.bias)
    return made


def test_scopes_nest_and_end() -> None:
    default = ModelPrecision(4)
    assert active(default) == 4
    with precision(3):
        with precision(2):
            assert active(default) == 2
        assert active(default) == 3
    assert active(default) == 4


def test_a_scope_belongs_to_its_thread() -> None:
    seen: list[object] = []
    with precision(2):
        thread = threading.Thread(target=lambda: seen.append(active(ModelPrecision(4))))
        thread.start()
        thread.join()
    assert seen == [4]


def test_rows_are_spread_over_the_tokens_of_a_sequence() -> None:
    rows = torch.tensor([2, 4], dtype=torch.int32)
    spread = per_row(rows, torch.Size([2, 3]))
    assert isinstance(spread, torch.Tensor)
    assert spread.tolist() == [2, 2, 2, 4, 4, 4]
    with pytest.raises(AnybitsError, match="2 entries"):
        per_row(rows, torch.Size([3, 3]))


@pytest.mark.parametrize("group_size", [32, None])
def test_each_row_runs_at_its_own_precision(group_size: int | None) -> None:
    made = layer(group_size)
    x = torch.randn(3, 2, 64)
    with precision(torch.tensor([4, 2, 3], dtype=torch.int32)):
        mixed = made(x)
    for row, p in enumerate((4, 2, 3)):
        expected = x[row].double() @ made.plane_weight.dequantize(p).double().T + made.bias.double()
        # Against the size of what is added up, since single sums may cancel.
        size = (x[row].double().abs() @ made.plane_weight.dequantize(p).double().abs().T).norm()
        assert (mixed[row].double() - expected).norm() < 1e-4 * size


def test_a_precision_that_is_not_stored_is_refused() -> None:
    with precision(5), pytest.raises(AnybitsError, match="precision 5 is not stored: choose one of 2, 3, 4"):
        layer()(torch.randn(1, 64))


def test_levels_keep_their_dtype_when_the_model_changes_its_own() -> None:
    made = layer()
    before = made.plane_weight.dequantize(3)
    made.to(torch.bfloat16)
    assert made.scales_3.dtype == torch.float16
    assert made.planes.dtype == torch.int32
    assert made.bias is not None
    assert made.bias.dtype == torch.bfloat16
    assert torch.equal(made.plane_weight.dequantize(3), before)
    assert made(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_stack_gives_one_expert_at_the_active_precision() -> None:
    stack = PlaneStack(torch.Size([3, 5, 64]), 32, ModelPrecision(3), torch.float32)
    weight = random_weight(15, 64, (2, 3), 32)
    stack.set_plane_weight(weight)
    assert torch.equal(stack[1], weight.dequantize(3)[5:10])
    with precision(2):
        assert torch.equal(stack[torch.tensor(2)], weight.dequantize(2)[10:])
    with precision(torch.tensor([2, 3])), pytest.raises(AnybitsError, match="one precision for the whole batch"):
        stack[0]


def test_a_layer_without_a_weight_says_so() -> None:
    empty = PlaneLinear(64, 5, 32, ModelPrecision(4))
    with pytest.raises(AnybitsError, match="no weight yet"):
        empty(torch.randn(1, 64))
    with pytest.raises(AnybitsError, match="where the layer is 5 x 64"):
        empty.set_plane_weight(random_weight(6, 64, (2,), 32))
