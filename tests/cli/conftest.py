"""A tiny model in a folder, and the command line run in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from coreinfer.cli.main import main
from tests.tiny import tiny_model, tiny_tokenizer


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def converted_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models are converted to."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, converted_models: Path
) -> None:
    """Tests of real models use the user's own cache, all others one of their own."""
    if not any(request.node.iter_markers("model")):
        monkeypatch.setenv("COREINFER_CACHE", str(converted_models))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a verb; a user's mistake must be one line on stderr, with nothing on stdout."""

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


def refusal(outcome: Outcome) -> str:
    """The one line of a refused command."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("coreinfer: ")
    return line.removeprefix("coreinfer: ")
