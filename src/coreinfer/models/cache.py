"""Where pulled models lie, and what is there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

SOURCE = "source.json"  # written last into a model's folder: what it is and where it came from


@dataclass(frozen=True)
class CachedModel:
    """A model in the local cache: its name, its folder, and the bytes its files take."""

    name: str
    folder: Path
    size: int


def cache_dir() -> Path:
    """The folder of all that is kept between runs; it need not exist.

    COREINFER_CACHE names it; otherwise it is `coreinfer` in XDG_CACHE_HOME or in ~/.cache.
    """
    if own := os.environ.get("COREINFER_CACHE"):
        return Path(own).expanduser()
    if platform := os.environ.get("XDG_CACHE_HOME"):
        return Path(platform).expanduser() / "coreinfer"
    return Path.home() / ".cache" / "coreinfer"


def model_dir(name: str) -> Path:
    """Where the model of a short name lies once it is pulled."""
    return cache_dir() / "models" / name


def cached_models() -> list[CachedModel]:
    """The models that were pulled, by name. A pull that was cut short is not among them."""
    models = []
    for source in sorted((cache_dir() / "models").glob(f"[!.]*/{SOURCE}")):
        folder = source.parent
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        models.append(CachedModel(folder.name, folder, size))
    return models
