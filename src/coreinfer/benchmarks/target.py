"""What is benched: a model, or a shape with synthetic weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from coreinfer.backends.native.container import is_converted, open_container
from coreinfer.benchmarks.shapes import SHAPES, config_of, shape_named
from coreinfer.errors import UserError
from coreinfer.models.assemble import skeleton
from coreinfer.models.loading import find
from coreinfer.models.pull import Progress, silent
from coreinfer.models.stream import open_checkpoint


@dataclass(frozen=True)
class Target:
    """A model, or the shape of one.

    Attributes:
        name: what rows call it.
        parameters: how many weights it has.
        context_length: most tokens of a sequence; None where it does not say.
        relu: its MLPs have a ReLU, so that many activations are exactly zero.
        source: as `coreinfer.load` takes it; None for a shape.
        shape: its configuration; None for a model.
        gguf: its GGUF file, where it has one.
    """

    name: str
    parameters: int
    context_length: int | None
    relu: bool
    source: str | None = None
    shape: Mapping[str, Any] | None = None
    gguf: Path | None = None

    @property
    def synthetic(self) -> bool:
        return self.shape is not None

    @classmethod
    def of_shape(cls, name: str, shapes: Mapping[str, Mapping[str, Any]] = SHAPES) -> Target:
        """Raises UserError if there is no such shape."""
        values = shape_named(name, shapes)
        config = config_of(values)
        parameters = sum(p.numel() for p in skeleton(config, name).parameters())
        return cls(name, parameters, _context(config), _relu(config), shape=values)

    @classmethod
    def of_model(cls, model: str, on_progress: Progress = silent) -> Target:
        """Raises UserError if there is no such model, or it is damaged."""
        path, name = find(model, on_progress)
        if path.is_dir() and is_converted(path):
            manifest = open_container(path).manifest
            decoder = manifest.decoder
            parameters = round(manifest.data_bytes * 8 / manifest.format.bits_per_weight)
            relu = decoder.activation == "relu"
            return cls(manifest.model, parameters, decoder.context_length, relu, source=model)
        checkpoint = open_checkpoint(path)
        config = checkpoint.config
        return cls(
            name,
            sum(math.prod(shape) for shape in checkpoint.shapes.values()),
            _context(config),
            _relu(config),
            source=model,
            gguf=_gguf(path),
        )

    def require_room(self, tokens: int) -> None:
        """Raises UserError if prompt and answer are longer than the model reads."""
        if self.context_length is not None and tokens > self.context_length:
            raise UserError(
                f"prompt and answer have {tokens} tokens, {self.name} reads "
                f"{self.context_length} at most; ask for fewer"
            )


def _context(config: PreTrainedConfig) -> int | None:
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def _relu(config: PreTrainedConfig) -> bool:
    names = (getattr(config, name, None) for name in ("hidden_act", "activation_function"))
    return "relu" in names


def _gguf(path: Path) -> Path | None:
    """The model's own file, or the only one in its folder."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    return found[0] if len(found) == 1 else None
