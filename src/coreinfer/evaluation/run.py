"""Tasks under rules: from names to a record that is written as it grows."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coreinfer import __version__
from coreinfer.backends.base import Backend
from coreinfer.errors import UserError, meant, require_whole
from coreinfer.evaluation.local import ALIASES, LOCAL_TASKS, digest_of
from coreinfer.evaluation.rules import Rule
from coreinfer.evaluation.section import Section, markdown, table_rows
from coreinfer.evaluation.texts import TEXT_FILE, TEXT_TASKS, WINDOWS, run_text_task
from coreinfer.files import replace_when_done
from coreinfer.journal import Journal
from coreinfer.jsonl import read_text

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

FORMAT = "coreinfer.eval/1"
# What an answer depends on, and what a score depends on beside.
ANSWERING = ("torch", "transformers")
SCORING = ("lm_eval", "sacrebleu", "rouge_score", "torchmetrics")


@dataclass(frozen=True)
class EvalSettings:
    """How much is asked, and how.

    Attributes:
        limit: items of a task at most (windows of perplexity and kl); None for all (for 40).
        few_shot: examples in a prompt; None for what each task says.
        dense_scoring: score continuations densely, as the paper's code did.
        batch_size: contexts computed together.
        seed: of few-shot examples, of sampling and of the bootstrap.
        chat: put prompts through the model's chat template.

    Raises:
        UserError: if a number is out of range.
    """

    limit: int | None = None
    few_shot: int | None = None
    dense_scoring: bool = False
    batch_size: int = 8
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None:
            require_whole("the limit of items", self.limit, 1)
        if self.few_shot is not None:
            require_whole("the number of few-shot examples", self.few_shot, 0)
        require_whole("the batch size", self.batch_size, 1)
        require_whole("the seed", self.seed, 0)


@dataclass
class Plan:
    """Tasks that are ready to run: what they need has been read.

    Attributes:
        names: in the order asked for.
        text: what perplexity and kl read; None without them.
        harness: lm-eval's tasks, by name.
        about: what each section says of its data and definition.
    """

    names: list[str]
    text: str | None = None
    harness: dict[str, ConfigurableTask] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)


def plan(
    names: Sequence[str], settings: EvalSettings, *, data_dir: Path | None, text: Path | None
) -> Plan:
    """Settle what the tasks are and read their data.

    Args:
        names: tasks, by lm-eval's names or what people call them, "perplexity" and "kl".
        settings: for the few-shot examples.
        data_dir: a folder with the files of LOCAL_TASKS; None for the hub.
        text: what perplexity and kl read, instead of a file of that folder.

    Raises:
        UserError: for a name that is none, data that is missing or not as it should be, too few
            rows for the examples, or packages that are not installed.
    """
    names = list(dict.fromkeys(ALIASES.get(name, name) for name in names))
    _require_names(names, local=data_dir is not None)
    made = Plan(names)
    if any(name in TEXT_TASKS for name in names):
        if text is None and data_dir is None:
            raise UserError("perplexity and kl read a text; name it by --text FILE or --data-dir")
        path = text or Path(data_dir or "", TEXT_FILE)
        made.text = read_text(path)
        about = {"data": {"name": path.name, "sha256": digest_of([path])}}
        made.about |= {name: about for name in names if name in TEXT_TASKS}
    wanted = [name for name in names if name not in TEXT_TASKS]
    if wanted:
        require_harness()
        _plan_harness(made, wanted, settings, data_dir)
    return made


def _plan_harness(
    made: Plan, wanted: Sequence[str], settings: EvalSettings, data_dir: Path | None
) -> None:
    from coreinfer.evaluation.harness.loading import definition_folder, load_from_hub, load_local
    from coreinfer.evaluation.harness.run import set_few_shot

    if data_dir is None:
        made.harness = load_from_hub(wanted)
        done = [name for name in made.names if name in TEXT_TASKS]
        made.names = [*made.harness, *done]  # a group has become its tasks
    else:
        made.harness = load_local(wanted, data_dir)
        for name in wanted:
            file = LOCAL_TASKS[name].file
            made.about[name] = {
                "data": {"name": file, "sha256": digest_of([data_dir / file])},
                "definition_sha256": digest_of([definition_folder(name)]),
            }
    for name, task in made.harness.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"{name} runs code that the model writes; this is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"{name} needs a model that sees; there are language models here alone")
        set_few_shot(task, settings.few_shot)


def _require_names(names: Sequence[str], *, local: bool) -> None:
    known = [*TEXT_TASKS, *LOCAL_TASKS]
    unknown = [name for name in names if name not in known]
    if not names:
        raise UserError(f"no task is named; there is {', '.join(known)}")
    if not unknown:
        return
    if local:
        close = meant(unknown[0], [*known, *ALIASES])
        raise UserError(
            f"no task {unknown[0]!r} on local files; {close}there is {', '.join(known)}; "
            "lm-eval's other tasks run without --data-dir, on the hub's data"
        )
    require_harness()
    from coreinfer.evaluation.harness.loading import hub_task_names

    hub = set(hub_task_names())
    for name in unknown:
        if name not in hub:
            close = meant(name, [*known, *ALIASES, *sorted(hub)])
            raise UserError(f"no task {name!r}; {close}'lm_eval ls tasks' lists them all")


def require_harness() -> None:
    """Raises UserError if the packages of the extra are not installed."""
    for name in SCORING:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"tasks need lm-evaluation-harness and its metrics, and {name} is not installed; "
                "pip install 'coreinfer[eval]' (perplexity and kl run without)"
            )


def describe_run(
    backend: Backend, rules: Mapping[str, Rule], settings: EvalSettings
) -> dict[str, Any]:
    """What a record says of its run, plain JSON."""
    return {
        "format": FORMAT,
        **_about_model(backend),
        "rules": {name: rule.describe() for name, rule in rules.items()},
        "limit": settings.limit,
        "few_shot": settings.few_shot,
        "scoring": "dense" if settings.dense_scoring else "sparse",
        "seed": settings.seed,
        "chat": settings.chat,
        "versions": _versions(*ANSWERING, *SCORING),
    }


def _about_model(backend: Backend) -> dict[str, Any]:
    return {
        "model": Path(backend.model_name).name,  # no path of this machine
        "model_fingerprint": backend.fingerprint,
        "backend": backend.name,
        "dtype": backend.dtype,
    }


def _versions(*packages: str) -> dict[str, str]:
    found = {name: metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    return {"coreinfer": __version__, **found}


def open_answers(backend: Backend, cache: Path) -> Journal:
    """The answers this model gave before, in a folder."""
    settings = {"format": FORMAT, **_about_model(backend), "versions": _versions(*ANSWERING)}
    return Journal.for_settings(cache, settings)


def run_plan(
    planned: Plan,
    backend: Backend,
    rules: Mapping[str, Rule],
    settings: EvalSettings,
    answers: Journal,
    on_progress: Callable[[str, int, int], None] = lambda _task, _done, _total: None,
) -> Iterator[Section]:
    """Run the tasks, one after the other.

    Args:
        planned: from `plan`.
        backend: the model.
        rules: by name; dense decoding is among them.
        settings: as for `plan`.
        answers: what is known; every batch is added as soon as it is done.
        on_progress: told of a task how many of how many contexts (windows) are done.

    Raises:
        UserError: if a rule does not fit the model, or a text is too short for the windows.
    """
    harness = None
    for name in planned.names:

        def progress(done: int, total: int, name: str = name) -> None:
            on_progress(name, done, total)

        about = planned.about.get(name, {})
        if name in TEXT_TASKS:
            assert planned.text is not None
            yield run_text_task(
                name,
                backend,
                rules,
                planned.text,
                answers,
                count=settings.limit or WINDOWS,
                batch_size=settings.batch_size,
                seed=settings.seed,
                on_progress=progress,
                **about,
            )
            continue
        from coreinfer.evaluation.harness.model import HarnessModel
        from coreinfer.evaluation.harness.run import run_task

        harness = harness or HarnessModel(
            backend,
            rules,
            dense_scoring=settings.dense_scoring,
            batch_size=settings.batch_size,
            seed=settings.seed,
            answers=answers,
        )
        harness.on_progress = progress
        yield run_task(
            planned.harness[name],
            harness,
            limit=settings.limit,
            seed=settings.seed,
            chat=settings.chat,
            **about,
        )


def table(sections: Sequence[Section]) -> str:
    """Sections as one Markdown table, of each task the metrics its community looks at."""
    return markdown(table_rows(sections, {n: task.headline for n, task in LOCAL_TASKS.items()}))


@dataclass(frozen=True)
class Place:
    """Where a record is written: a JSON file, and the table beside it.

    Raises:
        UserError: if the folder is not there, or cannot be made.
    """

    json: Path

    @classmethod
    def of(cls, out: str | Path) -> Place:
        """A .json (or .md) file; anything else is a folder, in which they are called eval.*."""
        path = Path(out)
        if path.suffix.lower() in (".json", ".md"):
            if not path.parent.is_dir():
                raise UserError(f"cannot write {str(out)!r}: there is no such folder")
            return cls(path.with_suffix(".json"))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {str(out)!r}: {error.strerror}") from error
        return cls(path / "eval.json")

    def write(self, record: Mapping[str, Any]) -> None:
        """Raises UserError if the file system refuses."""
        with replace_when_done(self.json) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        with replace_when_done(self.json.with_suffix(".md")) as partial:
            partial.write_text(table(record["tasks"]), encoding="utf-8")
