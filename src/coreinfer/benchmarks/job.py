"""One row to be measured, as it is handed to the process that measures it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """A row to be.

    Attributes:
        engine: "native", "hf" or a peer's name.
        model: what the row calls the model.
        dtype: of the weights, as the engine names it.
        source: the model, as `coreinfer.load` takes it; None for synthetic weights.
        shape: the configuration that synthetic weights are made for.
        gguf: the file that an engine reads which takes no other.
        keep: fraction of the neurons to decode with.
        active: fraction of those that a token computes whole.
        given: a `Decoding` as plain values, which takes the place of these two.
        skip_zeros: leave out neurons that are exactly zero, where the model has such.
        threads, prompt_tokens, decode_tokens: of the run.
    """

    engine: str
    model: str
    dtype: str
    threads: int
    prompt_tokens: int
    decode_tokens: int
    source: str | None = None
    shape: Mapping[str, Any] | None = None
    gguf: str | None = None
    keep: float = 1.0
    active: float = 1.0
    given: Mapping[str, Any] | None = None
    skip_zeros: bool = True

    @property
    def title(self) -> str:
        """For a person who waits."""
        kept = "" if self.keep == 1 else f" keep {self.keep:g}"
        active = "" if self.active == 1 else f" active {self.active:g}"
        given = "" if self.given is None else " as given"
        return f"{self.engine} {self.dtype}{kept}{active}{given}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))
