"""Sparse decoding really computes with the smaller matrices, gathered once a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coreinfer.backends.base import Phase
from coreinfer.backends.hf import choose as choose_module
from coreinfer.backends.hf.session import HfBackend, HfSession
from coreinfer.backends.hf.sparse import sparse
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Random, Stability
from coreinfer.standins import Linear
from tests.hf.reference import down
from tests.tiny import CONFIGS, tiny_model, tiny_tokenizer

D, K = 131, 52  # a prime, so that no other size of the model can be taken for it
RULE = Stability(beta=0.4)
PROMPT = [5, 77, 200, 13, 8]


def make(family: str = "llama", neurons: int = D) -> Any:
    name = {"opt": "ffn_dim", "gpt2": "n_inner", "falcon": "ffn_hidden_size"}
    return tiny_model(family, **{name.get(family, "intermediate_size"): neurons})


class Products(TorchDispatchMode):
    """The operand shapes of every matrix product, and how often anything was gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.gathers = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"):
            self.shapes += [tuple(a.shape) for a in args if isinstance(a, Tensor)]
        self.gathers += name == "index_select"
        return function(*args, **(kwargs or {}))

    def sizes(self) -> set[int]:
        return {size for shape in self.shapes for size in shape}


def session_of(model: Any, *prompts: list[int], stand_in: Any = None) -> HfSession:
    backend = HfBackend(model, tiny_tokenizer(), "t")
    session = backend.start(RecordingPlan.of(RULE, stand_in))
    session.prefill(prompts)
    return session


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, PROMPT[:3]]])
def test_products_have_the_size_of_the_core_set(family: str, prompts: list[list[int]]) -> None:
    session = session_of(make(family), *prompts)
    full, small = (2 * D, 2 * K) if family == "phi3" else (D, K)
    with Products() as dense:
        session.fork().decode([[1]] * len(prompts))
    assert {full, D} <= dense.sizes()
    session.select(RULE)
    with Products() as seen:
        session.decode([[1]] * len(prompts))
        session.decode([[1, 2, 3]] * len(prompts), Phase.SCORE)
    assert {small, K} <= seen.sizes()
    assert not {full, D} & seen.sizes()
    assert not seen.gathers


def test_weights_are_gathered_once_a_request() -> None:
    model = make()
    model.generation_config.eos_token_id = None
    with sparse(model, RULE), Products() as seen:
        model.generate(torch.tensor([PROMPT]), max_new_tokens=6)
        gathers = seen.gathers
        # gate, up and down of each layer; once a call, however many tokens follow
        assert gathers == 3 * 3
        model.generate(torch.tensor([PROMPT]), max_new_tokens=2)
        assert seen.gathers == 2 * gathers


def test_the_compact_weights_are_the_sorted_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = make("opt"), []
    own: Callable[..., Any] = choose_module.compact_mlp
    monkeypatch.setattr(
        choose_module, "compact_mlp", lambda *a: made.append((a[0].index, own(*a))) or made[-1][1]
    )
    session = session_of(model, PROMPT)
    (choice,) = session.select(RULE)
    assert [layer for layer, _ in made] == [0, 1, 2]
    for layer, compact in made:
        index = choice.core_set.layers[layer].long()
        assert (index[1:] > index[:-1]).all()
        fc1, fc2 = model.model.decoder.layers[layer].fc1, down(model, layer)
        assert torch.equal(compact.inputs[0].weight, fc1.weight[index])
        assert torch.equal(compact.inputs[0].bias, fc1.bias[index])
        assert torch.equal(compact.output.weight, fc2.weight[:, index])
        assert torch.equal(compact.output.bias, fc2.bias)
        for part in (compact.inputs[0].weight, compact.output.weight):
            assert part.is_contiguous()
            assert part.data_ptr() not in (fc1.weight.data_ptr(), fc2.weight.data_ptr())


def test_dense_layers_and_full_budgets_are_not_copied() -> None:
    rule = Stability(beta=0.4, dense_layers=(0,), budgets={2: 1.0})
    session = session_of(make(), PROMPT)
    with Products() as seen:
        (choice,) = session.select(rule)
        session.decode([[1]])
    assert seen.gathers == 3
    assert {D, K} <= seen.sizes()
    assert choice.core_set.layers[1].numel() == K


def test_a_stand_in_adds_two_thin_products() -> None:
    rank = 3
    session = session_of(make(), PROMPT, stand_in=Linear(rank=rank))
    session.select(RULE, Linear(rank=rank))
    with Products() as seen:
        session.decode([[1]])
    thin = [s for s in seen.shapes if rank in s and s != (1, rank)]
    assert len(thin) == 2 * 3
    assert D not in seen.sizes()


def test_the_phase_is_stated_not_guessed() -> None:
    """A one-token prefill is dense, a one-token continuation sparse, a long SCORE pass too."""
    session = HfBackend(make(), tiny_tokenizer(), "t").start(RecordingPlan.of(RULE))
    with Products() as seen:
        session.prefill([[5]])
    assert D in seen.sizes()
    session.select(RULE)
    for ids, phase in (([[7]], Phase.DECODE), ([[7]], Phase.SCORE), ([[7, 8, 9]], Phase.SCORE)):
        with Products() as seen:
            session.decode(ids, phase)
        assert D not in seen.sizes()
    with Products() as seen:
        session.prefill([[5]])  # a further turn
    assert D in seen.sizes()
    assert session.evidence()[0].tokens == 2


def test_the_prefill_of_generate_is_dense_and_its_decode_is_not() -> None:
    model = make()
    model.generation_config.eos_token_id = None
    passes: list[set[int]] = []

    class Watch(Products):
        pass

    with sparse(model, Random(beta=0.4)):
        own = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with Watch() as seen:
                out = own(*args, **kwargs)
            passes.append(seen.sizes())
            return out

        model.forward = forward
        model.generate(torch.tensor([[5]]), max_new_tokens=4)
        del model.forward
    assert [D in sizes for sizes in passes] == [True, False, False, False]
    assert [K in sizes for sizes in passes] == [False, True, True, True]
