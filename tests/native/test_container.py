"""The converted file: what is written is what is read, and nothing damaged is."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coreinfer.backends.native.architecture import DecoderConfig
from coreinfer.backends.native.container import (
    WEIGHTS,
    Container,
    Manifest,
    is_converted,
    open_container,
)
from coreinfer.backends.native.draft import JOURNAL, Draft
from coreinfer.errors import UserError
from coreinfer.kernels.formats import WeightFormat
from tests.models.damage import model_or_one_line
from tests.tiny import tiny_model

FORMATS = [
    WeightFormat("bfloat16", 0),
    WeightFormat("int8", 16),
    WeightFormat("int4", 16),
]


def manifest_of(model_type: str = "llama", format_: WeightFormat = FORMATS[1]) -> Manifest:
    decoder = DecoderConfig.from_hf(tiny_model(model_type).config)
    return Manifest(format_, "owner/tiny", "f" * 64, "s" * 64, decoder)


def random_tensors(manifest: Manifest, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 256, stored.shape, generator=generator, dtype=torch.uint8)
        if stored.dtype == "U8"
        else torch.randn(stored.shape, generator=generator)
        for name, stored in manifest.tensors().items()
    }


def write(folder: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> Path:
    """Write a whole model, its tensors in blocks of up to three rows."""
    folder.mkdir()
    draft = Draft(folder, manifest)
    for name in manifest.tensors():
        draft.write(name, tensors[name].split(3))
    draft.finish()
    draft.close()
    return draft.model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest = manifest_of()
    return write(tmp_path_factory.mktemp("whole") / "draft", manifest, random_tensors(manifest))


def copy_of(whole: Path, folder: Path, data: bytes | None = None) -> Path:
    shutil.copytree(whole, folder)
    if data is not None:
        (folder / WEIGHTS).write_bytes(data)
    return folder


@pytest.mark.parametrize("format_", FORMATS, ids=lambda f: f.dtype)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "opt"])
def test_what_is_written_is_read(tmp_path: Path, model_type: str, format_: WeightFormat) -> None:
    manifest = manifest_of(model_type, format_)
    tensors = random_tensors(manifest)
    assert len(tensors) > 10
    folder = write(tmp_path / "draft", manifest, tensors)
    container = open_container(folder, dtype=format_.dtype)
    assert container.manifest == manifest
    assert container.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert container[name].dtype == tensor.dtype
        assert torch.equal(container[name], tensor), name
    assert container.size == (folder / WEIGHTS).stat().st_size
    assert is_converted(folder)


def test_it_is_a_safetensors_file_with_the_documented_metadata(whole: Path) -> None:
    expected = random_tensors(manifest_of())
    with safe_open(whole / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert set(metadata) == {
        "format", "dtype", "group_size", "model", "model_fingerprint", "source", "architecture",
        "checksums", "header_checksum",
    }  # fmt: skip
    assert metadata["format"] == "coreinfer.native/2"
    assert (metadata["dtype"], metadata["group_size"]) == ("int8", "16")
    assert json.loads(metadata["architecture"])["num_layers"] == 3
    checksums = json.loads(metadata["checksums"])
    for name, tensor in expected.items():
        assert checksums[name] == xxhash.xxh3_64_hexdigest(tensor.numpy().tobytes())


def test_shapes_are_those_of_the_formats(whole: Path) -> None:
    container = open_container(whole)
    d, neurons, row = 32, 48, 32 + 2 * (32 // 16)
    assert container.tensors["layers.0.mlp"].shape == (neurons, 3 * row)
    assert container.tensors["layers.2.qkv"].shape == (32 + 2 * 16, row)
    assert container.tensors["head"].shape == (260, row)
    assert container.tensors["embed"].shape == (260, 2 * d)  # a table: bfloat16 in every format
    assert container.tensors["final_norm.weight"].shape == (d,)


def test_float32_tensors_are_aligned(whole: Path) -> None:
    container = open_container(whole)
    start = container.size - container.manifest.data_bytes
    assert start % 64 == 0
    vectors = [stored for stored in container.tensors.values() if stored.dtype == "F32"]
    assert vectors
    assert all((start + stored.start) % 4 == 0 for stored in vectors)


def test_a_wrong_byte_is_caught_when_its_tensor_is_asked_for(whole: Path, tmp_path: Path) -> None:
    first = open_container(whole)
    data = (whole / WEIGHTS).read_bytes()
    start = len(data) - first.manifest.data_bytes
    for name in ("layers.1.mlp", "final_norm.weight", "head"):
        stored = first.tensors[name]
        for at in (stored.start, stored.stop - 1):
            damaged = bytearray(data)
            damaged[start + at] ^= 1
            container = open_container(copy_of(whole, tmp_path / f"{name}{at}", bytes(damaged)))
            for other in container.keys() - {name}:
                assert container[other].numel()
            with pytest.raises(UserError, match=f"tensor '{name}' has the checksum"):
                container[name]
            with pytest.raises(UserError, match="convert the model again"):
                container.verify_all()


def test_reading_goes_on_after_pages_are_let_go(whole: Path) -> None:
    container, expected = open_container(whole), random_tensors(manifest_of())
    for name, tensor in expected.items():
        held = container[name]
        container.release(name)
        assert torch.equal(held, tensor)
    container.verify_all()


def test_a_file_cut_anywhere_is_refused(whole: Path, tmp_path: Path) -> None:
    data = (whole / WEIGHTS).read_bytes()
    header = len(data) - manifest_of().data_bytes
    for size in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(data) - 1):
        folder = copy_of(whole, tmp_path / str(size), data[:size])
        with pytest.raises(UserError, match="truncated") as refused:
            open_container(folder)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="is damaged: it has"):
        open_container(copy_of(whole, tmp_path / "longer", data + b"x"))


@pytest.mark.parametrize("version", [1, 3])
def test_another_version_is_refused_by_name(whole: Path, tmp_path: Path, version: int) -> None:
    data = (whole / WEIGHTS).read_bytes()
    other = data.replace(b"coreinfer.native/2", f"coreinfer.native/{version}".encode())
    folder = copy_of(whole, tmp_path / "other", other)
    message = rf"'coreinfer.native/{version}', this version of coreinfer reads"
    with pytest.raises(UserError, match=message):
        open_container(folder)
    assert is_converted(folder)


def test_another_dtype_is_refused_by_name(whole: Path) -> None:
    with pytest.raises(UserError, match="holds int8 weights, not int4; make one with"):
        open_container(whole, dtype="int4")


def test_what_is_no_converted_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no converted model at .*'coreinfer convert'"):
        open_container(tmp_path)
    assert not is_converted(tmp_path)
    for metadata in (None, {"format": "pt"}, {"format": "coreinfer.coreset/1"}):
        save_file({"a": torch.zeros(2)}, tmp_path / WEIGHTS, metadata)
        with pytest.raises(UserError, match="is no converted model"):
            open_container(tmp_path)
        assert not is_converted(tmp_path)


def test_a_header_that_was_changed_is_refused(whole: Path, tmp_path: Path) -> None:
    data = (whole / WEIGHTS).read_bytes()
    for old, new in (
        (b'"group_size": "16"', b'"group_size": "32"'),
        (b"owner/tiny", b"owner/tinu"),
        (b'\\"rope\\": {\\"theta\\": 1', b'\\"rope\\": {\\"theta\\": 2'),
    ):
        assert data.count(old) == 1
        folder = copy_of(whole, tmp_path / str(len(list(tmp_path.iterdir()))))
        (folder / WEIGHTS).write_bytes(data.replace(old, new))
        with pytest.raises(UserError, match="its header does not have the checksum"):
            open_container(folder)


def with_header(data: bytes, edit: Mapping[str, str]) -> bytes:
    """The file with some of its metadata changed, and a header checksum that is right."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__") | edit
    del metadata["header_checksum"]
    text = json.dumps([metadata, header], sort_keys=True)
    metadata["header_checksum"] = xxhash.xxh3_64_hexdigest(text.encode())
    packed = json.dumps({"__metadata__": metadata, **header}).encode()
    return len(packed).to_bytes(8, "little") + packed + data[8 + length :]


def test_a_header_that_does_not_fit_its_tensors_is_refused(whole: Path, tmp_path: Path) -> None:
    data = (whole / WEIGHTS).read_bytes()
    architecture = json.loads(open_container(whole).manifest.decoder.to_json())

    def other(**changes: object) -> dict[str, str]:
        return {"architecture": json.dumps(architecture | changes)}

    edits = [
        {"dtype": "int3"},
        {"dtype": "bfloat16"},
        {"group_size": "32"},
        {"group_size": "many"},
        {"checksums": "[]"},
        {"checksums": "{}"},
        {"checksums": "[" * 10_000},
        {"architecture": "{}"},
        other(num_layers=2),
        other(num_layers=2**30),
        other(vocab_size=2**30),
        other(hidden_size=64),
    ]
    assert open_container(copy_of(whole, tmp_path / "same", with_header(data, {}))).keys()
    for number, edit in enumerate(edits):
        folder = copy_of(whole, tmp_path / str(number), with_header(data, edit))
        with pytest.raises(UserError, match="is damaged") as refused:
            open_container(folder)
        assert "\n" not in str(refused.value)


def read_all(folder: Path) -> dict[str, Tensor]:
    container = open_container(folder)
    return {name: tensor.clone() for name, tensor in container.items()}


@given(st.data())
def test_damaged_bytes_give_the_same_tensors_or_one_line(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = (whole / WEIGHTS).read_bytes()
    header = len(good) - manifest_of().data_bytes
    folder = tmp_path_factory.mktemp("damaged")
    damaged = bytearray(good)
    place = st.one_of(st.integers(0, 63), st.integers(0, header), st.integers(0, len(good) - 1))
    for at in data.draw(st.lists(place, min_size=1, max_size=3)):
        damaged[at] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(good)), st.integers(0, len(good))))
    (folder / WEIGHTS).write_bytes(damaged[:end])
    model_or_one_line(lambda: read_all(folder))
    if bytes(damaged[header:end]) != good[header:]:
        with pytest.raises(UserError):
            read_all(folder)
    is_converted(folder)
    shutil.rmtree(folder)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_random_bytes_are_refused_with_one_line(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, length: int
) -> None:
    folder = tmp_path_factory.mktemp("noise")
    for data in (noise, length.to_bytes(8, "little") + noise):
        (folder / WEIGHTS).write_bytes(data)
        with pytest.raises(UserError) as refused:
            open_container(folder)
        assert "\n" not in str(refused.value)
        assert not is_converted(folder)
    shutil.rmtree(folder)


def names_written(folder: Path, manifest: Manifest) -> frozenset[str]:
    draft = Draft(folder, manifest)
    draft.close()
    return draft.done


def half_written(folder: Path, manifest: Manifest) -> list[str]:
    """A draft whose process was killed in the middle of a tensor."""
    folder.mkdir()
    tensors = random_tensors(manifest)
    first, second, third = list(tensors)[-3:]
    draft = Draft(folder, manifest)
    draft.write(first, [tensors[first]])
    draft.write(second, [tensors[second]])

    def cut() -> object:
        yield tensors[third][:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draft.write(third, cut())  # type: ignore[arg-type]
    draft.close()
    return [first, second]


def test_a_draft_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    manifest, tensors = manifest_of(), random_tensors(manifest_of())
    done = half_written(tmp_path / "draft", manifest)
    with pytest.raises(UserError):  # nothing opens what is not whole
        open_container(tmp_path / "draft" / "model")
    draft = Draft(tmp_path / "draft", manifest)
    assert draft.done == set(done)
    for name in manifest.tensors().keys() - draft.done:
        draft.write(name, [tensors[name]])
    draft.finish()
    draft.close()
    found = read_all(draft.model)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_draft_believes_no_damaged_tensor_and_no_cut_line(tmp_path: Path) -> None:
    manifest = manifest_of()
    first, second = half_written(tmp_path / "draft", manifest)
    with (tmp_path / "draft" / JOURNAL).open("a") as journal:
        journal.write('{"tensor": "final_no')
    assert names_written(tmp_path / "draft", manifest) == {first, second}
    path = tmp_path / "draft" / "model" / WEIGHTS
    data = bytearray(path.read_bytes())
    stored = manifest.tensors()[first]
    data[len(data) - manifest.data_bytes + stored.start] ^= 1
    path.write_bytes(bytes(data))
    assert names_written(tmp_path / "draft", manifest) == {second}


@pytest.mark.parametrize("journal", [b"", b"\xff\xfe", b"[]\n", b'{"draft": 3}\n{"tensor": 1}\n'])
def test_a_damaged_journal_begins_anew(tmp_path: Path, journal: bytes) -> None:
    half_written(tmp_path / "draft", manifest_of())
    (tmp_path / "draft" / JOURNAL).write_bytes(journal)
    assert names_written(tmp_path / "draft", manifest_of()) == frozenset()


def test_a_draft_of_something_else_begins_anew(tmp_path: Path) -> None:
    half_written(tmp_path / "draft", manifest_of())
    assert names_written(tmp_path / "draft", manifest_of("opt")) == frozenset()
    assert names_written(tmp_path / "draft", manifest_of()) == frozenset()


def test_the_reader_is_a_mapping_of_every_tensor(whole: Path) -> None:
    container = open_container(whole)
    assert isinstance(container, Container)
    assert len(container) == len(manifest_of().tensors())
    assert sum(math.prod(t.shape) for t in container.values()) > 0
    with pytest.raises(KeyError):
        container["nonsense"]
