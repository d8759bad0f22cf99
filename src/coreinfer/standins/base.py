"""What takes the place of the dropped neurons in decode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

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

    @abstractmethod
    def fit(self, sample: LayerSample, down: Tensor, dropped: Tensor) -> StandInTerms:
        """Fit one layer on its prompt.

        Args:
            sample: the prompt's tokens (its first token, an attention sink, is not among them
                unless there is no other).
            down: W_down, [d, D].
            dropped: indices of the dropped neurons, int64.

        Raises:
            ValueError: if the sample has no token.
        """

    def describe(self) -> dict[str, Any]:
        return {"name": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}
