"""What a row decodes with, handed to another process."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from coreinfer.benchmarks.decoding import Decoding, by_keep
from coreinfer.benchmarks.job import Job
from coreinfer.errors import UserError
from coreinfer.selectors import SELECTORS, Dense, Impact, Residual, Selector, Static
from coreinfer.standins import Calibrated, Linear, StandIn
from tests.calibration.stores import random_store
from tests.semantics.stores import random_store as random_clusters

JOB = Job("native", "tiny", "bfloat16", threads=1, prompt_tokens=6, decode_tokens=2)


def handed_on(given: Decoding) -> Decoding:
    job = Job.from_json(replace(JOB, given=asdict(given)).to_json())
    assert job.given is not None
    return Decoding(**job.given)


def same(a: Selector | StandIn | None, b: Selector | StandIn | None) -> bool:
    if a is None or b is None:
        return a is b
    return type(a) is type(b) and a.describe() == b.describe()


@pytest.mark.parametrize("stand_in", [None, Linear(rank=5, ridge=0.7)])
@pytest.mark.parametrize(
    "name", sorted(SELECTORS.keys() - {"similarity", "auto", "residual", "static", "dense"})
)
def test_it_arrives_as_it_was(name: str, stand_in: StandIn | None) -> None:
    rule = SELECTORS[name]
    selector = rule(dense_layers=(0, 2), budgets={1: 0.25}, active_budgets={1: 0.5}, active=0.75)
    found, stood = handed_on(Decoding.of(selector, stand_in, {})).made()
    assert found == selector
    assert stood == stand_in


def test_stores_are_opened_where_they_lie(tmp_path: Path) -> None:
    store, clusters = random_store(), random_clusters()
    store.save(tmp_path / "calibration")
    clusters.save(tmp_path / "clusters")
    paths = {"calibration": str(tmp_path / "calibration"), "clusters": str(tmp_path / "clusters")}
    residual = Residual(calibration=store, beta=0.3, prior_tokens=7)
    found = handed_on(Decoding.of(residual, Calibrated(calibration=store, rank=2), paths)).made()
    assert same(found[0], residual)
    assert same(found[1], Calibrated(calibration=store, rank=2))
    static = Static(clusters=clusters, beta=0.3)
    only = {"clusters": paths["clusters"]}
    assert same(handed_on(Decoding.of(static, None, only)).made()[0], static)
    # A static set may come from a calibration, too, but not in another process.
    learnt = Static(clusters=store, beta=0.3)
    with pytest.raises(UserError, match="--selector static is timed with --clusters STORE alone"):
        Decoding.of(learnt, None, {"calibration": paths["calibration"]})
    assert Decoding.of(Impact(), None, paths).stores == {}
    with pytest.raises(UserError, match="no calibration store at 'gone'"):
        Decoding.of(residual, None, {"calibration": "gone"}).made()


def test_rows_by_keep() -> None:
    assert by_keep(1.0, 1.0) == (Dense(), None)
    assert by_keep(1.0, 0.5) == (Impact(beta=1.0, active=0.5), None)
    assert by_keep(0.4, 1.0) == (Impact(beta=0.4), Linear())
