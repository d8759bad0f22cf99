"""The report: one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from coreinfer.analysis.charts import inline, svg
from coreinfer.analysis.sections import Cell, Figure, Section, Table

LONGEST_SHOWN = 120  # rows of a figure's data in the page; all of them are in its CSV

TITLE = "Core neurons: an analysis"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  color: #111; background: #fff; }
h1, h2, h3 { line-height: 1.25; }
h2 { border-top: 1px solid #999; padding-top: 1rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border-bottom: 1px solid #ccc; padding: 2px 8px; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; }
figure svg { max-width: 100%; height: auto; }
figcaption { font-size: 13px; }
.scroll { overflow-x: auto; }
code { font-size: 13px; overflow-wrap: anywhere; }
"""


def page(sections: Sequence[Section], about: Mapping[str, str], title: str = TITLE) -> str:
    """All sections as one page.

    Args:
        sections: in their order.
        about: what else a reader should know of the run, by name.
        title: of the page.
    """
    anchors = [anchor(section) for section in sections]
    contents = "".join(
        f'<li><a href="#{name}">{escape(heading(section))}</a></li>'
        for name, section in zip(anchors, sections, strict=True)
    )
    facts = "".join(
        f"<tr><th>{escape(name)}</th><td><code>{escape(value)}</code></td></tr>"
        for name, value in about.items()
    )
    body = "".join(_section(section) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        f"<h1>{escape(title)}</h1><table>{facts}</table>"
        "<p>Bars around a point are 95 % intervals. Every figure has its data as CSV below it.</p>"
        f"<ul>{contents}</ul>{body}</body></html>\n"
    )


def heading(section: Section) -> str:
    return f"{section.title} ({section.subject})" if section.subject else section.title


def anchor(section: Section) -> str:
    """A name for a section that is fit for an address, an id and a file."""
    name = f"{section.question}-{section.subject}" if section.subject else section.question
    return "".join(c if c.isascii() and (c.isalnum() or c in "-.") else "-" for c in name)


def file_stem(section: Section, table: Table) -> str:
    return f"{anchor(section)}-{table.name}"


def _section(section: Section) -> str:
    findings = "".join(f"<li>{escape(line)}</li>" for line in section.findings)
    settings = ", ".join(f"{name} {value}" for name, value in section.settings.items())
    return (
        f'\n<section id="{anchor(section)}"><h2>{escape(heading(section))}</h2>'
        f"<p>{escape(section.method)}</p><ul>{findings}</ul>"
        + "".join(_figure(section, figure) for figure in section.figures)
        + "".join(_captioned(section, table) for table in section.tables)
        + f"<p><small>{escape(settings)}; {section.seconds:.0f} s</small></p></section>"
    )


def _figure(section: Section, figure: Figure) -> str:
    table, stem = figure.table, file_stem(section, figure.table)
    drawing = inline(svg(figure), stem)
    drawing = drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(table.caption)}" ', 1)
    shown = table if len(table.rows) <= LONGEST_SHOWN else None
    data = f"<details><summary>data</summary>{_table(shown)}</details>" if shown else ""
    return (
        f"<figure>{drawing}<figcaption>{escape(table.caption)} {_download(stem, table)}"
        f"</figcaption>{data}</figure>"
    )


def _captioned(section: Section, table: Table) -> str:
    link = _download(file_stem(section, table), table)
    return f"<p>{escape(table.caption)} {link}</p>{_table(table)}"


def _download(stem: str, table: Table) -> str:
    data = base64.b64encode(table.to_csv().encode()).decode()
    return f'<a download="{stem}.csv" href="data:text/csv;charset=utf-8;base64,{data}">CSV</a>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _cell(cell: Cell) -> str:
    if cell is None:
        return "<td></td>"
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    shown = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return f'<td class="number">{shown}</td>'
