"""PlaneWeight: dequantize against loops in float64, and every wrong shape refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybits import bits
from anybits.errors import AnybitsError
from anybits.weight import AffineLevels, CodebookLevels, PlaneWeight, from_tensors
from conftest import random_weight

KINDS = ((None, 16), (32, 16), (32, 8))
"""Group size (None: codebooks) and bits of scales."""


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
                scales = [float(levels.scales[precision][i, n, g]) for i in range(precision)]
                if levels.scale_steps is not None:
                    scales = [s * float(levels.scale_steps[precision][i, n, 0]) for i, s in enumerate(scales)]
                if levels.offset_steps is not None:
                    value *= float(levels.offset_steps[precision][n, 0])
                out[n, k] = value + sum(s * (2 * bit - 1) for s, bit in zip(scales, b, strict=True))
    return out


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 4),
    k=st.integers(1, 100),
    top=st.integers(1, 8),
    group_size=st.sampled_from([None, 32, 64, -1]),
    symmetric=st.booleans(),
    scale_bits=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**31),
)
def test_dequantize_is_the_definition(
    n: int, k: int, top: int, group_size: int | None, symmetric: bool, scale_bits: int, seed: int
) -> None:
    weight = random_weight(n, k, tuple(range(1, top + 1)), group_size, symmetric, seed, scale_bits=scale_bits)
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
    for group_size, scale_bits in KINDS:
        weight = random_weight(6, 40, (2, 3), group_size, scale_bits=scale_bits)
        assert torch.equal(weight.rows(2, 5).dequantize(3), weight.dequantize(3)[2:5])


def test_bytes_are_those_of_the_planes_and_levels_read() -> None:
    weight = random_weight(8, 256, (2, 4), 128)
    assert weight.weight_bytes(2) == 2 * 8 * 256 // 8 + 2 * (2 + 1) * 8 * 2
    assert random_weight(8, 256, (2, 4), 128, symmetric=True).weight_bytes(4) == 4 * 8 * 256 // 8 + 2 * 4 * 8 * 2
    eight = random_weight(8, 256, (2, 4), 128, scale_bits=8)
    assert eight.weight_bytes(4) == 4 * 8 * 256 // 8 + (4 + 1) * 8 * (2 * 1 + 2)
    assert random_weight(8, 256, (3,)).weight_bytes(3) == 3 * 8 * 256 // 8 + 2 * 8 * 8


def test_tensors_round_trip() -> None:
    for group_size, scale_bits in KINDS:
        weight = random_weight(4, 64, (2, 3), group_size, scale_bits=scale_bits)
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


def test_levels_in_steps_are_complete_and_of_their_dtypes() -> None:
    good = random_weight(4, 64, (2, 3), 32, scale_bits=8)
    levels = good.levels
    assert isinstance(levels, AffineLevels)

    def refused(message: str, **changes: object) -> None:
        with pytest.raises(AnybitsError, match=message):
            PlaneWeight(good.planes, 64, replace(levels, **changes))

    floats = {p: t.half() for p, t in levels.scales.items()}
    other = {p: t.half() for p, t in levels.offsets.items()}
    refused("scales_2 has dtype torch.float16 where int8 is needed", scales=floats)
    refused("scales_2 has dtype torch.int8 where float16, bfloat16 or float32", scale_steps=None, offset_steps=None)
    refused("offset_steps_2 is stored without", scale_steps=None, scales=floats, offsets=other)
    refused("offset_steps_2 is missing", offset_steps=None)
    refused("offset_steps_2 is stored without", offsets=None)
    refused("scale_steps are stored for precisions .2. and scales", scale_steps={2: levels.scale_steps[2]})
    refused(r"scale_steps_2 has shape \[2, 4\]", scale_steps={p: t[..., 0] for p, t in levels.scale_steps.items()})
    refused(
        "offset_steps_2 has dtype torch.float64", offset_steps={p: t.double() for p, t in levels.offset_steps.items()}
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_levels_in_steps_expand_to_the_same_matrix(symmetric: bool, dtype: torch.dtype) -> None:
    weight = random_weight(5, 70, (2, 3), 32, symmetric, dtype=dtype, scale_bits=8)
    plain = replace(weight, levels=weight.levels.expanded())
    assert plain.levels.scale_bits == 16
    assert plain.levels.scales[2].dtype == torch.float32, (
        "random steps have more bits than float16 can hold a product of"
    )
    for p in (2, 3):
        assert torch.equal(plain.dequantize(p), weight.dequantize(p))


def test_group_of_the_last_columns_may_be_short() -> None:
    weight = random_weight(2, 33, (2,), 32)
    assert isinstance(weight.levels, AffineLevels)
    assert weight.levels.scales[2].shape == (2, 2, 2)
    assert bits.words(33) == 2
