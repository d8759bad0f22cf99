"""What `tune` found, as a result to keep: OUT.json, OUT.toml and OUT.md with the tables.

    coreinfer tune --model smollm2-135m-instruct --prompts wikitext2_raw_test.txt --bytes 0.7 \\
        --calibration STORE --out tuned.toml --json > tuned.json
    python -m benchmarks.tuning tuned.json --out benchmarks/results/tune-smollm2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import markdown, write_text
from coreinfer.errors import UserError
from coreinfer.jsonl import read_text

COLUMNS = ("settings", "dense layers", "MLP bytes / dense")
WRITTEN_BY = "# Written by: "


def page(found: Mapping[str, Any], settings: str, name: str) -> str:
    """All that is worth reading, as Markdown.

    Args:
        found: what `tune --json` printed.
        settings: the TOML file that it wrote.
        name: of the files, without a suffix.
    """
    comments = [line[2:] for line in settings.splitlines() if line.startswith("# ")]
    prompts = found["prompts"]
    losses = [f"on {prompts['search']} searched with", f"on {prompts['report']} others"]
    head = [*COLUMNS, *(f"{found['metric']} {where}" for where in losses), "perplexity", "top-1"]
    compared = {"chosen": found["chosen"], **found["rivals"]}
    single = sorted(
        (one for one in found["tried"] if one["stage"] == "one keep"),
        key=lambda one: one["search"]["mean"],
    )
    parts = [
        f"# Tuning: {found['model']}",
        f"Goal: {found['goal']}. Dense perplexity of the prompts reported on: "
        f"{found['dense']['report']['perplexity']:.1f}. ± is the standard error over the prompts. "
        f"All numbers: {name}.json; the settings: {name}.toml.",
        f"`{comments[0].removeprefix(WRITTEN_BY[2:])}`",
        markdown([["", *head], *([what, *_row(one)] for what, one in compared.items())]),
        "## One keep for all layers, on the prompts searched with",
        markdown([["settings", found["metric"]], *_named(single)]),
        "## The front",
        markdown([head, *map(_row, found["front"])]),
        "## What the chosen setting keeps, layer by layer",
        ", ".join(f"{keep:.2f}" for keep in found["chosen"]["keeps"]) + ".",
    ]
    if found["chosen"].get("actives"):
        parts.append("Of that is computed whole, about:")
        parts.append(", ".join(f"{part:.2f}" for part in found["chosen"]["actives"]) + ".")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _named(points: Iterable[Mapping[str, Any]]) -> Iterable[list[str]]:
    return ([one["settings"], _measured(one["search"])] for one in points)


def _row(point: Mapping[str, Any]) -> list[str]:
    report = point["quality"].get("report")
    return [
        point["settings"],
        str(len(point["dense_layers"])),
        f"{point['mlp_share']:.4f}",
        _measured(point["search"]),
        "" if point["report"] is None else _measured(point["report"]),
        "" if report is None else f"{report['perplexity']:.1f}",
        "" if report is None else f"{report['agreement']:.3f}",
    ]


def _measured(loss: Mapping[str, float]) -> str:
    return f"{loss['mean']:.4f} ± {loss['error']:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("found", type=Path, help="what tune --json printed")
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    args = parser.parse_args()
    found = json.loads(read_text(args.found))
    settings = read_text(found["out"])
    if not settings.startswith(WRITTEN_BY):
        raise UserError(f"{found['out']!r} is no settings file that tune has written")
    found["out"] = Path(found["out"]).name
    write_text(args.out.with_suffix(".md"), page(found, settings, args.out.name))
    write_text(args.out.with_suffix(".toml"), settings)
    write_text(args.out.with_suffix(".json"), json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
