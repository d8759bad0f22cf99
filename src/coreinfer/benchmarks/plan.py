"""Which rows there are, and which of them are alive at the same time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from coreinfer.benchmarks.decoding import Decoding
from coreinfer.benchmarks.job import Job
from coreinfer.benchmarks.machine import cores
from coreinfer.benchmarks.target import Target
from coreinfer.errors import UserError, require_ratio, require_whole
from coreinfer.kernels.formats import WeightFormat

NATIVE_DTYPES = ("bfloat16", "int8", "int4")
HF_DTYPES = ("float32", "bfloat16")
DTYPES = ("float32", *NATIVE_DTYPES)
ENGINES = ("native", "hf")
PEER_NAMES = ("transformers", "llama.cpp", "openvino")

_ROOM = 7e8  # bytes of a process beside the weights: libraries, activations, a KV cache
_MLP_SHARE = 0.65  # of a model's weights


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Args:
        dtypes: of the weights, of `DTYPES`.
        keeps: fractions of the neurons to decode with, in (0, 1]; 1 is dense.
        actives: fractions of the core neurons that a token computes whole, for each keep.
        engines: of `ENGINES`.
        peers: of `PEER_NAMES`.
        prompt_tokens: read by the prefill; the depth at which decoding is timed.
        decode_tokens: decoded a run.
        threads: at most the cores there are; None for all of them.
        repeats: timed runs a row, after one that is not.
        given: a row for each dtype decodes with these; None for no such row.

    Raises:
        UserError: for anything else.
    """

    dtypes: tuple[str, ...] = NATIVE_DTYPES
    keeps: tuple[float, ...] = (1.0, 0.4)
    actives: tuple[float, ...] = (1.0,)
    engines: tuple[str, ...] = ENGINES
    peers: tuple[str, ...] = ("transformers", "llama.cpp")
    prompt_tokens: int = 128
    decode_tokens: int = 16
    threads: int | None = None
    repeats: int = 3
    given: Decoding | None = None

    def __post_init__(self) -> None:
        _require_known("dtype", self.dtypes, DTYPES)
        _require_known("engine", self.engines, ENGINES)
        _require_known("peer", self.peers, PEER_NAMES)
        for keep in self.keeps:
            require_ratio("keeps", keep)
        for active in self.actives:
            require_ratio("actives", active)
        if not self.dtypes:
            raise UserError(f"no dtype to bench; name some of {', '.join(DTYPES)}")
        if not (self.engines and self.keeps) and not self.peers:
            raise UserError("nothing to bench; name an engine and a keep, or a peer")
        require_whole("prompt tokens", self.prompt_tokens, 1)
        require_whole("decode tokens", self.decode_tokens, 1)
        require_whole("repeats", self.repeats, 1)
        most = cores()
        if self.threads is not None and not 1 <= self.threads <= most:
            raise UserError(
                f"threads must be 1 to {most}, this machine's cores, got {self.threads}"
            )

    @property
    def num_threads(self) -> int:
        return cores() if self.threads is None else self.threads


def _require_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"no {what} {name!r}; there is {', '.join(known)}")


def own_jobs(target: Target, settings: Settings) -> Iterator[Job]:
    """The rows of CoreInfer's backends. A ReLU model has a dense row without skipped zeros too."""
    for engine in settings.engines:
        takes = NATIVE_DTYPES if engine == "native" else HF_DTYPES
        for dtype in settings.dtypes:
            if dtype not in takes:
                continue
            job = base_job(target, settings, engine, dtype)
            for keep in dict.fromkeys(settings.keeps):
                if keep == 1 and target.relu and engine == "native":
                    yield replace(job, skip_zeros=False)
                for active in dict.fromkeys(settings.actives):
                    yield replace(job, keep=keep, active=active)
            if settings.given is not None:
                yield replace(job, given=asdict(settings.given))


def base_job(
    target: Target, settings: Settings, engine: str, dtype: str, file: Path | None = None
) -> Job:
    """A dense row."""
    return Job(
        engine=engine,
        model=target.name,
        dtype=dtype,
        threads=settings.num_threads,
        prompt_tokens=settings.prompt_tokens,
        decode_tokens=settings.decode_tokens,
        source=target.source,
        shape=target.shape,
        gguf=None if file is None else str(file),
    )


def memory_of(job: Job, target: Target) -> float:
    """Bytes that a row takes, roughly: to choose which rows fit beside each other.

    The pages of a mapped file are not counted: they are given back when others need them.
    """
    if job.gguf is not None:
        return Path(job.gguf).stat().st_size * 1.1 + _ROOM
    bits = 32.0 if job.dtype == "float32" else WeightFormat.named(job.dtype).bits_per_weight
    size = target.parameters * bits / 8
    if job.engine == "native":  # it copies what is kept, from a mapped file
        size *= 1 - _MLP_SHARE * (1 - job.keep)
    elif job.keep < 1:  # a copy beside the whole
        size *= 1 + _MLP_SHARE * job.keep
    return size + _ROOM


def in_groups(jobs: Sequence[Job], sizes: Sequence[float], room: float) -> list[list[Job]]:
    """Jobs that fit into `room` bytes together; one that is larger is alone.

    They are put together by size, so that rows that read about as much are measured side by side.
    """
    groups: list[list[Job]] = []
    taken = 0.0
    for size, job in sorted(zip(sizes, jobs, strict=True), key=lambda pair: pair[0]):
        if groups and taken + size <= room:
            groups[-1].append(job)
            taken += size
        else:
            groups.append([job])
            taken = size
    return groups
