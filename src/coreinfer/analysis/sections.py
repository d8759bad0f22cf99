"""What a question's answer is made of: text, tables, and figures that are drawn from a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from coreinfer.errors import UserError

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; None is a cell without a value.

    Attributes:
        name: of its file, without a suffix; one of its kind in a section.
        caption: what it shows, a sentence.
        columns: their names.
        rows: as many cells each.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"the table {self.name!r} has rows of another width than its columns")

    def column(self, name: str) -> list[Cell]:
        place = self.columns.index(name)
        return [row[place] for row in self.rows]

    def to_csv(self) -> str:
        """RFC 4180 with a head; numbers in full, so that reading them gives the same ones."""
        text = io.StringIO()
        writer = csv.writer(text)  # a lone \r in a cell is quoted only where lines end in \r\n
        writer.writerow(self.columns)
        writer.writerows(["" if cell is None else cell for cell in row] for row in self.rows)
        return text.getvalue()

    @classmethod
    def of(cls, name: str, caption: str, rows: Sequence[Mapping[str, Cell]]) -> Table:
        """A table of mappings that have the same keys, the columns in their order."""
        columns = tuple(rows[0]) if rows else ()
        return cls(name, caption, columns, tuple(tuple(row[c] for c in columns) for row in rows))


@dataclass(frozen=True)
class Chart:
    """How a table is drawn; everything that is not None names one of its columns.

    Attributes:
        kind: "lines", "bars", "scatter" or "grid" (numbers in cells).
        x, y: the two axes; of a grid, columns and rows.
        series: a line, a kind of bar or of marker each.
        panel: axes of their own each.
        low, high: ends of an interval around y.
        value: the number in a cell of a grid.
        x_label, y_label: what stands at the axes.
        log_x: x by powers of two.
        log_y: y by powers of ten, where all of it is above 0.
        emphasis: of a scatter, the series that is drawn larger.
        reference: what is drawn across as a thin line, label and height.
    """

    kind: str
    x: str
    y: str
    series: str | None = None
    panel: str | None = None
    low: str | None = None
    high: str | None = None
    value: str | None = None
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    emphasis: str | None = None
    reference: tuple[str, float] | None = None


@dataclass(frozen=True)
class Figure:
    """A table and how it is drawn."""

    table: Table
    chart: Chart


@dataclass(frozen=True)
class Section:
    """The answer to a question.

    Attributes:
        question: name of the question.
        title: the question, as a heading.
        subject: what it was asked of: a model's name, or "" for none.
        method: what was measured and how, a paragraph.
        findings: sentences that the numbers say.
        figures, tables: what was measured.
        settings: with what, plain JSON.
        seconds: that it took.
    """

    question: str
    title: str
    subject: str
    method: str
    findings: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def all_tables(self) -> tuple[Table, ...]:
        return (*(figure.table for figure in self.figures), *self.tables)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Section:
        """What `to_json` wrote.

        Raises:
            UserError: if it is damaged.
        """
        try:
            data = json.loads(text)
            figures = tuple(
                Figure(_table(figure["table"]), _chart(figure["chart"]))
                for figure in data.pop("figures")
            )
            tables = tuple(_table(table) for table in data.pop("tables"))
            findings = tuple(data.pop("findings"))
            return cls(**data, findings=findings, figures=figures, tables=tables)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"the section is damaged: {error}") from None


def _table(data: Mapping[str, Any]) -> Table:
    rows = tuple(tuple(row) for row in data["rows"])
    return Table(data["name"], data["caption"], tuple(data["columns"]), rows)


def _chart(data: Mapping[str, Any]) -> Chart:
    reference = data["reference"]
    return Chart(**{**data, "reference": None if reference is None else tuple(reference)})
