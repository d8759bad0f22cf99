"""The native decoder against transformers on the same stored weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coreinfer.backends.native.weights import weights_from
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.generation import generate
from coreinfer.runtime.sampling import SamplingParams
from coreinfer.selectors import (
    SELECTORS,
    Auto,
    Dense,
    Impact,
    Selector,
    Similarity,
    Stability,
    Static,
)
from coreinfer.standins import Linear, Mean, StandIn
from tests.native.pairs import FORMATS, ODD, VARIANTS, Pair, tiny_pair
from tests.semantics.stores import random_store
from tests.tiny import BOS, tiny_model

PROMPTS = [
    [BOS, 5, 77, 200, 13, 13, 8, 250, 99, 41, 5, 77, 30, 31, 32, 180, 4],
    [90, 91, 200],
    [7],
]
RULE = Stability(alpha=0.3, beta=0.4)
# Of activations to one or two digits of eight bits, relative, through three layers.
ROUNDING = {"int4": 0.06, "int8": 1e-3}
close = torch.testing.assert_close


def near(got: Tensor, want: Tensor, pair: Pair, tolerance: float) -> None:
    if pair.native.dtype == "bfloat16":
        close(got, want, rtol=tolerance, atol=tolerance)
    else:
        assert (got - want).norm() < ROUNDING[pair.native.dtype] * want.norm()


def same_answers(pair: Pair, rule: Selector, stand_in: StandIn | None, tolerance: float) -> None:
    """Prefill, core sets and four decoded tokens, teacher-forced, on both backends."""
    plan = RecordingPlan.of(rule, stand_in)
    native, hf = pair.native.start(plan), pair.hf.start(plan)
    near(native.prefill(PROMPTS), hf.prefill(PROMPTS), pair, tolerance)
    ours, theirs = native.select(rule, stand_in), hf.select(rule, stand_in)
    for one, two in zip(ours, theirs, strict=True):
        assert one.core_set.layers.keys() == two.core_set.layers.keys()
        for layer, kept in one.core_set.layers.items():
            assert kept.tolist() == two.core_set.layers[layer].tolist()
        assert one.core_set.model_fingerprint == pair.native.fingerprint
    for ids in ([[1], [2], [3]], [[40], [50], [60]], [[9], [9], [9]]):
        near(native.decode(ids), hf.decode(ids), pair, tolerance)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_and_sparse_logits_are_those_of_transformers(variant: str, dtype: str) -> None:
    pair = tiny_pair(variant, dtype)
    same_answers(pair, Dense(), None, 1e-4)
    same_answers(pair, RULE, None, 1e-4)


@pytest.mark.parametrize("stand_in", [Mean(), Linear(rank=4)])
@pytest.mark.parametrize("variant", ["llama", "biased", "opt"])
def test_stand_ins_are_those_of_hf(variant: str, stand_in: StandIn) -> None:
    same_answers(tiny_pair(variant), RULE, stand_in, 1e-2)  # its maps are of eight bits


def test_sizes_that_nothing_divides() -> None:
    pair = tiny_pair("llama", changes=ODD)
    same_answers(pair, RULE, None, 1e-4)
    odd_opt = {"hidden_size": 36, "ffn_dim": 51, "word_embed_proj_dim": 36, "vocab_size": 263}
    same_answers(tiny_pair("opt", changes=odd_opt), RULE, None, 1e-4)


RULES = [
    name for name in SELECTORS if name not in ("similarity", "auto", "static", "oracle", "residual")
]  # those need a store, or the future


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_chooses_the_same_core_sets(name: str, dtype: str) -> None:
    for variant in ("llama", "opt"):
        same_answers(tiny_pair(variant, dtype), SELECTORS[name](), None, 1e-3)


@pytest.mark.parametrize("core", [False, True], ids=["hidden", "core"])
@pytest.mark.parametrize("variant", ["llama", "opt"])
def test_rules_with_clusters_choose_the_same_core_sets(variant: str, core: bool) -> None:
    pair = tiny_pair(variant)
    sizes, hidden = pair.native.weights.num_neurons, pair.native.weights.config.hidden_size
    clusters = random_store(
        sizes=sizes, hidden=hidden, core=core, model_fingerprint=pair.hf.fingerprint
    )
    rules = [
        Static(clusters=clusters, beta=0.4),
        Similarity(clusters=clusters, gamma=0.3),
        Auto(clusters=clusters, min_similarity=-1.0),
        Auto(clusters=clusters, min_similarity=-1.0, mode="choice", min_stability=1.0),
    ]
    for rule in rules:
        same_answers(pair, rule, None, 1e-3)


def test_greedy_answers_are_the_same_tokens() -> None:
    pair = tiny_pair("llama")
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    answers = [
        [piece.record.token_ids for piece in generate(backend, PROMPTS, RULE, params=params)
         if piece.record is not None]
        for backend in (pair.native, pair.hf)
    ]  # fmt: skip
    assert answers[0] == answers[1]
    assert any(len(set(tokens)) > 2 for tokens in answers[0])


def test_keeping_everything_is_dense() -> None:
    backend = tiny_pair("llama", "int8").native
    everything = Impact(beta=1.0)
    logits = []
    for rule in (everything, Dense()):
        session = backend.start(RecordingPlan.of(everything))
        session.prefill(PROMPTS)
        session.select(rule)
        logits.append(session.decode([[1], [2], [3]]))
    assert torch.equal(*logits)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_narrow_compute_chooses_nearly_the_same_neurons(compute: torch.dtype) -> None:
    """Jaccard of at least 0.8 a layer with 48 neurons, where one neuron is 0.1 of a set."""
    pair = tiny_pair("llama", compute=compute, cache_dtype=torch.bfloat16)
    plan = RecordingPlan.of(RULE)
    native, hf = pair.native.start(plan), pair.hf.start(plan)
    close(native.prefill(PROMPTS), hf.prefill(PROMPTS), rtol=0.1, atol=0.1)
    one, two = native.select(RULE)[0].core_set, hf.select(RULE)[0].core_set
    for layer, kept in one.layers.items():
        ours, theirs = set(kept.tolist()), set(two.layers[layer].tolist())
        assert len(ours & theirs) / len(ours | theirs) >= 0.8


def test_a_product_that_overflows_float16_is_computed_again() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= 3e4
        layer.mlp.down_proj.weight.data /= 3e4
    weights = weights_from(model, FORMATS["bfloat16"])
    from coreinfer.backends.native.backend import NativeBackend
    from tests.tiny import tiny_tokenizer

    logits = [
        NativeBackend(weights, tiny_tokenizer(), compute=compute, cache_dtype=torch.float32)
        .start(RecordingPlan())
        .prefill(PROMPTS)
        for compute in (torch.float16, torch.float32)
    ]
    close(*logits, rtol=0.05, atol=0.05)


def damaged(change: Any) -> Any:
    model = tiny_model("llama")
    change(model)
    return model


def test_weights_that_cannot_be_stored_are_refused_by_name() -> None:
    def nan(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan

    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        weights_from(damaged(nan), FORMATS["int8"])

    def infinite_norm(model: Any) -> None:
        model.model.norm.weight.data[0] = torch.inf

    with pytest.raises(UserError, match=r"model\.norm\.weight.*not finite"):
        weights_from(damaged(infinite_norm), FORMATS["bfloat16"])
    with pytest.raises(UserError, match=r"q_proj.*39"):
        weights_from(tiny_model("llama", **ODD), FORMATS["int4"])
    with pytest.raises(UserError, match="--backend hf"):
        weights_from(tiny_model("gemma"), FORMATS["bfloat16"])


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_bytes_of_a_token_are_those_of_the_stored_weights(dtype: str) -> None:
    pair = tiny_pair("llama", dtype)
    d, neurons, vocab, layers, kv = 32, 48, 260, 3, 16
    bits = {"bfloat16": 16, "int8": 8 + 16 / 16, "int4": 4 + 32 / 16}[dtype]
    cost = pair.native.cost
    neuron = 3 * d * bits / 8
    attention = (d * (d + 2 * kv) + d * d) * bits / 8
    norms = (2 * layers + 1) * d * 4
    assert cost.per_neuron == (neuron,) * layers
    head = d * (8 + 16 / 16 if dtype == "int4" else bits) / 8  # never fewer than eight bits
    assert cost.shared == layers * attention + norms + vocab * head + d * 2
    session = pair.native.start(RecordingPlan.of(RULE, Linear(rank=4)))
    session.prefill(PROMPTS[:1])
    choice = session.select(RULE, Linear(rank=4))[0]
    assert choice.stand_in_bytes == layers * (d * 4 + 2 * 4 * d * 8.5 / 8)
    kept = layers * round(0.4 * neurons) * neuron
    assert cost.sparse(choice.core_set) == cost.shared + kept


def test_the_bytes_of_biased_and_tied_models() -> None:
    biased, tied = tiny_pair("biased").native.cost, tiny_pair("smollm2").native.cost
    plain = tiny_pair("llama").native.cost
    assert biased.shared - plain.shared == 3 * (32 + 2 * 16 + 32) * 4
    untied = tiny_pair("smollm2", changes={"tie_word_embeddings": False}).native.cost
    assert untied.shared - tied.shared == 32 * 2  # one row more
    opt = tiny_pair("opt").native
    assert "embed" not in opt.weights.tensors
    assert opt.cost.per_neuron[0] == 2 * 32 * 2 + 4
