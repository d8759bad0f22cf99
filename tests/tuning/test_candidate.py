"""Candidates, the settings they stand for, and the TOML file that says the same."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.backends.hf.session import HfBackend
from coreinfer.cli import options
from coreinfer.cli.config import expand_config
from coreinfer.cli.main import build_parser
from coreinfer.cli.stand_in import stand_in_from
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.generation import prefill
from coreinfer.runtime.stores import Stores
from coreinfer.tuning.candidate import Candidate
from coreinfer.tuning.settings_file import to_toml, write_settings
from tests.calibration.stores import random_store as random_calibration
from tests.semantics.stores import random_store as random_clusters
from tests.tiny import tiny_backend

PROMPT = list(b"the cat sat on the mat, and sat there still")


@pytest.fixture(scope="module")
def backend() -> HfBackend:
    return tiny_backend()


@pytest.fixture(scope="module")
def stores(backend: HfBackend, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """Both, made for the tiny model, in folders whose names need care."""
    folder = tmp_path_factory.mktemp('a "store" = é')
    calibration, clusters = folder / "calibration", folder / "clusters"
    made_for = {"model": backend.model_name}
    sizes = (48, 48, 48)
    random_calibration(sizes=sizes, hidden=32, fingerprint=backend.fingerprint).save(calibration)
    random_clusters(
        sizes=sizes, hidden=32, hidden_size=32, model_fingerprint=backend.fingerprint, **made_for
    ).save(clusters)
    return Stores.open({"calibration": str(calibration), "clusters": str(clusters)})


rules = st.sampled_from(
    [
        ("stability", {"alpha": 0.25}),
        ("similarity", {}),
        ("auto", {"prior_tokens": 32}),
        ("impact", {}),
        ("griffin", {}),
        ("residual", {"prior_tokens": 100}),
    ]
)
stand_ins = st.sampled_from(
    [
        ("none", {}),
        ("mean", {}),
        ("linear", {"rank": 3, "ridge": 0.125}),
        ("calibrated", {"rank": 2, "ridge": 3.0}),
        ("calibrated", {"rank": 2, "fit_skipped": True}),
    ]
)
neurons = st.integers(1, 48)
keeps = st.one_of(
    st.tuples(neurons, neurons, neurons),
    neurons.map(lambda n: (n, n, n)),
    neurons.map(lambda n: (48, n, n)),
).map(lambda kept: tuple(round(n / 48, 6) for n in kept))
actives = st.sampled_from([(), (0.5, 0.5, 0.5), (0.25, 0.75, 1.0)])
candidates = st.builds(
    lambda rule, stand_in, keeps_, actives_: Candidate(
        rule[0], keeps_, rule[1], *stand_in, actives_
    ),
    rules,
    stand_ins,
    keeps,
    actives,
)


def typed(verb: str, path: Path) -> argparse.Namespace:
    """What the verb makes of `--config`."""
    parser = build_parser()
    args = ["score", "--pairs", "p.jsonl"] if verb == "score" else ["generate", "--prompt", "x"]
    return parser.parse_args(expand_config(parser, [*args, "--config", str(path)]))


@given(candidates)
def test_a_key_is_read_back(candidate: Candidate) -> None:
    again = Candidate.of_key(candidate.key)
    assert again == candidate
    assert again.key == candidate.key


@given(candidate=candidates, verb=st.sampled_from(["generate", "score"]))
def test_the_file_gives_the_same_settings(
    stores: Stores, candidate: Candidate, verb: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("t") / "s.toml"
    write_settings(path, candidate.options(stores), ["what for: a = [1]\nand on"])
    args = typed(verb, path)
    setting = candidate.effective.setting(stores)
    selector, stand_in = options.selector_from(args), stand_in_from(args)
    assert selector.describe() == setting.selector.describe()
    assert (stand_in is None) == (setting.stand_in is None)
    if stand_in is not None and setting.stand_in is not None:
        assert stand_in.describe() == setting.stand_in.describe()


def test_the_file_gives_the_same_density(
    backend: HfBackend, stores: Stores, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = (48, 30, 17)
    candidate = Candidate(
        "residual", tuple(round(n / 48, 6) for n in kept), {"prior_tokens": 9},
        "calibrated", {"rank": 2, "ridge": 3.0},
    )  # fmt: skip
    path = tmp_path / "s.toml"
    write_settings(path, candidate.options(stores), [])
    args = typed("generate", path)
    rule, made = options.selector_from(args), stand_in_from(args)
    plan = RecordingPlan.of(rule, made)
    chosen = prefill(backend, [PROMPT], plan).session.select(rule, made)[0]
    assert chosen.core_set.density == pytest.approx(sum(kept) / (3 * 48))
    assert [chosen.core_set.kept(layer) for layer in range(3)] == list(kept)
    assert "no effect" not in capsys.readouterr().err


@given(candidates)
def test_no_option_is_written_that_has_no_effect(stores: Stores, candidate: Candidate) -> None:
    written = candidate.options(stores)
    drops = min(candidate.keeps) < 1
    assert ("calibration" in written) == (
        drops and (candidate.selector == "residual" or candidate.stand_in == "calibrated")
    )
    assert ("clusters" in written) == (drops and candidate.selector in ("similarity", "auto"))
    assert (written["stand-in"] != "none") == (drops and candidate.stand_in != "none")
    all_dense = len(candidate.dense_layers) == 3
    assert len({"beta", "gamma", "budgets"} & written.keys()) == (not all_dense)
    assert len({"active", "active-budgets"} & written.keys()) == (
        any(active < 1 for active in candidate.actives) and not all_dense
    )


def test_layers_of_one_budget_are_written_together() -> None:
    candidate = Candidate("impact", (1.0, 0.5, 0.5, 0.25, 0.5, 0.5, 0.5))
    assert candidate.options(Stores()) == {
        "selector": "impact",
        "stand-in": "none",
        "dense-layers": [0],
        "budgets": {"1-2": 0.5, "3": 0.25, "4-6": 0.5},
    }
    skipping = replace(candidate, actives=(1.0, 0.6, 0.6, 0.6, 0.5, 0.5, 1.0))
    assert skipping.options(Stores()) == {
        **candidate.options(Stores()),
        "active-budgets": {"1-3": 0.6, "4-5": 0.5, "6": 1.0},
    }
    level = replace(candidate, actives=(1.0, *(0.6,) * 6))
    assert level.options(Stores()) == {**candidate.options(Stores()), "active": 0.6}
    assert candidate.dense_layers == (0,)


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.integers())
def test_values_are_toml(text: str, number: float, whole: int) -> None:
    from coreinfer.cli.config import tomllib

    if any("\ud800" <= char <= "\udfff" for char in text):
        return
    settings = {"a": text, "b": number, "c": [whole], "d": {"0-1": number}, "e": True}
    if abs(whole) < 2**63:
        assert tomllib.loads(to_toml(settings, [text])) == settings


def test_stores_that_are_not_there(tmp_path: Path) -> None:
    for name in ("calibration", "clusters"):
        with pytest.raises(UserError, match=r"no (calibration|cluster) store at"):
            Stores.open({name: str(tmp_path / "none")})


def test_widening_leaves_dense_layers_and_never_makes_one() -> None:
    candidate = Candidate("impact", (0.5, 0.95, 1.0, 0.99))
    assert candidate.widened(0.1, (20, 20, 20, 100)).keeps == (0.6, 0.95, 1.0, 0.99)
    assert candidate.widened(0.1, (20, 100, 20, 200)).keeps == (0.6, 0.99, 1.0, 0.995)


def test_what_keeps_all_and_skips_some_is_not_dense() -> None:
    candidate = Candidate("impact", (1.0, 1.0, 0.5), actives=(0.5, 1.0, 0.998))
    assert candidate.dense_layers == (1,)
    assert candidate.widened(0.1, (20, 20, 20)).keeps == (1.0, 1.0, 0.6)
    assert candidate.more_active(0.1, 0.97).actives == (0.6, 1.0, 0.998)
    assert candidate.more_active(0.5, 0.97).actives == (0.97, 1.0, 0.998)
    assert candidate.options(Stores()) == {
        "selector": "impact",
        "stand-in": "none",
        "dense-layers": [1],
        "budgets": {"0": 1.0, "2": 0.5},
        "active-budgets": {"0": 0.5, "2": 0.998},
    }
