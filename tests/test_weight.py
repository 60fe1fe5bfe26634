"""PlaneWeight: dequantize against loops in float64, and every wrong shape refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybits import bits
from anybits.errors import AnybitsError
from anybits.weight import AffineLevels, CodebookLevels, PlaneWeight, from_tensors
from conftest import random_weight


def oracle(weight: PlaneWeight, precision: int) -> torch.Tensor:
    """Return the matrix in float64, entry by entry from the definition."""
    out = torch.empty(weight.out_features, weight.in_features, dtype=torch.float64)
    levels = weight.levels
    for n in range(weight.out_features):
        for k in range(weight.in_features):
            b = [(int(weight.planes[i, n, k // 32]) >> (k % 32)) & 1 for i in range(precision)]
            if isinstance(levels, CodebookLevels):
                index = sum(bit << (precision - 1 - i) for i, bit in enumerate(b))
                out[n, k] = levels.centroids[precision][n, index].double()
            else:
                g = 0 if levels.group_size == -1 else k // levels.group_size
                value = 0.0 if levels.offsets is None else float(levels.offsets[precision][n, g])
                out[n, k] = value + sum(
                    float(levels.scales[precision][i, n, g]) * (2 * bit - 1) for i, bit in enumerate(b)
                )
    return out


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 4),
    k=st.integers(1, 100),
    top=st.integers(1, 8),
    group_size=st.sampled_from([None, 32, 64, -1]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_dequantize_is_the_definition(
    n: int, k: int, top: int, group_size: int | None, symmetric: bool, seed: int
) -> None:
    weight = random_weight(n, k, tuple(range(1, top + 1)), group_size, symmetric, seed)
    for p in weight.precisions:
        torch.testing.assert_close(weight.dequantize(p).double(), oracle(weight, p), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("group_size", [None, 32])
def test_planes_above_the_precision_do_not_matter(group_size: int | None) -> None:
    weight = random_weight(5, 70, (2, 3, 5), group_size)
    garbage = weight.planes.clone()
    garbage[3:] = torch.randint(-(2**31), 2**31 - 1, garbage[3:].shape, dtype=torch.int32)
    poisoned = PlaneWeight(garbage, 70, weight.levels)
    assert torch.equal(poisoned.dequantize(3), weight.dequantize(3))
    assert torch.equal(weight.up_to(3).dequantize(3), weight.dequantize(3))


def test_padding_bits_do_not_matter() -> None:
    weight = random_weight(5, 33, (2, 3), 32)
    dirty = weight.planes.clone()
    dirty[..., 1] |= -2  # all bits of the last word but column 32
    assert torch.equal(PlaneWeight(dirty, 33, weight.levels).dequantize(3), weight.dequantize(3))


def test_rows_are_the_rows() -> None:
    for group_size in (None, 32):
        weight = random_weight(6, 40, (2, 3), group_size)
        assert torch.equal(weight.rows(2, 5).dequantize(3), weight.dequantize(3)[2:5])


def test_bytes_are_those_of_the_planes_and_levels_read() -> None:
    weight = random_weight(8, 256, (2, 4), 128)
    assert weight.weight_bytes(2) == 2 * 8 * 256 // 8 + 2 * (2 + 1) * 8 * 2
    assert random_weight(8, 256, (2, 4), 128, symmetric=True).weight_bytes(4) == 4 * 8 * 256 // 8 + 2 * 4 * 8 * 2
    assert random_weight(8, 256, (3,)).weight_bytes(3) == 3 * 8 * 256 // 8 + 2 * 8 * 8


def test_tensors_round_trip() -> None:
    for group_size in (None, 32):
        weight = random_weight(4, 64, (2, 3), group_size)
        again = from_tensors(weight.tensors(), 64, group_size)
        assert torch.equal(again.dequantize(2), weight.dequantize(2))
    with pytest.raises(AnybitsError, match="no planes"):
        from_tensors({}, 64, None)
    with pytest.raises(AnybitsError, match="names no stored tensor"):
        from_tensors({"zeros": torch.zeros(1)}, 64, None)


def test_wrong_shapes_are_refused_in_one_sentence() -> None:
    good = random_weight(4, 64, (2, 3), 32)
    assert isinstance(good.levels, AffineLevels)
    with pytest.raises(AnybitsError, match="words a row where 100 input features"):
        PlaneWeight(good.planes, 100, good.levels)
    with pytest.raises(AnybitsError, match="planes must be int32"):
        PlaneWeight(good.planes.long(), 64, good.levels)
    with pytest.raises(AnybitsError, match="scales_2 has shape"):
        PlaneWeight(good.planes, 64, AffineLevels(64, good.levels.scales, good.levels.offsets))
    with pytest.raises(AnybitsError, match="group size 48 does not fit"):
        PlaneWeight(good.planes, 64, AffineLevels(48, good.levels.scales))
    with pytest.raises(AnybitsError, match="beside 2 planes"):
        PlaneWeight(good.planes[:2], 64, good.levels)
    with pytest.raises(AnybitsError, match="precision 4 is not stored: choose one of 2, 3"):
        good.dequantize(4)
    with pytest.raises(AnybitsError, match="dtype"):
        PlaneWeight(good.planes, 64, CodebookLevels({2: torch.zeros(4, 4, dtype=torch.float64)}))


def test_group_of_the_last_columns_may_be_short() -> None:
    weight = random_weight(2, 33, (2,), 32)
    assert isinstance(weight.levels, AffineLevels)
    assert weight.levels.scales[2].shape == (2, 2, 2)
    assert bits.words(33) == 2
