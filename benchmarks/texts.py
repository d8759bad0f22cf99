"""The text that the quality benchmarks measure on, cut into windows."""

from __future__ import annotations

import argparse
from pathlib import Path

from coreinfer.backends.base import Backend
from coreinfer.evaluation.continuations import Window, windows


def add_window_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, required=True, help="a plain text file")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--continuation-tokens", type=int, default=60)


def read_windows(backend: Backend, args: argparse.Namespace) -> list[Window]:
    """The windows that the options ask for.

    Raises:
        UserError: if the text is too short for them.
    """
    return windows(
        backend,
        args.text.read_text(encoding="utf-8"),
        count=args.windows,
        prompt_tokens=args.prompt_tokens,
        continuation_tokens=args.continuation_tokens,
    )
