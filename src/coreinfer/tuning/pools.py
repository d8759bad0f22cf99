"""Where candidates are measured: in this process or in several."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import active_children, get_context, parent_process
from typing import ClassVar, Protocol

from coreinfer.api import load
from coreinfer.backends.base import Backend
from coreinfer.backends.native.memory import available_memory
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Quality, Window, measure
from coreinfer.tuning.candidate import Candidate, Stores

DENSE = "dense"  # the name of dense decoding among the results of `measure`
PROCESS_BYTES = 2**30  # that a process takes beside its model


@dataclass(frozen=True)
class Task:
    """Windows, prefilled as one batch, and the keys of the candidates to measure on them."""

    windows: Sequence[Window]
    keys: Sequence[str]


Result = dict[str, Quality]  # by key, and dense decoding


class Pool(Protocol):
    """Measures tasks, some at a time; what comes out does not depend on how many."""

    @property
    def workers(self) -> int: ...

    def map(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        """The results with the positions of their tasks, as they are done."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class WorkerSpec:
    """What another process needs to do the same as this one."""

    model: str
    backend: str
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    stores: Mapping[str, str] = field(default_factory=dict)


class Worker:
    """A loaded model that measures tasks."""

    current: ClassVar[Worker]  # of a process of its own

    def __init__(self, backend: Backend, stores: Stores) -> None:
        self._backend = backend
        self._stores = stores

    @classmethod
    def of(cls, spec: WorkerSpec) -> Worker:
        options = asdict(spec)
        stores = Stores.open(options.pop("stores"))
        return cls(load(options.pop("model"), **options).backend, stores)

    def measure(self, task: Task) -> Result:
        settings = {key: Candidate.of_key(key).setting(self._stores) for key in task.keys}
        size = len(task.windows)
        (results,) = measure(self._backend, task.windows, settings, batch_size=size)
        return results

    @classmethod
    def start(cls, spec: WorkerSpec) -> None:
        """In a new process: Ctrl-C is the first process's to deal with, and its end is ours."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=end_with_parent, daemon=True).start()
        cls.current = cls.of(spec)

    @classmethod
    def run(cls, task: Task) -> Result:
        return cls.current.measure(task)


def end_with_parent() -> None:
    """End this process when the one that started it is gone, killed perhaps: a worker that waits
    for work would keep its model in memory for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def default_jobs(model_bytes: int, threads: int) -> int:
    """Processes that this machine has cores and memory for; 1 at least.

    A process is given twice what decoding reads a token: weights, caches and what was recorded.
    """
    jobs = (os.cpu_count() or 1) // threads
    free = available_memory()
    if free is not None:
        jobs = min(jobs, free // (2 * model_bytes + PROCESS_BYTES))
    return max(jobs, 1)


class InProcess:
    """One task after the other, with the model that is loaded already."""

    workers = 1

    def __init__(self, backend: Backend, stores: Stores) -> None:
        self._worker = Worker(backend, stores)

    def map(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        for position, task in enumerate(tasks):
            yield position, self._worker.measure(task)

    def close(self) -> None:
        """There is nothing to let go of."""


class Processes:
    """Several processes on this machine, each with a model of its own."""

    def __init__(self, spec: WorkerSpec, jobs: int) -> None:
        self.workers = jobs
        self._others = set(active_children())
        self._pool = ProcessPoolExecutor(
            jobs, get_context("spawn"), initializer=Worker.start, initargs=(spec,)
        )

    def map(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        try:
            waiting = {self._pool.submit(Worker.run, task): i for i, task in enumerate(tasks)}
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BrokenProcessPool:
            raise UserError(
                f"one of {self.workers} processes ended, for want of memory perhaps; start again "
                "with fewer --jobs to go on from here"
            ) from None

    def close(self) -> None:
        """At once: what a worker is doing is done again by who goes on."""
        for child in set(active_children()) - self._others:
            child.terminate()
        self._pool.shutdown(cancel_futures=True)
