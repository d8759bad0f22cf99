"""Skipped core neurons on transformers models: what is computed, and what is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coreinfer import sparse
from coreinfer.backends.base import Phase
from coreinfer.backends.hf.compact import SmallLinear
from coreinfer.backends.hf.session import HfBackend, HfSession
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.cost import bytes_per_token
from coreinfer.selectors import Impact, Selector, Stability
from coreinfer.standins import Linear
from tests.hf.reference import PATHS, hooked
from tests.tiny import CONFIGS, tiny_backend, tiny_model

A = [5, 77, 200, 13, 13, 8, 250, 99, 41, 5, 77]
B = [90, 91, 200]
AFTER = [17, 4, 66, 3]
RULE = Impact(beta=0.5, active=0.4, dense_layers=(2,))
PLAIN = ("opt", "gpt2", "gpt_neox", "falcon")
close = torch.testing.assert_close


def read(backend: HfBackend, rule: Selector = RULE, prompt: list[int] = A) -> HfSession:
    session = backend.start(RecordingPlan.of(rule))
    session.prefill([prompt])
    return session


def gates_by_hand(backend: HfBackend, first: Tensor, h: Tensor) -> Tensor:
    """act(gate x) [T, D] from the output of the first linear; h itself where there is no gate."""
    config = backend.model.config
    if config.model_type in PLAIN:
        return h
    gate = first[..., : h.shape[-1]]
    if config.model_type.startswith("gemma"):
        return torch.nn.functional.gelu(gate, approximate="tanh")
    return torch.nn.functional.silu(gate)


@pytest.mark.parametrize("family", CONFIGS)
def test_small_activations_count_as_zero_in_every_family(family: str) -> None:
    """The sparse model against the whole one, whose activations are masked by hand."""
    backend = tiny_backend(family)
    session = read(backend)
    (choice,) = session.select(RULE)
    cache = session.fork()
    got = session.decode([AFTER], Phase.SCORE)
    least = {layer: compact.skip.least[0] for layer, compact in session.compact.items()}  # type: ignore[union-attr]
    assert sorted(least) == [0, 1]
    firsts: dict[int, Tensor] = {}
    skipped = 0

    def edit(layer: int, h: Tensor) -> Tensor | None:
        nonlocal skipped
        if layer not in least:
            return None
        gates = gates_by_hand(backend, firsts[layer], h)
        kept = choice.core_set.layers[layer].long()
        large = torch.zeros_like(h, dtype=torch.bool)
        large[..., kept] = gates[..., kept].abs() >= least[layer]
        skipped += int((~large[..., kept]).sum())
        return h * large

    handles = []
    for layer in least:
        module = backend.model.get_submodule(PATHS[family][0].format(layer))

        def see(_m: object, _args: object, output: Tensor, layer: int = layer) -> None:
            firsts[layer] = output

        handles.append(module.register_forward_hook(see))
    with hooked(backend.model, edit):
        want = cache.decode_with({}, [AFTER]).detach()
    for handle in handles:
        handle.remove()
    close(got, want, rtol=1e-4, atol=1e-4)
    assert 0 < skipped < 2 * len(AFTER) * len(least) * 24
    (spared,) = session.spared()
    assert spared is not None
    size = backend.cost.behind_gate[0]
    assert spared == pytest.approx(skipped * size / len(AFTER))
    assert size < backend.cost.per_neuron[0]


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_a_batch_skips_what_each_of_its_prompts_skips_alone(family: str) -> None:
    backend = tiny_backend(family)
    together = backend.start(RecordingPlan.of(RULE, Linear(rank=2)))
    together.prefill([A, B])
    together.select(RULE, Linear(rank=2))
    tokens = [AFTER, AFTER[:2]]
    found = together.decode(tokens, Phase.SCORE)
    for row, prompt in enumerate((A, B)):
        alone = backend.start(RecordingPlan.of(RULE, Linear(rank=2)))
        alone.prefill([prompt])
        alone.select(RULE, Linear(rank=2))
        count = len(tokens[row])
        close(found[row, :count], alone.decode([tokens[row]], Phase.SCORE)[0], rtol=1e-4, atol=1e-4)
        assert together.spared()[row] == pytest.approx(alone.spared()[0])


def test_the_count_goes_on_and_belongs_to_a_fork() -> None:
    session = read(tiny_backend())
    assert session.spared() == [None]
    session.select(RULE)
    assert session.spared() == [None]
    fork = session.fork()
    whole = session.fork()
    whole.decode([AFTER], Phase.SCORE)
    for token in AFTER:
        fork.decode([[token]])
    assert fork.spared()[0] == pytest.approx(whole.spared()[0])
    assert session.spared() == [None]
    fork.select(RULE)
    assert fork.spared() == [None]


def test_nothing_is_skipped_unless_asked_for() -> None:
    backend, rule = tiny_backend(), Impact(beta=0.5)
    assert not RecordingPlan.of(rule).gates
    session = read(backend, rule)
    (choice,) = session.select(rule)
    session.decode([AFTER])
    assert all(compact.skip is None for compact in session.compact.values())
    assert session.spared() == [0.0]
    read_bytes = bytes_per_token(backend, session, rule, [choice])
    assert read_bytes == [backend.cost.sparse(choice.core_set)]
    with pytest.raises(ValueError, match="selection needs"):
        session.select(RULE)  # the gates were not recorded


def test_bytes_are_those_of_the_tokens_that_were_decoded() -> None:
    backend = tiny_backend()
    session = read(backend)
    choices = session.select(RULE)
    expected = bytes_per_token(backend, session, RULE, choices)
    cost, core_set = backend.cost, choices[0].core_set
    kept = 2 * 24
    assert expected == [round(cost.sparse(core_set) - kept * (0.6 * 2 * 32 * 4 - 4))]
    session.decode([AFTER], Phase.SCORE)
    (spared,) = session.spared()
    assert spared is not None
    got = bytes_per_token(backend, session, RULE, choices)
    assert got == [round(cost.sparse(core_set) + kept * 4 - spared)]


@pytest.mark.parametrize("all_others", [0.4, 1.0])
def test_a_layer_may_have_a_part_of_its_own(all_others: float) -> None:
    """Its thresholds are those of a rule that has this part everywhere, and bytes count it."""
    own = replace(RULE, active=all_others, active_budgets={1: 0.7})
    backend = tiny_backend()
    session = read(backend, own)
    choices = session.select(own)
    expected = bytes_per_token(backend, session, own, choices)
    for layer, active in ((0, all_others), (1, 0.7)):
        skip = session.compact[layer].skip
        if active == 1:
            assert skip is None
            continue
        alike = replace(RULE, active=active)
        other = read(backend, alike)
        other.select(alike)
        wanted = other.compact[layer].skip
        assert skip is not None
        assert wanted is not None
        assert torch.equal(skip.least, wanted.least)
    behind, core_set = 2 * 32 * 4, choices[0].core_set
    less = [(1 - active) * behind - 4 for active in (all_others, 0.7) if active < 1]
    assert expected == [round(backend.cost.sparse(core_set) - 24 * sum(less))]
    session.decode([AFTER], Phase.SCORE)
    (spared,) = session.spared()
    assert spared is not None
    got = bytes_per_token(backend, session, own, choices)
    assert got == [round(backend.cost.sparse(core_set) + 24 * 4 * len(less) - spared)]
    assert own.active_share(core_set.layers) == pytest.approx((all_others + 0.7) / 2)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_a_stand_in_may_stand_for_what_is_skipped_as_well(family: str) -> None:
    """At the prompt's mean input it gives the mean of all that decode leaves out of it."""
    backend = tiny_backend(family)
    stand_in = Linear(rank=4, fit_skipped=True)
    session = backend.start(RecordingPlan.of(RULE, stand_in))
    session.prefill([A, B])
    choices = session.select(RULE, stand_in)
    for layer, compact in session.compact.items():
        mlp = backend.anatomy.layers[layer]
        assert compact.skip is not None
        assert compact.left is not None
        assert compact.right is not None
        for row, choice in enumerate(choices):
            sample = session.sample(row, layer)
            x, h = sample.inputs, sample.h
            assert h is not None
            kept = choice.core_set.layers[layer].long()
            first = torch.nn.functional.linear(x, mlp.inputs[0].weight, mlp.inputs[0].bias)
            gates = gates_by_hand(backend, first, h)
            left_out = []
            for rounding in (1 - 1e-5, 1 + 1e-5):  # one activation is the threshold itself
                is_read = torch.zeros_like(h, dtype=torch.bool)
                is_read[:, kept] = gates[:, kept].abs() >= compact.skip.least[row] * rounding
                assert 0 < int(is_read.sum()) < 0.6 * len(x) * len(kept)
                left_out.append(((h * ~is_read) @ mlp.output.weight.t()).mean(dim=0))
            offset = compact.output.bias
            assert offset is not None
            own = offset[row] - (0 if mlp.output.bias is None else mlp.output.bias)
            said = compact.left.weight_of(row) @ (compact.right.weight_of(row) @ x.mean(dim=0))
            assert min(float((own + said - one).abs().max()) for one in left_out) < 1e-4


def test_what_is_skipped_is_fitted_only_where_its_tokens_were_recorded() -> None:
    session = tiny_backend().start(RecordingPlan.of(RULE, Linear(rank=4)))
    session.prefill([A])
    with pytest.raises(ValueError, match="selection needs"):
        session.select(RULE, Linear(rank=4, fit_skipped=True))


def test_all_neurons_may_be_core_neurons_of_which_few_are_active() -> None:
    """Skipping alone, as CATS does; a stand-in then has nothing to stand for."""
    rule = Impact(beta=1.0, active=0.3)
    backend = tiny_backend()
    session = backend.start(RecordingPlan.of(rule, Linear(rank=2)))
    session.prefill([A])
    (choice,) = session.select(rule, Linear(rank=2))
    assert choice.core_set.density == 1.0
    assert choice.stand_in_bytes == 0
    for layer, compact in session.compact.items():  # nothing is copied
        whole = backend.anatomy.layers[layer].output.weight
        assert isinstance(compact.output, SmallLinear)
        assert compact.output.weight.data_ptr() == whole.data_ptr()
    session.decode([AFTER], Phase.SCORE)
    (spared,) = session.spared()
    assert spared is not None
    skippable = 3 * 48 * backend.cost.behind_gate[0]
    assert 0.4 < spared / skippable < 0.9


def test_a_later_turn_adds_to_what_is_known_of_the_gates() -> None:
    backend = tiny_backend()
    turns, whole = read(backend, prompt=A), read(backend, prompt=A + B)
    turns.prefill([B])
    for session in (turns, whole):
        session.select(RULE)
    for layer, compact in whole.compact.items():
        other = turns.compact[layer].skip
        assert compact.skip is not None
        assert other is not None
        close(other.least, compact.skip.least, rtol=1e-4, atol=1e-5)


def test_a_prompt_of_one_token_has_thresholds_too() -> None:
    session = read(tiny_backend(), prompt=[7])
    session.select(RULE)
    assert session.decode([[4]]).isfinite().all()


def test_transformers_own_generate_skips_them_too() -> None:
    backend = tiny_backend()
    session = read(backend)
    session.select(RULE)
    logits, expected = backend.start(RecordingPlan()).prefill([A]), []
    for _ in range(6):
        expected.append(int(logits.reshape(-1, logits.shape[-1])[-1].argmax()))
        logits = session.decode([[expected[-1]]])
    model = tiny_model()
    with sparse(model, RULE):
        answer = model.generate(torch.tensor([A]), max_new_tokens=6, do_sample=False)
    assert answer[0, len(A) :].tolist() == expected


@pytest.mark.parametrize("value", [0, -0.5, 1.5, float("nan"), "half", True])
def test_active_is_a_fraction(value: object) -> None:
    with pytest.raises(UserError, match="active"):
        Stability(active=value)  # type: ignore[arg-type]
