"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from coreinfer.errors import UserError


def describe_os_error(error: OSError, path: str | Path) -> str:
    """One line for a failed read or write: what, where, and what would do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left while writing {str(path)!r}; free some, or write elsewhere"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {str(path)!r}; choose a path you can write to"
    return f"cannot access {str(path)!r}: {error.strerror or error}"


@contextmanager
def replace_when_done(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it over `path` only if the block succeeds.

    A directory made at the temporary path replaces `path` the same way.

    Raises:
        UserError: if the file system refuses (no space, no permission, no such folder).
    """
    path = Path(path)
    partial: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        partial = folder / path.name
        yield partial
        _use_usual_mode(partial)
        replace(partial, path, folder / "replaced")
    except OSError as error:
        raise UserError(describe_os_error(error, path)) from error
    except SafetensorError as error:  # safetensors wraps the operating system's own error
        raise UserError(_describe_safetensor_error(error, path)) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial.parent, ignore_errors=True)


def _describe_safetensor_error(error: SafetensorError, path: Path) -> str:
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is None:
        return f"cannot write {str(path)!r}: {error}"
    code = int(number[1])
    return describe_os_error(OSError(code, os.strerror(code)), path)


def _use_usual_mode(written: Path) -> None:
    """Let others read what the umask lets them: safetensors makes its files the owner's alone."""
    probe = written.with_name(f"{written.name}.mode")
    probe.touch()
    for file in (written, *written.rglob("*")):
        if file.is_file():
            file.chmod(stat.S_IMODE(probe.stat().st_mode))


def remove_leftovers(path: str | Path) -> None:
    """Remove what writers of `path` that were killed have left beside it."""
    path = Path(path)
    for folder in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def replace(new: Path, path: Path, aside: Path) -> None:
    """Rename `new` over `path`; a folder that is there is moved to `aside` first, or stays.

    What lies at `aside` already is removed then: who was killed has left it there.

    Raises:
        OSError: if the file system refuses.
    """
    try:
        if path.is_dir() and new.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        new.replace(path)
    except BaseException:  # Ctrl-C too, right after either of the two
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise
