"""Where the work is done: in this process or in several."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import Protocol

from coreinfer.backends.base import Backend
from coreinfer.backends.native.memory import available_memory
from coreinfer.errors import UserError
from coreinfer.runtime.stores import Stores
from coreinfer.tuning.work import Result, Task, Worker, WorkerSpec

PROCESS_BYTES = 2**30  # that a process takes beside its model


class Pool(Protocol):
    """Does tasks, some at a time; what comes out does not depend on how many."""

    @property
    def workers(self) -> int: ...

    def map(self, tasks: Sequence[Task[Result]]) -> Iterator[tuple[int, Result]]:
        """The results with the positions of their tasks, as they are done."""
        ...

    def close(self) -> None: ...


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

    def __init__(self, backend: Backend, stores: Stores, spec: WorkerSpec) -> None:
        self._worker = Worker(backend, stores, spec)

    def map(self, tasks: Sequence[Task[Result]]) -> Iterator[tuple[int, Result]]:
        for position, task in enumerate(tasks):
            yield position, task.run(self._worker)

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

    def map(self, tasks: Sequence[Task[Result]]) -> Iterator[tuple[int, Result]]:
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
