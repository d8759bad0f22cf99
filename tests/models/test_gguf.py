"""The GGUF header: what the `gguf` package reads, and damage contained."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coreinfer.errors import UserError
from coreinfer.models.gguf import read_gguf
from coreinfer.models.gguf_model import load_gguf
from tests.models.damage import model_or_one_line
from tests.models.gguf_writer import tiny_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    tiny_gguf(path, kinds={"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q8_0})
    return path.read_bytes()


def test_reads_what_the_reference_reader_reads(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    extra = {"general.note": "hé\n", "x.list": [1, 2, 3], "x.eps": 1e-5, "x.words": ["", "b"]}
    tiny_gguf(path, extra=extra, kinds={"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q8_0})
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for key, field in fields.items():
        found = ours.metadata[key]
        if isinstance(found, float):  # ours is the shortest number that is the file's float32
            found = float(np.float32(found))
        assert found == field.contents(), key
    assert ours.metadata["x.eps"] == 1e-5
    assert ours.architecture == "llama"
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.values(tensor.name), expected)


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_gguf(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def header(tensors: int, pairs: int, body: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + body


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


ARCH = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
HUGE = 2**62
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file"),
    "another format": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "magic alone": (b"GGUF", "ends inside its header"),
    "version": (header(0, 0, b"", version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
    "tensors without end": (header(HUGE, 0, bytes(64)), "entries"),
    "pairs without end": (header(0, HUGE, bytes(64)), "entries"),
    "a string without end": (header(0, 1, struct.pack("<Q", HUGE) + bytes(20)), "ends inside"),
    "an array without end": (
        header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 0, HUGE) + bytes(20)),
        "entries",
    ),
    "strings without end": (
        header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(20)),
        "entries",
    ),
    "arrays in an array": (
        header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(20)),
        "unknown type 9",
    ),
    "a value of no type": (header(0, 1, text(b"k") + struct.pack("<I", 77) + bytes(8)), "type 77"),
    "no UTF-8": (header(0, 1, text(b"\xff\xfe") + bytes(20)), "not UTF-8"),
    "a key twice": (header(0, 2, ARCH + ARCH), "twice"),
    "dimensions without end": (
        header(1, 1, ARCH + text(b"t") + struct.pack("<I", 2**31) + bytes(64)),
        "dimensions",
    ),
    "a tensor of no type": (
        header(1, 1, ARCH + text(b"t") + struct.pack("<IQIQ", 1, 4, 999, 0) + bytes(64)),
        "type 999",
    ),
    "a tensor too long": (
        header(1, 1, ARCH + text(b"t") + struct.pack("<IQIQ", 1, HUGE, 0, 0) + bytes(64)),
        "needs bytes",
    ),
    "a tensor behind the end": (
        header(1, 1, ARCH + text(b"t") + struct.pack("<IQIQ", 1, 4, 0, HUGE) + bytes(64)),
        "needs bytes",
    ),
    "half a block": (
        header(1, 1, ARCH + text(b"t") + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(128)),
        "shape",
    ),
    "an empty tensor": (
        header(1, 1, ARCH + text(b"t") + struct.pack("<IQIQ", 1, 0, 0, 0) + bytes(128)),
        "shape",
    ),
    "alignment": (
        header(
            1,
            2,
            ARCH
            + text(b"general.alignment")
            + struct.pack("<II", 4, 3)
            + text(b"t")
            + struct.pack("<IQIQ", 1, 4, 0, 0)
            + bytes(64),
        ),
        "alignment",
    ),
    "nothing in it": (header(0, 0, b""), "architecture"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case: str, tmp_path: Path) -> None:
    data, expected = DAMAGED[case]
    assert expected in refused(tmp_path / "m.gguf", data)


def test_a_tensor_twice(tmp_path: Path) -> None:
    row = text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 0)
    assert "twice" in refused(tmp_path / "m.gguf", header(2, 1, ARCH + row + row + bytes(64)))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(UserError, match=path.name):
            read_gguf(path)


def test_a_truncated_file_is_never_a_model(whole: bytes, tmp_path: Path) -> None:
    for size in [*range(0, 4096, 97), *range(4096, len(whole), 9973), len(whole) - 1]:
        refused(tmp_path / "m.gguf", whole[:size])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_bytes_give_a_model_or_one_line(
    data: st.DataObject, whole: bytes, tmp_path: Path
) -> None:
    damaged = bytearray(whole)
    # Damage in the tensors is only other numbers; the header is what can go wrong.
    places = st.integers(0, 9000) | st.integers(0, len(whole) - 1)
    for at in data.draw(st.lists(places, min_size=1, max_size=6)):
        damaged[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, 9000))
        new = data.draw(st.binary(max_size=64))
        damaged[at : at + data.draw(st.integers(0, 64))] = new
    (tmp_path / "m.gguf").write_bytes(damaged)
    model_or_one_line(lambda: load_gguf(tmp_path / "m.gguf"))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=400), version=st.sampled_from([2, 3]))
def test_random_bytes_give_one_line(body: bytes, version: int, tmp_path: Path) -> None:
    refused(tmp_path / "m.gguf", b"GGUF" + struct.pack("<I", version) + body)
    refused(tmp_path / "m.gguf", body.removeprefix(b"GGUF"))
