"""Drawing a chart as SVG: readable without colour, the same bytes for the same numbers."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from coreinfer.analysis.sections import Cell, Chart, Figure, Table
from coreinfer.errors import UserError

# Looks are repeated after different numbers of series, so that pairs of them are not.
LINES = (
    "-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)), (0, (3, 1, 1, 1)),
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "x", "+", "*", "P")
HATCHES = ("", "////", "\\\\\\\\", "xxx", "---", "|||", "+++", "//--", "\\\\||")
# Okabe and Ito's colours: distinct for most eyes, and of differing lightness.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
PANELS_A_ROW = 3
Order = Sequence[str | None]  # the series of a chart, in the order of their looks
# None for all of it leaves out the block that names web addresses and the date.
NO_METADATA = MappingProxyType(dict.fromkeys(("Creator", "Date", "Format", "Type")))


def require_plots() -> None:
    """Raises UserError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("analyze draws with matplotlib; pip install 'coreinfer[analyze]'")


def svg(figure: Figure) -> str:
    """A figure as an SVG document, its text as text."""
    import matplotlib

    options: Any = {"svg.fonttype": "none", "svg.hashsalt": "coreinfer", "font.size": 8}
    with matplotlib.rc_context(options), io.StringIO() as text:
        draw(figure).savefig(text, format="svg", metadata=dict(NO_METADATA))
        return text.getvalue()


def draw(figure: Figure) -> Any:
    """A figure as matplotlib's."""
    from matplotlib.figure import Figure as Canvas

    table, chart = figure.table, figure.chart
    panels = _groups(table, chart.panel)
    columns = 2 if len(panels) == 4 else min(len(panels), PANELS_A_ROW)
    rows = -(-len(panels) // columns)
    canvas = Canvas(figsize=(max(6.0, 3.6 * columns), 3.4 * rows), layout="constrained")
    grid = canvas.subplots(rows, columns, squeeze=False, sharey=chart.kind != "grid")
    # Of the whole table, so that a series looks alike in every panel.
    order = list(_groups(table, chart.series))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, part) in zip(grid.flat, panels.items(), strict=False):
        DRAWN[chart.kind](axes, part, chart, order)
        if chart.reference is not None:
            label, height = chart.reference
            axes.axhline(height, color="0.45", linestyle=(0, (1, 1)), linewidth=1, label=label)
        if chart.log_y and min(_numbers(part.column(chart.y)), default=0.0) > 0:
            axes.set_yscale("log")
        axes.set_xlabel(chart.x_label or chart.x)
        axes.set_ylabel(chart.y_label or chart.y)
        axes.tick_params(labelleft=True)
        if name is not None:
            axes.set_title(name, fontsize=8)
    named: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        canvas.legend(named.values(), named.keys(), loc="outside lower center", ncols=4)
    return canvas


def inline(document: str, prefix: str) -> str:
    """An SVG document as an element of a page; its ids get a prefix, for a page has many."""
    element = document[document.index("<svg") :]
    element = re.sub(r'\bid="', f'id="{prefix}-', element)
    element = re.sub(r'href="#', f'href="#{prefix}-', element)
    return re.sub(r"url\(#", f"url(#{prefix}-", element)


def _groups(table: Table, column: str | None) -> dict[str | None, Table]:
    """The rows of each value of a column, in the order in which the values come."""
    if column is None:
        return {None: table}
    parts: dict[str | None, list[tuple[Cell, ...]]] = {}
    for name, row in zip(table.column(column), table.rows, strict=True):
        parts.setdefault(str(name), []).append(row)
    return {
        name: Table(table.name, table.caption, table.columns, tuple(rows))
        for name, rows in parts.items()
    }


def _numbers(cells: Sequence[Cell]) -> list[float]:
    return [float("nan") if cell is None else float(cell) for cell in cells]


def _places(axes: Any, cells: Sequence[Cell], log: bool) -> list[float]:
    """x of each cell: numbers where all are, else a place for each text."""
    if any(isinstance(cell, str) for cell in cells):
        names = list(dict.fromkeys(str(cell) for cell in cells))
        axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 4 else 0)
        return [float(names.index(str(cell))) for cell in cells]
    values = _numbers(cells)
    if log:
        ticks = sorted(set(values))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    return values


def _errors(part: Table, chart: Chart, heights: Sequence[float]) -> list[list[float]] | None:
    if chart.low is None or chart.high is None:
        return None
    lows, highs = _numbers(part.column(chart.low)), _numbers(part.column(chart.high))
    # A mean of equal numbers may be off by its rounding; a NaN (no end) stays one.
    below = [max(y - low, 0.0) for y, low in zip(heights, lows, strict=True)]
    above = [max(high - y, 0.0) for y, high in zip(heights, highs, strict=True)]
    return [below, above]


def _lines(axes: Any, table: Table, chart: Chart, order: Order) -> None:
    for name, part in _groups(table, chart.series).items():
        i = order.index(name)
        heights = _numbers(part.column(chart.y))
        axes.errorbar(
            _places(axes, part.column(chart.x), chart.log_x),
            heights,
            yerr=_errors(part, chart, heights),
            linestyle=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            markersize=4,
            linewidth=1,
            elinewidth=0.6,
            label=name,
        )


def _scatter(axes: Any, table: Table, chart: Chart, order: Order) -> None:
    for name, part in _groups(table, chart.series).items():
        i = order.index(name)
        axes.scatter(
            _numbers(part.column(chart.x)),
            _numbers(part.column(chart.y)),
            marker=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            s=70 if name is not None and name == chart.emphasis else 14,
            linewidth=0.8,
            label=name,
        )


def _bars(axes: Any, table: Table, chart: Chart, order: Order) -> None:
    names = list(dict.fromkeys(str(cell) for cell in table.column(chart.x)))
    width = 0.8 / len(order)
    for name, part in _groups(table, chart.series).items():
        i = order.index(name)
        heights = _numbers(part.column(chart.y))
        shift = (i + 0.5) * width - 0.4
        axes.bar(
            [names.index(str(cell)) + shift for cell in part.column(chart.x)],
            heights,
            width,
            yerr=_errors(part, chart, heights),
            hatch=HATCHES[i % len(HATCHES)],
            facecolor="white",
            edgecolor=COLOURS[i % len(COLOURS)],
            error_kw={"elinewidth": 0.6},
            label=name,
        )
    axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 3 else 0)


def _grid(axes: Any, table: Table, chart: Chart, _order: Order) -> None:
    assert chart.value is not None
    xs = list(dict.fromkeys(table.column(chart.x)))
    ys = list(dict.fromkeys(table.column(chart.y)))
    cells = [[float("nan")] * len(xs) for _ in ys]
    for x, y, value in zip(
        table.column(chart.x), table.column(chart.y), _numbers(table.column(chart.value)),
        strict=True,
    ):  # fmt: skip
        cells[ys.index(y)][xs.index(x)] = value
    # Pale, so that the numbers, which say it all, can be read on it.
    axes.imshow(cells, cmap="Greys", alpha=0.45, aspect="auto")
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center")
    axes.set_xticks(range(len(xs)), [str(x) for x in xs])
    axes.set_yticks(range(len(ys)), [str(y) for y in ys])


DRAWN: Mapping[str, Callable[[Any, Table, Chart, Order], None]] = MappingProxyType(
    {"lines": _lines, "bars": _bars, "scatter": _scatter, "grid": _grid}
)
