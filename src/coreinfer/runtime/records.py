"""What a generation did: the record that travels with the stream."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class GenerationRecord:
    """One answer and what it cost; `to_json` is the object that `generate --json` prints.

    Times are in seconds: `prefill_s` reads the prompt densely and records its statistics,
    `select_s` chooses the core neurons, gathers their weights and fits the stand-in, as far as the
    prefill has not done so already (native does, where one pass reads one prompt), `decode_s` is
    all the rest up to the sequence's last token, without what the reader of the stream does. The
    first token comes from the prefill, so `decode_tokens_per_s` counts the tokens after it; None
    when there is none. In a batch a step serves every sequence, and each is given its whole time.
    `beta` (of `similarity`: `gamma`) is None where it says nothing: with a core set from a file, or
    with a budget for every sparse layer.
    """

    prompt_tokens: int
    generated_tokens: int
    text: str
    token_ids: list[int]
    finish_reason: str
    selector: str
    alpha: float | None
    beta: float | None
    active: float
    gamma: float | None
    stand_in: str
    dense_layers: list[int]
    density: float
    bytes_per_token: int
    dense_bytes_per_token: int
    prefill_s: float
    select_s: float
    decode_s: float
    decode_tokens_per_s: float | None
    peak_memory_bytes: int
    backend: str
    dtype: str
    model: str
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Piece:
    """A bit of streamed text of prompt `index`; the last one of a prompt carries its record."""

    index: int
    text: str
    record: GenerationRecord | None = None


def peak_memory_bytes() -> int:
    """The most memory this process has held: of the GPU where one is in use, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    try:
        # Of this program alone: what getrusage says begins with the program that started it.
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) * 1024
    except (OSError, StopIteration):  # not on every system
        pass
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
