"""CoreSet: the core neurons of a prompt, and their file format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.files import replace_when_done

FORMAT = "coreinfer.coreset/1"
_MOST_LAYERS = 100_000  # so that a damaged number cannot ask for all memory


@dataclass(frozen=True, eq=False)
class CoreSet:
    """The neurons that decoding keeps, layer by layer.

    Attributes:
        layers: for each sparse layer its sorted neuron indices, int32 [K]; dense layers are absent.
        num_neurons: D of every layer of the model, sparse or dense.
        model: name of the model it was made for.
        model_fingerprint: its fingerprint; a set is refused on any other model.
        selector: what chose it, as plain JSON.
    """

    layers: Mapping[int, Tensor]
    num_neurons: tuple[int, ...]
    model: str = ""
    model_fingerprint: str = ""
    selector: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.num_neurons or min(self.num_neurons) < 1:
            raise UserError(f"every layer must have a neuron, got {list(self.num_neurons)}")
        for layer, index in self.layers.items():
            _check_layer(layer, index, self.num_neurons)

    @property
    def num_layers(self) -> int:
        return len(self.num_neurons)

    def kept(self, layer: int) -> int:
        """How many neurons of a layer are kept; D where it is dense."""
        return self.layers[layer].numel() if layer in self.layers else self.num_neurons[layer]

    @property
    def density(self) -> float:
        """Kept neurons / all neurons, over all layers."""
        return sum(self.kept(layer) for layer in range(self.num_layers)) / sum(self.num_neurons)

    def require_model(self, fingerprint: str, name: str) -> None:
        """Raises UserError unless the set was made for the model with this fingerprint."""
        if self.model_fingerprint != fingerprint:
            raise UserError(
                f"this core set was made for {self.model!r} ({self.model_fingerprint[:12]}), "
                f"not for {name!r} ({fingerprint[:12]}); make one with 'coreinfer select'"
            )

    def save(self, path: str | Path) -> None:
        """Write safetensors: `layers.{i}` int32 tensors and string metadata.

        Raises:
            UserError: if the file cannot be written; nothing is left half-written.
        """
        uniform = len(set(self.num_neurons)) == 1
        sizes: int | list[int] = self.num_neurons[0] if uniform else list(self.num_neurons)
        metadata = {
            "format": FORMAT,
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "num_layers": str(self.num_layers),
            "num_neurons": json.dumps(sizes),
            "selector": json.dumps(dict(self.selector)),
        }
        # Clones, because safetensors refuses tensors that share their memory.
        tensors = {f"layers.{layer}": index.cpu().clone() for layer, index in self.layers.items()}
        with replace_when_done(path) as partial:
            save_file(tensors, partial, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> CoreSet:
        """Read a core set.

        Raises:
            UserError: if the file is missing, damaged, of another format or version, or holds
                indices that are unsorted or outside the layer's D neurons.
        """
        if Path(path).is_dir():
            raise UserError(f"{str(path)!r} is a folder, expected a core-set file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise UserError(f"no core set at {str(path)!r}") from None
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{str(path)!r} is not a readable core set: {error}") from None
        if metadata.get("format") != FORMAT:
            raise UserError(
                f"{str(path)!r} has format {metadata.get('format')!r}, expected {FORMAT!r}"
            )
        try:
            num_neurons = _layer_sizes(metadata["num_layers"], metadata["num_neurons"])
            selector = json.loads(metadata["selector"])
            model, fingerprint = metadata["model"], metadata["model_fingerprint"]
            layers = {int(name.removeprefix("layers.")): t for name, t in tensors.items()}
            if {f"layers.{layer}" for layer in layers} != tensors.keys():
                raise ValueError(f"tensors are named {sorted(tensors)}, not layers.0, layers.1, ..")
            if not isinstance(selector, dict):
                raise ValueError(f"selector is no JSON object: {selector!r}")
        except KeyError as error:
            raise UserError(f"{str(path)!r} has damaged metadata: no {error}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{str(path)!r} has damaged metadata: {error}") from None
        try:
            return cls(layers, num_neurons, model, fingerprint, selector)
        except UserError as error:
            raise UserError(f"{str(path)!r}: {error}") from None


def _layer_sizes(num_layers: str, num_neurons: str) -> tuple[int, ...]:
    """D of every layer, from the metadata; raises ValueError where that is damaged."""
    count, sizes = int(num_layers), json.loads(num_neurons)
    if not 0 < count <= _MOST_LAYERS:
        raise ValueError(f"num_layers is {count}")
    if not isinstance(sizes, list):
        sizes = [sizes] * count
    if len(sizes) != count or any(type(size) is not int for size in sizes):
        raise ValueError(f"num_neurons is {num_neurons[:80]}, for {count} layers")
    return tuple(sizes)


def _check_layer(layer: int, index: Tensor, num_neurons: tuple[int, ...]) -> None:
    if not 0 <= layer < len(num_neurons):
        raise UserError(f"core set names layer {layer}, the model has 0 to {len(num_neurons) - 1}")
    if index.dtype != torch.int32 or index.dim() != 1:
        raise UserError(
            f"layer {layer}: expected a 1-D int32 tensor, got {index.dtype} {tuple(index.shape)}"
        )
    if index.numel() == 0:
        raise UserError(f"layer {layer}: the core set is empty")
    size = num_neurons[layer]
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= size:
        bad = low if low < 0 else high
        raise UserError(f"layer {layer}: neuron {bad} is outside the layer's 0 to {size - 1}")
    if bool((index[1:] <= index[:-1]).any()):
        raise UserError(f"layer {layer}: indices must be sorted and without duplicates")
