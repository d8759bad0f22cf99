"""Skipped core neurons on the native backend: as hf computes and counts them."""

from __future__ import annotations

import pytest
import torch

from coreinfer.backends.base import Phase
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Impact
from coreinfer.standins import Linear
from tests.native.pairs import FORMATS, VARIANTS, tiny_native, tiny_pair

A = [5, 77, 200, 13, 13, 8, 250, 99, 41, 5, 77]
B = [90, 91, 200]
AFTER = [17, 4, 66, 3]
RULE = Impact(beta=0.5, active=0.4, dense_layers=(2,))
close = torch.testing.assert_close


@pytest.mark.parametrize("fit_skipped", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_hf_skips_the_same(variant: str, dtype: str, fit_skipped: bool) -> None:
    pair, stand_in = tiny_pair(variant, dtype), Linear(rank=4, fit_skipped=fit_skipped)
    sessions = [b.start(RecordingPlan.of(RULE, stand_in)) for b in (pair.hf, pair.native)]
    for session in sessions:
        session.prefill([A])
        session.select(RULE, stand_in)
    hf, native = (session.decode([AFTER], Phase.SCORE) for session in sessions)
    far = (hf - native).norm() / hf.norm()
    assert far < (0.02 if dtype == "bfloat16" else 0.15)
    shares = [
        spared / (48 * size)
        for (spared,), size in zip(
            (session.spared() for session in sessions),
            (pair.hf.cost.behind_gate[0], pair.native.cost.behind_gate[0]),
            strict=True,
        )
        if spared is not None
    ]
    # Where inputs are rounded, some at the threshold fall on the other side.
    assert shares[0] == pytest.approx(shares[1], abs=0.01 if dtype == "bfloat16" else 0.05)
    assert 0.3 < shares[0] < 1


@pytest.mark.parametrize("fit_skipped", [False, True])
@pytest.mark.parametrize("variant", ["llama", "relu", "opt"])
def test_the_choice_made_on_the_way_has_the_same_thresholds(
    variant: str, fit_skipped: bool
) -> None:
    backend, stand_in = tiny_native(variant), Linear(rank=4, fit_skipped=fit_skipped)
    ahead = backend.start(RecordingPlan.expecting(RULE, stand_in))
    after = backend.start(RecordingPlan.of(RULE, stand_in))
    logits = []
    for session in (ahead, after):
        session.prefill([A])
        session.select(RULE, stand_in)
        logits.append(session.decode([AFTER], Phase.SCORE))
    assert ahead._ahead is not None
    assert ahead._ahead.serves(RULE, stand_in)
    close(*logits, rtol=1e-2, atol=1e-2)
    assert ahead.spared() == pytest.approx(after.spared(), rel=0.02)


@pytest.mark.parametrize("chunk", [1, 4])
def test_batches_and_chunks_skip_what_each_prompt_skips_alone(chunk: int) -> None:
    together = tiny_native(prefill_chunk=chunk).start(RecordingPlan.of(RULE))
    together.prefill([A, B, A])
    together.select(RULE)
    tokens = [AFTER, AFTER[:1], AFTER]
    found = together.decode(tokens)
    for row, prompt in enumerate((A, B, A)):
        alone = tiny_native().start(RecordingPlan.of(RULE))
        alone.prefill([prompt])
        alone.select(RULE)
        size = len(tokens[row])
        close(found[row, :size], alone.decode([tokens[row]])[0], rtol=1e-3, atol=1e-3)
        assert together.spared()[row] == alone.spared()[0]


def test_dense_decoding_and_plain_core_neurons_skip_nothing() -> None:
    session = tiny_native().start(RecordingPlan.of(RULE))
    session.prefill([A])
    session.decode([AFTER])
    assert session.spared() == [0.0]
    session.select(Impact(beta=0.5))
    session.decode([AFTER])
    assert session.spared() == [0.0]


@pytest.mark.parametrize("variant", ["relu", "opt"])
def test_what_is_exactly_zero_is_among_what_is_skipped(variant: str) -> None:
    """With all neurons active that are not zero, skipping changes nothing but the count."""
    rule = Impact(beta=1.0, active=0.99)
    backend = tiny_native(variant)
    logits = []
    for own in (rule, Impact(beta=1.0)):
        session = backend.start(RecordingPlan.of(rule))
        session.prefill([B])  # so short that many are closed all over it
        session.select(own)
        logits.append(session.decode([AFTER]))
        if own is rule:
            (spared,) = session.spared()
            assert spared is not None
            assert spared / (3 * 48 * backend.cost.behind_gate[0]) > 0.2
    close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama", "relu", "opt"])
def test_all_neurons_of_a_layer_are_packed_once(variant: str) -> None:
    """For all prompts, whose thresholds differ."""
    backend, rule = tiny_native(variant), Impact(beta=1.0, active=0.1)
    packed = []
    for prompt in (A, B):
        session = backend.start(RecordingPlan.of(rule))
        session.prefill([prompt])
        session.select(rule)
        assert session._plans is not None
        packed.append(session._plans[0].mlps[1])
    assert packed[0].down.data.data_ptr() == packed[1].down.data.data_ptr()
    assert packed[0].least is not None
    assert packed[1].least is not None
    assert not torch.equal(packed[0].least, packed[1].least)
