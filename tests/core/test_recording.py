"""What a prefill leaves: the same however it was chunked, batched and padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.core.statistics import LayerStatistics
from coreinfer.errors import UserError
from coreinfer.recording import BatchWindows, PromptRecorder, RecordingPlan
from coreinfer.selectors import Auto, Griffin, Impact, Random, Similarity, Stability
from coreinfer.standins import Linear, Mean

D, HIDDEN, BOS, PAD = 9, 4, 1, 0
FULL = RecordingPlan(alpha=0.4, halves=True, input_sums=True, sample_tokens=4)


def activations(ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """An MLP that depends on token and position: x [.., d], h [.., D]."""
    steps = torch.arange(1, HIDDEN + D + 1).float()
    values = torch.sin((ids.unsqueeze(-1) * 7 + positions.unsqueeze(-1) * 3) * steps)
    return values[..., :HIDDEN], values[..., HIDDEN:]


def record(
    prompts: list[list[int]], plan: RecordingPlan, *, chunk: int = 100, bos: int | None = BOS
) -> list[PromptRecorder]:
    """Prefill as a backend does: left-padded, in chunks; padding has activations that are not."""
    recorders = [PromptRecorder(plan, [(D, HIDDEN)]) for _ in prompts]
    windows = BatchWindows(len(prompts), bos)
    feed(recorders, windows, prompts, chunk)
    return recorders


def feed(
    recorders: list[PromptRecorder], windows: BatchWindows, prompts: list[list[int]], chunk: int
) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    windows.expect([len(p) for p in prompts])
    for ids_chunk, real in zip(ids.split(chunk, dim=1), mask.split(chunk, dim=1), strict=True):
        for row, window in enumerate(windows.advance(real, ids_chunk)):
            positions = window.start + torch.arange(window.columns.numel())
            x = torch.full((*ids_chunk[row].shape, HIDDEN), torch.nan)
            h = torch.full((*ids_chunk[row].shape, D), torch.nan)
            x[window.columns], h[window.columns] = activations(
                ids_chunk[row, window.columns], positions
            )
            recorders[row].observe(0, window, x[window.columns], h[window.columns])


def expected(prompt: list[int], tokens: slice) -> LayerStatistics:
    stats = LayerStatistics.zeros(D, HIDDEN)
    x, h = activations(torch.tensor(prompt), torch.arange(len(prompt)))
    stats.update(x[tokens], h[tokens], 0.4)
    return stats


def assert_same(a: LayerStatistics, b: LayerStatistics) -> None:
    assert a.tokens == b.tokens
    assert torch.equal(a.counts, b.counts)
    torch.testing.assert_close(a.square_sum, b.square_sum, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.input_sum, b.input_sum, rtol=1e-12, atol=1e-12)


IDS = st.lists(st.integers(2, 30), min_size=1, max_size=9)


@given(st.lists(IDS, min_size=1, max_size=3), st.integers(1, 10))
def test_chunks_batches_and_padding_do_not_matter(prompts: list[list[int]], chunk: int) -> None:
    for prompt, recorder in zip(prompts, record(prompts, FULL, chunk=chunk), strict=True):
        alone = record([prompt], FULL)[0]
        assert_same(recorder.statistics()[0], expected(prompt, slice(None)))
        halves, alone_halves = recorder.halves(), alone.halves()
        assert halves is not None
        assert alone_halves is not None
        middle = (len(prompt) + 1) // 2
        assert_same(halves[0][0], expected(prompt, slice(0, middle)))
        assert_same(halves[1][0], expected(prompt, slice(middle, None)))
        ours, theirs = recorder.sample(0), alone.sample(0)
        assert ours.positions is not None
        assert theirs.positions is not None
        assert ours.h is not None
        assert theirs.h is not None
        assert torch.equal(ours.positions, theirs.positions)
        assert torch.equal(ours.h, theirs.h)
        assert ours.tokens == max(len(prompt) - 1, 1)


def test_the_bos_token_does_not_count() -> None:
    prompt = [BOS, 5, 6, 7]
    assert_same(record([prompt], FULL)[0].statistics()[0], expected(prompt, slice(1, None)))
    for chunk in (1, 2):
        recorder = record([prompt], FULL, chunk=chunk)[0]
        assert_same(recorder.statistics()[0], expected(prompt, slice(1, None)))


def test_the_bos_token_counts_if_the_plan_says_so() -> None:
    prompt = [BOS, 5, 6, 7]
    recorder = record([prompt], RecordingPlan(alpha=0.4, count_bos=True, input_sums=True))[0]
    assert_same(recorder.statistics()[0], expected(prompt, slice(None)))


def test_the_bos_token_counts_if_there_is_nothing_else() -> None:
    assert_same(record([[BOS]], FULL)[0].statistics()[0], expected([BOS], slice(None)))


def test_a_bos_token_in_the_middle_is_a_token_like_any_other() -> None:
    prompt = [5, BOS, BOS, 6]
    assert_same(record([prompt], FULL)[0].statistics()[0], expected(prompt, slice(None)))


def test_a_model_without_bos_counts_every_token() -> None:
    prompt = [BOS, 5]
    recorder = record([prompt], FULL, bos=None)[0]
    assert_same(recorder.statistics()[0], expected(prompt, slice(None)))


def test_turns_add_up() -> None:
    first, second = [BOS, 5, 6], [7, 8, 9, 10]
    recorders = [PromptRecorder(FULL, [(D, HIDDEN)])]
    windows = BatchWindows(1, BOS)
    feed(recorders, windows, [first], 2)
    feed(recorders, windows, [second], 3)
    whole = record([first + second], FULL)[0]
    assert_same(recorders[0].statistics()[0], whole.statistics()[0])
    ours, theirs = recorders[0].sample(0), whole.sample(0)
    assert ours.x is not None
    assert theirs.x is not None
    assert torch.equal(ours.x, theirs.x)
    halves = recorders[0].halves()
    assert halves is not None
    # each turn is halved by itself: tokens 1 and 3, 4 against 2 and 5, 6 (0 is the BOS token)
    assert [half[0].tokens for half in halves] == [1 + 2, 1 + 2]


def test_the_first_token_is_not_in_the_sample_of_a_stand_in() -> None:
    sample = record([[BOS, 5, 6]], FULL)[0].sample(0)
    assert sample.positions is not None
    assert sample.positions.tolist() == [1, 2]
    only = record([[BOS]], FULL)[0].sample(0)
    assert only.positions is not None
    assert only.positions.tolist() == [0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_with_their_layer(bad: float) -> None:
    recorder = PromptRecorder(FULL, [(D, HIDDEN), (D, HIDDEN)])
    window = BatchWindows(1, None).advance(torch.ones(1, 2), torch.tensor([[5, 6]]))[0]
    x, h = torch.ones(2, HIDDEN), torch.ones(2, D)
    recorder.observe(0, window, x, h)
    h[1, 3] = bad
    recorder.observe(1, window, x, h)
    with pytest.raises(UserError, match=r"^layer 1 has activations that are not finite; .*dtype"):
        recorder.statistics()


def test_a_plan_is_the_least_that_a_rule_needs() -> None:
    assert RecordingPlan.of(Stability(alpha=0.3)) == RecordingPlan(alpha=0.3)
    assert RecordingPlan.of(Impact()) == RecordingPlan()
    assert not Impact.needs_input_sums
    assert Similarity.needs_input_sums
    assert Auto.needs_input_sums
    assert RecordingPlan.of(Griffin(count_bos=True)) == RecordingPlan(count_bos=True)
    assert RecordingPlan.of(Random(), Mean()) == RecordingPlan(sample_tokens=0)
    assert RecordingPlan.of(Random(), Linear(sample_tokens=7)) == RecordingPlan(sample_tokens=7)
    both, none = Linear(sample_tokens=7, fit_skipped=True), Linear(sample_tokens=7)
    assert RecordingPlan.of(Random(), both) == RecordingPlan(sample_tokens=7)
    skips = Random(active=0.5)
    assert RecordingPlan.of(skips, none) == RecordingPlan(sample_tokens=7, gates=True)
    assert RecordingPlan.of(skips, both) == RecordingPlan(
        sample_tokens=7, gates=True, sample_gates=True
    )


PLANS = st.builds(
    RecordingPlan,
    alpha=st.sampled_from([None, 0.2, 0.4]),
    count_bos=st.booleans(),
    halves=st.booleans(),
    input_sums=st.booleans(),
    sample_tokens=st.sampled_from([None, 0, 5, 9]),
    gates=st.booleans(),
    sample_gates=st.booleans(),
)


@given(PLANS, PLANS)
def test_a_plan_covers_another_if_it_records_all_that_one_needs(
    plan: RecordingPlan, other: RecordingPlan
) -> None:
    enough = [
        other.alpha is None or plan.alpha == other.alpha,
        plan.count_bos == other.count_bos,
        plan.halves >= other.halves,
        plan.input_sums >= other.input_sums,
        plan.gates >= other.gates,
        plan.sample_gates >= other.sample_gates,
        (-1 if plan.sample_tokens is None else plan.sample_tokens)
        >= (-1 if other.sample_tokens is None else other.sample_tokens),
    ]
    assert plan.covers(other) == all(enough)
    assert plan.covers(plan)
