"""Models of the hub: its cache first, and every refusal in one line. No network."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from coreinfer.errors import UserError
from coreinfer.models import hub
from coreinfer.models.hub import fetch, is_hub_id
from tests.models.folders import tiny_folder

REPLY: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", True),
        ("HuggingFaceTB/SmolLM2-135M_x.1", True),
        ("name", False),
        ("a/b/c", False),
        ("/b", False),
        ("./b", False),
        ("../b", False),
        ("~/b", False),
        ("a/b\n", False),
        ("", False),
    ],
)
def test_ids(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected


class Snapshots:
    """Plays the hub: a folder in the local cache (or none), and what the network gives."""

    def __init__(self, cached: Path | None, online: Path | Exception) -> None:
        self.cached, self.online = cached, online
        self.asked: list[dict[str, Any]] = []

    def __call__(self, _model_id: str, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            if self.cached is None:
                raise LocalEntryNotFoundError("nothing here")
            return str(self.cached)
        self.asked.append(options)
        if isinstance(self.online, Exception):
            raise self.online
        return str(self.online)


def test_a_model_in_the_cache_asks_nothing_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_folder(tmp_path)
    snapshots = Snapshots(tmp_path, RuntimeError("asked"))
    monkeypatch.setattr(hub, "snapshot_download", snapshots)
    assert fetch("owner/name") == tmp_path
    assert snapshots.asked == []


@pytest.mark.parametrize("gone", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_that_is_there_in_part_is_downloaded(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_folder(tmp_path / "part")
    shutil.copytree(tmp_path / "part", tmp_path / "whole")
    (tmp_path / "part" / gone).unlink()
    snapshots = Snapshots(tmp_path / "part", tmp_path / "whole")
    monkeypatch.setattr(hub, "snapshot_download", snapshots)
    said: list[str] = []
    assert fetch("owner/name", said.append) == tmp_path / "whole"
    assert any("owner/name" in line for line in said)
    patterns = snapshots.asked[0]["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in patterns[:4])
    assert not any(Path("pytorch_model.bin").match(pattern) for pattern in patterns)
    assert not any(Path("modeling_x.py").match(pattern) for pattern in patterns)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lambda: GatedRepoError("gated\nmore", response=REPLY), "licence"),
        (lambda: RepositoryNotFoundError("404\nmore", response=REPLY), "has no model"),
        (lambda: OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (lambda: LocalEntryNotFoundError("cannot find"), "cannot be reached"),
        (lambda: ConnectionError("refused"), "cannot be reached"),
        (lambda: TimeoutError("slow"), "cannot be reached"),
        (lambda: RuntimeError("of another library\nmore"), "RuntimeError: of another library"),
        (lambda: HfHubHTTPError("500 Server Error\nmore", response=REPLY), "500 Server Error"),
        (lambda: OSError(28, "No space left on device"), "no space left"),
        (lambda: OSError("odd\nmore"), "odd"),
    ],
)
def test_what_goes_wrong_is_one_line(
    error: Callable[[], Exception], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "snapshot_download", Snapshots(None, error()))
    with pytest.raises(UserError) as caught:
        fetch("owner/name")
    message = str(caught.value)
    assert expected in message
    assert "owner/name" in message or "no space" in message
    assert "\n" not in message


def test_offline_with_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real library, which the suite keeps off the network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"owner/name is not .* HF_HUB_OFFLINE is set"):
        fetch("owner/name")
