"""A corpus as a model reads it: tokens, in batches that are the same whenever it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from coreinfer.building.corpus import read_corpus
from coreinfer.jsonl import OnSkip

WINDOW = 256  # documents held at a time, to be read in the order of their length


@dataclass(frozen=True)
class TokenDocument:
    """A document as the model reads it; `cut` says that there was more of it."""

    text: str
    ids: list[int]
    cut: bool


class Skips:
    """Passes each problem on in the first of the passes that a run makes, and then no more."""

    def __init__(self, on_skip: OnSkip) -> None:
        self._on_skip = on_skip
        self._told = False

    def tell(self, problem: str) -> None:
        if not self._told:
            with tqdm.external_write_mode():  # not into the middle of a progress bar
                self._on_skip(problem)

    def pass_done(self) -> None:
        self._told = True


def in_batches(documents: Iterator[TokenDocument], size: int) -> Iterator[list[TokenDocument]]:
    """Batches of documents of similar length: the same ones for the same documents."""
    while window := list(islice(documents, WINDOW)):
        window.sort(key=lambda document: len(document.ids))
        for start in range(0, len(window), size):
            yield window[start : start + size]


@dataclass(frozen=True)
class TokenCorpus:
    """The documents of a corpus file as tokens.

    Attributes:
        path: a file as `read_corpus` takes it.
        tokenizer: of the model.
        max_tokens: a longer document is cut to so many tokens.
        batch_size: documents of a batch.
        min_chars: a shorter document is skipped.
        skips: told of what is skipped.
    """

    path: Path
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    batch_size: int
    min_chars: int
    skips: Skips

    def batches(self) -> Iterator[list[TokenDocument]]:
        """Batches of documents of similar length: the same ones whenever the corpus is read."""
        return in_batches(self.documents(), self.batch_size)

    def documents(self) -> Iterator[TokenDocument]:
        """The documents that have a token, in the order of the file."""
        special = self.tokenizer.num_special_tokens_to_add()
        found = read_corpus(self.path, min_chars=self.min_chars, on_skip=self.skips.tell)
        for document in found:
            ids = list(self.tokenizer(document.text, verbose=False).input_ids)
            if len(ids) > special:
                yield TokenDocument(
                    document.text, ids[: self.max_tokens], len(ids) > self.max_tokens
                )
            else:
                self.skips.tell(
                    f"{str(self.path)!r}: line {document.line} has no token in this model's "
                    "vocabulary"
                )
