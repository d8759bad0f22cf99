"""On leaving `sparse` the model is what it was, whatever happened inside."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from coreinfer.backends.base import Phase
from coreinfer.backends.hf.session import HfBackend
from coreinfer.backends.hf.sparse import sparse
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Stability
from coreinfer.standins import Linear
from tests.tiny import CONFIGS, tiny_model, tiny_tokenizer

PROMPT = torch.tensor([[5, 77, 200, 13, 8, 250]])
RULE = Stability(beta=0.4)


def _plain(value: Any) -> Any:
    """Something to compare: what a container holds, by identity."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return id(value)


def state(model: PreTrainedModel) -> Any:
    """All that a model is: every module's attributes and hooks, and the bytes of its weights."""
    attributes = {name: _plain(module.__dict__) for name, module in model.named_modules()}
    weights = {
        key: value.contiguous().view(-1).view(torch.uint8).tolist()
        for key, value in model.state_dict().items()
    }
    return attributes, weights, model.config.to_json_string(), model.generation_config.to_dict()


def answer(model: PreTrainedModel, **options: Any) -> list[int]:
    options = {"max_new_tokens": 4, "do_sample": False} | options
    return model.generate(PROMPT, **options)[0].tolist()


@pytest.mark.parametrize("family", CONFIGS)
def test_nothing_is_left(family: str) -> None:
    model = tiny_model(family)
    dense = answer(model)
    before = state(model)
    with sparse(model, RULE, Linear(rank=2)):
        assert state(model) != before
        answer(model)
        answer(model, num_beams=2)
    assert state(model) == before
    assert answer(model) == dense


class Stop(BaseException):
    pass


def _raise(error: BaseException) -> Any:
    def hook(*_args: Any) -> None:
        raise error

    return hook


@pytest.fixture
def breaking() -> Iterator[Any]:
    """Makes the second layer's MLP raise; undone at the end."""
    handles = []

    def install(model: PreTrainedModel, error: BaseException) -> Any:
        handles.append(model.model.layers[1].mlp.register_forward_pre_hook(_raise(error)))
        return handles[-1]

    yield install
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), Stop()])
def test_an_exception_in_the_block(error: BaseException) -> None:
    model = tiny_model()
    before = state(model)
    with pytest.raises(type(error)), sparse(model, RULE):  # noqa: PT012
        answer(model)
        raise error
    assert state(model) == before


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), Stop()])
@pytest.mark.parametrize("in_decode", [False, True])
def test_an_exception_in_a_pass(error: BaseException, in_decode: bool, breaking: Any) -> None:
    model = tiny_model()
    with sparse(model, RULE):
        right = answer(model)
    before = state(model)
    with sparse(model, RULE) as run:
        if in_decode:
            count = [0]

            class Interrupt:
                def __call__(self, *_args: Any, **_kwargs: Any) -> bool:
                    count[0] += 1
                    if count[0] == 2:
                        raise error
                    return torch.tensor([False])

            with pytest.raises(type(error)):
                answer(model, stopping_criteria=[Interrupt()])
            assert run.phase is Phase.DECODE
        else:
            handle = breaking(model, error)
            with pytest.raises(type(error)):
                answer(model)
            handle.remove()
            assert run.choices == []
        assert answer(model) == right  # half a prefill counts for nothing
    assert state(model) == before


def test_a_session_whose_pass_fails_leaves_the_model_alone(breaking: Any) -> None:
    model = tiny_model()
    session = HfBackend(model, tiny_tokenizer(), "t").start(RecordingPlan.of(RULE))
    session.prefill(PROMPT.tolist())
    handle = breaking(model, KeyboardInterrupt())
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(PROMPT.tolist())
    session.select(RULE)
    with pytest.raises(KeyboardInterrupt):
        session.decode([[1]])
    assert state(model) == before
    handle.remove()


def test_nested_is_refused_and_the_outer_still_works() -> None:
    model = tiny_model()
    before = state(model)
    session = HfBackend(model, tiny_tokenizer(), "t").start(RecordingPlan.of(RULE))
    with sparse(model, RULE) as run:
        right = answer(model)
        inside = state(model)
        with pytest.raises(RuntimeError, match="already inside"), sparse(model, RULE):
            pass
        with pytest.raises(RuntimeError, match="already inside"):
            session.prefill(PROMPT.tolist())
        assert state(model) == inside
        assert answer(model) == right
        assert run.density < 1
    assert state(model) == before


def test_what_another_tool_rerouted_stays_rerouted() -> None:
    model = tiny_model()
    module = model.model.layers[0].mlp.down_proj
    own, calls = module.forward, []

    def traced(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        return own(x)

    module.forward = traced
    with sparse(model, RULE):
        answer(model)
    assert len(calls) == 1  # the prefill went through it
    assert module.__dict__["forward"] is traced


def test_leaving_drops_the_compact_weights_and_the_recordings() -> None:
    """The full weights are all that is left: no copies stay behind, even if the run is kept."""
    model = tiny_model()

    def tensors() -> list[weakref.ref[torch.Tensor]]:
        return [weakref.ref(o) for o in gc.get_objects() if type(o) is torch.Tensor]

    gc.collect()
    before = {id(t()) for t in tensors()}
    with sparse(model, RULE, Linear(rank=2)) as run:
        answer(model)
        gc.collect()
        inside = [t for t in tensors() if id(t()) not in before]
        assert any(t().dim() == 2 for t in inside)
    gc.collect()
    left = [t() for t in inside if t() is not None]
    kept = {id(i) for choice in run.choices for i in choice.core_set.layers.values()}
    assert [t.shape for t in left if id(t) not in kept and t.numel() > 40] == []
    assert run.choices[0].core_set.density == run.density < 1
    with pytest.raises(UserError, match="nothing was prefilled"):
        run.select()


def test_static_cache_leaves_what_generate_itself_leaves() -> None:
    model = tiny_model()
    answer(model, cache_implementation="static")
    names = {name: set(module.__dict__) for name, module in model.named_modules()}
    with sparse(model, RULE):
        answer(model, cache_implementation="static")
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == names


def test_parameters_are_the_same_objects() -> None:
    model = tiny_model()
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    with sparse(model, RULE):
        answer(model)
        assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
