"""What more in a layer is worth, against the losses that it is the slope of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coreinfer.backends.base import Phase
from coreinfer.backends.hf.compact import SmallLinear
from coreinfer.backends.hf.session import HfBackend, HfSession
from coreinfer.backends.hf.worth import Step, steps_between, worth
from coreinfer.core.measures import kl_by_token
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Impact, Random, Selector, Stability
from coreinfer.standins import Linear, Mean, StandIn
from tests.tiny import CONFIGS, tiny_backend

PROMPTS = [[5, 77, 200, 13, 13, 8, 250, 99, 41], [9, 31, 7, 7, 120]]
AFTER = [[17, 4, 66, 3], [8, 8, 1, 200]]
NOW = Impact(beta=0.4, dense_layers=(2,))
MORE = Impact(beta=0.5, dense_layers=(2,))
SKIPPING = replace(NOW, active=0.5)
WAYS = (replace(SKIPPING, beta=0.5), replace(SKIPPING, active=0.7))
FITTED = Linear(rank=3)


def loss_at(
    backend: HfBackend,
    gates: dict[int, float],
    stand_in: StandIn | None,
    rules: tuple[Selector, Selector] = (NOW, MORE),
) -> float:
    """KL with the layers so far on their way from one rule to the other."""
    read, steps = steps_of(backend, stand_in, rules)
    for layer, step in steps.items():
        steps[layer] = replace(step, gate=torch.tensor(gates.get(layer, 0.0)))
    with torch.no_grad():
        dense = read.fork().decode_with({}, AFTER)[:, :-1].log_softmax(dim=-1)
        sparse = read.fork().decode_with(steps, AFTER)[:, :-1].log_softmax(dim=-1)
    return float(kl_by_token(dense, sparse).mean())


def steps_of(
    backend: HfBackend, stand_in: StandIn | None, rules: tuple[Selector, Selector] = (NOW, MORE)
) -> tuple[HfSession, dict[int, Step]]:
    read = backend.start(RecordingPlan.of(rules[0], stand_in))
    read.prefill(PROMPTS)
    return read, steps_between(read, *rules, stand_in)


@pytest.mark.parametrize(
    "rules",
    [
        (NOW, MORE),
        *((SKIPPING, way) for way in WAYS),
        (replace(SKIPPING, beta=1.0), replace(WAYS[1], beta=1.0)),
    ],
)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_step_leads_from_one_rule_to_the_other(
    family: str, rules: tuple[Selector, Selector]
) -> None:
    backend = tiny_backend(family)
    read, steps = steps_of(backend, FITTED, rules)
    assert sorted(steps) == [0, 1]
    for gate, rule in zip((0.0, 1.0), rules, strict=True):
        set_to = {n: replace(s, gate=torch.tensor(gate)) for n, s in steps.items()}
        fork = read.fork()
        fork.select(rule, FITTED)
        want = fork.decode(AFTER, Phase.SCORE)
        with torch.no_grad():
            got = read.fork().decode_with(set_to, AFTER)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3"])
@pytest.mark.parametrize("stand_in", [None, Mean(), FITTED])
def test_it_is_the_slope_of_the_loss(family: str, stand_in: StandIn | None) -> None:
    backend = tiny_backend(family)
    found = worth(backend, PROMPTS, AFTER, NOW, MORE, stand_in)
    assert found.loss == pytest.approx(loss_at(backend, {}, stand_in), rel=1e-3)
    gains = found.gains
    assert gains[2] is None
    by = 0.02
    for layer in (0, 1):
        ends = [loss_at(backend, {layer: sign * by}, stand_in) for sign in (1, -1)]
        slope = (ends[1] - ends[0]) / (2 * by)
        assert gains[layer] == pytest.approx(slope, rel=0.05, abs=1e-4)


@pytest.mark.parametrize("more", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_of_neurons_and_of_activity_where_some_are_skipped(family: str, more: Selector) -> None:
    backend, rules = tiny_backend(family), (SKIPPING, more)
    gains = worth(backend, PROMPTS, AFTER, *rules, FITTED).gains
    by = 0.002  # so small that no other neuron falls below its least activation
    assert gains[2] is None
    for layer in (0, 1):
        losses = [loss_at(backend, {layer: sign * by}, FITTED, rules) for sign in (1, -1)]
        slope = (losses[1] - losses[0]) / (2 * by)
        assert gains[layer] == pytest.approx(slope, rel=0.05, abs=1e-4)


def test_a_batch_is_the_mean_of_its_prompts() -> None:
    backend = tiny_backend()
    after = [AFTER[0], AFTER[1][:3]]  # padded beside the other
    both = worth(backend, PROMPTS, after, NOW, MORE, FITTED)
    alone = [
        worth(backend, [prompt], [rest], NOW, MORE, FITTED)
        for prompt, rest in zip(PROMPTS, after, strict=True)
    ]
    assert both.loss == pytest.approx(sum(one.loss for one in alone) / 2, rel=1e-4)
    for layer in (0, 1):
        parts = [one.gains[layer] for one in alone]
        mean = sum(part for part in parts if part is not None) / 2
        assert both.gains[layer] == pytest.approx(mean, rel=1e-3, abs=1e-6)


def test_layers_that_do_not_grow_have_none() -> None:
    backend = tiny_backend()
    more = Impact(beta=0.4, budgets={0: 0.6}, dense_layers=(2,))
    gains = worth(backend, PROMPTS, AFTER, NOW, more, None).gains
    assert gains[0] is not None
    assert gains[1:] == [None, None]
    assert worth(backend, PROMPTS, AFTER, NOW, NOW, None).gains == [None] * 3


@pytest.mark.parametrize("other", [Random(beta=0.5, seed=1), replace(NOW, dense_layers=())])
def test_more_that_lacks_some_neurons_or_has_no_more_has_none(other: Selector) -> None:
    found = worth(tiny_backend(), PROMPTS, AFTER, NOW, other, None)
    assert found.gains == [None] * 3


def test_layers_that_keep_all_are_not_copied_on_their_way() -> None:
    backend, now = tiny_backend(), replace(SKIPPING, beta=1.0)
    _, steps = steps_of(backend, None, (now, replace(now, active=0.7)))
    for layer, step in steps.items():
        whole = backend.anatomy.layers[layer].output.weight
        for mlp in (step.now, step.more):
            assert isinstance(mlp.output, SmallLinear)
            assert mlp.output.weight.data_ptr() == whole.data_ptr()


def test_nothing_of_it_stays_in_the_model() -> None:
    """No gradients of weights, and the dense model is what it was."""
    backend = tiny_backend()
    with torch.no_grad():
        before = backend.model(torch.tensor(PROMPTS[:1])).logits
    worth(backend, PROMPTS, AFTER, Stability(beta=0.4), Stability(beta=0.5), FITTED)
    assert all(parameter.grad is None for parameter in backend.model.parameters())
    with torch.no_grad():
        assert torch.equal(backend.model(torch.tensor(PROMPTS[:1])).logits, before)
