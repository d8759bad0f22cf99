"""`coreinfer bench` on the command line."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest

from coreinfer.benchmarks import machine, run, target
from tests.benchmarks.fakes import TINY, fake_start
from tests.cli.conftest import Cli, refusal

SHORT = ("--prompt-tokens", 6, "--decode-tokens", 2, "--threads", 1, "--repeats", 1)


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that no one else can name, and a small buffer to sweep."""
    of_shape = target.Target.of_shape
    monkeypatch.setattr(target.Target, "of_shape", lambda name: of_shape(name, {"tiny": TINY}))
    monkeypatch.setattr(machine, "_LEAST_BUFFER", 1 << 16)
    monkeypatch.setattr(machine, "_TIMES_THE_CACHE", 0)


@pytest.mark.usefixtures("tiny_shape")
def test_a_row_in_a_process_of_its_own(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "is_installed", lambda _peer: False)
    done = cli(
        "bench", "--shape", "tiny", "--dtypes", "bfloat16", "--keeps", "0.5", "--engines", "native",
        "--peers", "llama.cpp", "--json", *SHORT,
    )  # fmt: skip
    assert done.code == 0, done
    report = json.loads(done.out)
    assert report["read_gb_per_s"] > 0
    (row,) = report["rows"]
    assert (row["engine"], row["density"], row["selector"]) == ("native", 0.5, "impact")
    speed = row["decode_tokens_per_s"]
    assert 0 < speed["min"] == speed["median"] == speed["max"]
    assert row["prefill_s"] > 0
    assert row["select_s"] > 0
    assert row["prompt_tokens"] == 6
    assert 10**7 < row["peak_memory_bytes"] < 10**10
    assert row["synthetic"] is True
    assert any(note.startswith("llama.cpp: not installed") for note in report["notes"])


@pytest.mark.usefixtures("tiny_shape")
def test_the_table_and_the_plot(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run, "bench", partial(run.bench, start=fake_start([])))
    picture = tmp_path / "bench.png"
    done = cli("bench", "--shape", "tiny", "--peers", "none", "--plot", picture, *SHORT)
    assert done.code == 0, done
    assert "tiny (synthetic weights, speed only), 6 prompt tokens, 1 thread" in done.out
    assert "of limit" in done.out
    assert len([line for line in done.out.splitlines() if line.startswith("native")]) == 6
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny_shape")
def test_every_row_has_a_bar_of_its_own(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run, "bench", partial(run.bench, start=fake_start([])))
    picture = tmp_path / "bench.svg"
    done = cli("bench", "--shape", "tiny", "--peers", "none", "--dtypes", "bfloat16",
               "--actives", "1.0,0.5", "--plot", picture, *SHORT)  # fmt: skip
    assert done.code == 0, done
    rows = [line for line in done.out.splitlines() if line.startswith("native")]
    # matplotlib writes a text as outlines, beside a comment that says it.
    labels = re.findall(r"<!-- (native .*?) -->", picture.read_text(encoding="utf-8"))
    assert len(labels) == len(rows) > 2


def test_a_settings_file_makes_a_row(
    cli: Cli, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `tune` found is timed as it is."""
    monkeypatch.setattr(machine, "_LEAST_BUFFER", 1 << 16)
    monkeypatch.setattr(machine, "_TIMES_THE_CACHE", 0)
    config = tmp_path / "tuned.toml"
    config.write_text(
        f'model = "{model_dir}"\nbackend = "hf"\nselector = "griffin"\nstand-in = "linear"\n'
        'rank = 2\ndense-layers = [0]\n[budgets]\n"1" = 0.25\n"2" = 0.75\n'
    )
    shared = ("bench", "--dtypes", "float32", "--engines", "hf", "--keeps", "1.0", "--peers",
              "none", "--json", *SHORT)  # fmt: skip
    done = cli(*shared, "--config", config)
    assert done.code == 0, done
    dense, given = json.loads(done.out)["rows"]
    assert (dense["selector"], given["selector"]) == ("dense", "griffin")
    assert given["density"] == pytest.approx(2 / 3, abs=0.02)
    assert given["bytes_per_token"] < dense["bytes_per_token"]
    alone = cli(*shared, "--model", model_dir, "--rank", 3)
    assert alone.err.splitlines()[0] == "coreinfer: note: --rank has no effect with no --selector"
    assert len(json.loads(alone.out)["rows"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "llama2-8b"), "no shape 'llama2-8b'; did you mean 'llama2-7b'"),
        (("--dtypes", "int3"), "no dtype 'int3'"),
        (("--dtypes", ""), "no dtype to bench"),
        (("--keeps", "1.5"), "keeps must be above 0 and at most 1, got 1.5"),
        (("--keeps", "half"), "'half' is not a number"),
        (("--repeats", "0"), "repeats must be at least 1, got 0"),
        (("--threads", "0"), "threads must be 1 to"),
        (("--threads", "99999"), "this machine's cores, got 99999"),
        (("--peers", "vllm"), "no peer 'vllm'"),
        (("--prompt-tokens", "0"), "prompt tokens must be at least 1"),
        (("--decode-tokens", "0"), "decode tokens must be at least 1"),
        (("--model", "m", "--shape", "llama2-7b"), "not allowed with argument"),
        (("--model", "no-such-model"), "no model 'no-such-model'"),
        (("--plot", "bench.txt"), "the file may end in .png, .svg, .pdf"),
        (("--plot", "no-such-folder/x.png"), "there is no such folder"),
        (
            ("--shape", "opt-6.7b", "--prompt-tokens", "2040", "--decode-tokens", "9"),
            "have 2049 tokens, opt-6.7b reads 2048 at most",
        ),
    ],
)
def test_mistakes_are_one_line(cli: Cli, options: tuple[str, ...], message: str) -> None:
    assert message in refusal(cli("bench", *options))
