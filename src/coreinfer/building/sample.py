"""A calibration corpus, and which of its documents are read for what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from tqdm import tqdm

from coreinfer.building.layer_errors import LEAST_TOKENS
from coreinfer.building.reading import TokenCorpus, TokenDocument, in_batches
from coreinfer.errors import UserError

GOLDEN = (5**0.5 - 1) / 2


def is_chosen(index: int, share: float) -> bool:
    """Whether a document is of a share, in (0, 1], that is spread evenly over all of them.

    The fractional parts of the multiples of the golden ratio fill every interval evenly (Weyl
    1916), along any stretch of the documents and whatever period there is in their order.
    """
    return index * GOLDEN % 1 < share


@dataclass(frozen=True)
class CalibrationCorpus:
    """The documents of a corpus that have a token that counts: the first one may be a BOS token.

    Attributes:
        reader: of the corpus.
        documents: how many; tokens: of them all.
        long: how many of the documents have the tokens that errors are measured on.
        longest: the tokens of the longest.
    """

    reader: TokenCorpus
    documents: int
    tokens: int
    long: int
    longest: int

    @classmethod
    def counted(cls, reader: TokenCorpus, progress: bool = True) -> CalibrationCorpus:
        """By a pass that reads no more than the tokens, and tells every problem.

        Raises:
            UserError: if there is no document with a token, or none is long enough.
        """
        documents = tokens = long = longest = 0
        with tqdm(desc="counting", unit="doc", disable=None if progress else True) as bar:
            for document in _usable(reader):
                documents += 1
                tokens += len(document.ids)
                long += len(document.ids) >= LEAST_TOKENS
                longest = max(longest, len(document.ids))
                bar.update()
        reader.skips.pass_done()
        if not documents:
            raise UserError(f"{str(reader.path)!r} has no document with a token to read")
        if not long:
            raise UserError(
                f"{str(reader.path)!r} has no document of {LEAST_TOKENS} tokens or more, on which "
                "the layers' errors are measured; use longer ones"
            )
        return cls(reader, documents, tokens, long, longest)

    def read(self) -> Iterator[TokenDocument]:
        """All of them, in the order of the file."""
        return _usable(self.reader)

    def batches(self, share: float = 1.0) -> Iterator[list[TokenDocument]]:
        """About this share of them, the same ones whatever the batch size."""
        chosen = (one for index, one in enumerate(self.read()) if is_chosen(index, share))
        return in_batches(chosen, self.reader.batch_size)

    def documents_of(self, share: float) -> int:
        """How many documents a share of them is."""
        return sum(is_chosen(index, share) for index in range(self.documents))

    def long_ones(self, wanted: int) -> list[list[int]]:
        """Token ids of so many long documents at most, the longer half of twice as many from all
        over the corpus."""
        step = max(1, self.long // (2 * wanted))
        long = (one.ids for one in self.read() if len(one.ids) >= LEAST_TOKENS)
        return sorted(islice(long, 0, 2 * wanted * step, step), key=len)[-wanted:]


def _usable(reader: TokenCorpus) -> Iterator[TokenDocument]:
    return (document for document in reader.documents() if len(document.ids) > 1)
