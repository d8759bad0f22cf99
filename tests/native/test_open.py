"""Opening a model on the native backend, and what is refused before anything is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import coreinfer
from coreinfer.backends.native import open as opening
from coreinfer.backends.native.architecture import DecoderConfig
from coreinfer.backends.native.convert import convert
from coreinfer.backends.native.memory import available_memory, needed_memory, require_memory
from coreinfer.backends.native.tensors import tensor_plans
from coreinfer.backends.native.weights import weights_from
from coreinfer.errors import UserError
from coreinfer.kernels import library
from coreinfer.kernels.formats import WeightFormat
from coreinfer.selectors import Dense, Impact
from tests.native.pairs import FORMATS
from tests.tiny import tiny_model, tiny_tokenizer

PROMPT = [5, 77, 200, 13, 13, 8, 250]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "tiny"
    tiny_model("llama", hidden_size=64, intermediate_size=96).save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_a_model_folder_is_converted_once_and_equals_the_model_in_memory(
    folder: Path, dtype: str
) -> None:
    said: list[str] = []
    llm = coreinfer.load(str(folder), backend="native", dtype=dtype, on_progress=said.append)
    assert sum("converting" in line for line in said) == 1
    again = coreinfer.load(str(folder), backend="native", dtype=dtype, on_progress=said.append)
    assert sum("converting" in line for line in said) == 1
    model = tiny_model("llama", hidden_size=64, intermediate_size=96)
    made = weights_from(model, WeightFormat.named(dtype))
    for one in (llm, again):
        assert (one.name, one.backend.name, one.backend.dtype) == ("tiny", "native", dtype)
        assert one.backend.fingerprint == made.fingerprint
        assert one.backend.eos_token_ids == frozenset([257])
        assert one.backend.family == "llama"
        assert one.backend.context_length == 512
    weights = opening.open_native(str(folder), dtype=dtype).weights
    assert weights.config == made.config
    for plan in tensor_plans(made.config):
        assert torch.equal(weights.tensors[plan.name], made.tensors[plan.name]), plan.name


@pytest.fixture
def another_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, object], None]]:
    """Puts another value where the kernels are looked for, as a fresh process would find it."""

    def forget() -> None:
        for cached in (library._load, library._resolve, opening._tell_of_missing_kernels):
            cached.cache_clear()

    def put(name: str, value: object) -> None:
        monkeypatch.setattr(library, name, value)
        forget()

    monkeypatch.delenv(library.VARIABLE, raising=False)
    forget()
    yield put
    monkeypatch.undo()
    forget()


def test_kernels_that_are_missing_are_told_once(
    folder: Path,
    tmp_path: Path,
    another_library: Callable[[str, object], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told() -> list[str]:
        caplog.clear()
        for _ in range(2):
            coreinfer.load(str(folder), backend="native")
        return [record.getMessage() for record in caplog.records if record.name == opening.__name__]

    if library.native():
        assert told() == []
    other = tmp_path / "kernels.so"
    other.write_text("of another machine")
    cases: list[tuple[str, object, str]] = [
        ("ABI_VERSION", -1, "of another version of coreinfer; install it anew"),
        ("_find", lambda: str(other), "kernels.so.*; install coreinfer anew on this machine"),
        ("_find", lambda: None, "were not built; install a C\\+\\+ compiler"),
    ]
    for name, value, reason in cases[0 if library.native() else 1 :]:
        another_library(name, value)
        (line,) = told()
        assert re.fullmatch(f"the native backend computes with plain torch, .*{reason}.*", line)
    monkeypatch.setenv(library.VARIABLE, "twin")  # who asks for it knows
    another_library("_find", lambda: None)
    assert told() == []


def test_the_verbs_of_the_api_take_it(folder: Path) -> None:
    llm = coreinfer.load(str(folder), backend="native", dtype="int8")
    (record,) = llm.generate("ab", Impact(beta=0.5), max_new_tokens=4)
    assert (record.backend, record.dtype) == ("native", "int8")
    assert record.bytes_per_token < record.dense_bytes_per_token
    core_set = llm.select("ab", Impact(beta=0.5))
    hf = coreinfer.load(str(folder), backend="hf")
    core_set.require_model(hf.backend.fingerprint, "tiny")
    (scored,) = llm.score([("ab", "cd")], Dense())
    (same,) = hf.score([("ab", "cd")], Dense())
    assert scored.num_tokens == same.num_tokens
    assert scored.logprob == pytest.approx(same.logprob, rel=0.05)


def test_a_converted_folder_opens_as_what_it_is(folder: Path, tmp_path: Path) -> None:
    made = convert(str(folder), WeightFormat("int4", 32), tmp_path / "made")
    llm = coreinfer.load(str(made), backend="native")
    assert (llm.backend.dtype, llm.name) == ("int4", "tiny")
    with pytest.raises(UserError, match="int4"):
        coreinfer.load(str(made), backend="native", dtype="int8")
    with pytest.raises(UserError, match="--backend native"):
        coreinfer.load(str(made), backend="hf")
    assert coreinfer.load(str(made)).backend.name == "native"


def test_what_native_does_not_do_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not float32; use --backend hf"):
        coreinfer.load(str(folder), backend="native", dtype="float32")
    with pytest.raises(UserError, match="on the CPU, not on 'cuda'; use --backend hf"):
        coreinfer.load(str(folder), backend="native", device="cuda")
    with pytest.raises(UserError, match="--backend native"):
        coreinfer.load(str(folder), backend="hf", dtype="int4")
    with pytest.raises(UserError, match="hf, native"):
        coreinfer.load(str(folder), backend="other")
    gemma = tmp_path / "gemma"
    tiny_model("gemma").save_pretrained(gemma)
    tiny_tokenizer().save_pretrained(gemma)
    with pytest.raises(UserError, match="'gemma'; use --backend hf"):
        coreinfer.load(str(gemma), backend="native")


def test_more_threads_than_cores_are_refused(folder: Path) -> None:
    cores = os.cpu_count() or 1
    before = torch.get_num_threads()
    for backend in ("hf", "native"):
        with pytest.raises(UserError, match=f"at most {cores}.*got {cores + 1}"):
            coreinfer.load(str(folder), backend=backend, threads=cores + 1)
    assert torch.get_num_threads() == before


def test_too_little_memory_is_said_before_loading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: object) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(opening, "NativeBackend", never)
    monkeypatch.setattr("coreinfer.backends.native.memory.available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"tiny in int8 needs 0\.3 GB of memory, 0\.0 GB are free"):
        coreinfer.load(str(folder), backend="native", dtype="int8")


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [("bfloat16", "--dtype int8 or int4"), ("int8", "--dtype int4"), ("int4", "smaller model")],
)
def test_the_line_names_what_is_needed_and_what_is_there(dtype: str, advice: str) -> None:
    require_memory(10**9, "m", dtype, 10**9)
    with pytest.raises(UserError, match=advice) as error:
        require_memory(2 * 10**9, "m", dtype, 10**9)
    assert "needs 2.0 GB of memory, 1.0 GB are free" in str(error.value)


def test_what_a_model_needs_is_its_weights_and_little_more() -> None:
    weights = weights_from(tiny_model("llama"), FORMATS["int8"])
    stored = sum(tensor.nbytes for tensor in weights.tensors.values())
    needed = needed_memory(weights.config, stored)
    assert stored < needed < stored + 300e6
    large = DecoderConfig.from_json(
        weights.config.to_json().replace('"vocab_size": 260', '"vocab_size": 100000000')
    )
    assert needed_memory(large, stored) - needed == (100000000 - 260) * 32 * 2


def test_the_memory_that_is_there(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:    5000 kB\nHugePages_Total: 0\n")
    group = tmp_path / "group"
    assert available_memory(meminfo, group) == 5000 * 1024
    group.mkdir()
    for name, text in (
        ("memory.max", "max\n"),
        ("memory.current", "2000000\n"),
        ("memory.stat", "anon 1000000\nfile 500000\n"),
    ):
        (group / name).write_text(text)
    assert available_memory(meminfo, group) == 5000 * 1024  # no limit
    (group / "memory.max").write_text("3000000\n")
    assert available_memory(meminfo, group) == 1500000
    (group / "memory.max").write_text("90000000000\n")
    assert available_memory(meminfo, group) == 5000 * 1024
    meminfo.write_text("MemTotal: 9000 kB\n")
    assert available_memory(meminfo, group) is None
    assert available_memory(tmp_path / "none", group) is None
