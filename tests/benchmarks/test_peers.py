"""Other engines: what they have rows for, and llama.cpp where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from coreinfer.benchmarks import run as run_module
from coreinfer.benchmarks.gguf_files import write_synthetic
from coreinfer.benchmarks.peers import PEERS
from coreinfer.benchmarks.plan import PEER_NAMES, Settings, base_job
from coreinfer.benchmarks.run import bench
from coreinfer.benchmarks.target import Target
from tests.benchmarks.fakes import TINY, TINY_OPT, fake_start, small_meter

SETTINGS = Settings(
    dtypes=("bfloat16", "int8", "int4"), keeps=(), prompt_tokens=6, decode_tokens=3, threads=1
)


def target(values: dict = TINY) -> Target:  # type: ignore[type-arg]
    return Target.of_shape("tiny", {"tiny": values})


def test_every_peer_that_can_be_named_is_there() -> None:
    assert tuple(PEERS) == PEER_NAMES


def test_a_peer_that_is_not_installed_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "is_installed", lambda peer: peer.package == "transformers")
    report = bench(target(), SETTINGS, start=fake_start([]), meter=small_meter())
    assert [(row.engine, row.dtype) for row in report.rows] == [("transformers", "bfloat16")]
    assert "llama.cpp: not installed (pip install 'coreinfer[bench]')" in report.notes


def test_a_peer_that_does_not_do_the_model_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "is_installed", lambda _peer: True)
    settings = Settings(
        dtypes=SETTINGS.dtypes, keeps=(), peers=PEER_NAMES, prompt_tokens=6, decode_tokens=3
    )
    report = bench(target(TINY_OPT), settings, start=fake_start([]), meter=small_meter())
    assert [row.engine for row in report.rows] == ["transformers"]
    assert "llama.cpp Q8_0: llama.cpp does not do 'opt'" in report.notes
    assert any(note.startswith("openvino: OpenVINO GenAI needs a GGUF") for note in report.notes)


def test_llama_cpp_has_rows_beside_the_integer_dtypes(tmp_path: Path) -> None:
    peer = PEERS["llama.cpp"]
    assert peer.forms(target(), ("bfloat16",)) == []
    assert peer.forms(target(), ("bfloat16", "int4", "int8")) == ["Q4_0", "Q8_0"]
    path = peer.file(target(), "Q4_0", tmp_path)
    assert path is not None
    assert path.parent == tmp_path
    assert peer.file(target(), "Q4_0", tmp_path) == path  # once


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("form", ["Q8_0", "Q4_0"])
def test_llama_cpp_reads_a_synthetic_file_again_and_again(tmp_path: Path, form: str) -> None:
    file = tmp_path / "tiny.gguf"
    write_synthetic(TINY, form, file)
    engine = PEERS["llama.cpp"].open(base_job(target(), SETTINGS, "llama.cpp", form, file))
    assert engine.vocab_size == TINY["vocab_size"]
    for _ in range(3):  # each on an empty sequence, or its context would be too short
        repeat = engine.repeat([5, 6, 7, 8, 9, 10], [1, 2, 3])
        assert repeat.decode_tokens == 3
        assert repeat.decode_s > 0
        assert repeat.prefill_s > 0
    about = engine.about()
    assert (about.dtype, about.density) == (form, 1.0)
    assert about.bytes_per_token
