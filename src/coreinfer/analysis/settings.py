"""With what the questions are asked: sizes, fractions and seeds, the same for all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from coreinfer.errors import UserError, require_ratio, require_whole


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured, and at which points.

    Args:
        windows: pieces of text of each source, at least 2.
        prompt_tokens, continuation_tokens: their parts; the first token of a continuation comes
            from the dense prefill and is not measured.
        batch_size: windows computed together.
        keep: fraction of the neurons kept where that is not what is varied.
        dense_layers: layers that stay dense wherever language models are asked.
        alphas, keeps: the grid: alpha, and beta and gamma.
        lengths: prompt lengths in tokens, ascending.
        long_tokens: length of a long continuation; period: tokens after which it selects anew.
        corpus_documents: documents of a cluster store that is made on the way, of
            document_tokens tokens at most.
        seed: of everything that is drawn.

    Raises:
        UserError: if one is out of range.
    """

    windows: int = 8
    prompt_tokens: int = 128
    continuation_tokens: int = 32
    batch_size: int = 8
    keep: float = 0.4
    dense_layers: tuple[int, ...] = ()
    alphas: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)
    keeps: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    lengths: tuple[int, ...] = (1, 4, 16, 64, 128, 256)
    long_tokens: int = 320
    period: int = 64
    corpus_documents: int = 48
    document_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("windows", self.windows, 2)
        require_whole("prompt_tokens", self.prompt_tokens, 8)
        require_whole("continuation_tokens", self.continuation_tokens, 2)
        require_whole("batch_size", self.batch_size, 1)
        require_ratio("keep", self.keep)
        for name in ("alphas", "keeps", "lengths"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise UserError(f"{name} must be ascending and at least one, got {list(values)}")
        for value in (*self.alphas, *self.keeps):
            require_ratio("alphas and keeps", value)
        for length in self.lengths:
            require_whole("a prompt length", length, 1)
        require_whole("period", self.period, 2)
        require_whole("long_tokens", self.long_tokens, self.period)
        require_whole("corpus_documents", self.corpus_documents, 2)
        require_whole("document_tokens", self.document_tokens, 2)
        require_whole("seed", self.seed, 0, 2**32 - 1)

    def describe(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
