"""Which documents of a corpus a calibration reads for what."""

from __future__ import annotations

from pathlib import Path

import pytest

from coreinfer.building.reading import Skips, TokenCorpus
from coreinfer.building.sample import CalibrationCorpus, is_chosen
from coreinfer.errors import UserError
from coreinfer.jsonl import OnSkip, refuse
from tests.building.corpora import write_corpus
from tests.tiny import tiny_tokenizer


def corpus_of(
    tmp_path: Path, texts: list[str], batch_size: int = 8, on_skip: OnSkip = refuse
) -> CalibrationCorpus:
    path = write_corpus(tmp_path / "c.jsonl", texts)
    reader = TokenCorpus(path, tiny_tokenizer(), 64, batch_size, 1, Skips(on_skip))
    return CalibrationCorpus.counted(reader, progress=False)


@pytest.mark.parametrize("period", [1, 2, 3, 8, 32, 256])
@pytest.mark.parametrize("share", [1.0, 0.75, 1 / 2, 1 / 3, 1 / 8, 1 / 32])
def test_a_share_is_spread_evenly_whatever_the_order(share: float, period: int) -> None:
    chosen = [index for index in range(256 * 32) if is_chosen(index, share)]
    for start in range(0, period, max(1, period // 4)):  # of each kind, if kinds go round
        ours = [index for index in chosen if index % period == start]
        assert len(ours) == pytest.approx(share * 256 * 32 / period, rel=0.2, abs=3)
    for stretch in range(8):
        inside = [index for index in chosen if index // 1024 == stretch]
        assert len(inside) == pytest.approx(share * 1024, rel=0.02, abs=2)


@pytest.mark.parametrize("share", [1.0, 0.4, 1 / 32])
def test_a_share_is_of_all_lengths_and_the_same_in_all_batches(
    tmp_path: Path, share: float
) -> None:
    # Sorted by length in windows of 256, as a corpus that is read in batches is.
    texts = [f"{i:03} " + "x" * (i * 7 % 53) for i in range(600)]
    read = []
    for size in (1, 7, 8, 32):
        corpus = corpus_of(tmp_path, texts, size)
        batches = list(corpus.batches(share))
        assert {len(batch) for batch in batches[:-1]} <= {size, 256 % size}
        read.append(sorted(one.text for batch in batches for one in batch))
    assert all(texts == read[0] for texts in read)
    assert len(read[0]) == corpus.documents_of(share) == pytest.approx(share * 600, abs=1)
    tokens = sum(len(text) for text in read[0])
    assert tokens == pytest.approx(share * corpus.tokens, rel=0.15)


def test_it_counts_what_has_a_token_that_counts(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, ["a", "ab", "abc", "abcd", "x" * 99])
    assert (corpus.documents, corpus.tokens, corpus.long) == (4, 2 + 3 + 4 + 64, 2)
    assert [len(one.ids) for one in corpus.read()] == [2, 3, 4, 64]


def test_errors_are_measured_on_long_documents_from_all_over(tmp_path: Path) -> None:
    # Every other document is too short, those that are looked at for errors among them.
    texts = ["abc" if i % 2 == 0 else "y" * (4 + i % 30) for i in range(80)]
    corpus = corpus_of(tmp_path, texts)
    found = corpus.long_ones(4)
    assert [len(ids) for ids in found] == sorted(len(ids) for ids in found)
    assert len(found) == 4
    assert min(len(ids) for ids in found) > 10
    assert len(corpus.long_ones(99)) == 40


def test_without_a_document_that_is_long_enough_nothing_is_begun(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no document with a token to read"):
        corpus_of(tmp_path, ["a", "b"])
    with pytest.raises(UserError, match=r"no document of 4 tokens or more, .*; use longer ones"):
        corpus_of(tmp_path, ["ab", "abc"])
