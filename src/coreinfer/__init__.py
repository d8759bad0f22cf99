"""Decode large language models with the few MLP neurons a prompt needs: its core neurons.

    import coreinfer

    llm = coreinfer.load("smollm2-135m-instruct")
    for piece in llm.stream("Why is the sky blue?", selector=coreinfer.Stability(beta=0.4)):
        print(piece.text, end="")

The method is that of arXiv 2410.18311. What is named here is imported when it is first used, so
`import coreinfer` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coreinfer.api import LLM, Comparison, load
    from coreinfer.backends.hf.sparse import SparseRun, sparse
    from coreinfer.core.coreset import CoreSet
    from coreinfer.errors import UserError
    from coreinfer.runtime.conversation import Conversation
    from coreinfer.runtime.records import GenerationRecord, Piece
    from coreinfer.runtime.sampling import SamplingParams
    from coreinfer.runtime.scoring import Score
    from coreinfer.selectors import (
        Auto,
        Dense,
        Fixed,
        Griffin,
        Impact,
        Oracle,
        Random,
        Selector,
        Similarity,
        Stability,
        Static,
    )
    from coreinfer.semantics.store import ClusterStore
    from coreinfer.standins import Linear, Mean, StandIn

_HOMES = {
    "LLM": "api",
    "Auto": "selectors",
    "ClusterStore": "semantics.store",
    "Comparison": "api",
    "Conversation": "runtime.conversation",
    "CoreSet": "core.coreset",
    "Dense": "selectors",
    "Fixed": "selectors",
    "GenerationRecord": "runtime.records",
    "Griffin": "selectors",
    "Impact": "selectors",
    "Linear": "standins",
    "Mean": "standins",
    "Oracle": "selectors",
    "Piece": "runtime.records",
    "Random": "selectors",
    "SamplingParams": "runtime.sampling",
    "Score": "runtime.scoring",
    "Selector": "selectors",
    "Similarity": "selectors",
    "SparseRun": "backends.hf.sparse",
    "Stability": "selectors",
    "StandIn": "standins",
    "Static": "selectors",
    "UserError": "errors",
    "load": "api",
    "sparse": "backends.hf.sparse",
}

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Auto",
    "ClusterStore",
    "Comparison",
    "Conversation",
    "CoreSet",
    "Dense",
    "Fixed",
    "GenerationRecord",
    "Griffin",
    "Impact",
    "Linear",
    "Mean",
    "Oracle",
    "Piece",
    "Random",
    "SamplingParams",
    "Score",
    "Selector",
    "Similarity",
    "SparseRun",
    "Stability",
    "StandIn",
    "Static",
    "UserError",
    "load",
    "sparse",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"coreinfer.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'coreinfer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
