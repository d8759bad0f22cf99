"""What takes the place of the dropped neurons in decode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from coreinfer.standins.down import DownProjection
from coreinfer.standins.sample import LayerSample


@dataclass(frozen=True)
class StandInTerms:
    """The stand-in of one layer: y += offset + left @ (right @ x).

    Attributes:
        offset: [d].
        left: [d, r], right: [r, d]; None where the stand-in is a constant.
    """

    offset: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def num_weights(self) -> int:
        """Weights that decode reads for it."""
        parts = (self.offset, self.left, self.right)
        return sum(part.numel() for part in parts if part is not None)


@dataclass(frozen=True, kw_only=True)
class StandIn(ABC):
    """Replaces W_down[:, rest] h[rest], which dropping the other neurons leaves out."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def sample_tokens(self) -> int:
        """How many prompt tokens' x and h must be kept to fit it; 0 where sums are enough."""

    @property
    def fit_skipped(self) -> bool:
        """Whether it also stands for core neurons at the tokens where they are skipped."""
        return False

    @abstractmethod
    def fit(
        self,
        layer: int,
        sample: LayerSample,
        down: DownProjection,
        dropped: Tensor,
        known: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> StandInTerms:
        """Fit one layer on its prompt.

        Args:
            layer: its index.
            sample: the prompt's tokens (its first token, an attention sink, is not among them
                unless there is no other).
            down: the layer's down projection.
            dropped: indices of the dropped neurons, int64; at least one.
            known: the dropped part W_down[:, dropped] h_t[dropped] of every token read so far, each
                at its position, [T, d] float32, where it was computed already.
            skipped: what the core neurons add at the sampled tokens where they are skipped,
                [n, d] float32; given where `fit_skipped` and neurons are skipped.

        Raises:
            ValueError: if the sample has no token.
        """

    def check(self, fingerprint: str, model: str) -> None:
        """Refuse what does not fit the model, before any work is done.

        Raises:
            UserError: for a store made for another model.
        """
        return

    def describe(self) -> dict[str, Any]:
        """Name and parameters as plain JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {key: v.describe() if hasattr(v, "describe") else v for key, v in values.items()}
        return {"name": self.name} | plain
