"""What decoding a token has read."""

from __future__ import annotations

from collections.abc import Sequence

from coreinfer.backends.base import Backend, Choice, Session
from coreinfer.core.measures import THRESHOLD_BYTES
from coreinfer.selectors import Selector


def bytes_per_token(
    backend: Backend, session: Session, selector: Selector, choices: Sequence[Choice]
) -> list[int]:
    """Bytes of weights read to decode a token, of each sequence.

    Where core neurons are skipped it is the mean over what the session has decoded since it chose
    them; before anything was, what the prompt lets expect.
    """
    read = []
    for choice, spared in zip(choices, session.spared(), strict=True):
        core_set = choice.core_set
        size: float = backend.cost.sparse(core_set, choice.stand_in_bytes)
        if selector.skips and spared is None:
            size -= backend.cost.skipped(core_set, selector.active_in)
        elif selector.skips and spared is not None:
            thresholds = sum(
                len(kept)
                for layer, kept in core_set.layers.items()
                if selector.active_in(layer) < 1
            )
            size += THRESHOLD_BYTES * thresholds - spared
        read.append(round(size))
    return read
