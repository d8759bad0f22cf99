"""What decode did not read, because core neurons were skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spared:
    """Bytes that were not read, over tokens that were decoded; of each sequence of a batch."""

    num_bytes: tuple[float, ...]
    tokens: tuple[int, ...]

    @classmethod
    def nothing(cls, batch: int) -> Spared:
        """Before anything was decoded."""
        return cls((0.0,) * batch, (0,) * batch)

    def plus(self, num_bytes: Sequence[float], tokens: Sequence[int]) -> Spared:
        """After so many tokens more of each sequence."""
        return Spared(
            tuple(a + b for a, b in zip(self.num_bytes, num_bytes, strict=True)),
            tuple(a + b for a, b in zip(self.tokens, tokens, strict=True)),
        )

    @property
    def means(self) -> list[float | None]:
        """Bytes a token; None where none was decoded."""
        pairs = zip(self.num_bytes, self.tokens, strict=True)
        return [size / tokens if tokens else None for size, tokens in pairs]
