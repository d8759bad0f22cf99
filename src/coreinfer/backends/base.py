"""What a backend offers to the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from coreinfer.core.coreset import CoreSet
from coreinfer.core.measures import ReadCost
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Selector
from coreinfer.selectors.evidence import Evidence
from coreinfer.standins import StandIn


class Phase(Enum):
    """What a forward pass is for; always stated, never guessed from a shape."""

    PREFILL = "prefill"  # dense, and the statistics are recorded
    DECODE = "decode"  # the core neurons alone
    SCORE = "score"  # like decode, on given tokens, many at once


@dataclass(frozen=True)
class Choice:
    """What `Session.select` chose for one sequence.

    Attributes:
        core_set: its core neurons.
        stand_in_bytes: bytes that decode reads for the stand-in, all layers.
        notes: what the selector wants to be known, plain JSON.
    """

    core_set: CoreSet
    stand_in_bytes: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


def require_context(length: int | None, tokens: int) -> None:
    """Raises UserError if a sequence of so many tokens is longer than the model reads."""
    if length is not None and tokens > length:
        raise UserError(f"the model reads {length} tokens at most, this would be {tokens}")


class Session(Protocol):
    """A batch of sequences in flight: KV cache, statistics and, once selected, core neurons."""

    def prefill(
        self, token_ids: Sequence[Sequence[int]], texts: Sequence[str] | None = None
    ) -> Tensor:
        """Read tokens densely and record their statistics; may be called again for more.

        The next turn of a conversation goes on where the last one ended, after `decode` too. What
        was decoded stays in the KV cache as the core neurons computed it and is never counted, so
        the next `select` sees the sum over what was prefilled, all turns alike.

        Returns:
            Logits that follow each sequence's last token, [B, V].

        Raises:
            UserError: if a sequence gets no token, or becomes longer than the model reads.
        """
        ...

    def look_ahead(self, token_ids: Sequence[Sequence[int]]) -> None:
        """Record the statistics of tokens to come, for the oracle; the sequences do not move."""
        ...

    def select(self, selector: Selector, stand_in: StandIn | None = None) -> list[Choice]:
        """Choose each sequence's core neurons; what follows is decoded with them alone."""
        ...

    def decode(self, token_ids: Sequence[Sequence[int]], phase: Phase = Phase.DECODE) -> Tensor:
        """Append tokens, none or more a sequence; logits after each, [B, T, V].

        Shorter sequences are padded on the right; logits there mean nothing, and no further
        `decode` may follow for them, other than of no token: that costs next to nothing. Before
        `select`, all neurons are used.

        Raises:
            UserError: if a sequence becomes longer than the model reads.
        """
        ...

    def spared(self) -> list[float | None]:
        """Bytes a token that decode did not read since `select`, of each sequence, for its core
        neurons were skipped; mean over the tokens. None before any was decoded."""
        ...

    def fork(self) -> Session:
        """A copy that goes on by its own, at no cost in memory; this one stays where it is."""
        ...

    def evidence(self) -> list[Evidence]:
        """What the prefill recorded, a sequence each."""
        ...


class Backend(Protocol):
    """A loaded model that can run sessions."""

    @property
    def name(self) -> str: ...
    @property
    def model_name(self) -> str: ...
    @property
    def family(self) -> str:
        """The architecture, as `config.model_type` spells it."""
        ...

    @property
    def dtype(self) -> str: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def cost(self) -> ReadCost: ...
    @property
    def context_length(self) -> int | None: ...
    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def check(self, selector: Selector, stand_in: StandIn | None = None) -> None:
        """Raises UserError if the selector or the stand-in does not fit this model."""
        ...

    def start(self, plan: RecordingPlan) -> Session:
        """A fresh session that records what `plan` asks for."""
        ...

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next is honest."""
        ...
