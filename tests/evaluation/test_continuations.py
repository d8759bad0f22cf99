"""Quality of continuations: windows, and measures equal to their plain definitions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import (
    Quality,
    Setting,
    Window,
    measure,
    standard_error,
    widest,
    windows,
)
from coreinfer.runtime.scoring import Pair, score
from coreinfer.selectors import Dense, Impact, Oracle, Random, Stability
from coreinfer.standins import Linear, Mean
from tests.tiny import tiny_backend

TEXT = "".join(f"sentence number {i} of this text. " for i in range(60))


def measured(settings: dict[str, Setting], batch_size: int = 4) -> dict[str, Quality]:
    backend = tiny_backend()
    texts = windows(backend, TEXT, count=5, prompt_tokens=30, continuation_tokens=8)
    *_, last = measure(backend, texts, settings, batch_size=batch_size)
    return last


def test_windows_are_pieces_of_the_text_that_do_not_overlap() -> None:
    backend = tiny_backend()
    found = windows(backend, TEXT, count=7, prompt_tokens=30, continuation_tokens=12)
    pieces = [backend.tokenizer.decode(w.prompt + w.continuation) for w in found]
    places = [TEXT.index(piece) for piece in pieces]
    assert all(b - a >= 42 for a, b in pairwise(places))
    assert all((len(w.prompt), len(w.continuation)) == (30, 12) for w in found)
    assert [w.text for w in found] == [piece[:30] for piece in pieces]


@pytest.mark.parametrize("count", [0, 1000])
def test_a_text_that_is_too_short_is_refused(count: int) -> None:
    with pytest.raises(UserError, match="ask for fewer or shorter ones"):
        windows(tiny_backend(), TEXT, count=count, prompt_tokens=30, continuation_tokens=12)


def test_windows_longer_than_the_model_reads_are_refused() -> None:
    backend = tiny_backend()
    message = r"windows of 500 \+ 13 tokens are longer than the 512 that tiny-llama reads"
    with pytest.raises(UserError, match=message):
        windows(backend, TEXT, count=1, prompt_tokens=500, continuation_tokens=13)
    whole = windows(backend, TEXT, count=1, prompt_tokens=500, continuation_tokens=12)
    longer = [Window([1, *whole[0].prompt], whole[0].continuation, TEXT)]
    settings = {"impact": Setting(Impact(beta=0.5)), "oracle": Setting(Oracle(beta=0.5))}
    assert [len(found["impact"].nll) for found in measure(backend, whole, settings)] == [1]
    with pytest.raises(UserError, match=r"windows of 501 \+ 12 tokens"):
        list(measure(backend, [*whole, *longer], settings, batch_size=1))


def test_keeping_everything_costs_nothing() -> None:
    results = measured({"all": Setting(Stability(beta=1.0)), "none": Setting(Random(beta=0.05))})
    assert results["all"].kl == pytest.approx([0.0] * 5, abs=1e-6)
    assert results["all"].agreement == [1.0] * 5
    assert results["all"].perplexity == pytest.approx(results["dense"].perplexity, rel=1e-5)
    assert min(results["none"].kl) > 0.001
    assert results["none"].bytes_per_token[0] < results["dense"].bytes_per_token[0]


def test_measures_are_what_their_definitions_say() -> None:
    backend = tiny_backend()
    selector = Impact(beta=0.3)
    (window,) = windows(backend, TEXT, count=1, prompt_tokens=30, continuation_tokens=8)
    *_, results = measure(backend, [window], {"impact": Setting(selector)})
    # The negative log-likelihood against `score`, whose first token is not measured here.
    whole = score(backend, [Pair(window.prompt, window.continuation, "")], selector)[0]
    first = score(backend, [Pair(window.prompt, window.continuation[:1], "")], selector)[0]
    expected = -(whole.logprob - first.logprob) / 7
    assert results["impact"].nll[0] == pytest.approx(expected, rel=1e-4)
    # KL and agreement against the plain model for the dense side, a session for the sparse one.
    ids = torch.tensor([window.prompt + window.continuation])
    dense = backend.model(ids).logits[0, 30:-1].detach().double().log_softmax(-1)
    from coreinfer.recording import RecordingPlan

    session = backend.start(RecordingPlan.of(selector))
    session.prefill([window.prompt])
    session.select(selector)
    sparse = session.decode([window.continuation[:-1]])[0].double().log_softmax(-1)
    kl = (dense.exp() * (dense - sparse)).sum(-1).mean()
    assert results["impact"].kl[0] == pytest.approx(float(kl), rel=1e-3)
    same = (dense.argmax(-1) == sparse.argmax(-1)).double().mean()
    assert results["impact"].agreement[0] == pytest.approx(float(same))


def test_the_batch_size_changes_nothing() -> None:
    settings = {
        "paper": Setting(Stability(beta=0.4), Mean()),
        "impact": Setting(Impact(beta=0.4), Linear(rank=4)),
        "oracle": Setting(Oracle(beta=0.4)),
    }
    one, three = measured(settings, 1), measured(settings, 3)
    for name in ("dense", *settings):
        assert one[name].nll == pytest.approx(three[name].nll, rel=1e-3)
        assert one[name].density == three[name].density
        assert one[name].bytes_per_token == three[name].bytes_per_token


def test_one_prefill_serves_only_settings_that_count_alike() -> None:
    with pytest.raises(UserError, match="must share one alpha"):
        widest([Setting(Stability(alpha=0.2)), Setting(Stability(alpha=0.4))])
    plan = widest([Setting(Dense()), Setting(Stability()), Setting(Impact(), Linear())])
    assert plan.alpha == 0.4
    assert plan.sample_tokens == Linear().sample_tokens


def test_the_summary_averages_over_windows() -> None:
    quality = Quality(
        nll=[1.0, 3.0], kl=[0.0, 1.0], agreement=[1.0, 0.5], density=[0.5, 0.5],
        bytes_per_token=[10, 20],
    )  # fmt: skip
    summary = quality.summary()
    assert summary["perplexity"] == pytest.approx(math.exp(2.0))
    assert summary["kl_se"] == pytest.approx(0.5)
    assert (summary["bytes_per_token"], summary["windows"]) == (15, 2)
    assert standard_error([1.0]) == 0.0


def test_a_setting_that_does_not_fit_is_refused_before_any_work() -> None:
    backend = tiny_backend()
    window = Window([1, 2], [3, 4], "")
    with pytest.raises(UserError, match="dense layer 9 is outside"):
        next(measure(backend, [window], {"bad": Setting(Impact(dense_layers=(9,)))}))
