"""Sections, charts and the page: what is drawn is the data, and the page needs nothing else."""

from __future__ import annotations

import base64
import csv
import io
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import matplotlib
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coreinfer.analysis.charts import COLOURS, HATCHES, LINES, MARKERS, draw, inline, svg
from coreinfer.analysis.page import file_stem, page
from coreinfer.analysis.sections import Cell, Chart, Figure, Section, Table
from coreinfer.errors import UserError

ROWS: list[dict[str, Cell]] = [
    {"x": x, "rule": rule, "part": part, "y": i + x / 3, "low": i + x / 3 - 0.5,
     "high": None if x == 1 else i + x / 3 + 0.25}
    for part in ("left", "right")
    for i, rule in enumerate(("one", "two & <three>"))
    for x in (1, 2, 4)
]  # fmt: skip
TABLE = Table.of("t", 'A "caption" with <marks> & more.', ROWS)
KINDS = {
    "lines": Chart("lines", x="x", y="y", series="rule", panel="part", low="low", high="high",
                   log_x=True, reference=("chance", 0.5)),
    "bars": Chart("bars", x="x", y="y", series="rule", low="low", high="high"),
    "scatter": Chart("scatter", x="x", y="y", series="rule", panel="part"),
    "grid": Chart("grid", x="x", y="rule", value="y", panel="part"),
}  # fmt: skip


def section(*figures: Figure, name: str = "quest") -> Section:
    return Section(
        question=name, title="What <is> it?", subject="a/model & more", method="Measured & <told>.",
        findings=("One < two.", "Ünïcode."), figures=figures, tables=(TABLE,),
        settings={"keep": 0.4, "layers": [1, 2]}, seconds=1.5,
    )  # fmt: skip


class Elements(HTMLParser):
    """Every start tag of a page with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements(text: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(text)
    return parser.found


WHOLE = page(
    [section(*(Figure(TABLE, chart) for chart in (KINDS["lines"],))), section(name="other")],
    {"command": "coreinfer analyze --x '<y>'"},
)


def test_the_page_needs_nothing_but_itself() -> None:
    found = elements(WHOLE)
    assert len(found) > 50
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in found}
    for tag, attributes in found:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                assert str(value).startswith(("#", "data:")), f"{tag} {name}={value!r:.60}"
    assert "@import" not in WHOLE
    assert not [part for part in WHOLE.split("url(")[1:] if not part.startswith("#")]
    # Namespaces are names, no addresses that are looked up; no other address is there.
    for namespace in ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"):
        assert namespace in WHOLE
    rest = WHOLE.replace("http://www.w3.org/2000/svg", "").replace(
        "http://www.w3.org/1999/xlink", ""
    )
    assert "http:" not in rest
    assert "https:" not in rest


def test_links_lead_somewhere_and_ids_are_unique() -> None:
    found = elements(WHOLE)
    ids = [a["id"] for _, a in found if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {str(a["href"])[1:] for _, a in found if str(a.get("href", "")).startswith("#")}
    assert targets
    assert targets <= set(ids)
    uses = {str(a["xlink:href"])[1:] for _, a in found if "xlink:href" in a}
    assert uses
    assert uses <= set(ids)


def test_what_a_user_wrote_is_text_not_markup() -> None:
    assert "What &lt;is&gt; it?" in WHOLE
    assert "One &lt; two." in WHOLE
    assert "--x &#x27;&lt;y&gt;&#x27;" in WHOLE
    assert "<y>" not in WHOLE
    assert "<marks>" not in WHOLE


def test_the_csv_of_a_figure_is_the_data_it_is_drawn_from() -> None:
    figure = Figure(TABLE, KINDS["lines"])
    text = page([section(figure)], {})
    downloads = {
        str(a["download"]): base64.b64decode(str(a["href"]).split("base64,")[1]).decode()
        for tag, a in elements(text)
        if tag == "a" and "download" in a
    }
    stem = file_stem(section(figure), TABLE)
    assert stem == "quest-a-model---more-t"
    head, *rows = csv.reader(io.StringIO(downloads[f"{stem}.csv"]))
    assert tuple(head) == TABLE.columns
    assert len(rows) == len(ROWS)
    drawn: list[tuple[str, str, float, float]] = []
    canvas = draw(figure)
    for axes in canvas.axes:
        for container in axes.containers:
            xs, ys = container.lines[0].get_data()
            part, rule = axes.get_title(), container.get_label()
            drawn += [(part, rule, float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
    assert sorted(drawn) == sorted(
        (row["part"], row["rule"], float(row["x"]), float(row["y"]))
        for row in (dict(zip(head, cells, strict=True)) for cells in rows)
    )


def test_error_bars_reach_from_low_to_high() -> None:
    canvas = draw(Figure(TABLE, KINDS["lines"]))
    (bars,) = canvas.axes[0].containers[0].lines[2]
    ends = [tuple(segment[:, 1]) for segment in bars.get_segments() if len(segment) == 2]
    whole = [row for row in ROWS[:3] if row["high"] is not None]  # without an end, no bar
    assert ends == [(row["low"], row["high"]) for row in whole]


def test_bars_have_the_heights_of_the_table() -> None:
    table = Table.of("b", "", [row for row in ROWS if row["part"] == "left"])
    (axes,) = draw(Figure(table, KINDS["bars"])).axes
    heights = [patch.get_height() for patch in axes.patches]
    assert heights == pytest.approx(table.column("y"))
    assert len({patch.get_hatch() for patch in axes.patches}) == 2


def test_a_grid_says_its_numbers() -> None:
    canvas = draw(Figure(TABLE, KINDS["grid"]))
    said = [text.get_text() for axes in canvas.axes for text in axes.texts]
    assert sorted(said) == sorted(f"{row['y']:.2f}" for row in ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawing_is_xml_with_text_and_the_same_every_time(kind: str) -> None:
    figure = Figure(TABLE, KINDS[kind])
    document = svg(figure)
    root = ET.fromstring(document)
    words = " ".join("".join(node.itertext()) for node in root.iter())
    assert "two & <three>" in words
    assert "metadata" not in document
    assert document == svg(figure)
    assert inline(document, "p").startswith("<svg")


def test_series_differ_without_colour_and_look_alike_in_every_panel() -> None:
    for looks in (LINES, MARKERS, HATCHES):
        assert len(set(looks)) == len(looks)
    for one, other in ((LINES, MARKERS), (COLOURS, HATCHES)):
        pairs = {(one[i % len(one)], other[i % len(other)]) for i in range(24)}
        assert len(pairs) == 24
    only_second = [row for row in ROWS if row["part"] == "left" or row["rule"] != "one"]
    canvas = draw(Figure(Table.of("t", "", only_second), KINDS["lines"]))
    left, right = canvas.axes
    looks = [
        (c.get_label(), c.lines[0].get_linestyle(), c.lines[0].get_marker())
        for c in left.containers
    ]
    assert looks[0][1:] != looks[1][1:]
    assert [
        (c.get_label(), c.lines[0].get_linestyle(), c.lines[0].get_marker())
        for c in right.containers
    ] == looks[1:]
    (legend,) = canvas.legends
    assert {text.get_text() for text in legend.texts} == {"one", "two & <three>", "chance"}


def test_drawing_leaves_matplotlibs_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    svg(Figure(TABLE, KINDS["lines"]))
    assert dict(matplotlib.rcParams) == before


CELLS = st.one_of(
    st.none(), st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(blacklist_categories=["Cs"]), max_size=8),
)  # fmt: skip


@given(st.lists(st.tuples(CELLS, CELLS), max_size=5))
@example([(None, "\r"), ("\n", '"\r\n')])
def test_sections_and_csv_come_back_as_they_were(rows: list[tuple[Cell, Cell]]) -> None:
    table = Table("t", "c", ("a", 'b, "c"'), tuple(rows))
    one = Section("q", "t", "", "m", ("f",), (Figure(table, KINDS["lines"]),), (table,), {"k": 1})
    assert Section.from_json(one.to_json()) == one
    head, *read = csv.reader(io.StringIO(table.to_csv(), newline=""))
    assert tuple(head) == table.columns
    for cells, row in zip(read, rows, strict=True):
        for text, cell in zip(cells, row, strict=True):
            if isinstance(cell, (int, float)):
                assert float(text) == cell
            else:
                assert text == ("" if cell is None else cell)


@given(st.text(max_size=30) | st.sampled_from(["{}", "[]", '{"figures": 3}', "null", "[[1]]"]))
def test_a_damaged_section_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="damaged"):
        Section.from_json(text)


def test_rows_fit_their_columns() -> None:
    with pytest.raises(ValueError, match="another width"):
        Table("t", "", ("a", "b"), ((1,),))
