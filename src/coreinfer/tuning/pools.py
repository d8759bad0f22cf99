"""Where candidates are measured: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any, ClassVar, Protocol

from coreinfer.api import load
from coreinfer.backends.base import Backend
from coreinfer.backends.native.memory import available_memory
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Quality, Window, measure
from coreinfer.tuning.candidate import Candidate, Stores

DENSE = "dense"  # the name of dense decoding among the results of `measure`
PROCESS_BYTES = 2**30  # that a process takes beside its model
CONNECT_SECONDS = 5
JOIN_SECONDS = 60


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
        """In a new process: Ctrl-C is the first process's to deal with."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        cls.current = cls.of(spec)

    @classmethod
    def run(cls, task: Task) -> Result:
        return cls.current.measure(task)


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
        self._pool.shutdown(cancel_futures=True)


class RayCluster:
    """Actors on a Ray cluster; its nodes need coreinfer and the model's files."""

    def __init__(self, spec: WorkerSpec, address: str, jobs: int | None) -> None:
        """For an address that `require_ray` has found to answer."""
        import ray as installed

        ray: Any = installed  # whose types come and go with the package
        self._ray = ray
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        cpus = spec.threads or 1
        most = max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus)
        self.workers = min(jobs or most, most)
        actor: Any = ray.remote(num_cpus=cpus)(RemoteWorker)
        self._actors = [actor.remote(spec) for _ in range(self.workers)]

    def map(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        from ray.exceptions import RayError

        free, left = list(self._actors), list(enumerate(tasks))
        running: dict[Any, tuple[Any, int]] = {}
        try:
            while left or running:
                while free and left:
                    actor, (position, task) = free.pop(), left.pop(0)
                    running[actor.measure.remote(task)] = (actor, position)
                (done, *_), _rest = self._ray.wait(list(running))
                actor, position = running.pop(done)
                free.append(actor)
                yield position, self._ray.get(done)
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"the Ray cluster failed ({reason}); start again to go on from here"
            ) from None

    def close(self) -> None:
        self._ray.shutdown()


class RemoteWorker:
    """A `Worker` as a Ray actor."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._worker = Worker.of(spec)

    def measure(self, task: Task) -> Result:
        return self._worker.measure(task)


def require_ray(address: str) -> None:
    """See to it that a cluster answers, in bounded time: Ray itself may wait for minutes, or abort.

    Raises:
        UserError: if Ray is not installed, or nothing that is Ray answers at the address.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("--ray needs Ray; pip install 'coreinfer[ray]'")
    dead = f"no Ray cluster answers at {address!r}; start one with 'ray start --head'"
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except ValueError:
            raise UserError(
                f"{address!r} is no Ray address; write HOST:PORT, ray://HOST:PORT, auto or local"
            ) from None
        except OSError as error:
            raise UserError(f"{dead} ({error.strerror or error})") from None
    elif address == "local":
        return
    elif address != "auto":
        raise UserError(
            f"{address!r} is no Ray address; write HOST:PORT, ray://HOST:PORT, auto or local"
        )
    join = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"
    try:
        subprocess.run(
            [sys.executable, "-c", join, address],
            check=True,
            timeout=JOIN_SECONDS,
            capture_output=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{dead} (nothing within {JOIN_SECONDS} s)") from None
    except subprocess.CalledProcessError:
        raise UserError(dead) from None
