"""Make a corpus for `coreinfer cluster`, or prompts for the other benchmarks, from JSONL files.

    python -m benchmarks.corpus --from squad_dev.jsonl:context:title --each 400 --out corpus.jsonl

Each source is FILE:FIELD or FILE:FIELD:GROUP_FIELD. Of every source, distinct texts are taken at
even distances; a line of the output has the text, the source's name and its group.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from coreinfer.files import replace_when_done
from coreinfer.jsonl import read_jsonl


def documents(source: str, each: int) -> list[dict[str, str]]:
    """At most `each` distinct texts of one source."""
    path, text_field, *group = source.split(":")
    found: dict[str, dict[str, str]] = {}
    for _, row in read_jsonl(path, [text_field]):
        text = row[text_field]
        label = str(row[group[0]]) if group else Path(path).stem
        found.setdefault(text, {"text": text, "source": Path(path).stem, "group": label})
    rows = list(found.values())
    return [rows[i * len(rows) // each] for i in range(each)] if len(rows) > each else rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="sources", action="append", required=True)
    parser.add_argument("--each", type=int, default=400, help="documents of each source at most")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [row for source in args.sources for row in documents(source, args.each)]
    with replace_when_done(args.out) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{args.out}: {len(rows)} documents")


if __name__ == "__main__":
    main()
