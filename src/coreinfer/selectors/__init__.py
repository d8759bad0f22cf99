"""Selection rules, one file each. Adding one is a file and an entry of `SELECTORS`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from coreinfer.selectors.auto import Auto
from coreinfer.selectors.base import Selection, Selector
from coreinfer.selectors.dense import Dense
from coreinfer.selectors.evidence import Evidence
from coreinfer.selectors.fixed import Fixed
from coreinfer.selectors.griffin import Griffin
from coreinfer.selectors.impact import Impact
from coreinfer.selectors.oracle import Oracle
from coreinfer.selectors.random import Random
from coreinfer.selectors.residual import Residual
from coreinfer.selectors.similarity import Similarity
from coreinfer.selectors.stability import Stability
from coreinfer.selectors.static import Static

# What a user can name; `Fixed` comes from a core-set file instead.
SELECTORS: Mapping[str, type[Selector]] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Dense,
            Stability,
            Similarity,
            Auto,
            Impact,
            Griffin,
            Residual,
            Static,
            Random,
            Oracle,
        )
    }
)

__all__ = [
    "SELECTORS",
    "Auto",
    "Dense",
    "Evidence",
    "Fixed",
    "Griffin",
    "Impact",
    "Oracle",
    "Random",
    "Residual",
    "Selection",
    "Selector",
    "Similarity",
    "Stability",
    "Static",
]
