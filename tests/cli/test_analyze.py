"""`coreinfer analyze`, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.analysis.sample import CODE, STORIES
from tests.cli.conftest import Cli, refusal


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    text, rows = tmp_path / "stories.txt", tmp_path / "code.jsonl"
    text.write_text("\n".join(" ".join(STORIES[i : i + 4]) for i in range(0, 40, 4)))
    rows.write_text("".join(json.dumps({"body": code}) + "\n" for code in CODE))
    return text, rows


SMALL = ("--windows", 2, "--prompt-tokens", 16, "--continuation-tokens", 4, "--lengths", "2,8",
         "--keeps", "0.25,0.5,0.75", "--keep", 0.5, "--threads", 1)  # fmt: skip


def test_questions_become_a_page(
    cli: Cli, model_dir: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    text, rows = texts
    sources = ("--text", text, "--prompts", f"code={rows}:body", "--out", tmp_path / "out")
    asked = ("--model", model_dir, "--questions", "layers,semantics")
    arguments = ("analyze", *asked, *SMALL, *sources)
    run = cli(*arguments)
    assert run.code == 0, run.err
    assert "Stability of core neurons by layer" in run.out
    assert run.out.rstrip().endswith("report.html")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Semantic similarity" in page
    assert page.count("<svg") == 7
    assert sorted(path.suffix for path in (tmp_path / "out").glob("semantics*")) == [
        ".csv", ".csv", ".csv", ".csv", ".svg", ".svg",
    ]  # fmt: skip
    again = cli(*arguments, "--json")
    assert again.code == 0
    first, second = (json.loads(line) for line in again.out.splitlines())
    assert (first["question"], second["question"]) == ("layers", "semantics")
    assert again.err.count(": from ") == 2  # kept from the first run


def test_settings_come_from_a_file(
    cli: Cli, model_dir: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    text, rows = texts
    settings = tmp_path / "s.toml"
    settings.write_text(
        f'model = "{model_dir}"\nquestions = ["semantics"]\nwindows = 2\nprompt-tokens = 16\n'
        f'text = ["{text}"]\nprompts = "{rows}:body"\nkeep = 0.5\n'
    )
    run = cli("analyze", "--config", settings, "--out", tmp_path / "page.html", "--json")
    assert run.code == 0, run.err
    assert json.loads(run.out)["settings"]["windows"] == 2


def test_mistakes_are_a_line(
    cli: Cli, model_dir: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    text, rows = texts
    out = ("--out", tmp_path / "o")
    one = ("analyze", "--model", model_dir, "--text", text, *out)
    assert "no question 'gird'; did you mean 'grid'?" in refusal(cli(*one, "--questions", "gird"))
    assert "no question was asked" in refusal(cli(*one, "--questions", ""))
    assert "arguments are required: --out" in refusal(cli("analyze", "--questions", "grid"))
    assert "needs texts of 1 kinds, got 0" in refusal(
        cli("analyze", "--model", model_dir, "--questions", "grid", *out)
    )
    assert "'semantics' needs texts of 2 kinds" in refusal(cli(*one, "--questions", "semantics"))
    assert "windows must be at least 2, got 1" in refusal(cli(*one, "--windows", 1))
    assert "no file at" in refusal(cli(*one, "--prompts", "none.jsonl"))
    assert "line 1 has no 'text'" in refusal(cli(*one, "--prompts", f"{rows}:text"))
    assert "no cluster store" in refusal(cli(*one, "--clusters", tmp_path / "nothing"))
    assert "'x' is not a whole number" in refusal(cli(*one, "--lengths", "4,x"))
    assert "outside" in refusal(cli(*one, "--questions", "grid", "--dense-layers", "7"))
    assert "the text has" in refusal(cli(*one, "--questions", "grid", "--windows", 900))


def test_other_networks_need_no_model(cli: Cli, tmp_path: Path) -> None:
    run = cli("analyze", "--model", "no-such-model", "--questions", "layers", "--out", tmp_path)
    assert run.code == 2
    assert "needs texts" in run.err
