"""Asking questions: every answer kept as soon as it is there, then the report of them all."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any

import torch
import transformers

from coreinfer import __version__
from coreinfer.analysis.beyond import Beyond
from coreinfer.analysis.charts import require_plots, svg
from coreinfer.analysis.grid import Grid
from coreinfer.analysis.layers import Layers
from coreinfer.analysis.materials import Materials
from coreinfer.analysis.page import file_stem, page
from coreinfer.analysis.prompt_length import PromptLength
from coreinfer.analysis.question import Question
from coreinfer.analysis.robustness import Robustness
from coreinfer.analysis.sections import Section
from coreinfer.analysis.semantics import Semantics
from coreinfer.analysis.settings import Settings
from coreinfer.analysis.texts import Source, require_distinct
from coreinfer.backends.base import Backend
from coreinfer.calibration.store import CalibrationStore
from coreinfer.errors import UserError, meant
from coreinfer.evaluation.continuations import require_window
from coreinfer.files import describe_os_error, replace_when_done
from coreinfer.semantics.store import ClusterStore

QUESTIONS: Mapping[str, Question] = MappingProxyType(
    {
        one.name: one
        for one in (Grid(), PromptLength(), Layers(), Semantics(), Robustness(), Beyond())
    }
)


@dataclass(frozen=True)
class Place:
    """Where a run writes.

    Attributes:
        report: the page.
        prefix: what the names of the files beside it begin with.
        work: folder of the answers so far, and of cluster stores made on the way.
    """

    report: Path
    prefix: str
    work: Path

    @classmethod
    def of(cls, out: str | Path) -> Place:
        """A .html file, with its files beside it; anything else is a folder for all of them.

        Raises:
            UserError: if it cannot be made.
        """
        out = Path(out)
        is_page = out.suffix.lower() == ".html"
        folder = out.parent if is_page else out
        place = (
            cls(out, f"{out.stem}-", folder / f"{out.stem}-work")
            if is_page
            else cls(out / "report.html", "", out / "work")
        )
        try:
            if is_page and not folder.is_dir():
                raise UserError(f"cannot write {str(out)!r}: there is no such folder")
            place.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(describe_os_error(error, place.work)) from error
        return place


def questions_named(names: Sequence[str]) -> list[Question]:
    """The questions of these names, "all" for all, each once in the order of QUESTIONS.

    Raises:
        UserError: for another name, or none.
    """
    for name in names:
        if name != "all" and name not in QUESTIONS:
            known = f"there is all, {', '.join(QUESTIONS)}"
            raise UserError(f"no question {name!r}; {meant(name, QUESTIONS)}{known}")
    if not names:
        raise UserError(f"no question was asked; there is all, {', '.join(QUESTIONS)}")
    return [one for name, one in QUESTIONS.items() if name in names or "all" in names]


def analyze(
    models: Mapping[str, Callable[[], Backend]],
    questions: Sequence[Question],
    sources: Sequence[Source],
    settings: Settings,
    out: str | Path,
    *,
    stores: Sequence[ClusterStore] = (),
    calibrations: Sequence[CalibrationStore] = (),
    about: Mapping[str, str] | None = None,
    on_progress: Callable[[str], None] = lambda _line: None,
) -> list[Section]:
    """Ask questions of models and write the report, its figures and its data.

    An answer that is there from an earlier run of exactly these settings is taken as it is, so a
    run that was interrupted goes on. The report is written anew after each answer.

    Args:
        models: what loads each, by name.
        questions: from `questions_named`.
        sources: texts.
        settings: how much is measured.
        out: see `Place.of`.
        stores, calibrations: each model uses the one that was made for it, if there is one.
        about: what else the report should say of the run.
        on_progress: told what is going on.

    Raises:
        UserError: if the texts are not enough, windows are longer than a model reads, a store is
            for none of the models, matplotlib is missing, or the place cannot be written.
    """
    require_plots()
    require_distinct(sources)
    for question in questions:
        if len(sources) < question.needs_sources:
            raise UserError(
                f"the question {question.name!r} needs texts of {question.needs_sources} kinds, "
                f"got {len(sources)}; give --text FILE or --prompts FILE, once for each kind"
            )
    place = Place.of(out)
    facts = {**(about or {}), **environment()}
    sections: list[Section] = []
    unused: list[ClusterStore | CalibrationStore] = [*stores, *calibrations]
    if unused and not models:
        raise UserError("none of these questions takes a store; leave it out")
    every = _materials(
        models, questions, sources, settings, place, stores, calibrations, on_progress
    )
    for number, materials in enumerate(every, start=1):
        taken = (materials.clusters, materials.calibration)
        unused = [store for store in unused if all(store is not one for one in taken)]
        if unused and number == len(models):
            raise UserError(
                f"the store of {unused[0].model!r} is for none of the models; leave it out"
            )
        for question in questions:
            if question.needs_model:
                sections.append(_answer(question, materials, place.work, on_progress))
                write(place, _in_order(sections, questions), facts)
    for question in questions:
        if not question.needs_model:
            materials = Materials(
                _no_model, tuple(sources), settings, place.work, None, None, on_progress
            )
            sections.append(_answer(question, materials, place.work, on_progress))
            write(place, _in_order(sections, questions), facts)
    return _in_order(sections, questions)


def _materials(
    models: Mapping[str, Callable[[], Backend]],
    questions: Sequence[Question],
    sources: Sequence[Source],
    settings: Settings,
    place: Place,
    stores: Sequence[ClusterStore],
    calibrations: Sequence[CalibrationStore],
    on_progress: Callable[[str], None],
) -> Iterator[Materials]:
    for load in models.values():
        backend = load()
        own = (one for one in stores if one.model_fingerprint == backend.fingerprint)
        learnt = (one for one in calibrations if one.model_fingerprint == backend.fingerprint)
        last = len(backend.cost.num_neurons) - 1
        for layer in settings.dense_layers:
            if layer > last:
                raise UserError(
                    f"dense layer {layer} is outside {backend.model_name}, which has 0 to {last}"
                )
        for question in questions:
            if question.needs_model:
                _require_windows(backend, question, settings)
        yield Materials(
            lambda backend=backend: backend,  # type: ignore[misc]
            tuple(sources), settings, place.work, next(own, None), next(learnt, None), on_progress,
        )  # fmt: skip


def _require_windows(backend: Backend, question: Question, settings: Settings) -> None:
    """Raises UserError where a question has windows that the model cannot read."""
    for prompt_tokens, continuation_tokens in question.windows(settings):
        try:
            require_window(backend, prompt_tokens, continuation_tokens)
        except UserError as error:
            raise UserError(f"the question {question.name!r}: {error}") from None


def _no_model() -> Backend:
    raise AssertionError("this question is asked of no language model")


def _answer(
    question: Question, materials: Materials, work: Path, on_progress: Callable[[str], None]
) -> Section:
    """The answer, from an earlier run if it was asked just like this."""
    backend = materials.backend if question.needs_model else None
    clusters, calibration = materials.clusters, materials.calibration
    asked: dict[str, Any] = {
        "question": question.name,
        "version": [__version__, _code()],
        "model": None
        if backend is None
        else [backend.model_name, backend.fingerprint, backend.name, backend.dtype],
        "settings": materials.settings.describe(),
        "sources": [[source.name, dict(source.identity)] for source in materials.sources],
        "clusters": None if clusters is None else clusters.describe(),
        "calibration": None if calibration is None else calibration.describe(),
    }
    subject = "" if backend is None else backend.model_name
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    file = work / f"{question.name}-{key}.json"
    if file.exists():
        try:
            section = Section.from_json(file.read_text(encoding="utf-8"))
        except (UserError, UnicodeDecodeError):
            on_progress(f"{str(file)!r} is damaged; asking again")
        else:
            on_progress(f"{question.name}: from {str(file)!r}")
            return section
    began = perf_counter()
    answer = question.ask(materials)
    shown = dict(asked["settings"])
    if backend is not None:
        shown |= {"backend": backend.name, "dtype": backend.dtype}
    section = Section(
        question=question.name,
        title=question.title,
        subject=subject,
        method=answer.method,
        findings=tuple(answer.findings),
        figures=tuple(answer.figures),
        tables=tuple(answer.tables),
        settings=shown,
        seconds=perf_counter() - began,
    )
    with replace_when_done(file) as partial:
        partial.write_text(section.to_json(), encoding="utf-8")
    return section


def _code() -> str:
    """Changes with the code, so that no answer outlives the way it was got."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _in_order(sections: Sequence[Section], questions: Sequence[Question]) -> list[Section]:
    """Question by question, the models side by side."""
    names = [question.name for question in questions]
    return sorted(sections, key=lambda section: names.index(section.question))


def write(place: Place, sections: Sequence[Section], about: Mapping[str, str]) -> None:
    """The page, and beside it every table as CSV and every figure as SVG.

    Raises:
        UserError: if a file cannot be written.
    """
    folder = place.report.parent
    for section in sections:
        for table in section.all_tables:
            _write(folder / f"{place.prefix}{file_stem(section, table)}.csv", table.to_csv())
        for figure in section.figures:
            stem = f"{place.prefix}{file_stem(section, figure.table)}"
            _write(folder / f"{stem}.svg", svg(figure))
    _write(place.report, page(sections, about))


def _write(path: Path, text: str) -> None:
    with replace_when_done(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def environment() -> dict[str, str]:
    """Versions and the processor, for who reads the report later."""
    return {
        "versions": f"coreinfer {__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }
