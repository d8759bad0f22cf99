"""The work of tuning: pieces that any process can do, and what a process needs for them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from multiprocessing import parent_process
from typing import ClassVar, Protocol, TypeVar

from coreinfer.api import differentiable, load
from coreinfer.backends.base import Backend
from coreinfer.backends.hf.session import HfBackend
from coreinfer.backends.hf.worth import Worth, worth
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Quality, Window, measure
from coreinfer.runtime.stores import Stores
from coreinfer.tuning.candidate import Candidate

DENSE = "dense"  # the name of dense decoding among the results of `Measure`

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Task(Protocol[Result_co]):
    """A piece of work that another process can do: plain values, and what is made of them."""

    def run(self, worker: Worker) -> Result_co: ...


@dataclass(frozen=True)
class Measure:
    """Windows, prefilled as one batch, and the keys of the candidates to measure on them."""

    windows: Sequence[Window]
    keys: Sequence[str]

    def run(self, worker: Worker) -> dict[str, Quality]:
        """The quality of each by its key, and of dense decoding."""
        settings = {key: Candidate.of_key(key).setting(worker.stores) for key in self.keys}
        size = len(self.windows)
        (results,) = measure(worker.backend, self.windows, settings, batch_size=size)
        return results


@dataclass(frozen=True)
class Weigh:
    """Windows, and the keys of a candidate and of the same with more in its layers."""

    windows: Sequence[Window]
    now: str
    more: str

    def run(self, worker: Worker) -> Worth:
        """What more is worth, layer by layer."""
        now, more = (Candidate.of_key(key).setting(worker.stores) for key in (self.now, self.more))
        return worth(
            worker.differentiable,
            [window.prompt for window in self.windows],
            [window.continuation for window in self.windows],
            now.selector,
            more.selector,
            now.stand_in,
            [window.text for window in self.windows],
        )


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
    """A loaded model, and the stores, for tasks.

    Attributes:
        backend: the model that is asked for.
        stores: that candidates may need.
        spec: what both come from.
    """

    current: ClassVar[Worker | UserError]  # of a process of its own; or why there is none

    def __init__(self, backend: Backend, stores: Stores, spec: WorkerSpec) -> None:
        self.backend = backend
        self.stores = stores
        self.spec = spec

    @classmethod
    def of(cls, spec: WorkerSpec) -> Worker:
        options = asdict(spec)
        stores = Stores.open(options.pop("stores"))
        return cls(load(options.pop("model"), **options).backend, stores, spec)

    @cached_property
    def differentiable(self) -> HfBackend:
        """The model on hf, which a backward pass can go through; loaded when it is asked for.

        Raises:
            UserError: if hf cannot load it.
        """
        spec = self.spec
        return differentiable(self.backend, spec.model, device=spec.device, threads=spec.threads)

    @classmethod
    def start(cls, spec: WorkerSpec) -> None:
        """In a new process: Ctrl-C is the first process's to deal with, and its end is ours."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=end_with_parent, daemon=True).start()
        try:
            cls.current = cls.of(spec)
        except UserError as error:  # raised here, all that the first process hears is that we ended
            cls.current = error

    @classmethod
    def run(cls, task: Task[Result]) -> Result:
        if isinstance(cls.current, UserError):
            raise cls.current
        return task.run(cls.current)


def end_with_parent() -> None:
    """End this process when the one that started it is gone, killed perhaps: a worker that waits
    for work would keep its model in memory for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
