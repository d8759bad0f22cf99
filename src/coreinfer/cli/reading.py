"""Options of the verbs that read a corpus."""

from __future__ import annotations

import argparse

from coreinfer.cli.values import number, whole

CORPUS_FILE = (
    "a .jsonl file (an object with 'text', or a string, a line), or text with blank lines between "
    "documents"
)


def add_reading_options(parser: argparse.ArgumentParser, *, least_tokens: int) -> None:
    """How documents are read and counted; `least_tokens` is the shortest that one may be cut to."""
    parser.add_argument(
        "--alpha",
        type=number,
        default=0.4,
        metavar="A",
        help="fraction of a token's positive activations that count, above 0 to 1 (default: 0.4)",
    )
    parser.add_argument(
        "--max-tokens",
        type=whole,
        default=512,
        metavar="N",
        help=f"tokens read of a document at most, from {least_tokens} (default: 512)",
    )
    parser.add_argument(
        "--batch-size",
        type=whole,
        default=8,
        metavar="N",
        help="documents prefilled together, from 1 (default: 8)",
    )
