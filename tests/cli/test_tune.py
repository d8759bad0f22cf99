"""`coreinfer tune`, through the command line."""

from __future__ import annotations

import importlib.util
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from coreinfer.calibration.store import CalibrationStore
from coreinfer.cli.config import tomllib
from coreinfer.cli.tune import found_from
from coreinfer.tuning.work import Measure, Weigh
from tests.building.corpora import documents, write_corpus
from tests.calibration.stores import build
from tests.cli.conftest import Cli, refusal
from tests.interrupting import interrupt
from tests.tiny import tiny_backend

TEXT = "".join(
    f"The cat number {i} sat on the mat. It was warm there, and {i}.\n" for i in range(40)
)
SMALL = (
    "--backend", "hf", "--prompt-tokens", 24, "--continuation-tokens", 6, "--search-prompts", 2,
    "--report-prompts", 3, "--trials", 12, "--steps", 2, "--descent-prompts", 6,
)  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    build(tiny_backend(), write_corpus(folder / "c.jsonl", documents(8)), folder / "store")
    return folder / "store"


def found(text: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(text)
    return {**record, "seconds": 0, "out": ""}


def test_neurons_are_skipped_where_that_is_asked_for(
    cli: Cli, model_dir: Path, text: Path, tmp_path: Path
) -> None:
    """And the settings file makes the other verbs skip them."""
    out, page = tmp_path / "tuned.toml", tmp_path / "tuned.html"
    asked = ("tune", "--model", model_dir, "--prompts", text, "--bytes", 0.7, *SMALL, "--jobs", 1)
    done = cli(*asked, "--skipping", "--out", out, "--page", page, "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert any(one["actives"] for one in record["tried"])
    chosen = record["chosen"]
    assert min(chosen["actives"]) < 1
    assert "computed" in page.read_text(encoding="utf-8")
    run = cli("generate", "--config", out, "--prompt", "hi", "--max-new-tokens", 4, "--json")
    answer = json.loads(run.out)
    assert run.err == ""
    assert answer["active"] < 1
    assert answer["density"] == pytest.approx(sum(chosen["keeps"]) / len(chosen["keeps"]))
    typed = cli("generate", "--config", out, "--active", 1, "--prompt", "hi", "--json")
    assert json.loads(typed.out)["active"] == 1.0


def test_a_byte_budget_becomes_a_settings_file(
    cli: Cli, model_dir: Path, text: Path, calibration: Path, tmp_path: Path
) -> None:
    out, page = tmp_path / "tuned.toml", tmp_path / "tuned.html"
    asked = (
        "tune",
        "--model",
        model_dir,
        "--prompts",
        text,
        "--bytes",
        0.7,
        *SMALL,
        "--trials",
        18,
    )
    done = cli(*asked, "--calibration", calibration, "--out", out, "--page", page, "--jobs", 1,
               "--json")  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    chosen = record["chosen"]
    assert chosen["mlp_share"] <= 0.7
    assert record["reached"]
    assert record["prompts"] == {"search": 2, "report": 3}
    assert {one["selector"] for one in record["tried"]} == {
        "stability", "impact", "griffin", "residual",
    }  # fmt: skip

    settings = tomllib.loads(out.read_text(encoding="utf-8"))
    assert settings["model"] == str(model_dir)
    assert settings["selector"] == chosen["selector"]
    prompt = ("--raw", "--prompt", "The cat sat", "--max-new-tokens", 3, "--json")
    used = cli("generate", "--config", out, *prompt)
    assert used.code == 0, used.err
    assert "no effect" not in used.err
    answer = json.loads(used.out)
    assert answer["density"] == pytest.approx(chosen["quality"]["report"]["density"])
    assert answer["stand_in"] == chosen["stand_in"]
    assert answer["bytes_per_token"] <= chosen["bytes_per_token"]  # a shorter prompt, fewer ranks

    html = page.read_text(encoding="utf-8")
    assert html.count("<svg") == 3
    assert "bytes &lt;= 0.7" in html
    assert "CSV" in html
    assert not re.search(r"(src|href)=.https?:", html)  # nothing is fetched from elsewhere
    assert str(tmp_path) not in html + out.read_text(encoding="utf-8").split("selector")[0].replace(
        str(model_dir), ""
    )

    again = cli(*asked, "--calibration", calibration, "--out", out, "--jobs", 1, "--json")
    assert "results are known from an earlier run" in again.err
    assert found(again.out) == found(done.out)


def test_processes_find_the_same(cli: Cli, model_dir: Path, text: Path, tmp_path: Path) -> None:
    results = []
    for jobs in (1, 2):
        done = cli(
            "tune", "--model", model_dir, "--prompts", text, "--budget", "ppl<=+30%", *SMALL,
            "--jobs", jobs, "--out", tmp_path / f"{jobs}.toml", "--json",
        )  # fmt: skip
        assert done.code in (0, 2), done.err
        results.append(found(done.out))
    assert results[0] == results[1]
    first, second = ((tmp_path / f"{jobs}.toml").read_text() for jobs in (1, 2))
    assert tomllib.loads(first) == tomllib.loads(second)


def test_a_budget_out_of_reach_gives_the_closest(
    cli: Cli, model_dir: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "t.toml"
    done = cli(
        "tune", "--model", model_dir, "--prompts", text, "--budget", "kl<=1e-9", *SMALL, "--jobs",
        1, "--out", out,
    )  # fmt: skip
    assert done.code == 2
    assert "kl <= 1e-09 cannot be reached on these prompts; the closest is kl" in done.err
    assert "which was not reached" in out.read_text(encoding="utf-8")
    assert "chosen:" in done.out


def test_an_interrupted_search_goes_on(
    cli: Cli, model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("tune", "--model", model_dir, "--prompts", text, "--bytes", 0.6, *SMALL, "--jobs", 1,
             "--json", "--out")  # fmt: skip
    whole = cli(*asked, tmp_path / "whole.toml")
    for task, after in ((Measure, 1), (Measure, 4), (Weigh, 1)):
        with monkeypatch.context() as patch:
            interrupt(patch, task, "run", after)
            cut = cli(*asked, tmp_path / "cut.toml")
            assert cut.code == 130
            assert "interrupted: the same command goes on" in cut.err
        assert not (tmp_path / "cut.toml").exists()
        assert not (tmp_path / "cut.html").exists()
    rest = cli(*asked, tmp_path / "cut.toml")
    assert "known from an earlier run" in rest.err
    assert found(rest.out) == found(whole.out)
    assert (tmp_path / "cut.html").exists() == (find_spec("matplotlib") is not None)


def test_stores_are_named_from_the_folder_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"calibration": "stores/c", "clusters": "/abs", "rank": 8}
    found = found_from(Path("out/tuned"), settings)
    assert found == {"calibration": "../../stores/c", "clusters": "/abs", "rank": 8}
    assert found_from(Path("t.toml").parent, settings) == settings


def test_prompts_of_a_jsonl_file(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"Say {i}, please."}) + "\n" for i in range(6)) + "oops\n"
    )
    done = cli(
        "tune", "--model", model_dir, "--prompts", prompts, "--bytes", 0.7, *SMALL, "--jobs", 1,
        "--out", tmp_path / "t.toml", "--steps", 0,
    )  # fmt: skip
    assert done.code == 0, done.err  # what follows the prompts that are asked for is not read
    assert "on 2 prompts searched with" in done.out
    assert "on 3 others" in done.out


def test_mistakes_are_a_line(
    cli: Cli, model_dir: Path, text: Path, calibration: Path, tmp_path: Path
) -> None:
    base = ("tune", "--model", model_dir, "--backend", "hf", "--prompts", text)
    out = ("--out", tmp_path / "t.toml")
    one = (*base, *out, "--jobs", 1)
    assert "one of the arguments --budget --bytes is required" in refusal(cli(*one))
    assert "not allowed with" in refusal(cli(*one, "--bytes", 0.5, "--budget", "kl<=1"))
    assert "'kl' is no budget" in refusal(cli(*one, "--budget", "kl"))
    assert "bytes must be" in refusal(cli(*one, "--bytes", 1.5))
    assert "cannot be reached" in refusal(cli(*one, *SMALL, "--bytes", 0.001))
    seven = (*one, "--bytes", 0.7)
    assert "arguments are required: --out" in refusal(cli(*base, "--bytes", 0.7))
    assert "--out is a .toml file" in refusal(cli(*base, "--bytes", 0.7, "--out", "t.json"))
    assert "there is no folder" in refusal(
        cli(*base, "--bytes", 0.7, "--out", tmp_path / "none" / "t.toml")
    )
    assert "--page is a .html file" in refusal(cli(*seven, "--page", tmp_path / "p.pdf"))
    assert "trials must be at least 1" in refusal(cli(*seven, "--trials", 0))
    assert "steps must be at least 0" in refusal(cli(*seven, "--steps", -1))
    assert "descent must be at least 1" in refusal(cli(*seven, "--descent-prompts", 0))
    assert "search must be at least 1" in refusal(cli(*seven, "--search-prompts", 0))
    assert "jobs must be at least 1" in refusal(cli(*seven, *SMALL, "--jobs", 0))
    assert "threads must be at least 1" in refusal(cli(*seven, "--threads", 0))
    assert "no calibration store" in refusal(cli(*seven, "--calibration", tmp_path / "x"))
    assert "no cluster store" in refusal(cli(*seven, "--clusters", tmp_path / "x"))
    assert "no file at" in refusal(cli(*base[:-1], "none.txt", *out, "--bytes", 0.7))
    assert "the half to search with: the text has" in refusal(
        cli(*seven, "--search-prompts", 99, "--prompt-tokens", 400)
    )
    assert "windows of 500 + 60 tokens are longer than the 512 that tiny reads" in refusal(
        cli(*seven, "--prompt-tokens", 500)
    )
    assert "is no Ray address" in refusal(cli(*seven, *SMALL, "--ray", "here"))
    CalibrationStore.load(calibration)  # it is whole
    assert not list(tmp_path.glob("t.*"))


def test_another_model_is_refused(
    cli: Cli, text: Path, calibration: Path, tmp_path: Path, tmp_path_factory: Any
) -> None:
    from tests.tiny import tiny_model, tiny_tokenizer

    other = tmp_path_factory.mktemp("other") / "m"
    tiny_model(seed=5, num_hidden_layers=4).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    line = refusal(
        cli("tune", "--model", other, "--prompts", text, "--bytes", 0.7, *SMALL, "--jobs", 1,
            "--calibration", calibration, "--out", tmp_path / "t.toml")
    )  # fmt: skip
    assert "this calibration store was made for" in line


@pytest.mark.parametrize("missing", ["optuna", "matplotlib"])
def test_a_missing_extra_is_named(
    cli: Cli, model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:  # fmt: skip
    find_spec = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == missing else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    line = refusal(
        cli("tune", "--model", model_dir, "--prompts", text, "--bytes", 0.7, "--out",
            tmp_path / "t.toml", "--page", tmp_path / "t.html")
    )  # fmt: skip
    assert "pip install 'coreinfer[tune]'" in line
