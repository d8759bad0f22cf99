"""The work folder of a build: what is done so far, so that an interrupted run can go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.files import describe_os_error, replace_when_done

LOCK, VECTOR_FILE = "lock", "vectors.f32"
SHARE = 20  # writing checkpoints takes at most one part in so many of the time


@dataclass(frozen=True)
class Checkpoint:
    """How far a stage has come: plain JSON, and tensors."""

    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class WorkFolder:
    """The checkpoints of a build, a file a stage; each says which settings it was made with.

    Args:
        path: the folder; it exists.
        stages: their names; each is made from those before it.
        on_note: told which work is done again although it was there, and why.
        every: seconds between checkpoints at least.
    """

    def __init__(
        self, path: Path, stages: Sequence[str], on_note: Callable[[str], None], every: float
    ) -> None:
        self.path = path
        self.stages = tuple(stages)
        self.vector_file = path / VECTOR_FILE
        self._on_note = on_note
        self._every = every
        self._cost = 0.0
        self._last = monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return monotonic() - self._last >= max(self._every, SHARE * self._cost)

    def save(self, stage: str, settings: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Write a stage's checkpoint; the one before it is there until this one is whole.

        Raises:
            UserError: if it cannot be written.
        """
        started = monotonic()
        about = {"settings": dict(settings), "state": dict(checkpoint.state)}
        with replace_when_done(self._file(stage)) as partial:
            save_file(dict(checkpoint.tensors), partial, {"about": json.dumps(about)})
        self._last = monotonic()
        self._cost = self._last - started

    def load(self, stage: str, settings: Mapping[str, Any]) -> Checkpoint | None:
        """A stage's checkpoint, if it has one that was made with the same settings.

        If not, those of the stages after it are worth nothing either, and are removed.
        """
        try:
            found, checkpoint = _read(self._file(stage))
        except FileNotFoundError:
            self._forget(stage)
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
            self._on_note(f"{str(self._file(stage))!r} is damaged; making the {stage} anew")
            self._forget(stage)
            return None
        wanted = json.loads(json.dumps(dict(settings)))
        if found != wanted:
            keys = sorted(key for key in wanted | found if wanted.get(key) != found.get(key))
            self._on_note(
                f"the {stage} in {str(self.path)!r} are of a run with another {', '.join(keys)}; "
                "making them anew"
            )
            self._forget(stage)
            return None
        return checkpoint

    @contextmanager
    def append_vectors(self, size: int) -> Iterator[BinaryIO]:
        """The vectors' file, open for writing after its first `size` bytes.

        Raises:
            UserError: if it cannot be written.
        """
        try:
            with self.vector_file.open("r+b" if size else "wb") as file:
                file.truncate(size)
                file.seek(size)
                yield file
        except OSError as error:
            raise UserError(describe_os_error(error, self.vector_file)) from error

    def has_vectors(self, size: int) -> bool:
        """Whether the vectors' file has the `size` bytes that it should have."""
        return self.vector_file.is_file() and self.vector_file.stat().st_size >= size

    @property
    def has_checkpoint(self) -> bool:
        return any(self._file(stage).exists() for stage in self.stages)

    def _forget(self, stage: str) -> None:
        for later in self.stages[self.stages.index(stage) :]:
            self._file(later).unlink(missing_ok=True)

    def _file(self, stage: str) -> Path:
        return self.path / f"{stage}.safetensors"


def _read(file: Path) -> tuple[dict[str, Any], Checkpoint]:
    """(settings, checkpoint) of a stage's file."""
    with safe_open(file, framework="pt") as opened:
        about = json.loads(opened.metadata()["about"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return dict(about["settings"]), Checkpoint(dict(about["state"]), tensors)


@contextmanager
def work_folder(
    path: Path,
    stages: Sequence[str],
    on_note: Callable[[str], None],
    every: float,
    also: Sequence[str] = (),
) -> Iterator[WorkFolder]:
    """Open or make a work folder, for one process at a time; remove it if the block succeeds.

    Where the block fails or is interrupted it stays, unless it has no checkpoint yet, nor one of
    the further files that it may hold (`also`, as patterns).

    Raises:
        UserError: if it cannot be made or written, is in use, or is something else.
    """
    lock = FileLock(path / LOCK)
    try:
        while not lock.is_locked:
            path.mkdir(exist_ok=True)
            _require_ours(path, stages, also)
            lock.acquire(timeout=0)
            if not (path / LOCK).exists():  # of a folder that a run has removed as it ended
                lock.release()
        for leftover in path.glob(".*.partial"):  # of a checkpoint that was being written
            shutil.rmtree(leftover, ignore_errors=True)
    except Timeout:
        raise UserError(
            f"another run is at work in {str(path)!r}; wait for it, or choose another path"
        ) from None
    except OSError as error:
        raise UserError(describe_os_error(error, path)) from error
    work = WorkFolder(path, stages, on_note, every)
    done = False
    try:
        yield work
        done = True
    finally:
        begun = work.has_checkpoint or any(any(path.glob(pattern)) for pattern in also)
        if done or not begun:
            _remove(path)
        lock.release()


def _remove(path: Path) -> None:
    """Remove a work folder, the lock last: another run may begin anew as soon as that is gone."""
    for entry in path.glob("*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            with suppress(OSError):
                entry.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _require_ours(path: Path, stages: Sequence[str], also: Sequence[str]) -> None:
    ours = {LOCK, VECTOR_FILE, ".*.partial", *also, *(f"{stage}.safetensors" for stage in stages)}
    for entry in path.iterdir():
        if not any(entry.match(pattern) for pattern in ours):
            raise UserError(
                f"{str(path)!r} is needed for unfinished work, but has a file {entry.name!r} of "
                "something else; move it away, or choose another path"
            )
