"""What a model costs to read, and how it is told from others."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from coreinfer.core.coreset import CoreSet
from coreinfer.models.mlp import fingerprint, mlp_layers, read_cost
from tests.hf.reference import down_weight
from tests.tiny import CONFIGS, VOCAB, tiny_model

d, D, L, HEADS = 32, 48, 3, 4
HEAD_DIM, KV = 8, 2
ATTENTION = d * d + 2 * KV * HEAD_DIM * d + d * d  # q, k and v, o of a llama


def cost(model: PreTrainedModel) -> tuple[int, int, tuple[int, ...]]:
    found = read_cost(model, mlp_layers(model))
    assert found.num_neurons == (D,) * L
    return found.shared, found.dense, found.per_neuron


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_llama(dtype: torch.dtype, tied: bool) -> None:
    size = dtype.itemsize
    model = tiny_model("llama", tie_word_embeddings=tied, dtype=dtype)
    # The head is read whole. Untied, one row of the input embedding is read besides; tied, that
    # row is one of the head's.
    norms = L * 2 * d + d
    shared = size * (VOCAB * d + (0 if tied else d) + L * ATTENTION + norms)
    per_neuron = size * 3 * d
    assert cost(model) == (shared, shared + L * D * per_neuron, (per_neuron,) * L)


def test_llama_with_biases() -> None:
    model = tiny_model("llama", mlp_bias=True, attention_bias=True)
    biases = L * (d + 2 * KV * HEAD_DIM + d + d)  # q, k and v, o, and the down projection's
    shared = 4 * (VOCAB * d + d + L * ATTENTION + L * 2 * d + d + biases)
    per_neuron = 4 * (3 * d + 2)
    assert cost(model) == (shared, shared + L * D * per_neuron, (per_neuron,) * L)


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2(tied: bool) -> None:
    model = tiny_model("gpt2", tie_word_embeddings=tied)
    attention = d * 3 * d + 3 * d + d * d + d
    norms = (L * 2 + 1) * 2 * d
    # One row of the learned positions.
    tables = VOCAB * d + (0 if tied else d) + d
    shared = 4 * (tables + L * (attention + d) + norms)  # + d: the down projection's bias
    per_neuron = 4 * (2 * d + 1)
    assert cost(model) == (shared, shared + L * D * per_neuron, (per_neuron,) * L)


def test_opt_with_a_narrow_embedding() -> None:
    narrow = 20
    model = tiny_model("opt", word_embed_proj_dim=narrow)
    attention = 4 * (d * d + d)
    norms = (L * 2 + 1) * 2 * d
    tables = VOCAB * narrow + d + 2 * narrow * d  # head, one position, projections in and out
    shared = 4 * (tables + L * (attention + d) + norms)
    per_neuron = 4 * (2 * d + 1)
    assert cost(model) == (shared, shared + L * D * per_neuron, (per_neuron,) * L)


def test_phi3() -> None:
    model = tiny_model("phi3", tie_word_embeddings=False)
    shared = 4 * (VOCAB * d + d + L * ATTENTION + L * 2 * d + d)
    per_neuron = 4 * 3 * d  # the fused rows are two
    assert cost(model) == (shared, shared + L * D * per_neuron, (per_neuron,) * L)


def test_falcon() -> None:
    model = tiny_model("falcon", bias=False, multi_query=True, tie_word_embeddings=True)
    attention = d * (d + 2 * HEAD_DIM) + d * d
    norms = (L + 1) * 2 * d  # one a layer: attention and MLP are parallel
    shared = 4 * (VOCAB * d + L * attention + norms)
    per_neuron = 4 * 2 * d
    assert cost(model) == (shared, shared + L * D * per_neuron, (per_neuron,) * L)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_core_set_saves_its_neurons_and_nothing_else(family: str) -> None:
    model = tiny_model(family)
    found = read_cost(model, mlp_layers(model))
    every = CoreSet({}, (D,) * L)
    some = CoreSet({1: torch.arange(10, dtype=torch.int32)}, (D,) * L)
    assert found.sparse(every) == found.dense
    assert found.dense - found.sparse(some) == (D - 10) * found.per_neuron[1]
    assert found.shared > 0


@pytest.mark.parametrize("family", CONFIGS)
def test_the_view_is_that_of_the_weights(family: str) -> None:
    model = tiny_model(family)
    for index, layer in enumerate(mlp_layers(model)):
        weight = down_weight(model, index)
        assert (layer.index, layer.num_neurons, layer.hidden_size) == (index, D, d)
        assert layer.output.weight.data_ptr() == weight.data_ptr()  # a view, not a copy
        assert torch.equal(layer.output.weight, weight)
        norms = weight.double().square().sum(dim=0).sqrt()
        torch.testing.assert_close(layer.column_norms(), norms, rtol=1e-6, atol=0)
        assert sum(linear.weight.shape[0] for linear in layer.inputs) in (D, 2 * D)


def print_of(model: PreTrainedModel) -> str:
    return fingerprint(model, mlp_layers(model))


@pytest.mark.parametrize("family", CONFIGS)
def test_the_fingerprint_is_that_of_the_checkpoint(family: str) -> None:
    """In float32 and bfloat16 alike, whether or not bfloat16 can hold the weights exactly."""
    wide = tiny_model(family)
    narrow = tiny_model(family, dtype=torch.bfloat16)
    assert not torch.equal(down_weight(wide, 0), down_weight(narrow, 0).float())
    assert print_of(wide) == print_of(narrow) == print_of(narrow.float())


@pytest.mark.parametrize("family", CONFIGS)
def test_the_fingerprint_tells_models_apart(family: str) -> None:
    prints = {print_of(tiny_model(family, seed=seed)) for seed in range(4)}
    changed = tiny_model(family)
    down_weight(changed, 2)[0, 0] += 1
    prints |= {print_of(changed)}
    assert len(prints) == 5


def test_the_fingerprint_tells_architectures_apart() -> None:
    assert len({print_of(tiny_model(family)) for family in CONFIGS}) == len(CONFIGS)


def test_the_fingerprint_is_the_same_everywhere() -> None:
    """Core sets and stores travel: the value is pinned, so no process or release may change it."""
    model = tiny_model("llama")
    for index in range(L):
        weight = down_weight(model, index)
        weight.copy_(torch.arange(weight.numel()).view_as(weight) / 1000 - index)
    assert print_of(model) == "08ac13d78cbb4527da0547b41a64b0f5adebbfd969ef157dc90680865e92b127"
