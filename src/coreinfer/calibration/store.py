"""The calibration store: what a corpus says about a model's neurons, layer by layer.

A store is a folder of two files: `calibration.safetensors`, which is all that is read, and
`calibration.json`, its description for people. It may be the folder of a cluster store, whose files
have other names. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coreinfer.calibration.prediction import LayerPrediction
from coreinfer.core.layer_errors import LayerErrors
from coreinfer.core.statistics import LayerStatistics
from coreinfer.core.stores import check_tensor, save_store, tensors_file
from coreinfer.errors import UserError, require_ratio, require_whole

FORMAT = "coreinfer.calibration/1"
NAME = "calibration"  # of its files
# The sums of `LayerStatistics` that are kept, and their type.
SUMS = {
    "counts": torch.int64,
    "positive_sum": torch.float64,
    "square_sum": torch.float64,
    "unit_square_sum": torch.float64,
    "input_sum": torch.float64,
    "residual_sum": torch.float64,
}


@dataclass(frozen=True, eq=False)
class CalibrationStore:
    """What a calibration corpus says about a model.

    Attributes:
        model, model_fingerprint: the model it was made for; it is refused on any other.
        alpha: of the token-wise counts, in (0, 1].
        predictions: of each layer, h from the MLP's input.
        statistics: of each layer, the sums over the corpus, `residual_sum` among them: the priors.
        layer_errors: what each layer loses at each keep.
        corpus: its name, size and hash, or how the model wrote it. Plain JSON.
    """

    model: str
    model_fingerprint: str
    alpha: float
    predictions: Sequence[LayerPrediction]
    statistics: Sequence[LayerStatistics]
    layer_errors: LayerErrors
    corpus: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_ratio("alpha of a calibration store", self.alpha)
        layers = len(self.predictions)
        if not layers or len(self.statistics) != layers or self.layer_errors.num_layers != layers:
            raise UserError(
                f"a calibration store needs all parts of every layer, got {layers} predictions, "
                f"{len(self.statistics)} statistics, errors of {self.layer_errors.num_layers}"
            )
        for layer, (made, sums) in enumerate(zip(self.predictions, self.statistics, strict=True)):
            _check_prediction(f"layer {layer}", made)
            _check_sums(f"layer {layer}", sums, made)

    @property
    def num_layers(self) -> int:
        return len(self.predictions)

    @property
    def num_neurons(self) -> tuple[int, ...]:
        """D of every layer."""
        return tuple(made.coefficients.shape[1] for made in self.predictions)

    @property
    def rank(self) -> int:
        """r of the predictions."""
        return self.predictions[0].rank

    @property
    def tokens(self) -> int:
        """Tokens of the corpus that were counted."""
        return int(self.statistics[0].tokens)

    def __deepcopy__(self, memo: object) -> CalibrationStore:
        return self  # it never changes, and is large

    def require_model(self, fingerprint: str, name: str) -> None:
        """Raises UserError unless the store was made for the model with this fingerprint."""
        if self.model_fingerprint != fingerprint:
            raise UserError(
                f"this calibration store was made for {self.model!r} "
                f"({self.model_fingerprint[:12]}), not for {name!r} ({fingerprint[:12]}); "
                "make one with 'coreinfer calibrate'"
            )

    def corpus_statistics(self) -> Sequence[LayerStatistics]:
        """The sums over the whole corpus, a layer each."""
        return self.statistics

    def describe(self) -> dict[str, Any]:
        """What it is, as plain JSON: what `calibration.json` holds."""
        return {
            "format": FORMAT,
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "num_layers": self.num_layers,
            "rank": self.rank,
            "alpha": self.alpha,
            "tokens": self.tokens,
            "corpus": dict(self.corpus),
            "keeps": list(self.layer_errors.keeps),
        }

    def save(self, path: str | Path) -> None:
        """Write the store's files into a folder, which is made unless it is there.

        What else is there stays; a calibration is replaced only when the new one is complete.

        Raises:
            UserError: if it cannot be written, or something that is no store is there.
        """
        save_store(Path(path), NAME, self._tensors(), json.dumps(self.describe(), indent=2))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"errors": self.layer_errors.errors}
        for layer, (made, sums) in enumerate(zip(self.predictions, self.statistics, strict=True)):
            tensors[f"input_mean.{layer}"] = made.input_mean
            tensors[f"basis.{layer}"] = made.basis
            tensors[f"coefficients.{layer}"] = made.coefficients
            tensors |= {f"{name}.{layer}": getattr(sums, name) for name in SUMS}
        return tensors

    @classmethod
    def load(cls, path: str | Path) -> CalibrationStore:
        """Read a store.

        Raises:
            UserError: if it is missing, damaged, truncated, or of another format or version.
        """
        path = Path(path)
        file = tensors_file(path, NAME)
        if not file.exists():
            raise UserError(
                f"no calibration store at {str(path)!r}; make one with 'coreinfer calibrate'"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                about = json.loads((opened.metadata() or {})["about"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{str(file)!r} is not readable: {error}") from None
        found = about.get("format") if isinstance(about, dict) else None
        if found != FORMAT:
            raise UserError(f"{str(path)!r} has format {found!r}, expected {FORMAT!r}")
        try:
            layers = range(int(about["num_layers"]))
            return cls(
                model=str(about["model"]),
                model_fingerprint=str(about["model_fingerprint"]),
                alpha=about["alpha"],
                predictions=[
                    LayerPrediction(
                        tensors[f"input_mean.{layer}"],
                        tensors[f"basis.{layer}"],
                        tensors[f"coefficients.{layer}"],
                    )
                    for layer in layers
                ],
                statistics=[
                    LayerStatistics(
                        **{name: tensors[f"{name}.{layer}"] for name in SUMS},
                        tokens=int(about["tokens"]),
                    )
                    for layer in layers
                ],
                layer_errors=LayerErrors(tuple(about["keeps"]), tensors["errors"]),
                corpus=dict(about["corpus"]),
            )
        except UserError as error:
            raise UserError(f"{str(path)!r} is damaged: {error}") from None
        except KeyError as error:
            raise UserError(f"{str(path)!r} is damaged: it has no {error}") from None
        except (TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
            raise UserError(f"{str(path)!r} is damaged: {error!r}") from None


def _check_prediction(where: str, made: LayerPrediction) -> None:
    hidden, neurons = made.input_mean.numel(), made.coefficients.shape[-1]
    rank = made.basis.shape[-1]
    require_whole(f"rank of {where}", rank, 1)
    check_tensor(f"input mean of {where}", made.input_mean, (hidden,), torch.float32)
    check_tensor(f"basis of {where}", made.basis, (hidden, rank), torch.float32)
    check_tensor(f"coefficients of {where}", made.coefficients, (1 + rank, neurons), torch.float32)


def _check_sums(where: str, sums: LayerStatistics, made: LayerPrediction) -> None:
    require_whole(f"tokens of {where}", int(sums.tokens), 1)
    neurons = made.coefficients.shape[1]
    for name, dtype in SUMS.items():
        size = made.input_mean.numel() if name == "input_sum" else neurons
        check_tensor(f"{name} of {where}", getattr(sums, name), (size,), dtype)
