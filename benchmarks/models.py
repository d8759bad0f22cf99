"""The model that the options of a quality benchmark name."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from coreinfer.api import load
from coreinfer.backends.base import Backend


def opened(
    args: argparse.Namespace, on_progress: Callable[[str], None] = lambda _line: None
) -> Backend:
    """As --model, --backend, --dtype and --threads say."""
    return load(
        args.model,
        backend=args.backend,
        dtype=args.dtype,
        threads=args.threads,
        on_progress=on_progress,
    ).backend
