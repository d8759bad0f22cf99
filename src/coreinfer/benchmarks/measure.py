"""One run of an engine, timed: prefill, selection and decode apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import numpy as np

_SEED = 0

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Repeat:
    """What one run took, in seconds; `decode_s` is all `decode_tokens` together."""

    prefill_s: float
    select_s: float
    decode_s: float
    decode_tokens: int


@dataclass(frozen=True)
class About:
    """What an engine decodes with.

    Attributes:
        dtype: of its weights, as the engine names it.
        selector: the rule that chose its neurons; "dense" for all of them.
        density: kept neurons / all neurons.
        bytes_per_token: weights read to decode a token; None where the engine does not say.
        zero_activations: share of the kept neurons that are exactly zero and so not read; None
            where none is skipped.
        active: share of the kept neurons that a token was to compute whole.
    """

    dtype: str
    selector: str = "dense"
    density: float = 1.0
    bytes_per_token: int | None = None
    zero_activations: float | None = None
    active: float = 1.0


class Engine(Protocol):
    """Something that reads a prompt and decodes tokens after it."""

    @property
    def vocab_size(self) -> int: ...

    def repeat(self, prompt: Sequence[int], answer: Sequence[int]) -> Repeat:
        """Read the prompt from nothing, then decode `answer`, one token a step."""
        ...

    def about(self) -> About:
        """What the last run decoded with."""
        ...


class Steps(Protocol):
    """An engine that is driven step by step."""

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Read a prompt, on a sequence that is empty again."""
        ...

    def select(self) -> None:
        """Choose what to decode with."""
        ...

    def decode(self, token_id: int) -> None:
        """Append a token and compute what follows it."""
        ...


def timed(
    steps: Steps, prompt: Sequence[int], answer: Sequence[int], clock: Clock = perf_counter
) -> Repeat:
    """One run. The tokens are given, so that drawing them is in no time."""
    began = clock()
    steps.prefill(prompt)
    read = clock()
    steps.select()
    selected = clock()
    for token in answer:
        steps.decode(token)
    ended = clock()
    return Repeat(read - began, selected - read, ended - selected, len(answer))


def random_tokens(vocab_size: int, count: int) -> list[int]:
    """Token ids, the same for every engine with that vocabulary."""
    tokens: list[int] = np.random.default_rng(_SEED).integers(vocab_size, size=count).tolist()
    return tokens


@dataclass(frozen=True)
class Spread:
    """The middle and the ends of some measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """A line of the result; `to_json` is the object that `bench --json` prints for it.

    Seconds are medians. `gb_per_s` is `bytes_per_token` times the median speed, in 1e9 bytes.
    """

    engine: str
    model: str
    dtype: str
    selector: str
    density: float
    threads: int
    prompt_tokens: int
    prefill_s: float
    select_s: float
    decode_tokens_per_s: Spread
    bytes_per_token: int | None
    gb_per_s: float | None
    peak_memory_bytes: int
    synthetic: bool
    zero_activations: float | None = None
    active: float = 1.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def row_of(
    repeats: Sequence[Repeat],
    about: About,
    *,
    engine: str,
    model: str,
    threads: int,
    prompt_tokens: int,
    peak_memory_bytes: int,
    synthetic: bool,
) -> Row:
    """The row that an engine's repeats make."""
    speed = Spread.of([one.decode_tokens / one.decode_s for one in repeats])
    size = about.bytes_per_token
    return Row(
        engine=engine,
        model=model,
        dtype=about.dtype,
        selector=about.selector,
        density=about.density,
        threads=threads,
        prompt_tokens=prompt_tokens,
        prefill_s=median(one.prefill_s for one in repeats),
        select_s=median(one.select_s for one in repeats),
        decode_tokens_per_s=speed,
        bytes_per_token=size,
        gb_per_s=None if size is None else size * speed.median / 1e9,
        peak_memory_bytes=peak_memory_bytes,
        synthetic=synthetic,
        zero_activations=about.zero_activations,
        active=about.active,
    )
