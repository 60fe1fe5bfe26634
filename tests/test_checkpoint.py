"""Files: bytes read at a maximum precision, golden bytes, and everything that must be refused."""

import contextlib
import json
import struct
import zlib
from pathlib import Path

import pytest
import torch

from anybits.bits import codes_to_planes
from anybits.checkpoint import CheckpointReader, CheckpointWriter, checkpoint_files, read_stored_config
from anybits.config import StoredConfig
from anybits.errors import AnybitsError
from anybits.weight import AffineLevels, PlaneWeight
from conftest import random_weight

N, K = 24, 96
METHODS = {"anybcq": 32, "anybcq in 8 bits": 32, "any-precision": None}


def write(folder: Path, method: str = "anybcq", precisions: tuple[int, ...] = (2, 3, 5)) -> PlaneWeight:
    """Write a checkpoint with one module `a.b` and one other tensor; return the module's weight."""
    group_size, scale_bits = METHODS[method], 8 if method.endswith("8 bits") else 16
    weight = random_weight(N, K, precisions, group_size, scale_bits=scale_bits)
    symmetric = False if group_size else None
    stored = StoredConfig(method.split()[0], precisions, ("a.*",), group_size, symmetric, scale_bits=scale_bits)
    writer = CheckpointWriter(folder)
    tensors = {f"a.b.{name}": t for name, t in weight.tensors().items()} | {"a.b.weight": torch.empty(0)}
    writer.write_shard("block-00000", tensors)
    writer.write_shard("rest", {"norm.weight": torch.ones(8)})
    writer.finish(["block-00000", "rest"], stored, {"model_type": "llama"})
    return weight


def read(folder: Path, max_precision: int | None = None) -> tuple[PlaneWeight, CheckpointReader]:
    stored = read_stored_config(folder)
    precisions = tuple(p for p in stored.precisions if max_precision is None or p <= max_precision)
    reader = CheckpointReader(checkpoint_files(folder), stored)
    reader.verify_unquantized()
    reader.bytes_read = 0
    reader.check("a.b", N, K, precisions)
    return reader.read("a.b", K, precisions), reader


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_is_read(tmp_path: Path, method: str) -> None:
    weight = write(tmp_path, method)
    again, _ = read(tmp_path)
    for name, tensor in weight.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


@pytest.mark.parametrize("method", METHODS)
def test_a_maximum_precision_reads_only_its_bytes(tmp_path: Path, method: str) -> None:
    weight = write(tmp_path, method)
    planes = N * (K // 32) * 4
    for p in (2, 3, 5):
        again, reader = read(tmp_path, p)
        levels = sum(
            t.numel() * t.element_size() for q in (2, 3, 5) if q <= p for t in weight.levels.tensors(q).values()
        )
        assert reader.bytes_read == p * planes + levels
        assert again.planes.shape[0] == p
        assert torch.equal(again.dequantize(p), weight.dequantize(p))


def test_a_lower_precision_survives_garbage_in_the_planes_above(tmp_path: Path) -> None:
    """The bytes above the maximum precision are not even looked at, so damage there goes unnoticed."""
    weight = write(tmp_path)
    path = tmp_path / "model-block-00000.safetensors"
    data = bytearray(path.read_bytes())
    start, stop = planes_place(data)
    data[start + (stop - start) * 3 // 5 : stop] = bytes((stop - start) * 2 // 5)
    path.write_bytes(data)
    assert torch.equal(read(tmp_path, 3)[0].dequantize(3), weight.dequantize(3))
    with pytest.raises(AnybitsError, match="corrupted: the bytes of a.b.planes"):
        read(tmp_path)


def planes_place(data: bytes) -> tuple[int, int]:
    """Return the first and last byte of a.b.planes in a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    first, last = json.loads(data[8 : 8 + length])["a.b.planes"]["data_offsets"]
    return 8 + length + first, 8 + length + last


def test_the_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    """Golden bytes, the example of docs/format.md: whoever changes them changes the format and its version."""
    codes = (torch.arange(2 * 40).view(2, 40) % 4).to(torch.uint8)
    levels = AffineLevels(32, {2: torch.tensor([[[1.0, 0.5]] * 2, [[0.25, 0.125]] * 2]).half()})
    weight = PlaneWeight(codes_to_planes(codes, 2), 40, levels)
    CheckpointWriter(tmp_path).write_shard("block-00000", {f"a.{k}": t for k, t in weight.tensors().items()})
    data = (tmp_path / "model-block-00000.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    body = data[8 + length :]
    # Codes run 0, 1, 2, 3, 0, ...: plane 0 (their high bits) is 0011 repeated, plane 1 is 0101 repeated, and
    # the second word of a row holds columns 32 to 39 in its lowest byte.
    row_0, row_1 = "cccccccccc000000", "aaaaaaaaaa000000"
    assert body[:32].hex() == row_0 * 2 + row_1 * 2
    assert body[32:].hex() == "003c0038" * 2 + "00340030" * 2
    header = json.loads(data[8 : 8 + length])
    assert header["a.planes"] == {"dtype": "I32", "shape": [2, 2, 2], "data_offsets": [0, 32]}
    assert header["a.scales_2"] == {"dtype": "F16", "shape": [2, 2, 2], "data_offsets": [32, 48]}
    sums = json.loads(header["__metadata__"]["anybits.crc32"])
    assert sums == {
        "a.planes": [zlib.crc32(body[:16]), zlib.crc32(body[16:32])],
        "a.scales_2": [zlib.crc32(body[32:])],
    }


def test_the_bytes_of_levels_in_steps_are_those_of_the_format(tmp_path: Path) -> None:
    """Golden bytes, the second example of docs/format.md: the matrix is that of the first."""
    codes = (torch.arange(2 * 40).view(2, 40) % 4).to(torch.uint8)
    scales = torch.tensor([[[64, 32]] * 2, [[64, 32]] * 2], dtype=torch.int8)
    steps = torch.tensor([[[1 / 64]] * 2, [[1 / 256]] * 2]).half()
    weight = PlaneWeight(codes_to_planes(codes, 2), 40, AffineLevels(32, {2: scales}, None, {2: steps}))
    CheckpointWriter(tmp_path).write_shard("block-00000", {f"a.{k}": t for k, t in weight.tensors().items()})
    data = (tmp_path / "model-block-00000.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

    def stored(name: str) -> str:
        first, last = header[name]["data_offsets"]
        return body[first:last].hex()

    assert header["a.scales_2"]["dtype"] == "I8"
    assert header["a.scale_steps_2"] | {"data_offsets": 0} == {"dtype": "F16", "shape": [2, 2, 1], "data_offsets": 0}
    assert stored("a.scales_2") == "4020" * 4
    assert stored("a.scale_steps_2") == "0024" * 2 + "001c" * 2
    wanted = [-1.25, -0.75, 0.75, 1.25]
    assert weight.dequantize(2)[0, :4].tolist() == wanted
    assert weight.dequantize(2)[1, 32:36].tolist() == [w / 2 for w in wanted]


@pytest.mark.parametrize("method", METHODS)
def test_every_flipped_bit_of_the_data_is_noticed(tmp_path: Path, method: str) -> None:
    write(tmp_path, method)
    path = tmp_path / "model-block-00000.safetensors"
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    for place in range(8 + length, len(good), 37):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        with pytest.raises(AnybitsError, match="corrupted"):
            read(tmp_path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("model-block-00000.safetensors", "model-rest.safetensors"):
        path = tmp_path / name
        good = path.read_bytes()
        for keep in (0, 4, 8, 100, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:keep])
            with pytest.raises(AnybitsError, match="truncated or corrupted"):
                read(tmp_path)
        path.write_bytes(good)
    read(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_damaged_headers_never_raise_anything_else(tmp_path: Path, method: str) -> None:
    write(tmp_path, method)
    path = tmp_path / "model-block-00000.safetensors"
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        bad = bytearray(good)
        place = int(torch.randint(0, 8 + length, (1,), generator=generator))
        bad[place] = int(torch.randint(0, 256, (1,), generator=generator))
        path.write_bytes(bad)
        with contextlib.suppress(AnybitsError):  # anything else fails the test
            read(tmp_path)


def edit(path: Path, **changes: object) -> None:
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 7}, "format version 7, and this anybits reads versions 1 and 2: install"),
        ({"format_version": 0}, "format version 0"),
        ({"format_version": None}, "format version None"),
        ({"format_version": 2, "scale_bits": 8}, "a.b.scales_2 is torch.float16 .* where torch.int8"),
        ({"format_version": 2, "scale_bits": 12}, "scale_bits 12 does not fit"),
        ({"scale_bits": 8}, "format version 1 and scale_bits 8, which only version 2 has"),
        ({"group_size": 64}, "a.b.scales_2 is .* where .* is needed"),
        ({"group_size": 20}, "group size 20 does not fit"),
        ({"precisions": [2, 3, 4, 5]}, "no a.b.scales_4"),
        ({"precisions": [2, 3]}, r"a.b.planes is torch.int32 \[5, 24, 3\]"),
        ({"method": "any-precision", "group_size": None}, "no a.b.centroids_2"),
    ],
)
def test_a_config_that_does_not_fit_the_files_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(AnybitsError, match=message):
        read(tmp_path)


def test_what_an_older_anybits_reads_keeps_its_version(tmp_path: Path) -> None:
    """Version 1 knew no scale_bits; version 2 is refused there by its number, in one sentence."""
    write(tmp_path / "16")
    write(tmp_path / "8", "anybcq in 8 bits")
    old, new = (
        json.loads((tmp_path / bits / "config.json").read_text())["quantization_config"] for bits in ("16", "8")
    )
    assert old["format_version"] == 1
    assert "scale_bits" not in old
    assert new["format_version"] == 2
    assert new["scale_bits"] == 8
    assert read_stored_config(tmp_path / "8").up_to(3).scale_bits == 8
    edit(tmp_path / "8" / "config.json", scale_bits=16)
    with pytest.raises(AnybitsError, match=r"a.b.scales_2 is torch.int8 .* where torch.float16 or"):
        read(tmp_path / "8")
    edit(tmp_path / "8" / "config.json", method="any-precision", group_size=None, scale_bits=8)
    with pytest.raises(AnybitsError, match="any-precision has no scales"):
        read(tmp_path / "8")


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    with pytest.raises(AnybitsError, match="no config.json"):
        read_stored_config(tmp_path)
    write(tmp_path)
    (tmp_path / "model-rest.safetensors").unlink()
    with pytest.raises(AnybitsError, match="model-rest.safetensors is missing"):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(AnybitsError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(AnybitsError, match="the checkpoint is incomplete"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(AnybitsError, match="is not quantized"):
        read_stored_config(tmp_path)
    (tmp_path / "config.json").write_text("{]")
    with pytest.raises(AnybitsError, match="cannot be read as JSON"):
        read_stored_config(tmp_path)
