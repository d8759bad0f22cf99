"""Each question on a tiny model: what must hold of its numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from coreinfer.analysis import beyond, layers, semantics
from coreinfer.analysis.digits import Recurrent, digits
from coreinfer.analysis.grid import Grid
from coreinfer.analysis.layers import Layers, given_out
from coreinfer.analysis.long_generation import courses
from coreinfer.analysis.materials import CALIBRATED, HALF_ACTIVE, Materials
from coreinfer.analysis.prompt_length import PromptLength, kinds
from coreinfer.analysis.question import Answer
from coreinfer.analysis.robustness import Robustness
from coreinfer.analysis.sections import Cell, Table
from coreinfer.analysis.semantics import Semantics
from coreinfer.core.measures import ReadCost, jaccard
from coreinfer.evaluation.continuations import Setting
from coreinfer.evaluation.overlap import pairwise_overlap
from coreinfer.runtime.scoring import Pair, score
from coreinfer.selectors import Impact, Stability
from tests.analysis.sample import SMALL, SOURCES, materials
from tests.tiny import tiny_backend

FULL = dataclasses.replace(SMALL, keep=1.0, keeps=(0.5, 0.75, 1.0))


def rows(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def table_of(answer: Answer, name: str) -> list[dict[str, Any]]:
    every = [figure.table for figure in answer.figures] + list(answer.tables)
    (found,) = (table for table in every if table.name == name)
    return rows(found)


def sane(answer: Answer) -> None:
    """Charts name columns that are there; intervals hold their value."""
    assert answer.findings
    for figure in answer.figures:
        chart, table = figure.chart, figure.table
        assert table.rows
        for name in (chart.x, chart.y, chart.series, chart.panel, chart.low, chart.high,
                     chart.value):  # fmt: skip
            assert name is None or name in table.columns
        for row in rows(table):
            low = row[chart.low] if chart.low else None
            high = row[chart.high] if chart.high else None
            if low is not None and high is not None:
                assert low <= row[chart.y] <= high


def test_the_grid_has_every_cell_and_nothing_is_lost_where_all_is_kept(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, keeps=(0.25, 1.0))
    answer = Grid().ask(materials(tmp_path, settings))
    sane(answer)
    found = table_of(answer, "grid")
    cells = {(r["text"], r["rule"], r["alpha"], r["beta or gamma"]) for r in found}
    assert len(cells) == len(found) == 2 * 2 * 2 * 2
    for row in found:
        assert (row["kl"] == 0) == (row["beta or gamma"] == 1.0), row
        assert row["density"] == pytest.approx(row["beta or gamma"])


def test_alpha_changes_what_is_measured(tmp_path: Path) -> None:
    found = table_of(Grid().ask(materials(tmp_path)), "grid")
    by_alpha = {
        alpha: [r["kl"] for r in found if r["alpha"] == alpha and r["rule"] == "stability"]
        for alpha in SMALL.alphas
    }
    assert by_alpha[0.2] != by_alpha[0.4]


def test_a_cell_is_what_the_score_of_the_same_windows_says(tmp_path: Path) -> None:
    made = materials(tmp_path)
    (windows, _) = made.windows().values()
    (cell,) = (
        row
        for row in table_of(Grid().ask(made), "grid")
        if (row["text"], row["rule"], row["alpha"], row["beta or gamma"])
        == ("stories", "stability", 0.4, 0.5)
    )
    losses = []
    for window in windows:
        # The first token comes from the dense prefill; the grid leaves it out.
        whole = Pair(window.prompt, window.continuation, window.text)
        first = Pair(window.prompt, window.continuation[:1], window.text)
        a, b = (score(made.backend, [pair], Stability(beta=0.5))[0] for pair in (whole, first))
        losses.append(-(a.logprob - b.logprob) / (len(window.continuation) - 1))
    assert cell["perplexity"] == pytest.approx(np.exp(fmean(losses)), rel=1e-4)


def test_prompt_length_keeps_all_rules_at_one_density(tmp_path: Path) -> None:
    answer = PromptLength().ask(materials(tmp_path))
    sane(answer)
    for name, places in (("lengths", len(SMALL.lengths)), ("coherence", 4)):
        found = table_of(answer, name)
        assert len(found) == places * 7
        whole = [row for row in found if row["rule"] != HALF_ACTIVE]
        assert len({row["density"] for row in whole}) == 1
        for row in found:
            if row["rule"] == HALF_ACTIVE:
                assert row["density"] > whole[0]["density"]
    whole = materials(tmp_path)
    longest = whole.interleaved()
    for name, windows in kinds(whole, longest).items():
        assert [w.continuation for w in windows] == [w.continuation for w in longest], name
    assert "4 topics mixed" in kinds(whole, longest)
    assert "2 topics mixed" in kinds(whole, longest[:2])


def test_rules_read_the_same_bytes_and_include_those_of_a_calibration(tmp_path: Path) -> None:
    made = materials(tmp_path, calibrated=True)
    rules = made.rules(["stability", "impact"])
    assert list(rules) == ["stability", "impact", HALF_ACTIVE, CALIBRATED]
    results = made.measure(made.interleaved(), rules)
    read = {name: results[name].summary()["bytes_per_token"] for name in rules}
    assert read["stability"] == read["impact"]
    # How many neurons a token skips is known from the prompt alone.
    assert read[HALF_ACTIVE] == pytest.approx(read["impact"], rel=0.05)
    assert read[CALIBRATED] > read["impact"]  # its map is read too
    assert CALIBRATED not in materials(tmp_path).rules([])


def test_layers_measure_each_layer_alone(tmp_path: Path) -> None:
    made = materials(tmp_path, dataclasses.replace(SMALL, dense_layers=(1,)))
    answer = Layers().ask(made)
    sane(answer)
    errors = table_of(answer, "error-by-layer")
    assert {row["layer"] for row in errors} == {0, 2}
    learn, test = layers.halves(made)
    assert not {tuple(w.prompt) for w in learn} & {tuple(w.prompt) for w in test}
    setting = {"one": Setting(Impact(beta=0.25, dense_layers=(1, 2)))}
    alone = made.measure(learn, setting)["one"]
    (found,) = (r for r in errors if r["layer"] == 0 and r["keep"] == "keep 0.25")
    assert found["kl"] == pytest.approx(fmean(alone.kl))
    stable = table_of(answer, "stability-by-layer")
    assert {row["layer"] for row in stable} == {0, 1, 2}  # it looks at all of them
    along = table_of(answer, "stability-by-length")
    last = [r for r in along if r["with"] == "with the whole prompt" and r["tokens"] == 16]
    assert [r["overlap"] for r in last] == [1.0, 1.0]


def test_budgets_read_the_same_bytes(tmp_path: Path) -> None:
    answer = Layers().ask(materials(tmp_path))
    gains = table_of(answer, "gain")
    for keep in {row["mean keep"] for row in gains}:
        equal, half_way, by_layer = (row for row in gains if row["mean keep"] == keep)
        for other in (half_way, by_layer):
            assert other["bytes_of_dense"] <= equal["bytes_of_dense"] + 0.01
            assert other["density"] == pytest.approx(equal["density"], abs=0.02)


def test_what_is_given_out_sums_to_what_there_is() -> None:
    cost = ReadCost(10, (4, 8, 4), (100, 100, 50))
    errors = {
        0: {0.2: [9.0], 0.6: [1.0]},
        1: {0.2: [0.1], 0.6: [0.05]},
        2: {0.2: [3.0], 0.6: [2.0]},
    }
    shares = given_out(cost, errors, 0.4)
    spent = sum(shares[i] * cost.per_neuron[i] * cost.num_neurons[i] for i in shares)
    assert spent == pytest.approx(0.4 * cost.mlp)
    assert shares[0] > 0.4 > shares[1]
    assert all(0.2 <= share <= 1 for share in shares.values())


def test_semantics_correlates_overlap_with_each_encoder(tmp_path: Path) -> None:
    answer = Semantics().ask(materials(tmp_path))
    sane(answer)
    found = table_of(answer, "correlation")
    encoders = {"MiniLM", "TF-IDF", "hidden, layer 0", "hidden, layer 1"}
    assert {row["encoder"] for row in found} == encoders
    assert len(found) == 2 * 2 * 4 * 3  # rules, scopes, encoders, layers
    assert all(-1 <= row["r"] <= 1 for row in found)
    kinds_ = table_of(answer, "overlap-by-kind")
    assert sum(row["pairs"] for row in kinds_) == 16 * 15 / 2


def test_overlaps_of_many_sets_are_jaccards() -> None:
    generator = torch.Generator().manual_seed(0)
    sets = [
        {1: torch.randperm(20, generator=generator)[: 5 + i].sort().values.int()} for i in range(4)
    ]
    found = pairwise_overlap(sets, (10, 20))[1]
    for i in range(4):
        for j in range(4):
            assert float(found[i, j]) == pytest.approx(jaccard(sets[i][1], sets[j][1]))


def test_tf_idf_sees_shared_words() -> None:
    vectors = semantics.tf_idf(["red cat", "red dog", "blue sky"]).double()
    assert vectors.norm(dim=-1).tolist() == pytest.approx([1, 1, 1])
    assert float(vectors[0] @ vectors[1]) > float(vectors[0] @ vectors[2]) == 0
    assert semantics.tf_idf(["?", "!"]).shape == (2, 2)  # even a text without a word


def test_pairs_fall_into_equal_parts_by_cosine() -> None:
    generator = np.random.default_rng(0)
    cosine, overlap = generator.random((2, 12, 12))
    parts = semantics.binned("r", "e", cosine, overlap)
    assert sum(int(row["pairs"] or 0) for row in parts) == 66
    assert [row["cosine"] for row in parts] == sorted(float(row["cosine"] or 0) for row in parts)
    i, j = np.triu_indices(12, k=1)
    total = sum(float(row["overlap"] or 0) * int(row["pairs"] or 0) for row in parts)
    assert total == pytest.approx(overlap[i, j].sum())


def test_robustness_measures_every_part(tmp_path: Path) -> None:
    answer = Robustness().ask(materials(tmp_path, calibrated=True))
    sane(answer)
    names = [figure.table.name for figure in answer.figures]
    assert names == ["domain-shift", "long-generation", "noise", "topic", "short"]
    shift = table_of(answer, "domain-shift")
    assert {row["core set from"] for row in shift} >= {"store of stories", "store of code"}
    assert all(row["kl"] > 0 for name in names for row in table_of(answer, name))


def test_nothing_is_lost_in_a_long_answer_where_all_is_kept() -> None:
    backend = tiny_backend()
    windows = SOURCES[0].windows(backend, 2, 16, 24)
    found = courses(backend, windows, Setting(Impact(beta=1.0)), period=8, dense_tokens=(1, 3))
    assert list(found) == [
        "never", "refreshed, 1 dense of 8", "refreshed, 3 dense of 8", "all read again",
    ]  # fmt: skip
    for course in found.values():
        assert len(course.kl) == 3
        assert all(abs(kl) < 1e-6 for period in course.kl for kl in period)


def test_the_first_period_is_alike_under_every_policy() -> None:
    backend = tiny_backend()
    windows = SOURCES[0].windows(backend, 2, 16, 24)
    found = courses(backend, windows, Setting(Impact(beta=0.4)), period=8, dense_tokens=(1, 3))
    first = [course.kl[0] for course in found.values()]
    assert all(kl == pytest.approx(first[0]) for kl in first)
    assert found["never"].kl[1] != pytest.approx(found["all read again"].kl[1])


def test_reading_all_again_is_a_fresh_prompt() -> None:
    backend = tiny_backend()
    (window,) = SOURCES[0].windows(backend, 1, 16, 16)
    setting = Setting(Impact(beta=0.4))
    again = courses(backend, [window], setting, period=8, dense_tokens=(1,))["all read again"]
    moved = dataclasses.replace(
        window, prompt=window.prompt + window.continuation[:8],
        continuation=window.continuation[8:],
    )  # fmt: skip
    fresh = courses(backend, [moved], setting, period=8, dense_tokens=(1,))["never"]
    assert again.kl[1] == pytest.approx(fresh.kl[0], rel=1e-4)


def no_sources(tmp_path: Path) -> Materials:
    def no_model() -> Any:
        raise AssertionError("no language model is asked")

    return Materials(no_model, (), dataclasses.replace(SMALL, keeps=(0.5, 1.0)), tmp_path)


def test_other_networks_lose_nothing_where_all_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beyond, "EPOCHS", 1)
    monkeypatch.setattr(beyond, "MOST_INPUTS", 12)
    answer = beyond.Beyond().ask(no_sources(tmp_path))
    sane(answer)
    found = table_of(answer, "cost")
    assert {row["network"] for row in found} == {"convolutional", "recurrent"}
    assert all(row["kept"] == 1.0 for row in found if row["keep"] == 1.0)
    assert any(row["kept"] < 1.0 for row in found if row["keep"] == 0.5)
    assert any("texts of two kinds" in line for line in answer.findings)
    again = beyond.Beyond().ask(no_sources(tmp_path))
    assert again == answer  # all of it is seeded


def test_a_recurrence_reads_on_from_where_it_was() -> None:
    data = digits(0)
    images = data.test[0][:3]
    network = beyond.seeded(Recurrent, 0)
    whole = network.read(images)
    parts = network.read(images[:, 5:], network.read(images[:, :5]))
    assert torch.equal(whole, parts)
    assert len(data.train[1]) + len(data.test[1]) == 1797
    assert float(data.train[0].max()) <= 1


def test_the_encoder_is_asked_where_there_are_texts(tmp_path: Path) -> None:
    network = beyond.sentence_encoder(
        dataclasses.replace(no_sources(tmp_path), sources=SOURCES,
                            settings=dataclasses.replace(SMALL, windows=2))
    )  # fmt: skip
    assert len(network.taps) == 6  # the layers of all-MiniLM-L6-v2
    own = [beyond.statistics_of(network, text) for text in network.inputs]
    assert {one.num_neurons for one in own[0].values()} == {1536}
    found: list[dict[str, Cell]] = beyond.cost(network, own, (1.0,), 0)
    assert all(row["kept"] == pytest.approx(1.0) for row in found)
