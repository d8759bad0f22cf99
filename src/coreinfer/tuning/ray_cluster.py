"""A Ray cluster that does the work of tuning."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from coreinfer.errors import UserError
from coreinfer.tuning.work import Result, Task, Worker, WorkerSpec

CONNECT_SECONDS = 5
JOIN_SECONDS = 60


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

    def map(self, tasks: Sequence[Task[Result]]) -> Iterator[tuple[int, Result]]:
        from ray.exceptions import RayError

        free, left = list(self._actors), list(enumerate(tasks))
        running: dict[Any, tuple[Any, int]] = {}
        try:
            while left or running:
                while free and left:
                    actor, (position, task) = free.pop(), left.pop(0)
                    running[actor.run.remote(task)] = (actor, position)
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

    def run(self, task: Task[Result]) -> Result:
        return task.run(self._worker)


def require_ray(address: str) -> None:
    """See to it that a cluster answers, in bounded time: Ray itself may wait for minutes, or abort.

    Raises:
        UserError: if it is no address, Ray is not installed, or nothing that is Ray answers there.
    """
    endpoint = _endpoint(address)
    if importlib.util.find_spec("ray") is None:
        raise UserError("--ray needs Ray; pip install 'coreinfer[ray]'")
    if address == "local":
        return
    dead = f"no Ray cluster answers at {address!r}; start one with 'ray start --head'"
    if endpoint is not None:
        try:
            socket.create_connection(endpoint, CONNECT_SECONDS).close()
        except OSError as error:
            raise UserError(f"{dead} ({error.strerror or error})") from None
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


def _endpoint(address: str) -> tuple[str, int] | None:
    """Host and port of an address; None for one that Ray looks up itself.

    Raises:
        UserError: if it is no address.
    """
    if address in ("auto", "local"):
        return None
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise UserError(
            f"{address!r} is no Ray address; write HOST:PORT, ray://HOST:PORT, auto or local"
        )
    return host, int(port)
