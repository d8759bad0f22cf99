"""Nothing is ever half-written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from coreinfer.errors import UserError
from coreinfer.files import describe_os_error, replace, replace_when_done


def interrupted(path: Path, error: type[BaseException]) -> None:
    path.write_text("half of")
    raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replace_when_done(path) as partial:
        partial.write_text("new")
        assert not path.exists()
        assert partial.parent.parent == tmp_path  # the same file system, so a rename is atomic
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="modes as POSIX has them")
def test_what_is_written_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    def private(path: Path) -> None:  # as safetensors makes its files
        path.touch(mode=0o600)

    (tmp_path / "usual").touch()
    with replace_when_done(tmp_path / "file") as partial:
        private(partial)
    with replace_when_done(tmp_path / "folder") as partial:
        partial.mkdir()
        private(partial / "file")
    usual = (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "file").stat().st_mode == usual
    assert (tmp_path / "folder" / "file").stat().st_mode == usual
    assert names(tmp_path / "folder") == ["file"]


def test_what_was_there_stays_until_then(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replace_when_done(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_was_there_stays_if_writing_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), replace_when_done(path) as partial:
        interrupted(partial, error)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.mkdir()
    (path / "stale").write_text("old")
    with replace_when_done(path) as partial:
        partial.mkdir()
        (partial / "fresh").write_text("new")
    assert names(path) == ["fresh"]
    assert names(tmp_path) == ["store"]


def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store"
    path.mkdir()
    (path / "kept").write_text("old")

    def refuse(_self: Path, _target: Path) -> Path:
        raise OSError(errno.EIO, "the disk is failing")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(UserError, match="the disk is failing"), replace_when_done(path) as partial:
        partial.mkdir()
    assert names(path) == ["kept"]
    assert names(tmp_path) == ["store"]


@pytest.mark.parametrize(("move", "left"), [("rename", "old"), ("replace", "new")])
def test_ctrl_c_between_the_moves_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move: str, left: str
) -> None:
    path = tmp_path / "store"
    path.mkdir()
    (path / "old").write_text("the only copy")
    original = getattr(Path, move)
    pressed: list[Path] = []

    def moved_and_pressed(source: Path, target: Path) -> None:
        original(source, target)
        pressed.append(source)
        if len(pressed) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, move, moved_and_pressed)
    new = tmp_path / "fresh" / "store"
    new.mkdir(parents=True)
    (new / "new").write_text("another")
    with pytest.raises(KeyboardInterrupt):
        replace(new, path, new.with_name("replaced"))
    shutil.rmtree(new.parent)
    assert names(path) == [left]
    assert names(tmp_path) == ["store"]


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(UserError, match="folder'"), replace_when_done(path) as partial:
        partial.write_text("a file")
    assert path.is_dir()


def test_a_folder_that_is_missing_is_the_users_mistake(tmp_path: Path) -> None:
    missing = replace_when_done(tmp_path / "nowhere" / "file")
    with pytest.raises(UserError, match=r"cannot access .*nowhere.*file': No such file"), missing:
        pytest.fail("the block must not run")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left while writing 'f'; free some, or write elsewhere"),
        (errno.EDQUOT, "no space left while writing 'f'; free some, or write elsewhere"),
        (errno.EACCES, "no permission to write 'f'; choose a path you can write to"),
        (errno.EROFS, "no permission to write 'f'; choose a path you can write to"),
        (errno.EIO, "cannot access 'f': broken"),
    ],
)
def test_errors_of_the_system_say_what_would_do(code: int, message: str) -> None:
    assert describe_os_error(OSError(code, "broken"), "f") == message


def test_a_full_disk_under_safetensors_is_a_full_disk(tmp_path: Path) -> None:
    def fill(message: str) -> None:
        with replace_when_done(tmp_path / "file"):
            raise SafetensorError(message)

    with pytest.raises(UserError, match=r"no space left while writing .*file'; free some"):
        fill(f"I/O error: No space left on device (os error {errno.ENOSPC})")
    with pytest.raises(UserError, match=r"cannot write .*file': odd"):
        fill("odd")
    assert names(tmp_path) == []
