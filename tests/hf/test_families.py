"""Every family, in odd shapes: dense is exactly dense, sparse is the full product with zeros."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from coreinfer.backends.hf.session import HfBackend
from coreinfer.backends.hf.sparse import sparse
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Selector, Stability
from tests.hf.reference import activations, core_set, counts, sparse_greedy
from tests.tiny import BOS, CONFIGS, tiny_model, tiny_tokenizer

ODD = {"intermediate_size": 37, "num_hidden_layers": 1, "num_key_value_heads": 1}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in CONFIGS),
    *((f, ODD) for f in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "phi3")),
    ("llama", {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 4, "hidden_act": "relu"}),
    ("mistral", {"sliding_window": 7}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("gemma", {"tie_word_embeddings": False}),
    ("gemma2", {"sliding_window": 7, "intermediate_size": 53}),
    ("gemma3_text", {"sliding_window": 7, "num_hidden_layers": 7}),
    ("phi3", {"tie_word_embeddings": True, "sliding_window": 7}),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"word_embed_proj_dim": 20, "ffn_dim": 37, "do_layer_norm_before": False}),
    ("opt", {"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"}),
    ("gpt2", {"n_inner": None, "n_layer": 1, "tie_word_embeddings": False}),
    ("gpt_neox", {"use_parallel_residual": False, "intermediate_size": 37}),
    ("gpt_neox", {"use_parallel_residual": True, "tie_word_embeddings": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    ("falcon", {"parallel_attn": False, "multi_query": False, "ffn_hidden_size": 37}),
    ("falcon", {"alibi": True, "bias": False}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
]
PROMPT = [5, 77, 200, 13, 13, 8, 250, 99, 41, 5, 77]
STEPS = 8

each_variant = pytest.mark.parametrize(
    ("family", "changes"), VARIANTS, ids=[f"{f}-{'-'.join(c) or 'plain'}" for f, c in VARIANTS]
)


def make(family: str, changes: dict[str, Any], **options: Any) -> PreTrainedModel:
    model = tiny_model(family, **changes, **options)
    model.generation_config.eos_token_id = None
    return model


def generate(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def session_greedy(
    model: PreTrainedModel, prompt: list[int], selector: Selector
) -> tuple[list[int], torch.Tensor]:
    """The same through a session."""
    session = HfBackend(model, tiny_tokenizer(), "tiny").start(RecordingPlan.of(selector))
    logits = [session.prefill([prompt])[0]]
    session.select(selector)
    tokens = [int(logits[0].argmax())]
    while len(tokens) < STEPS:
        logits.append(session.decode([tokens[-1:]])[0, -1])
        tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits)


@each_variant
def test_keeping_everything_is_exactly_dense(family: str, changes: dict[str, Any]) -> None:
    model = make(family, changes)
    tokens, logits = generate(model, PROMPT)
    assert not torch.allclose(logits[-2], logits[-1])  # the answer is no standstill
    every = tuple(range(model.config.num_hidden_layers))
    for selector in (Stability(beta=1.0), Stability(beta=0.3, dense_layers=every)):
        with sparse(model, selector) as run:
            sparse_tokens, sparse_logits = generate(model, PROMPT)
            assert run.density == 1.0
        assert sparse_tokens == tokens
        assert torch.equal(sparse_logits, logits)
        session_tokens, session_logits = session_greedy(model, PROMPT, selector)
        assert session_tokens == tokens
        assert torch.equal(session_logits, logits)


@each_variant
def test_sparse_decoding_is_the_full_product_with_zeros(
    family: str, changes: dict[str, Any]
) -> None:
    model = make(family, changes)
    alpha, beta = 0.3, 0.4
    kept = {i: core_set(h, alpha, beta) for i, (_, h) in enumerate(activations(model, PROMPT))}
    tokens, logits = sparse_greedy(model, PROMPT, kept, STEPS)
    assert not torch.allclose(logits[1:], generate(model, PROMPT)[1][1:], atol=1e-3)
    selector = Stability(alpha=alpha, beta=beta)
    with sparse(model, selector) as run:
        found, found_logits = generate(model, PROMPT)
        layers = run.choices[0].core_set.layers
    assert {i: index.tolist() for i, index in layers.items()} == kept
    assert found == tokens
    torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-4)
    in_session, session_logits = session_greedy(model, PROMPT, selector)
    assert in_session == tokens
    torch.testing.assert_close(session_logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("count_bos", [False, True])
def test_statistics_are_those_of_a_hook(family: str, count_bos: bool) -> None:
    model = make(family, {})
    prompt = [BOS, *PROMPT]
    selector = Stability(alpha=0.3, count_bos=count_bos)
    plan = replace(RecordingPlan.of(selector), input_sums=True)
    session = HfBackend(model, tiny_tokenizer(), "t").start(plan)
    session.prefill([prompt])
    layers = session.evidence()[0].layers
    for stats, (x, h) in zip(layers, activations(model, prompt), strict=True):
        if not count_bos:
            x, h = x[1:], h[1:]
        found, sums = counts(h, 0.3)
        wide = h.double()
        assert stats.tokens == len(h)
        assert stats.counts.tolist() == found
        torch.testing.assert_close(stats.positive_sum.tolist(), sums)
        torch.testing.assert_close(stats.square_sum, wide.square().sum(dim=0))
        units = wide / wide.norm(dim=1, keepdim=True)
        torch.testing.assert_close(stats.unit_square_sum, units.square().sum(dim=0))
        torch.testing.assert_close(stats.input_sum, x.double().sum(dim=0))


@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16(family: str) -> None:
    model = make(family, {}, dtype=torch.bfloat16)
    tokens, logits = generate(model, PROMPT)
    with sparse(model, Stability(beta=1.0)):
        all_tokens, all_logits = generate(model, PROMPT)
    assert all_tokens == tokens
    assert torch.equal(all_logits, logits)
    kept = {i: core_set(h, 0.3, 0.4) for i, (_, h) in enumerate(activations(model, PROMPT))}
    with sparse(model, Stability(alpha=0.3, beta=0.4)) as run:
        model.generate(torch.tensor([PROMPT]), max_new_tokens=1)
        layers = run.choices[0].core_set.layers
        assert {i: index.tolist() for i, index in layers.items()} == kept
        # Teacher-forced, so that one rounded argmax does not send the two apart.
    tokens, logits = sparse_greedy(model, PROMPT, kept, STEPS)
    selector = Stability(alpha=0.3, beta=0.4)
    session = HfBackend(model, tiny_tokenizer(), "t").start(RecordingPlan.of(selector))
    rows = [session.prefill([PROMPT])[0]]
    session.select(selector)
    rows += [session.decode([[token]])[0, -1] for token in tokens[:-1]]
    error = (torch.stack(rows).float() - logits.float()).abs().max()
    assert error <= 0.05 * logits.float().abs().max()
