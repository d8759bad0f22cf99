"""How a calibration store is made, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coreinfer.calibration.sums import BASES, sketch_width
from coreinfer.errors import UserError, require_ratio, require_whole


@dataclass(frozen=True)
class CalibrationSettings:
    """How a store is made.

    Attributes:
        rank: of the predictions, at least 1; never above the hidden size.
        alpha: fraction of each token's positive activations that count, in (0, 1].
        seed: of the sketch, and of what the model writes.
        max_tokens: a longer document is cut to so many tokens, from 4; below the context length.
        batch_size: documents prefilled together.
        min_chars: a shorter document is skipped.
        basis: how it is chosen, one of `BASES`.
        basis_tokens: tokens that the basis is chosen from, about; from all over the corpus.
        error_documents: documents on which the layers' errors are measured at most.
        own_tokens: tokens that the model writes where there is no corpus.
        train_steps: of training the predictions on what decoding loses, from 0.
    """

    rank: int = 256
    alpha: float = 0.4
    seed: int = 0
    max_tokens: int = 512
    batch_size: int = 8
    min_chars: int = 1
    basis: str = "regression"
    basis_tokens: int = 32_768
    error_documents: int = 8
    own_tokens: int = 32_768
    train_steps: int = 0

    def __post_init__(self) -> None:
        require_whole("rank", self.rank, 1)
        require_ratio("alpha", self.alpha)
        require_whole("seed", self.seed, 0, 2**32 - 1)
        require_whole("max_tokens", self.max_tokens, 4)
        if self.basis not in BASES:
            raise UserError(f"no basis {self.basis!r}; there is {', '.join(BASES)}")
        require_whole("train_steps", self.train_steps, 0)
        for name in ("batch_size", "basis_tokens", "error_documents", "own_tokens"):
            require_whole(name, getattr(self, name), 1)


def memory_needed(sizes: Sequence[tuple[int, int]], rank: int) -> int:
    """Bytes that the sums take at most, beside the model, for layers of (D, d)."""
    most = 0
    for stage in ("basis", "sums"):
        total = 0
        for neurons, hidden in sizes:
            if stage == "basis":
                total += 8 * hidden * (hidden + sketch_width(neurons, rank))
            else:
                total += 8 * (1 + rank) * (neurons + rank) + 8 * 6 * neurons
        most = max(most, total)
    return most
