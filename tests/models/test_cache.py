"""Where the cache is, and what is listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from coreinfer.models.cache import SOURCE, cache_dir, cached_models, model_dir


def test_the_variable_goes_first_then_the_platform_then_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("COREINFER_CACHE", "")
    assert cache_dir() == tmp_path / "xdg" / "coreinfer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / "home" / ".cache" / "coreinfer"
    monkeypatch.setenv("COREINFER_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "home" / "mine"


def test_looking_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path / "cache"))
    assert cached_models() == []
    model_dir("m")
    assert list(tmp_path.iterdir()) == []


def test_only_whole_models_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path))
    for folder, files in {
        "b-whole": {SOURCE: "{}", "model.safetensors": "12345"},
        "a-whole": {SOURCE: "{}"},
        "without-source": {"model.safetensors": "12345"},
        ".c.xyz.partial": {SOURCE: "{}"},
    }.items():
        model_dir(folder).mkdir(parents=True)
        for name, text in files.items():
            (model_dir(folder) / name).write_text(text)
    listed = cached_models()
    assert [(m.name, m.folder, m.size) for m in listed] == [
        ("a-whole", model_dir("a-whole"), 2),
        ("b-whole", model_dir("b-whole"), 7),
    ]
