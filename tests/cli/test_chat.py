"""`coreinfer chat`, driven through standard input."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from coreinfer.errors import UserError
from tests.cli.conftest import Cli, Outcome, refusal
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def talk(cli: Cli, model_dir: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def run(*lines: str, options: tuple[object, ...] = ()) -> Outcome:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return cli("chat", "--model", model_dir, "--max-new-tokens", 4, *options)

    return run


def test_a_conversation_is_kept_and_saved(talk, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "talk.json"
    run = talk("hello", "", "and you?", f"/save {path}", options=("--system", "be brief"))
    assert run.code == 0
    messages = json.loads(path.read_text())["messages"]
    roles = [m["role"] for m in messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in messages[:2]] == ["be brief", "hello"]
    assert run.out.startswith(messages[2]["content"] + "\n" + messages[4]["content"] + "\n")
    assert "saved 5 messages" in run.out


def test_commands(talk) -> None:  # type: ignore[no-untyped-def]
    run = talk(
        "/help", "/stats", "/set", "/set ignore_eos true", "/set beta 0.5", "hi", "/stats",
        "/dense", "again", "/stats", "/dense", "/reset", "/quit", "never read",
    )  # fmt: skip
    assert run.code == 0
    assert "/save FILE" in run.out
    assert "nothing was answered yet" in run.out
    assert "beta = 0.4" in run.out
    assert "ignore_eos = false" in run.out
    assert "ignore_eos = true" in run.out
    assert "beta = 0.5" in run.out
    assert "impact: density 0.50" in run.out
    assert "dense: density 1.00" in run.out
    assert "the conversation starts anew" in run.out
    assert "never read" not in run.out


def test_a_setting_that_several_things_have_is_set_for_all(talk) -> None:  # type: ignore[no-untyped-def]
    random = ("--selector", "random", "--stand-in", "none", "--temperature", 1.5)
    talked = talk("/set", "/set seed 7", "hi", "/reset", "/set seed 8", "hi", options=random)
    assert talked.code == 0, talked.err
    assert "seed = 0 (rule)" in talked.out
    assert "seed = 0 (sampling)" in talked.out
    assert "seed = 7 (rule and sampling)" in talked.out
    first = talk("hi", options=(*random, "--seed", 7)).out.strip()
    second = talk("hi", options=(*random, "--seed", 8)).out.strip()
    assert first != second
    assert first in talked.out
    assert second in talked.out


def test_a_value_that_one_of_them_refuses_is_set_for_none() -> None:
    from coreinfer.cli.chat import Chat
    from coreinfer.runtime.sampling import SamplingParams
    from coreinfer.selectors import Random

    settings = {"selector": Random(), "stand_in": None, "params": SamplingParams()}
    chat = Chat(lambda: None, settings)  # type: ignore[arg-type, return-value]
    with pytest.raises(UserError, match="the seed must be 0 to"):
        chat.handle(f"/set seed {2**63}")
    assert (settings["selector"].seed, settings["params"].seed) == (0, 0)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/unknown", "there is no command '/unknown'; /help lists them"),
        ("/set nothing 3", "there is no setting 'nothing'; there are"),
        ("/set beta", "beta needs a value such as 0.4, got ''"),
        ("/set beta lots", "beta needs a value such as 0.4, got 'lots'"),
        ("/set beta 7", "beta must be above 0 and at most 1, got 7"),
        ("/set beta [1]", "beta needs a value such as 0.4"),
        ("/set top_k 1.5", "top_k is a whole number, got '1.5'"),
        ("/set top_k true", "top_k needs a value such as 0, got 'true'"),
        ("/set ignore_eos 1", "ignore_eos needs a value such as false, got '1'"),
        ("/set beta null", "beta needs a value such as 0.4, got 'null'"),
        ("/save", "/save needs a file name"),
        ("/save /nowhere/at/all.json", "/nowhere/at/all.json"),
    ],
)
def test_a_mistake_is_told_and_the_chat_goes_on(talk, line: str, message: str) -> None:  # type: ignore[no-untyped-def]
    run = talk(line, "/stats")
    assert run.code == 0
    (told,) = run.err.splitlines()
    assert message in told
    assert "nothing was answered yet" in run.out


def test_a_model_without_chat_template_is_refused(cli: Cli, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    line = refusal(cli("chat", "--model", tmp_path / "base"))
    assert "base has no chat template; use 'generate'" in line
