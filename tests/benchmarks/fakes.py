"""Engines, clocks and processes that take known times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from coreinfer.benchmarks.job import Job
from coreinfer.benchmarks.machine import ReadMeter
from coreinfer.benchmarks.measure import About, Repeat, Row, row_of
from coreinfer.benchmarks.process import RowError, RowProcess

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
TINY_OPT = {
    "model_type": "opt",
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "vocab_size": 320,
    "activation_function": "relu",
}


@dataclass
class FakeClock:
    """A clock that goes on when it is told to."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeSteps:
    """10 s a prompt token, 3 s to select, then 1 s, 2 s, ... a decoded token."""

    clock: FakeClock
    calls: list[str] = field(default_factory=list)

    def prefill(self, token_ids: Sequence[int]) -> None:
        self.calls.append(f"prefill {list(token_ids)}")
        self.clock.now += 10 * len(token_ids)

    def select(self) -> None:
        self.calls.append("select")
        self.clock.now += 3

    def decode(self, token_id: int) -> None:
        self.calls.append(f"decode {token_id}")
        self.clock.now += sum(call.startswith("decode") for call in self.calls)


class FakeProcess(RowProcess):
    """A row that is measured at once; `speeds` are the tokens a second of its runs."""

    def __init__(self, job: Job, log: list[str], speeds: Sequence[float], fails: str) -> None:
        self.job = job
        self._log = log
        self._speeds = list(speeds)
        self._fails = fails

    def start(self) -> None:
        self._do("start")

    def repeat(self) -> None:
        self._do("repeat")

    def finish(self) -> Row:
        self._do("finish")
        return row_of(
            [Repeat(1.0, 0.5, 4 / speed, 4) for speed in self._speeds],
            About(self.job.dtype, density=self.job.keep, bytes_per_token=1000),
            engine=self.job.engine,
            model=self.job.model,
            threads=self.job.threads,
            prompt_tokens=self.job.prompt_tokens,
            peak_memory_bytes=7,
            synthetic=self.job.shape is not None,
        )

    def kill(self) -> None:
        self._log.append(f"{self.job.title}: kill")

    def _do(self, what: str) -> None:
        self._log.append(f"{self.job.title}: {what}")
        if what == self._fails:
            raise RowError(f"no {what}")


def fake_start(
    log: list[str], speeds: Sequence[float] = (10.0, 30.0, 20.0), **fails: str
) -> Callable[[Job], RowProcess]:
    """Starts fake processes; `fails` says at what an engine fails."""
    return lambda job: FakeProcess(job, log, speeds, fails.get(job.engine, ""))


def small_meter() -> ReadMeter:
    return ReadMeter(1, size=1 << 16)
