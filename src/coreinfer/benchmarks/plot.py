"""The result as a picture: decode speed of every row, from slowest to fastest run."""

from __future__ import annotations

from pathlib import Path

from coreinfer.benchmarks.run import Report
from coreinfer.benchmarks.table import heading, neurons
from coreinfer.errors import UserError
from coreinfer.files import replace_when_done

SUFFIXES = (".png", ".svg", ".pdf")


def require_plot(path: str) -> None:
    """Raises UserError, before anything is measured, if nothing can be drawn there."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot draw {path!r}; the file may end in {', '.join(SUFFIXES)}")
    if not Path(path).resolve().parent.is_dir():
        raise UserError(f"cannot draw {path!r}: there is no such folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib; pip install 'coreinfer[plots]'") from None


def plot(report: Report, path: str) -> None:
    """Draw the rows as bars.

    Raises:
        UserError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = report.rows[::-1]  # the first on top
    speeds = [row.decode_tokens_per_s for row in rows]
    figure = Figure(figsize=(8, 1.5 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        range(len(rows)),
        [speed.median for speed in speeds],
        xerr=[
            [speed.median - speed.min for speed in speeds],
            [speed.max - speed.median for speed in speeds],
        ],
        color=["tab:blue" if row.engine in ("native", "hf") else "tab:gray" for row in rows],
        capsize=2,
        tick_label=[f"{row.engine} {row.dtype} {neurons(row)} {row.density:.2f}" for row in rows],
    )
    axes.set_xlabel("decoded tokens a second: median, slowest and fastest run")
    axes.set_title("\n".join(heading(report)), fontsize=8)
    with replace_when_done(path) as partial:
        figure.savefig(partial, format=Path(path).suffix[1:].lower())
