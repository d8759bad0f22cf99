"""Conversion: the same numbers as the loaded model, whatever the source, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from coreinfer.backends.native import blocks
from coreinfer.backends.native import convert as module
from coreinfer.backends.native.container import WEIGHTS, open_container
from coreinfer.backends.native.convert import convert, converted
from coreinfer.backends.native.weights import NativeWeights, weights_from
from coreinfer.errors import UserError
from coreinfer.kernels.formats import WeightFormat
from coreinfer.models.checkpoint import load_folder
from coreinfer.models.gguf_model import load_gguf
from coreinfer.models.mlp import fingerprint, mlp_layers
from tests.models.folders import edit_tensors, tiny_folder
from tests.models.gguf_writer import tiny_gguf
from tests.tiny import tiny_model

BFLOAT16, INT8, INT4 = (
    WeightFormat("bfloat16", 0),
    WeightFormat("int8", 16),
    WeightFormat("int4", 32),
)
FORMATS = [BFLOAT16, INT8, INT4]
MODELS = ["llama", "mistral", "qwen2", "qwen3", "opt"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny llama."""
    tiny_folder(tmp_path / "tiny", tie_word_embeddings=True)
    return tmp_path / "tiny"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks a tensor, the last one shorter, even where a tensor is tiny."""
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", 7 * 32)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(open_container(folder))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.dtype)
@pytest.mark.parametrize("model_type", MODELS)
def test_a_folder_gives_the_weights_of_the_loaded_model(
    tmp_path: Path, model_type: str, weight_format: WeightFormat
) -> None:
    tied = model_type in ("opt", "qwen2")
    model = tiny_folder(tmp_path / "tiny", model_type, tie_word_embeddings=tied)
    assert convert(str(tmp_path / "tiny"), weight_format, tmp_path / "out") == tmp_path / "out"
    assert_same(tensors_of(tmp_path / "out"), dict(weights_from(model, weight_format).tensors))
    manifest = open_container(tmp_path / "out").manifest
    assert manifest.model == "tiny"
    assert manifest.format == weight_format
    assert manifest.model_fingerprint == fingerprint(model, mlp_layers(model))


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fingerprint_is_that_of_the_hf_model(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": 4}  # more columns than are sampled
    if model_type == "opt":
        sizes |= {"word_embed_proj_dim": 96, "ffn_dim": 80}
    else:
        sizes |= {"intermediate_size": 80}
    tiny_folder(tmp_path / "tiny", model_type, dtype=dtype, **sizes)
    loaded, _ = load_folder(tmp_path / "tiny")
    out = convert(str(tmp_path / "tiny"), INT8, tmp_path / "out")
    expected = fingerprint(loaded, mlp_layers(loaded))
    assert open_container(out).manifest.model_fingerprint == expected


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sharded_half_precision_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_folder(tmp_path / "tiny", dtype=dtype, shard_size="20KB")
    assert len(list((tmp_path / "tiny").glob("*.safetensors"))) > 2
    out = convert(str(tmp_path / "tiny"), INT8, tmp_path / "out")
    assert_same(tensors_of(out), dict(weights_from(model.float(), INT8).tensors))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_gives_the_weights_of_the_loaded_model(
    tmp_path: Path, architecture: str
) -> None:
    tiny_gguf(tmp_path / "tiny.gguf", architecture)
    model, tokenizer = load_gguf(tmp_path / "tiny.gguf")
    out = convert(str(tmp_path / "tiny.gguf"), INT4, tmp_path / "out")
    assert_same(tensors_of(out), dict(weights_from(model, INT4).tensors))
    manifest = open_container(out).manifest
    assert manifest.model == "tiny"
    assert manifest.model_fingerprint == fingerprint(model, mlp_layers(model))
    _, again = load_folder_tokenizer(out, model.config)
    assert again.encode("some text") == tokenizer.encode("some text")
    assert again.chat_template == tokenizer.chat_template


def load_folder_tokenizer(out: Path, config: object) -> tuple[object, object]:
    from transformers import AutoConfig, AutoTokenizer

    read = AutoConfig.from_pretrained(out)
    assert read.model_type == config.model_type  # type: ignore[attr-defined]
    return read, AutoTokenizer.from_pretrained(out)


def test_names_without_the_first_part_are_understood(folder: Path, tmp_path: Path) -> None:
    model, _ = load_folder(folder)

    def shorten(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(folder, shorten)
    assert not any(name.startswith("model.") for name in load_file(folder / WEIGHTS))
    out = convert(str(folder), INT8, tmp_path / "out")
    assert_same(tensors_of(out), dict(weights_from(model, INT8).tensors))


def test_configuration_and_tokenizer_come_along(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    out = convert(str(folder), INT8, tmp_path / "out")
    copied = {file.name for file in out.iterdir()} - {WEIGHTS}
    assert copied >= {"config.json", "generation_config.json", "tokenizer.json"}
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in copied)
    assert not copied & {"pytorch_model.bin", "modeling_own.py"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


def test_progress_goes_from_nothing_to_all(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = convert(
        str(folder), INT8, tmp_path / "out", on_bytes=lambda done, total: seen.append((done, total))
    )
    size = open_container(out).manifest.data_bytes
    assert {total for _, total in seen} == {size}
    assert (seen[0][0], seen[-1][0]) == (0, size)
    assert sorted(seen) == seen


def stop_at(share: float, error: BaseException) -> Callable[[int, int], None]:
    def on_bytes(done: int, total: int) -> None:
        if done > share * total:
            raise error

    return on_bytes


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "no space")], ids=repr)
def test_an_interrupted_run_goes_on(folder: Path, tmp_path: Path, error: BaseException) -> None:
    whole = convert(str(folder), INT8, tmp_path / "whole")
    threads = torch.get_num_threads()
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
    with pytest.raises(expected):
        convert(str(folder), INT8, tmp_path / "out", on_bytes=stop_at(0.6, error))
    assert torch.get_num_threads() == threads
    assert not (tmp_path / "out").exists()
    seen: list[int] = []
    convert(str(folder), INT8, tmp_path / "out", on_bytes=lambda done, _: seen.append(done))
    assert seen[0] > 0.3 * seen[-1]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny", "whole"]


def test_a_killed_run_goes_on(folder: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from coreinfer.backends.native.convert import convert\n"
        "from coreinfer.kernels.formats import WeightFormat\n"
        "def on_bytes(done, total):\n"
        "    if done > total / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(sys.argv[1], WeightFormat('int8', 16), sys.argv[2], on_bytes=on_bytes)\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    seen: list[int] = []
    out = convert(str(folder), INT8, tmp_path / "out", on_bytes=lambda n, _: seen.append(n))
    assert seen[0] > 0
    model, _ = load_folder(folder)
    assert_same(tensors_of(out), dict(weights_from(model, INT8).tensors))


def test_a_run_that_is_killed_before_it_has_tidied_up_is_in_nobodys_way(
    folder: Path, tmp_path: Path
) -> None:
    out = convert(str(folder), INT8, tmp_path / "out")
    script = (
        "import os, signal, sys\n"
        "from coreinfer.backends.native import convert\n"
        "from coreinfer.kernels.formats import WeightFormat\n"
        "replace = convert.replace_folder\n"
        "def replace_and_die(*args):\n"
        "    replace(*args)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert.replace_folder = replace_and_die\n"
        "convert.convert(sys.argv[1], WeightFormat('int4', 32), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(out)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert open_container(out).manifest.format == INT4
    convert(str(folder), INT8, out)
    assert open_container(out).manifest.format == INT8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


def test_unfinished_work_on_other_files_is_not_used(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(str(folder), INT8, tmp_path / "out", on_bytes=stop_at(0.6, KeyboardInterrupt()))
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    os.utime(folder / WEIGHTS, ns=(1, 1))  # however coarse the clock of the file system is
    seen: list[int] = []
    out = convert(str(folder), INT8, tmp_path / "out", on_bytes=lambda n, _: seen.append(n))
    assert seen[0] == 0
    model, _ = load_folder(folder)
    assert_same(tensors_of(out), dict(weights_from(model, INT8).tensors))


def test_what_is_there_is_left_checked_replaced_or_refused(folder: Path, tmp_path: Path) -> None:
    out = convert(str(folder), INT8, tmp_path / "out")
    before = (out / WEIGHTS).stat().st_ino
    convert(str(folder), INT8, out)
    assert (out / WEIGHTS).stat().st_ino == before
    data = bytearray((out / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (out / WEIGHTS).write_bytes(bytes(data))
    convert(str(folder), INT8, out)  # it was damaged
    open_container(out).verify_all()
    convert(str(folder), INT4, out)
    assert open_container(out).manifest.format == INT4
    other = tmp_path / "other"
    other.mkdir()
    convert(str(folder), INT8, other)  # an empty folder is as good as none
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear")
    for there in (tmp_path / "letters", folder, folder / "config.json"):
        with pytest.raises(UserError, match="exists and is no converted model; choose another"):
            convert(str(folder), INT8, there)
    assert (tmp_path / "letters" / "one.txt").read_text() == "dear"


def test_one_process_at_a_time(folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.draft").mkdir()
    lock = FileLock(tmp_path / ".out.draft" / "lock")
    told: list[str] = []
    waits = threading.Event()

    def on_progress(line: str) -> None:
        told.append(line)
        waits.set()

    def run() -> None:
        convert(str(folder), INT8, tmp_path / "out", on_progress=on_progress)

    with lock:
        other = threading.Thread(target=run)
        other.start()
        assert waits.wait(60)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / ".out.draft")  # as the one that has the lock does in the end
    other.join(60)
    assert not other.is_alive()
    assert "waiting for another process" in told[0]
    open_container(tmp_path / "out").verify_all()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_converts_once(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    first = converted(str(folder), INT8, on_progress=told.append)
    assert cache in first.parents
    assert told == ["converting tiny to int8, once"]
    assert open_container(first, dtype="int8").manifest.model == "tiny"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_convert", lambda *_: pytest.fail("converted again"))
        assert converted(str(folder), INT8, on_progress=told.append) == first
    assert len(told) == 1
    others = {
        converted(str(folder), WeightFormat("int8", 32)),
        converted(str(folder), INT4),
        converted(str(folder), BFLOAT16),
    }
    assert len(others | {first}) == 4


@pytest.mark.usefixtures("cache")
def test_the_cache_follows_the_models_files(folder: Path, tmp_path: Path) -> None:
    first = converted(str(folder), INT8)
    before = open_container(first).manifest
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    os.utime(folder / WEIGHTS, ns=(1, 1))
    assert converted(str(folder), INT8) == first
    assert open_container(first).manifest.source != before.source
    tiny_folder(tmp_path / "elsewhere" / "tiny", seed=5)  # of the same name
    assert converted(str(tmp_path / "elsewhere" / "tiny"), INT8) != first


@pytest.mark.usefixtures("cache")
def test_the_cache_makes_a_damaged_model_anew(folder: Path) -> None:
    first = converted(str(folder), INT8)
    data = (first / WEIGHTS).read_bytes()
    for damaged in (data[:-1], data.replace(b"native/2", b"native/9"), b"", data[:100]):
        (first / WEIGHTS).write_bytes(damaged)
        assert converted(str(folder), INT8) == first
        assert (first / WEIGHTS).read_bytes() == data


def test_a_converted_model_is_its_own_conversion(folder: Path, tmp_path: Path) -> None:
    out = convert(str(folder), INT8, tmp_path / "out")
    assert converted(str(out), INT8) == out
    with pytest.raises(UserError, match="holds int8 weights, not int4"):
        converted(str(out), INT4)
    with pytest.raises(UserError, match="stored in groups of 16, not 32"):
        converted(str(out), WeightFormat("int8", 32))
    with pytest.raises(UserError, match="is a converted model already"):
        convert(str(out), INT4, tmp_path / "again")


def test_the_source_hash_is_that_of_the_files(folder: Path, tmp_path: Path) -> None:
    one = open_container(convert(str(folder), INT8, tmp_path / "one")).manifest
    two = open_container(convert(str(folder), INT4, tmp_path / "two")).manifest
    assert one.source == two.source
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"transformers_version": "0"}))
    three = open_container(convert(str(folder), INT8, tmp_path / "three")).manifest
    assert three.source != one.source
    assert three.model_fingerprint == one.model_fingerprint


def test_peak_memory_does_not_hold_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read asks for more than one tensor or one block, whichever is larger."""
    from coreinfer.models.stream import FolderCheckpoint

    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", 32)
    sizes: list[tuple[str, int]] = []
    rows = FolderCheckpoint.rows

    def counted(self: FolderCheckpoint, name: str, start: int, stop: int) -> Tensor:
        part = rows(self, name, start, stop)
        sizes.append((name, part.numel()))
        return part

    monkeypatch.setattr(FolderCheckpoint, "rows", counted)
    convert(str(folder), INT8, tmp_path / "out")
    assert max(size for name, size in sizes if "down_proj" not in name) <= 32
    assert max(size for name, size in sizes if "down_proj" in name) == 48 * 32
    assert sum(size for _, size in sizes) >= sum(p.numel() for p in tiny_model().parameters()) / 2


def test_the_cost_of_a_token_is_known_without_reading_the_weights(
    folder: Path, tmp_path: Path
) -> None:
    container = open_container(convert(str(folder), INT8, tmp_path / "out"))
    manifest = container.manifest
    about = (manifest.decoder, manifest.format)
    mapped = NativeWeights(*about, container, manifest.model, manifest.model_fingerprint)
    in_memory = NativeWeights(*about, dict(container), manifest.model, manifest.model_fingerprint)
    sizes = {name: tensor.nbytes for name, tensor in in_memory.tensors.items()}
    assert mapped.read_cost().dense == sum(sizes.values())  # tied, so there is no table of it
    empty = NativeWeights(*about, {}, manifest.model, manifest.model_fingerprint)
    assert empty.read_cost() == mapped.read_cost()
