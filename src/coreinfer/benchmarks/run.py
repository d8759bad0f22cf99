"""The bench: every row in a process of its own, their runs taking turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer.backends.native.convert import converted
from coreinfer.backends.native.memory import available_memory
from coreinfer.benchmarks.job import Job
from coreinfer.benchmarks.machine import ReadMeter, describe_machine
from coreinfer.benchmarks.measure import Row
from coreinfer.benchmarks.peers import PEERS, is_installed
from coreinfer.benchmarks.plan import Settings, base_job, in_groups, memory_of, own_jobs
from coreinfer.benchmarks.process import RowError, RowProcess
from coreinfer.benchmarks.synthetic import ACTIVE
from coreinfer.benchmarks.target import Target
from coreinfer.errors import UserError
from coreinfer.kernels.formats import WeightFormat

Tell = Callable[[str], None]
Start = Callable[[Job], RowProcess]

_SHARE = 0.8  # of the memory that is free, for rows that are alive together


@dataclass(frozen=True)
class Report:
    """What was measured; `to_json` is the object that `bench --json` prints.

    Attributes:
        machine: what this machine is.
        read_gb_per_s: its read bandwidth with as many threads, in 1e9 bytes: the fastest sweep.
        rows: what was measured.
        notes: what could not be, and how the rest was.
    """

    machine: dict[str, Any]
    read_gb_per_s: float
    rows: list[Row]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "read_gb_per_s": self.read_gb_per_s,
            "rows": [row.to_json() for row in self.rows],
            "notes": self.notes,
        }


def bench(
    target: Target,
    settings: Settings,
    *,
    on_progress: Tell = lambda _line: None,
    start: Start = RowProcess,
    meter: ReadMeter | None = None,
) -> Report:
    """Measure a model or a shape.

    Rows that fit into memory together are loaded together, and their runs take turns: the first
    run of each, then the second of each, so that a machine that slows down does so for all alike.
    Read bandwidth is measured before every turn, while all of them wait.

    Args:
        target: what to bench.
        settings: the rows, and how often.
        on_progress: told, a line each, what takes long.
        start: makes the process of a row.
        meter: measures read bandwidth.

    Raises:
        UserError: if prompt and answer do not fit the model, or no row at all could be measured.
    """
    target.require_room(settings.prompt_tokens + settings.decode_tokens)
    meter = meter or ReadMeter(settings.num_threads)
    meter.sweep()
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="coreinfer-bench-") as folder:
        jobs = [
            *_convertible(target, list(own_jobs(target, settings)), notes, on_progress),
            *_peer_jobs(target, settings, Path(folder), notes, on_progress),
        ]
        jobs, groups = _grouped(target, jobs, notes)
        found: dict[str, Row] = {}
        for number, group in enumerate(groups, 1):
            on_progress(f"group {number} of {len(groups)}")
            found |= _measured(group, settings.repeats, meter, start, notes, on_progress)
        rows = [found[key] for job in jobs if (key := job.to_json()) in found]
    if not rows:
        raise UserError(f"no row could be measured: {notes[0] if notes else 'none was asked for'}")
    notes += _about_the_run(target, rows, groups)
    return Report(describe_machine(), meter.best, rows, list(dict.fromkeys(notes)))


def _convertible(
    target: Target, jobs: Sequence[Job], notes: list[str], tell: Tell
) -> Iterator[Job]:
    """The jobs whose model is converted where it has to be: here, not in what is measured."""
    refused: dict[str, bool] = {}
    for job in jobs:
        if job.engine == "native" and target.source is not None and job.dtype not in refused:
            try:
                converted(target.source, WeightFormat.named(job.dtype), on_progress=tell)
                refused[job.dtype] = False
            except UserError as error:
                notes.append(f"native {job.dtype}: {error}")
                refused[job.dtype] = True
        if job.engine != "native" or not refused.get(job.dtype, False):
            yield job


def _peer_jobs(
    target: Target, settings: Settings, folder: Path, notes: list[str], tell: Tell
) -> Iterator[Job]:
    for name in settings.peers:
        peer = PEERS[name]
        if not is_installed(peer):
            notes.append(f"{name}: not installed ({peer.hint})")
            continue
        try:
            forms = peer.forms(target, settings.dtypes)
        except UserError as error:
            notes.append(f"{name}: {error}")
            continue
        if not forms:
            notes.append(f"{name}: it has no row for {', '.join(settings.dtypes)}")
        for form in forms:
            try:
                tell(f"preparing {name} {form}")
                file = peer.file(target, form, folder)
            except UserError as error:
                notes.append(f"{name} {form}: {error}")
                continue
            yield base_job(target, settings, name, form, file)


def _grouped(
    target: Target, jobs: Sequence[Job], notes: list[str]
) -> tuple[list[Job], list[list[Job]]]:
    """The jobs that fit into the memory there is, and which are alive together."""
    free = available_memory()
    sizes = {job.to_json(): memory_of(job, target) for job in jobs}
    if free is None:  # unknown: one after the other
        return list(jobs), [[job] for job in jobs]
    fitting = []
    for job in jobs:
        if (size := sizes[job.to_json()]) > free:
            notes.append(
                f"{job.title}: needs about {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
            )
        else:
            fitting.append(job)
    return fitting, in_groups(fitting, [sizes[job.to_json()] for job in fitting], free * _SHARE)


def _measured(
    group: Sequence[Job],
    repeats: int,
    meter: ReadMeter,
    start: Start,
    notes: list[str],
    tell: Tell,
) -> dict[str, Row]:
    """The rows of a group, by their jobs; one that fails becomes a note."""
    alive: list[RowProcess] = []
    rows: dict[str, Row] = {}

    def attempt(process: RowProcess, work: Callable[[], object]) -> bool:
        try:
            work()
        except RowError as error:
            notes.append(f"{process.job.title}: {error}")
            process.kill()
            return False
        return True

    try:
        for job in group:
            tell(f"loading {job.title}")
            process = start(job)
            alive.append(process)
            if not attempt(process, process.start):
                alive.remove(process)
        for number in range(1, repeats + 1):
            meter.sweep()
            for process in list(alive):
                tell(f"run {number} of {repeats}: {process.job.title}")
                if not attempt(process, process.repeat):
                    alive.remove(process)
        for process in list(alive):
            key = process.job.to_json()
            attempt(process, lambda: rows.update({key: process.finish()}))  # noqa: B023  # at once
            alive.remove(process)
    finally:
        for process in alive:
            process.kill()
    return rows


def _about_the_run(
    target: Target, rows: Sequence[Row], groups: Sequence[Sequence[Job]]
) -> Iterator[str]:
    if len(groups) == 1:
        yield "all rows were loaded together and their runs took turns"
    else:
        named = "; ".join(", ".join(job.title for job in group) for group in groups)
        yield f"runs took turns within these groups, which fit into memory together: {named}"
    yield (
        "decoding is timed after the prompt, on random tokens; tokenizing and sampling are in no "
        "time; peak memory counts loading, and mapped files as far as they were read"
    )
    if target.synthetic:
        yield (
            "synthetic weights, speed only; the layers of native read the same records in the "
            "prefill and have weights of their own in decode, so that peak memory is without the "
            "file that a real model maps"
        )
        if any(row.zero_activations is not None for row in rows):
            yield f"synthetic ReLU layers are made to have {ACTIVE:.0%} of their neurons active"
