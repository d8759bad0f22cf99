"""Tasks of lm-eval on local JSONL files: a small entry each says how a row becomes a hub row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer.errors import UserError
from coreinfer.jsonl import is_text, open_to_read, read_json_lines

Row = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """What a field may hold: a name for messages, and the check."""

    name: str
    fits: Callable[[object], bool]


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(is_text(one) for one in value)


TEXT = Kind("text", is_text)
WHOLE = Kind("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
TEXTS = Kind("a list of texts, at least one", lambda v: _texts(v) and v != [])
TEXT_LISTS = Kind(
    "a list of lists of texts, none of them empty",
    lambda v: isinstance(v, list) and all(_texts(one) and one for one in v) and v != [],
)


@dataclass(frozen=True)
class LocalTask:
    """A task that runs on a file.

    Attributes:
        file: its name in the data folder.
        folder: of the task's definition below lm_eval/tasks; None for one of ours.
        fields: of a row of the file.
        to_hub_row: the row as the hub's data set has it; raises ValueError, saying what is wrong.
        headline: the metrics of the table, where the task has more.
    """

    file: str
    folder: str | None
    fields: Mapping[str, Kind]
    to_hub_row: Callable[[Row], Row]
    headline: tuple[str, ...] = ()


def _same(row: Row) -> Row:
    return row


def _labelled(row: Row, choices: int) -> None:
    if not 0 <= row["label"] < choices:
        raise ValueError(f"has label {row['label']}, expected 0 to {choices - 1}")


def _piqa(row: Row) -> Row:
    _labelled(row, 2)
    return row


def _arc(row: Row) -> Row:
    _labelled(row, len(row["choices"]))
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": letters}
    return {**row, "choices": choices, "answerKey": letters[row["label"]]}


def _hellaswag(row: Row) -> Row:
    _labelled(row, len(row["endings"]))
    activity, colon, context = row["ctx"].partition(": ")
    if not colon:
        raise ValueError("has a 'ctx' without an activity before a colon")
    label = str(row["label"])
    return {**row, "activity_label": activity, "ctx_a": context, "ctx_b": "", "label": label}


def _winogrande(row: Row) -> Row:
    if row["answer"] not in (1, 2):
        raise ValueError(f"has answer {row['answer']}, expected 1 or 2")
    if "_" not in row["sentence"]:
        raise ValueError("has a 'sentence' without a blank '_'")
    return {**row, "answer": str(row["answer"])}


def _coqa(row: Row) -> Row:
    turns = len(row["questions"])
    if not len(row["answers"]) == len(row["all_answers"]) == turns:
        raise ValueError("has not as many answers as questions")
    # The hub has three annotators' answers apart, of all turns; a missing one is the main answer.
    additional = {
        str(i): {"input_text": [a[i + 1] if i + 1 < len(a) else a[0] for a in row["all_answers"]]}
        for i in range(3)
    }
    return {
        "id": row["id"],
        "story": row["story"],
        "questions": {"input_text": row["questions"]},
        "answers": {"input_text": row["answers"]},
        "additional_answers": additional,
    }


def _translation(source: str) -> LocalTask:
    return LocalTask(
        f"wmt16_newstest2016_{source}_en.jsonl",
        "translation",
        {source: TEXT, "en": TEXT},
        lambda row: {"translation": row},
        ("bleu", "chrf"),
    )


LOCAL_TASKS: Mapping[str, LocalTask] = {
    "truthfulqa_gen": LocalTask(
        "truthfulqa.jsonl",
        "truthfulqa",
        {
            "question": TEXT,
            "best_answer": TEXT,
            "correct_answers": TEXTS,
            "incorrect_answers": TEXTS,
        },
        _same,
        # An accuracy says on which side an answer is, and noise is on the right one half the time.
        ("bleu_max", "bleu_acc", "rouge1_max", "rouge1_acc"),
    ),
    "triviaqa": LocalTask(
        "triviaqa_dev.jsonl",
        "triviaqa",
        {"question": TEXT, "answers": TEXTS},
        lambda row: {**row, "answer": {"aliases": row["answers"]}},
    ),
    "coqa": LocalTask(
        "coqa_dev.jsonl",
        "coqa",
        {
            "id": TEXT,
            "story": TEXT,
            "questions": TEXTS,
            "answers": TEXTS,
            "all_answers": TEXT_LISTS,
        },
        _coqa,
    ),
    "squad": LocalTask(
        "squad_dev.jsonl",
        None,
        {"id": TEXT, "title": TEXT, "context": TEXT, "question": TEXT, "answers": TEXTS},
        lambda row: {**row, "answers": {"text": row["answers"]}},
    ),
    "xsum": LocalTask("xsum_test.jsonl", None, {"document": TEXT, "summary": TEXT}, _same),
    "wmt16-de-en": _translation("de"),
    "wmt16-ro-en": _translation("ro"),
    "piqa": LocalTask(
        "piqa_valid.jsonl",
        "piqa",
        {"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": WHOLE},
        _piqa,
    ),
    "gsm8k": LocalTask("gsm8k_test.jsonl", "gsm8k", {"question": TEXT, "answer": TEXT}, _same),
    "lambada_openai": LocalTask(
        "lambada_test.jsonl",
        "lambada",
        {"context": TEXT, "target": TEXT},
        lambda row: {"text": f"{row['context']} {row['target']}"},
    ),
    "arc_easy": LocalTask(
        "arc_easy_test.jsonl",
        "arc",
        {"question": TEXT, "choices": TEXTS, "label": WHOLE},
        _arc,
    ),
    "hellaswag": LocalTask(
        "hellaswag_val.jsonl",
        "hellaswag",
        {"ctx": TEXT, "endings": TEXTS, "label": WHOLE},
        _hellaswag,
    ),
    "boolq": LocalTask(
        "boolq_val.jsonl",
        "super_glue/boolq",
        {"passage": TEXT, "question": TEXT, "answer": FLAG},
        lambda row: {**row, "label": int(row["answer"])},
    ),
    "winogrande": LocalTask(
        "winogrande_val.jsonl",
        "winogrande",
        {"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": WHOLE},
        _winogrande,
    ),
}

# What people call them.
ALIASES = {
    "lambada": "lambada_openai",
    "truthfulqa": "truthfulqa_gen",
    "arc-easy": "arc_easy",
    "wmt16_de_en": "wmt16-de-en",
    "wmt16_ro_en": "wmt16-ro-en",
}


def read_rows(task: str, folder: Path) -> list[Row]:
    """All rows of a task's file, as the hub has them.

    Raises:
        UserError: if the file is missing or has no row, or a row is not as it should be; with its
            line.
    """
    local = LOCAL_TASKS[task]
    path = folder / local.file
    shape = ", ".join(f"{name!r} ({kind.name})" for name, kind in local.fields.items())
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}, in which {task} needs a file {local.file!r}")
    if not path.is_file():
        raise UserError(
            f"no file {local.file!r} in {str(folder)!r}, which {task} needs: JSONL, {shape} a line"
        )
    rows = []
    for number, value in read_json_lines(path):
        problem = _problem(value, local.fields)
        if problem is None:
            try:
                rows.append(local.to_hub_row({name: value[name] for name in local.fields}))
                continue
            except ValueError as error:
                problem = str(error)
        raise UserError(f"{str(path)!r}: line {number} {problem}; {task} needs {shape} on each")
    if not rows:
        raise UserError(f"{str(path)!r} has no row; {task} needs {shape} on each line")
    return rows


def _problem(value: object, fields: Mapping[str, Kind]) -> str | None:
    if not isinstance(value, dict):
        return "is not a JSON object"
    for name, kind in fields.items():
        if name not in value:
            return f"has no {name!r}"
        if not kind.fits(value[name]):
            return f"has a {name!r} that is not {kind.name}"
    return None


def digest_of(paths: Iterable[Path]) -> str:
    """SHA-256 of files, names included; of a folder those directly in it.

    Raises:
        UserError: if one cannot be read.
    """
    found = hashlib.sha256()
    for path in paths:
        inside = sorted(file for file in path.glob("*") if file.is_file())
        for file in inside if path.is_dir() else [path]:
            with open_to_read(file) as opened:
                found.update(f"{file.name}\n".encode())
                found.update(hashlib.sha256(opened.read()).digest())
    return found.hexdigest()
