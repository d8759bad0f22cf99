"""The rules that stand side by side in an evaluation, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from coreinfer.errors import UserError, meant
from coreinfer.evaluation.continuations import Setting
from coreinfer.journal import key_of
from coreinfer.selectors import SELECTORS
from coreinfer.standins import STAND_INS

BASELINE = "dense"
DEFAULT_RULES = ("dense", "paper", "best", "random", "static")
GIVEN = "given"  # the rule that --selector and --stand-in name


@dataclass(frozen=True)
class RuleName:
    """A selector and a stand-in by name; "none" drops the other neurons."""

    selector: str
    stand_in: str = "none"

    def __str__(self) -> str:
        return self.selector if self.stand_in == "none" else f"{self.selector}+{self.stand_in}"

    def lacks(self, *, clusters: bool, calibration: bool) -> str | None:
        """The option without which this rule cannot run; None if all is there."""
        if self.stand_in == "calibrated" or self.selector == "residual":
            return None if calibration else "--calibration STORE"
        if self.selector == "static":
            return None if clusters or calibration else "--calibration STORE or --clusters STORE"
        if self.selector in ("similarity", "auto"):
            return None if clusters else "--clusters STORE"
        return None


@dataclass(frozen=True)
class Rule:
    """A way to decode, with digests of the stores it uses: what its answers depend on."""

    setting: Setting
    stores: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**self.setting.describe(), "stores": list(self.stores)}

    @cached_property
    def digest(self) -> str:
        return key_of(self.describe())


def rule_names(
    names: Sequence[str], *, calibration: bool, given: RuleName | None = None
) -> list[RuleName]:
    """Rules by name, each once, dense decoding first: it is what the others are compared with.

    Args:
        names: "paper" (stability, dropping), "best" (residual+calibrated with a calibration, else
            impact+linear), "given", or SELECTOR, or SELECTOR+STAND_IN.
        calibration: whether a calibration is given.
        given: the rule that the user's settings name, if they name one.

    Raises:
        UserError: for another name.
    """
    best = RuleName("residual", "calibrated") if calibration else RuleName("impact", "linear")
    short = {"paper": RuleName("stability"), "best": best}
    if given is not None:
        short[GIVEN] = given
    elif GIVEN in names:
        raise UserError("no rule is given; --selector or a settings file that names one would do")
    selectors = [*short, *SELECTORS]
    found = {BASELINE: RuleName(BASELINE)}
    for name in names:
        selector, _, stand_in = name.partition("+")
        _require_known("rule", selector, selectors)
        _require_known("stand-in", stand_in or "none", ["none", *STAND_INS])
        if selector in short and stand_in:
            raise UserError(f"{selector!r} has a stand-in of its own, got {name!r}")
        rule = short.get(name, RuleName(selector, stand_in or "none"))
        found.setdefault(str(rule), rule)
    return list(found.values())


def _require_known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UserError(f"no {what} {name!r}; {meant(name, known)}there is {', '.join(known)}")
