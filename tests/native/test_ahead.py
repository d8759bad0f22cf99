"""Choosing while the prompt is read: the same core sets and stand-ins as choosing afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from coreinfer.backends.choose import SmallLayer
from coreinfer.backends.native.backend import NativeBackend
from coreinfer.backends.native.session import NativeSession
from coreinfer.backends.native.weights import weights_from
from coreinfer.benchmarks.decoding import by_keep
from coreinfer.benchmarks.engines import BackendEngine
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.generation import generate
from coreinfer.runtime.sampling import SamplingParams
from coreinfer.selectors import (
    Auto,
    Dense,
    Fixed,
    Griffin,
    Impact,
    Oracle,
    Random,
    Residual,
    Selector,
    Similarity,
    Stability,
    Static,
)
from coreinfer.standins import Calibrated, Linear, Mean, StandIn, StandInTerms
from tests.calibration.stores import random_store as random_calibration
from tests.native.pairs import FORMATS, tiny_native
from tests.semantics.stores import random_store as random_clusters
from tests.tiny import BOS, tiny_model, tiny_tokenizer

A = [BOS, 5, 77, 200, 13, 13, 8, 250, 99, 41, 5, 77]
B = [90, 91, 200]
RULE, LINEAR = Impact(beta=0.4), Linear(rank=4)
VARIANTS = ["llama", "opt", "relu", "biased"]
STAND_INS = ["none", "mean", "linear", "calibrated"]
close = torch.testing.assert_close


def rule_of(name: str, backend: NativeBackend) -> Selector:
    sizes, hidden = backend.weights.num_neurons, backend.weights.config.hidden_size
    clusters = random_clusters(sizes=sizes, hidden=hidden, model_fingerprint=backend.fingerprint)
    rules: dict[str, Selector] = {
        "impact": Impact(beta=0.4, dense_layers=(1,), budgets={2: 0.2}),
        "griffin": Griffin(beta=0.3),
        "stability": Stability(alpha=0.3, beta=0.4, count_bos=True),
        "random": Random(beta=0.5, seed=3),
        "static": Static(clusters=clusters, beta=0.4),
        "residual": Residual(calibration=calibration(backend), beta=0.4),
        "auto": Auto(clusters=clusters, min_similarity=-1.0),
        "similarity": Similarity(clusters=clusters, gamma=0.3),
    }
    if name == "fixed":
        session = backend.start(RecordingPlan.of(RULE))
        session.prefill([B])
        return Fixed(core_set=session.select(RULE)[0].core_set)
    return rules[name]


def calibration(backend: NativeBackend) -> Any:
    weights = backend.weights
    made = random_calibration(sizes=weights.num_neurons, hidden=weights.config.hidden_size)
    return replace(made, model_fingerprint=backend.fingerprint)


def stand_in_of(name: str, backend: NativeBackend) -> StandIn | None:
    match name:
        case "mean":
            return Mean()
        case "linear":
            return LINEAR
        case "calibrated":
            return Calibrated(calibration=calibration(backend), rank=4)
    return None


class Spy:
    """Sees what a backend packs."""

    def __init__(self, backend: NativeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: list[tuple[int, list[int], Any]] = []
        pack = backend.stepper.pack_layer

        def seen(small: SmallLayer) -> Any:
            terms = small.terms or [None] * len(small.kept)
            for one, term in zip(small.kept, terms, strict=True):
                self.layers.append((small.layer, one.tolist(), term))
            return pack(small)

        monkeypatch.setattr(backend.stepper, "pack_layer", seen)

    def take(self) -> list[tuple[int, list[int], Any]]:
        taken, self.layers = self.layers, []
        return taken


def same_terms(one: StandInTerms | None, two: StandInTerms | None) -> None:
    assert (one is None) == (two is None)
    if one is None or two is None:
        return
    close(one.offset, two.offset, rtol=1e-3, atol=1e-4)
    assert (one.left is None) == (two.left is None)
    if one.left is not None and two.left is not None:
        maps = [t.left.double() @ t.right.double() for t in (one, two)]  # type: ignore[union-attr]
        close(*maps, rtol=1e-3, atol=1e-3 * float(maps[1].abs().max()) + 1e-9)


def both(
    backend: NativeBackend, rule: Selector, stand_in: StandIn | None
) -> tuple[NativeSession, NativeSession]:
    """A session that knows what will be asked for, and one that does not."""
    return (
        backend.start(RecordingPlan.expecting(rule, stand_in)),
        backend.start(RecordingPlan.of(rule, stand_in)),
    )


def chose_ahead(session: NativeSession, rule: Selector, stand_in: StandIn | None) -> bool:
    return session._ahead is not None and session._ahead.serves(rule, stand_in)


def agree(
    backend: NativeBackend,
    rule: Selector,
    stand_in: StandIn | None,
    spy: Spy,
    prompt: list[int] = A,
) -> None:
    ahead, after = both(backend, rule, stand_in)
    close(ahead.prefill([prompt]), after.prefill([prompt]), rtol=1e-4, atol=1e-4)
    assert chose_ahead(ahead, rule, stand_in)
    packed = spy.take()
    (one,), (two,) = ahead.select(rule, stand_in), after.select(rule, stand_in)
    repacked = spy.take()
    assert packed
    assert [layer[:2] for layer in packed] == [layer[:2] for layer in repacked]
    for (_, _, ours), (_, _, theirs) in zip(packed, repacked, strict=True):
        same_terms(ours, theirs)
    assert one.core_set.layers.keys() == two.core_set.layers.keys()
    for layer, kept in one.core_set.layers.items():
        assert torch.equal(kept, two.core_set.layers[layer])
    assert one.stand_in_bytes == two.stand_in_bytes
    assert one.notes == two.notes
    assert one.core_set.selector == two.core_set.selector
    for ids in ([[17]], [[3, 4, 5]]):
        close(ahead.decode(ids), after.decode(ids), rtol=2e-2, atol=2e-2)  # maps are of eight bits


@pytest.mark.parametrize("stand_in", STAND_INS)
@pytest.mark.parametrize(
    "rule", ["impact", "griffin", "stability", "random", "static", "residual", "fixed"]
)
def test_every_rule_that_ranks_a_layer_alone(
    rule: str, stand_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tiny_native("llama")
    spy = Spy(backend, monkeypatch)
    rule_, stand_in_ = rule_of(rule, backend), stand_in_of(stand_in, backend)
    spy.take()
    agree(backend, rule_, stand_in_, spy)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stand_in", STAND_INS)
def test_every_mlp_in_every_dtype(
    variant: str, dtype: str, stand_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tiny_native(variant, dtype)
    agree(backend, RULE, stand_in_of(stand_in, backend), Spy(backend, monkeypatch))


@pytest.mark.parametrize("prompt", [[BOS], [7], [BOS, 7], [7, 8], list(range(3, 60))])
@pytest.mark.parametrize("stand_in", [None, Mean(), Linear(rank=4, sample_tokens=20)])
def test_prompts_that_leave_little_to_fit_and_prompts_that_are_sampled(
    prompt: list[int], stand_in: StandIn | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tiny_native("llama")
    agree(backend, RULE, stand_in, Spy(backend, monkeypatch), prompt)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_narrow_compute(compute: torch.dtype) -> None:
    backend = tiny_native("llama", "int4", compute=compute)
    ahead, after = both(backend, RULE, LINEAR)
    close(ahead.prefill([A]), after.prefill([A]), rtol=0.1, atol=0.1)
    ours, theirs = (one.select(RULE, LINEAR)[0].core_set.layers for one in (ahead, after))
    for layer, kept in ours.items():
        common = set(kept.tolist()) & set(theirs[layer].tolist())
        assert len(common) >= 0.8 * len(kept)
    close(ahead.decode([[9]]), after.decode([[9]]), rtol=0.2, atol=0.2)


def test_a_part_that_overflows_float16_is_computed_again() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= 3e4
        layer.mlp.down_proj.weight.data /= 3e4
    weights = weights_from(model, FORMATS["bfloat16"])
    logits = []
    for compute in (torch.float16, torch.float32):
        backend = NativeBackend(
            weights, tiny_tokenizer(), compute=compute, cache_dtype=torch.float32
        )
        session = backend.start(RecordingPlan.expecting(RULE, LINEAR))
        prefilled = session.prefill([A])
        assert chose_ahead(session, RULE, LINEAR)
        session.select(RULE, LINEAR)
        logits.append((prefilled, session.decode([[4]])))
    for one, two in zip(*logits, strict=True):
        close(one, two, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("rule", "stand_in"),
    [(Impact(beta=1.0), LINEAR), (Dense(), LINEAR), (Impact(), None), (Stability(), None)],
)
def test_where_nothing_is_split_nothing_changes(rule: Selector, stand_in: StandIn | None) -> None:
    ahead, after = both(tiny_native("llama", "int4"), rule, stand_in)
    assert torch.equal(ahead.prefill([A]), after.prefill([A]))
    assert chose_ahead(ahead, rule, stand_in)
    assert torch.equal(ahead.fork().decode([[1]]), after.fork().decode([[1]]))  # before a choice
    ahead.select(rule, stand_in)
    after.select(rule, stand_in)
    assert torch.equal(ahead.decode([[1]]), after.decode([[1]]))


def decoded(session: NativeSession, rule: Selector, stand_in: StandIn | None) -> Tensor:
    """After a choice, on a fork; with the core neurons of each layer."""
    fork = session.fork()
    fork.select(rule, stand_in)
    return fork.decode([[17]] * len(fork.lengths))


def test_anything_else_that_was_recorded_can_still_be_asked_for() -> None:
    for variant in VARIANTS:
        ahead, after = both(tiny_native(variant), Stability(alpha=0.3), LINEAR)
        ahead.prefill([A])
        after.prefill([A])
        settings: list[tuple[Selector, StandIn | None]] = [
            (Impact(beta=0.3), None),
            (Stability(alpha=0.3), LINEAR),
            (Stability(alpha=0.3), Linear(rank=2)),
            (Stability(alpha=0.3), None),
            (Griffin(), Mean()),
            (Dense(), None),
            (Stability(alpha=0.3), LINEAR),
        ]
        want = [decoded(after, *setting) for setting in settings]
        for setting, logits in zip(settings, want, strict=True):
            close(decoded(ahead, *setting), logits, rtol=2e-2, atol=2e-2)
        for setting, logits in zip(
            settings, want, strict=True
        ):  # on one session, one after another
            ahead.select(*setting)
            close(ahead.fork().decode([[17]]), logits, rtol=2e-2, atol=2e-2)
        # what was not asked for is gone by then, and was worked out again
        assert not chose_ahead(ahead, Stability(alpha=0.3), LINEAR)


def test_equal_settings_are_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = tiny_native()
    session = backend.start(RecordingPlan.expecting(Impact(beta=0.4), Linear(rank=4)))
    session.prefill([A])
    spy = Spy(backend, monkeypatch)
    session.select(Impact(beta=0.4), Linear(rank=4))
    assert not spy.take()
    session.select(Impact(beta=0.4), Linear(rank=4))
    assert not spy.take()
    session.select(Impact(beta=0.3), Linear(rank=4))
    assert spy.take()


def test_before_a_choice_all_neurons_decode() -> None:
    ahead, after = both(tiny_native(), RULE, LINEAR)
    ahead.prefill([A])
    after.prefill([A])
    close(ahead.decode([[1, 2]]), after.decode([[1, 2]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "options"),
    [([A, B], {}), ([A], {"prefill_chunk": 5}), ([A], {"prefill_chunk": len(A) - 1})],
    ids=["batch", "chunks", "one token more than a chunk"],
)
def test_batches_and_chunks_choose_afterwards(
    prompts: list[list[int]], options: dict[str, Any]
) -> None:
    ahead, after = both(tiny_native(**options), RULE, LINEAR)
    assert torch.equal(ahead.prefill(prompts), after.prefill(prompts))
    assert ahead._ahead is None
    assert torch.equal(decoded(ahead, RULE, LINEAR), decoded(after, RULE, LINEAR))


@pytest.mark.parametrize("forking", [False, True])
def test_a_further_turn_chooses_afterwards_from_all_turns(forking: bool) -> None:
    ahead, after = both(tiny_native(), RULE, LINEAR)
    for turn, tokens in enumerate([A, B, A[::-1]]):
        if forking:
            ahead = ahead.fork()
        close(ahead.prefill([tokens]), after.prefill([tokens]), rtol=2e-2, atol=2e-2)
        assert chose_ahead(ahead, RULE, LINEAR) == (turn == 0)
        (one,), (two,) = ahead.select(RULE, LINEAR), after.select(RULE, LINEAR)
        for layer, kept in one.core_set.layers.items():
            assert torch.equal(kept, two.core_set.layers[layer])
        close(ahead.decode([[1]]), after.decode([[1]]), rtol=2e-2, atol=2e-2)
    assert ahead.evidence()[0].tokens == after.evidence()[0].tokens


@pytest.mark.parametrize("name", ["auto", "similarity"])
def test_rules_that_need_the_whole_prompt_choose_afterwards(name: str) -> None:
    backend = tiny_native()
    rule = rule_of(name, backend)
    ahead, after = both(backend, rule, LINEAR)
    assert torch.equal(ahead.prefill([A]), after.prefill([A]))
    assert ahead._ahead is None
    assert torch.equal(decoded(ahead, rule, LINEAR), decoded(after, rule, LINEAR))


def test_the_oracle_looks_ahead_as_ever() -> None:
    ahead, after = both(tiny_native(), Oracle(beta=0.4), LINEAR)
    for session in (ahead, after):
        session.prefill([A])
        session.look_ahead([[3, 4, 5]])
    assert torch.equal(
        decoded(ahead, Oracle(beta=0.4), LINEAR), decoded(after, Oracle(beta=0.4), LINEAR)
    )


def test_looking_ahead_leaves_the_choice_alone() -> None:
    ahead, after = both(tiny_native(), RULE, LINEAR)
    for session in (ahead, after):
        session.prefill([A])
        session.look_ahead([[3, 4, 5]])
    assert chose_ahead(ahead, RULE, LINEAR)
    close(decoded(ahead, RULE, LINEAR), decoded(after, RULE, LINEAR), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("stand_in", [None, Mean(), LINEAR])
def test_bad_activations_are_one_clear_refusal(stand_in: StandIn | None) -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight.data *= 1e30
    mlp.up_proj.weight.data *= 1e30
    weights = weights_from(model, FORMATS["bfloat16"])
    session = NativeBackend(weights, tiny_tokenizer()).start(
        RecordingPlan.expecting(RULE, stand_in)
    )
    session.prefill([A])
    with pytest.raises(UserError, match=r"^layer 1 has activations that are not finite"):
        session.select(RULE, stand_in)


def test_what_does_not_fit_the_model_is_refused_before_anything_is_read() -> None:
    backend = tiny_native()
    session = backend.start(RecordingPlan.expecting(Impact(dense_layers=(7,)), LINEAR))
    with pytest.raises(UserError, match="dense layer 7"):
        session.prefill([A])
    assert session.lengths == []
    other = Calibrated(calibration=random_calibration(sizes=(48,) * 3, hidden=32))
    with pytest.raises(UserError, match="calibration store was made for"):
        backend.start(RecordingPlan.expecting(RULE, other)).prefill([A])


def test_a_plan_that_records_too_little_for_its_intent_is_no_trap() -> None:
    plan = replace(RecordingPlan.expecting(Stability(alpha=0.3), LINEAR), alpha=None)
    session = tiny_native().start(plan)
    session.prefill([A])
    with pytest.raises(ValueError, match="the prefill recorded"):
        session.select(Stability(alpha=0.3), LINEAR)
    session.select(RULE, LINEAR)


def test_generate_and_bench_say_what_they_will_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = tiny_native()
    started: list[NativeSession] = []
    start = backend.start

    def remembered(plan: RecordingPlan) -> NativeSession:
        started.append(start(plan))
        return started[-1]

    monkeypatch.setattr(backend, "start", remembered)
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    assert [*generate(backend, [A], RULE, LINEAR, params)][-1].record is not None
    assert chose_ahead(started[-1], RULE, LINEAR)
    engine = BackendEngine(backend, 260, *by_keep(0.4, 1.0))
    engine.repeat(A, [3, 4])
    assert chose_ahead(started[-1], Impact(beta=0.4), Linear())
