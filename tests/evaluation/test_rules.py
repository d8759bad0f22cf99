"""Rules by name."""

from __future__ import annotations

import pytest

from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Setting, sharing_a_prefill
from coreinfer.evaluation.rules import DEFAULT_RULES, Rule, RuleName, rule_names
from coreinfer.selectors import Dense, Impact, Random, Stability
from coreinfer.standins import Linear


def names(*given: str, calibration: bool = False) -> list[str]:
    return [str(rule) for rule in rule_names(given, calibration=calibration)]


def test_the_usual_rules() -> None:
    plain = ["dense", "stability", "impact+linear", "random", "static"]
    assert names(*DEFAULT_RULES) == plain
    plain[2] = "residual+calibrated"
    assert names(*DEFAULT_RULES, calibration=True) == plain


def test_dense_comes_first_and_every_rule_once() -> None:
    assert names("griffin+mean", "paper", "stability", "dense", "stability+none") == [
        "dense", "griffin+mean", "stability",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stabilty", "no rule 'stabilty'; did you mean 'stability'"),
        ("impact+linea", "no stand-in 'linea'; did you mean 'linear'"),
        ("best+linear", "'best' has a stand-in of its own"),
        ("", "no rule ''; there is paper, best, dense"),
        ("fixed", "no rule 'fixed'"),
    ],
)
def test_another_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        names(name)


@pytest.mark.parametrize(
    ("rule", "needs"),
    [
        (RuleName("dense"), set()),
        (RuleName("random", "linear"), set()),
        (RuleName("similarity"), {"clusters"}),
        (RuleName("auto"), {"clusters"}),
        (RuleName("residual"), {"calibration"}),
        (RuleName("impact", "calibrated"), {"calibration"}),
    ],
)
def test_what_a_rule_lacks(rule: RuleName, needs: set[str]) -> None:
    for clusters in (False, True):
        for calibration in (False, True):
            there = {n for n, has in (("clusters", clusters), ("calibration", calibration)) if has}
            lack = rule.lacks(clusters=clusters, calibration=calibration)
            assert (lack is None) == (needs <= there)
            assert lack is None or all(f"--{name} STORE" in lack for name in needs)


def test_static_runs_with_either_store() -> None:
    static = RuleName("static")
    assert static.lacks(clusters=False, calibration=False) is not None
    assert static.lacks(clusters=True, calibration=False) is None
    assert static.lacks(clusters=False, calibration=True) is None


def test_digests_tell_settings_and_stores_apart() -> None:
    rules = [
        Rule(Setting(Impact())),
        Rule(Setting(Impact(beta=0.5))),
        Rule(Setting(Impact(), Linear())),
        Rule(Setting(Impact(), Linear(rank=3))),
        Rule(Setting(Random(seed=1))),
        Rule(Setting(Random(seed=2))),
        Rule(Setting(Impact()), ("a store",)),
    ]
    assert len({rule.digest for rule in rules}) == len(rules)
    assert Rule(Setting(Impact(beta=0.4))).digest == rules[0].digest


def test_settings_that_one_recording_serves_are_measured_together() -> None:
    settings = {
        "a": Setting(Stability(alpha=0.2)),
        "b": Setting(Impact(), Linear()),
        "c": Setting(Stability(alpha=0.3)),
        "d": Setting(Impact(count_bos=True)),
        "e": Setting(Dense()),
    }
    assert sharing_a_prefill(settings) == [["a", "b", "e"], ["c"], ["d"]]
