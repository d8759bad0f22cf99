"""A checkpoint's tensors a few rows at a time, for what must not hold a model in memory.

Names, and what the numbers mean, are those of transformers, whatever file they lie in.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from coreinfer.errors import UserError
from coreinfer.models.assemble import make_config, one_line, quiet_transformers
from coreinfer.models.checkpoint import CONFIG, read_config, require_tokenizer, weight_files
from coreinfer.models.gguf_model import GgufModel
from coreinfer.models.gguf_tokenizer import gguf_tokenizer

# What lies beside the weights and goes with them: never code, never pickles.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "tekken.json", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja",
)  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")


class Checkpoint(Protocol):
    """A model on disk."""

    @property
    def where(self) -> str:
        """Its path, quoted, for messages."""
        ...

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, by transformers' name."""
        ...

    @property
    def identity(self) -> str:
        """A hash that changes when a file of it does: of names, sizes and times."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, as it is stored, or float32 where that is quantised.

        Raises:
            UserError: if they cannot be read.
        """
        ...

    def write_companions(self, folder: Path) -> None:
        """Put configuration and tokenizer into a folder, as transformers reads them."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder with safetensors, or a .gguf file.

    Raises:
        UserError: if it is no model, is damaged, or holds what are no floating-point weights.
    """
    return FolderCheckpoint(path) if path.is_dir() else GgufCheckpoint(path)


@dataclass(frozen=True)
class _Place:
    """Which file a tensor is in, by what name."""

    file: Path
    name: str


class FolderCheckpoint:
    """A folder as transformers writes it: config.json, safetensors, a tokenizer.

    A file is opened anew for each read: the pages that were read before are let go with it.
    """

    def __init__(self, folder: Path) -> None:
        self.where = repr(str(folder))
        self._folder = folder
        values = read_config(folder)
        require_tokenizer(folder)
        self._files = weight_files(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, _Place] = {}
        for path in self._files:
            with _reading(path), safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    _require_float(path, name, part.get_dtype())
                    shapes[name] = tuple(part.get_shape())
                    self._places[name] = _Place(path, name)
        self.config = make_config(values, len(shapes), repr(str(folder / CONFIG)))
        self.shapes = shapes
        self._name_fully()

    @property
    def identity(self) -> str:
        return _identity([*self._files, *_companions(self._folder)])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        place = self._places[name]
        with _reading(place.file), safe_open(place.file, framework="pt") as file:
            rows: Tensor = file.get_slice(place.name)[start:stop]
            return rows

    def write_companions(self, folder: Path) -> None:
        for file in _companions(self._folder):
            shutil.copyfile(file, folder / file.name)

    def _name_fully(self) -> None:
        """A checkpoint of the model without its head leaves out the first part of the names."""
        prefix = "model."
        if any(name.startswith(prefix) for name in self.shapes):
            return
        for name in list(self.shapes):
            if not name.startswith("lm_head."):
                self.shapes[prefix + name] = self.shapes.pop(name)
                self._places[prefix + name] = self._places.pop(name)


class GgufCheckpoint:
    """A GGUF file of an architecture whose tensors keep their shapes."""

    def __init__(self, path: Path) -> None:
        self.where = repr(str(path))
        self._path = path
        self._model = GgufModel.open(path)
        self.config = self._model.config
        stored, tensors = self._model.stored, self._model.file.tensors
        self.shapes = {name: tensors[stored[name]].shape for name in stored}

    @property
    def identity(self) -> str:
        return _identity([self._path])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._model.tensor(name, slice(start, stop))

    def write_companions(self, folder: Path) -> None:
        tokenizer = gguf_tokenizer(self._model.file, lambda _line: None)
        with quiet_transformers():
            self.config.save_pretrained(folder)
            self._model.generation().save_pretrained(folder)
            tokenizer.save_pretrained(folder, save_jinja_files=False)


def _companions(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in COMPANIONS)
    ]


def _identity(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        about = file.stat()
        digest.update(repr((file.name, about.st_size, about.st_mtime_ns)).encode())
    return digest.hexdigest()


def _require_float(path: Path, name: str, dtype: str) -> None:
    if dtype not in _FLOATS:
        raise UserError(
            f"{str(path)!r}: tensor {name!r} holds {dtype}, not floating-point numbers; "
            "use the unquantised model"
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} is damaged or truncated: {one_line(error)}; get the file again"
        ) from None
