"""What is written to the terminal beside the answer itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def warn(message: str) -> None:
    """One line on stderr."""
    print("coreinfer:", " ".join(message.split()), file=sys.stderr, flush=True)


class Skipped:
    """Warns of each line of input that is passed over, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, problem: str) -> None:
        self.count += 1
        warn(f"{problem}; skipped")

    @property
    def exit_code(self) -> int:
        """2, the user's mistake, where a line was passed over."""
        return 2 if self.count else 0


def note(message: str) -> None:
    """A line on stderr that is no warning, such as what an answer cost."""
    print(message, file=sys.stderr, flush=True)


def progress(message: str) -> None:
    """What is going on, on stderr, where a person watches."""
    if sys.stderr.isatty():
        print(message, file=sys.stderr, flush=True)


class Bar:
    """A progress bar on stderr, where a person watches; one task after the other."""

    def __init__(self) -> None:
        self._stream = sys.stderr  # which a library may redirect while we show
        self._task: str | None = None
        self._bar: Any = None

    def show(self, task: str, done: int, total: int) -> None:
        """`done` of `total`; another task is another bar, and no bar goes back."""
        from tqdm import tqdm

        if task != self._task:
            self.close()
            self._task = task
            self._bar = tqdm(desc=task, total=total, file=self._stream, disable=None, leave=False)
        self._bar.update(max(0, done - self._bar.n))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns; the first row is the head. Numbers stand on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i and _is_number(cell) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-+."
