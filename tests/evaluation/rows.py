"""Made-up rows of every local task, in the schema of its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coreinfer.evaluation.local import LOCAL_TASKS

COLOURS = ("red", "green", "blue", "grey")


def _rows() -> dict[str, list[dict[str, Any]]]:
    """Four rows a task, each of which says its number."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in LOCAL_TASKS}
    for i, colour in enumerate(COLOURS):
        made: dict[str, dict[str, Any]] = {
            "truthfulqa_gen": {
                "question": f"What is sky {i}?",
                "best_answer": colour,
                "correct_answers": [colour, f"it is very {colour} up there"],
                "incorrect_answers": ["sour", "loud"],
                "category": "Sky",
            },
            "triviaqa": {"id": str(i), "question": f"Which colour {i}?", "answers": [colour, "x"]},
            "coqa": {
                "id": str(i),
                "source": "made up",
                "story": f"Ann {i} has a {colour} hat.",
                "questions": ["Who has a hat?", "Which colour?"],
                "answers": ["Ann", colour],
                "all_answers": [["Ann", "her"], [colour, f"a {colour} one", colour.upper()]],
            },
            "squad": {
                "id": str(i),
                "title": f"Hats {i}",
                "context": f"The hat is {colour}.",
                "question": "Which colour?",
                "answers": [colour, f"a {colour}"],
            },
            "xsum": {"document": f"Hat {i} was seen. It is {colour}.", "summary": f"{colour} hat"},
            "wmt16-de-en": {"de": f"Ein Hut {i}.", "en": f"A {colour} hat."},
            "wmt16-ro-en": {"ro": f"O pălărie {i}.", "en": f"A {colour} hat."},
            "piqa": {"goal": f"Dye {i}", "sol1": colour, "sol2": "wood", "label": i % 2},
            "gsm8k": {"question": f"{i} and {i}?", "answer": f"{i}+{i}=<<{i}>>\n#### {2 * i}"},
            "lambada_openai": {"context": f"In year {i} the hat was", "target": colour},
            "arc_easy": {
                "id": str(i),
                "question": f"Which is colour {i}?",
                "choices": [colour, "wood", "iron"],
                "label": i % 3,
            },
            "hellaswag": {
                "ind": i,
                "ctx": f"Dyeing hats: Ann {i} dyes",
                "endings": [f"it {c}." for c in COLOURS],
                "label": i,
            },
            "boolq": {
                "question": f"is hat {i} {colour}",
                "title": "Hats",
                "passage": f"Hat {i} is {colour}.",
                "answer": i % 2 == 0,
            },
            "winogrande": {
                "sentence": f"Hat {i} is not in the box, for _ is big.",
                "option1": "the hat",
                "option2": "the box",
                "answer": i % 2 + 1,
            },
        }
        for name, row in made.items():
            rows[name].append(row)
    return rows


ROWS: Mapping[str, list[dict[str, Any]]] = _rows()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_all(folder: Path) -> Path:
    """The files of all local tasks, and a text for perplexity and kl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ROWS.items():
        write_rows(folder / LOCAL_TASKS[name].file, rows)
    text = "".join(f"sentence number {i} of this text. " for i in range(60))
    (folder / "wikitext2_raw_test.txt").write_text(text, encoding="utf-8")
    return folder
