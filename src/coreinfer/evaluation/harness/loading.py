"""Tasks by name: lm-eval's own definitions, on the hub's data or on local files."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from coreinfer.errors import UserError
from coreinfer.evaluation.harness.quiet import quiet
from coreinfer.evaluation.local import LOCAL_TASKS, Row, read_rows

OURS = Path(__file__).parent / "tasks"
_LM_EVALS = Path(lm_eval.tasks.__file__).parent
_SQUAD_METRICS = "transformers.data.metrics.squad_metrics"


def hub_task_names() -> list[str]:
    """All names lm-eval knows: tasks, groups and tags. Takes some seconds."""
    with quiet():  # our definitions take the place of some of its own
        names: list[str] = TaskManager(include_path=OURS).all_tasks
    return names


def definition_folder(name: str) -> Path:
    """Where a task of LOCAL_TASKS is defined."""
    folder = LOCAL_TASKS[name].folder
    return OURS if folder is None else _LM_EVALS / folder


def load_local(names: Sequence[str], folder: Path) -> dict[str, ConfigurableTask]:
    """Tasks of LOCAL_TASKS on the files of a folder.

    Whatever split a task is scored on at the hub, here all rows of the file are it; few-shot
    examples come from the same file, never the row itself.

    Raises:
        UserError: if a file is missing or not as it should be.
    """
    rows = {name: read_rows(name, folder) for name in names}
    paths = sorted({definition_folder(name) for name in names})
    manager = TaskManager(include_path=paths, include_defaults=False)
    members = [{"task": name, **_on_rows(rows[name])} for name in names]
    with quiet(), _squad_metrics():
        tasks = manager.load({"group": "local", "task": members})["tasks"]
    return {name: tasks[name] for name in names}


def _on_rows(rows: Sequence[Row]) -> dict[str, Any]:
    data = datasets.Dataset.from_list(list(rows))
    return {
        "custom_dataset": lambda **_: {"test": data},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "test",  # equal to test_split, so that a row is never its own example
    }


def load_from_hub(names: Sequence[str]) -> dict[str, ConfigurableTask]:
    """Tasks, or those of a group or tag, on the hub's data.

    Raises:
        UserError: if the data cannot be fetched.
    """
    known = all(name in LOCAL_TASKS for name in names)  # the index of all takes some seconds
    paths = sorted({definition_folder(name) for name in names}) if known else [OURS]
    with quiet():
        manager = TaskManager(include_path=paths, include_defaults=not known)
    loaded: dict[str, ConfigurableTask] = {}
    for name in names:
        try:
            with quiet(), _squad_metrics():
                loaded |= manager.load([name])["tasks"]
        except Exception as error:  # whatever a missing connection or data set makes it raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot load the data of {name} from the hub ({reason}); "
                "name a folder with the data by --data-dir"
            ) from error
    return loaded


@contextmanager
def _squad_metrics() -> Iterator[None]:
    """lm-eval's CoQA takes two functions from a module that transformers 5 no longer has; while
    tasks are loaded, those of torchmetrics are there in its place."""
    try:
        importlib.import_module(_SQUAD_METRICS)
        stand_ins: Mapping[str, ModuleType] = {}
    except ModuleNotFoundError:
        package = ModuleType(_SQUAD_METRICS.rpartition(".")[0])
        module = ModuleType(_SQUAD_METRICS)
        vars(module).update(compute_exact=_compute_exact, compute_f1=_compute_f1)
        vars(package).update(squad_metrics=module, __path__=[])
        stand_ins = {package.__name__: package, module.__name__: module}
    data = importlib.import_module("transformers.data")
    sys.modules.update(stand_ins)
    if stand_ins:
        vars(data)["metrics"] = package
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
        if stand_ins:
            del vars(data)["metrics"]


def _compute_exact(gold: str, predicted: str) -> float:
    return _squad(gold, predicted)["exact_match"]


def _compute_f1(gold: str, predicted: str) -> float:
    return _squad(gold, predicted)["f1"]


def _squad(gold: str, predicted: str) -> dict[str, float]:
    from torchmetrics.functional.text import squad

    target: dict[str, Any] = {"answers": {"text": [gold], "answer_start": [0]}, "id": "0"}
    scores = squad({"prediction_text": predicted, "id": "0"}, target)
    return {name: float(score) / 100 for name, score in scores.items()}
