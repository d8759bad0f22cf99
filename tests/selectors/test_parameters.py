"""Every mistake in a selector's parameters, and what its refusal says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coreinfer.errors import UserError
from coreinfer.selectors import Dense, Griffin, Impact, Oracle, Random, Selector, Stability

RULES = [Stability, Impact, Griffin, Random, Oracle, Dense]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
NO_RATIO = [0, 0.0, -0.4, 1.01, 40, math.nan, math.inf, "0.4", None, True, [0.4]]


def assert_refused(message: str, rule: type[Selector], **parameters: Any) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        rule(**parameters)
    assert "\n" not in str(refusal.value)
    value = next(iter(parameters.values()))
    shown = next(iter(value.values())) if isinstance(value, dict) and value else value
    assert str(shown) in str(refusal.value) or "(" in repr(value)


@every_rule
@pytest.mark.parametrize("beta", NO_RATIO)
def test_beta(rule: type[Selector], beta: object) -> None:
    assert_refused(r"^beta must be .*above 0 and at most 1, got ", rule, beta=beta)


@pytest.mark.parametrize("alpha", NO_RATIO)
def test_alpha(alpha: object) -> None:
    assert_refused(r"^alpha must be .*above 0 and at most 1, got ", Stability, alpha=alpha)


@every_rule
@pytest.mark.parametrize("name", ["budget", "active budget"])
@pytest.mark.parametrize("keep", NO_RATIO)
def test_budgets(rule: type[Selector], name: str, keep: object) -> None:
    message = rf"^the {name} of layer 2 must be .*above 0 and at most 1, got "
    assert_refused(message, rule, **{f"{name}s".replace(" ", "_"): {2: keep}})


@every_rule
@pytest.mark.parametrize("name", ["budgets", "active budgets"])
def test_the_layers_of_budgets(rule: type[Selector], name: str) -> None:
    def made(value: object) -> None:
        rule(**{name.replace(" ", "_"): value})

    for layer in ("2", 2.0, None, True):
        with pytest.raises(UserError, match=rf"^a layer with {name} must be a whole number"):
            made({layer: 0.5})
    with pytest.raises(UserError, match=rf"^a layer with {name} must be at least 0, got -1$"):
        made({-1: 0.5})
    for budgets in ([0.5], 0.5, None, "0.5"):
        with pytest.raises(UserError, match=rf"^{name} must map layer indices to fractions, got "):
            made(budgets)


@every_rule
def test_dense_layers(rule: type[Selector]) -> None:
    for layer in ("2", 2.0, None, True, math.nan):
        with pytest.raises(UserError, match=r"^a dense layer must be a whole number, at least 0"):
            rule(dense_layers=(layer,))
    with pytest.raises(UserError, match=r"^a dense layer must be at least 0, got -1$"):
        rule(dense_layers=(0, -1))
    for layers in (3, None, "0-2", 0.5):
        with pytest.raises(UserError, match=r"^dense_layers must be a tuple of layer indices"):
            rule(dense_layers=layers)


@every_rule
@pytest.mark.parametrize("flag", ["yes", 1, 0, None, math.nan])
def test_count_bos(rule: type[Selector], flag: object) -> None:
    assert_refused(r"^count_bos must be True or False, got ", rule, count_bos=flag)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1", None, True, math.nan])
def test_seed(seed: object) -> None:
    assert_refused(rf"^seed must be .*0 to {2**64 - 1}, got ", Random, seed=seed)


def test_seeds_at_the_ends_of_the_range_draw() -> None:
    from tests.selectors.evidence import prompt

    for seed in (0, 2**64 - 1):
        assert Random(seed=seed).select(prompt().evidence(None)).layers


@every_rule
def test_layers_outside_the_model(rule: type[Selector]) -> None:
    sizes = (8, 8, 8)
    rule(dense_layers=(0, 2), budgets={1: 0.5}).check(sizes, "f", "m")
    with pytest.raises(UserError, match=r"^dense layer 3 is outside the model, which has 0 to 2$"):
        rule(dense_layers=(3,)).check(sizes, "f", "m")
    with pytest.raises(UserError, match=r"^budget layer 7 is outside the model, which has 0 to 2$"):
        rule(budgets={7: 0.5}).check(sizes, "f", "m")


@every_rule
def test_budgets_that_keep_nothing(rule: type[Selector]) -> None:
    with pytest.raises(UserError, match=r"^keeping 0.01 of 8 neurons rounds to none; keep at"):
        rule(budgets={1: 0.01}).check((8, 8), "f", "m")
    rule(budgets={1: 0.01}, dense_layers=(1,)).check((8, 8), "f", "m")  # a dense layer keeps all


def test_a_beta_that_keeps_nothing() -> None:
    with pytest.raises(UserError, match=r"^keeping 0.05 of 8 neurons rounds to none"):
        Stability(beta=0.05).check((8, 8), "f", "m")
    Stability(beta=0.05).check((16, 16), "f", "m")


@every_rule
def test_parameters_are_named_and_cannot_be_changed(rule: type[Selector]) -> None:
    with pytest.raises(TypeError):
        rule(0.4)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        rule().beta = 0.5  # type: ignore[misc]
