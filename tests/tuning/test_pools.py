"""Workers: the same results in this process, in others and on Ray; and how they fail."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coreinfer import api
from coreinfer.api import load
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Window
from coreinfer.runtime.stores import Stores
from coreinfer.tuning import pools
from coreinfer.tuning.candidate import Candidate
from coreinfer.tuning.pools import (
    InProcess,
    Pool,
    Processes,
)
from coreinfer.tuning.ray_cluster import JOIN_SECONDS, RayCluster, require_ray
from coreinfer.tuning.work import Measure, Task, Weigh, Worker, WorkerSpec
from tests.tiny import tiny_model, tiny_tokenizer

KEYS = [
    Candidate("impact", (0.5, 0.25, 1.0), {}, "linear", {"rank": 2, "ridge": 0.3}).key,
    Candidate("griffin", (0.5,) * 3).key,
]
WIDER = Candidate("impact", (0.6, 0.4, 1.0), {}, "linear", {"rank": 2, "ridge": 0.3}).key
WINDOWS = [[Window([5 * i + j for j in range(9)], [3, 1, 4, 1, 5], "x")] for i in range(3)]
TASKS: list[Task[Any]] = [
    Measure(WINDOWS[0], KEYS),
    Measure(WINDOWS[1], KEYS[:1]),
    Measure(WINDOWS[2], KEYS[1:]),
    Weigh(WINDOWS[0], KEYS[0], WIDER),
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return WorkerSpec(str(folder), "hf", threads=1)


@pytest.fixture(scope="module")
def expected(spec: WorkerSpec) -> dict[int, Any]:
    backend = load(spec.model, backend="hf", threads=1).backend
    return dict(InProcess(backend, Stores(), spec).map(TASKS))


def test_a_task_measures_its_candidates_and_dense_decoding(expected: dict[int, Any]) -> None:
    assert sorted(expected) == [0, 1, 2, 3]
    assert set(expected[0]) == {"dense", *KEYS}
    assert set(expected[1]) == {"dense", KEYS[0]}
    assert expected[0]["dense"].kl == [0.0]
    assert expected[0][KEYS[0]].kl[0] > 0


def test_what_more_neurons_are_worth(expected: dict[int, Any]) -> None:
    first, second, dense = expected[3].gains
    assert first != 0
    assert second != 0
    assert dense is None
    assert expected[3].loss == pytest.approx(expected[0][KEYS[0]].kl[0], rel=1e-4)


def test_native_work_is_weighed_on_hf(spec: WorkerSpec, expected: dict[int, Any]) -> None:
    pool = InProcess(load(spec.model, backend="native", threads=1).backend, Stores(), spec)
    found = dict(pool.map([TASKS[0], TASKS[3]]))
    assert found[1] == expected[3]
    assert found[0][KEYS[0]].kl[0] == pytest.approx(expected[0][KEYS[0]].kl[0], rel=0.1)


def test_processes_give_the_same(spec: WorkerSpec, expected: dict[int, Any]) -> None:
    pool = Processes(spec, 2)
    try:
        assert dict(pool.map(TASKS)) == expected
        assert dict(pool.map([])) == {}
    finally:
        pool.close()


class Killed:
    """A task during which the system ends the process."""

    def run(self, _worker: Worker) -> None:
        os._exit(9)


def test_a_process_that_ends_is_a_line(spec: WorkerSpec) -> None:
    pool = Processes(spec, 1)
    try:
        with pytest.raises(UserError, match="fewer --jobs"):
            list(pool.map([Killed()]))
    finally:
        pool.close()


def test_a_process_that_cannot_begin_says_why() -> None:
    pool = Processes(WorkerSpec("no-such-model", "hf", threads=1), 1)
    try:
        with pytest.raises(UserError, match="no model 'no-such-model'"):
            list(pool.map(TASKS))
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("free", "jobs"), [(None, 4), (100 * 2**30, 4), (5 * 2**30, 1), (7 * 2**30, 2), (0, 1)]
)
def test_as_many_processes_as_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, free: int | None, jobs: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(pools, "available_memory", lambda: free)
    assert pools.default_jobs(2**30, threads=2) == jobs


# Ray itself, where it is installed: its own start takes longer than all tests here together, so
# that CI does without it.
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (coreinfer[ray])"
)


@pytest.fixture
def listening() -> Iterator[int]:
    """A port where something answers that is no Ray."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"pip install 'coreinfer\[ray\]'"):
        require_ray("auto")


@pytest.mark.parametrize("address", ["nonsense", "host:port", "ray://", ""])
def test_what_is_no_address(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: True)
    with pytest.raises(UserError, match="is no Ray address"):
        require_ray(address)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: True)
    with pytest.raises(UserError, match=f"no Ray cluster answers at '127.0.0.1:{free_port}'"):
        require_ray(f"127.0.0.1:{free_port}")


def test_somebody_else_there(monkeypatch: pytest.MonkeyPatch, listening: int) -> None:
    """The join is tried in a process of its own, for so long and no longer."""
    waited = []

    def run(*_args: Any, timeout: float, **_options: Any) -> None:
        waited.append(timeout)
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: True)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"no Ray cluster answers .*nothing within \d+ s"):
        require_ray(f"127.0.0.1:{listening}")
    assert waited == [JOIN_SECONDS]


@needs_ray
def test_ray_gives_the_same(
    spec: WorkerSpec, expected: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    pool: Pool = RayCluster(spec, "local", 2)
    try:
        assert dict(pool.map(TASKS)) == expected
    finally:
        pool.close()


def test_a_worker_does_not_outlive_who_started_it() -> None:
    script = (
        "from multiprocessing import get_context\n"
        "from coreinfer.tuning.work import end_with_parent\n"
        "child = get_context('spawn').Process(target=end_with_parent)\n"
        "child.start()\n"
        "print(child.pid, flush=True)\n"
        "child.join()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)  # it is there
        parent.kill()
        # The child has the other end of the pipe: it closes when the child ends.
        assert parent.stdout.read() == b""


def test_a_large_model_is_loaded_once_more_in_bfloat16(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = load(spec.model, backend="native", threads=1).backend
    assert api.differentiable(native, spec.model).dtype == "float32"
    monkeypatch.setattr(api, "LARGE", 1)
    large = api.differentiable(native, spec.model)
    assert large.dtype == "bfloat16"
    assert api.differentiable(large, spec.model) is large
    found = dict(InProcess(large, Stores(), spec).map([TASKS[3]]))
    assert found[0].gains[0] is not None
