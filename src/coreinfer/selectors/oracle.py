"""Control: the core neurons of the tokens that are still to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from coreinfer.core.statistics import LayerStatistics
from coreinfer.errors import UserError
from coreinfer.selectors.base import LayerSource, Selector
from coreinfer.selectors.evidence import Evidence
from coreinfer.selectors.rules import by_impact


@dataclass(frozen=True, kw_only=True)
class Oracle(Selector):
    """Ranks by the impact of neurons on the *following* tokens, decoded densely beforehand.

    No method can do this: it bounds what any fixed set chosen by impact could reach. It costs a
    whole dense decoding, so it is never fast.
    """

    name: ClassVar[str] = "oracle"
    needs_column_norms: ClassVar[bool] = True
    needs_future: ClassVar[bool] = True

    def by_layer(self, num_neurons: Sequence[int]) -> LayerSource | None:
        return None  # the tokens it ranks by are still to come

    def source(self, evidence: Evidence) -> tuple[Sequence[LayerStatistics], dict[str, Any]]:
        if evidence.future is None:
            raise UserError(
                "the oracle selector needs the tokens that follow the prompt; use it in "
                "'generate' or 'score', which can look ahead"
            )
        return evidence.future, {}

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return by_impact(statistics, column_norms)
