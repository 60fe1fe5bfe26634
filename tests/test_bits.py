"""The bit order, against arithmetic written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybits import bits
from anybits.errors import AnybitsError


@given(st.integers(1, 200), st.integers(1, 4), st.integers(0, 2**31))
def test_pack_puts_column_j_at_bit_j_modulo_32(columns: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = bits.pack(plane)
    assert packed.shape == (rows, bits.words(columns))
    for row in range(rows):
        for word in range(bits.words(columns)):
            expected = sum(int(plane[row, 32 * word + j]) << j for j in range(min(32, columns - 32 * word)))
            assert int(packed[row, word]) % 2**32 == expected
    assert torch.equal(bits.unpack(packed, columns), plane)


@given(st.integers(1, 70), st.integers(1, 8), st.integers(0, 2**31))
def test_codes_survive_and_plane_0_is_most_significant(columns: int, precision: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**precision, (3, columns), generator=generator, dtype=torch.uint8)
    planes = bits.codes_to_planes(codes, precision)
    for lower in range(1, precision + 1):
        assert torch.equal(bits.planes_to_codes(planes, lower, columns), codes >> (precision - lower))


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(AnybitsError, match="uint8 or bool"):
        bits.pack(torch.zeros(3))
    with pytest.raises(AnybitsError, match="33 columns"):
        bits.unpack(torch.zeros(2, 1, dtype=torch.int32), 33)


def test_a_transposed_single_row_packs_like_any_other() -> None:
    row = torch.arange(32, dtype=torch.uint8)[:, None].bitwise_and(1).T
    assert torch.equal(bits.unpack(bits.pack(row), 32), row)
