"""The registry: a file a rule, a name a rule, and descriptions that say all."""

from __future__ import annotations

import inspect
import json
import pkgutil
from dataclasses import MISSING, fields
from importlib import import_module

import pytest

import coreinfer.selectors
from coreinfer.selectors import SELECTORS, Fixed, Selector

# Those that need no store.
PLAIN = {
    name: rule
    for name, rule in SELECTORS.items()
    if all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(rule))
}


def rules_in_files() -> dict[str, type[Selector]]:
    """Module name -> the rule defined there."""
    found = {}
    for module in pkgutil.iter_modules(coreinfer.selectors.__path__):
        path = f"coreinfer.selectors.{module.name}"
        for _, kind in inspect.getmembers(import_module(path), inspect.isclass):
            concrete = issubclass(kind, Selector) and not inspect.isabstract(kind)
            if concrete and kind.__module__ == path:
                assert module.name not in found, f"{path} has two rules"
                found[module.name] = kind
    return found


def test_every_rule_is_registered_under_the_name_of_its_file() -> None:
    found = rules_in_files()
    assert found.pop("fixed") is Fixed  # comes from a core-set file, not by name
    assert found == dict(SELECTORS)


def test_names_are_unique_and_their_own() -> None:
    assert all(name == rule.name for name, rule in SELECTORS.items())
    assert len({rule.name for rule in (*SELECTORS.values(), Fixed)}) == len(SELECTORS) + 1


def test_the_registry_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        SELECTORS["mine"] = Fixed  # type: ignore[index]


def test_the_rules_of_the_paper_and_the_controls_are_there() -> None:
    assert {"dense", "stability", "similarity", "auto"} <= SELECTORS.keys()
    assert {"impact", "griffin", "static", "random", "oracle"} <= SELECTORS.keys()
    assert PLAIN.keys() >= {"dense", "stability", "impact", "griffin", "random", "oracle"}


@pytest.mark.parametrize("rule", PLAIN.values(), ids=PLAIN.keys())
def test_a_description_is_complete_json(rule: type[Selector]) -> None:
    selector = rule(dense_layers=(0, 3), budgets={1: 0.5}, beta=0.3)
    described = json.loads(json.dumps(selector.describe()))
    assert described.pop("name") == rule.name
    assert described.keys() == {f.name for f in fields(rule)}
    # it says enough to make the same rule again
    described["dense_layers"] = tuple(described["dense_layers"])
    described["budgets"] = {int(layer): keep for layer, keep in described["budgets"].items()}
    assert rule(**described) == selector


@pytest.mark.parametrize("layers", [(0, 1), [0, 1], range(2)])
def test_any_sequence_of_dense_layers_is_described_as_a_list(layers: tuple[int, ...]) -> None:
    assert PLAIN["impact"](dense_layers=layers).describe()["dense_layers"] == [0, 1]


@pytest.mark.parametrize("rule", SELECTORS.values(), ids=SELECTORS.keys())
def test_every_rule_says_what_it_is(rule: type[Selector]) -> None:
    assert inspect.getdoc(rule)
    assert rule.__doc__ != Selector.__doc__
