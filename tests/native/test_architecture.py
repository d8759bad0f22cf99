"""DecoderConfig: what is read from a configuration, what is refused, and its tensors."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from coreinfer.backends.native.architecture import MODEL_TYPES, DecoderConfig
from coreinfer.backends.native.tensors import Role, tensor_plans
from coreinfer.errors import UserError
from tests.tiny import CONFIGS, tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def hf_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**{**CONFIGS[model_type], **changes})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_json_round_trip(model_type: str) -> None:
    config = DecoderConfig.from_hf(hf_config(model_type))
    assert DecoderConfig.from_json(config.to_json()) == config


def test_variants_of_the_families() -> None:
    llama = DecoderConfig.from_hf(hf_config("llama"))
    assert (llama.family, llama.norm, llama.gated, llama.qk_norm) == ("llama", "rms", True, False)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.tied) == (False,) * 4
    qwen2 = DecoderConfig.from_hf(hf_config("qwen2"))
    assert (qwen2.qkv_bias, qwen2.o_bias) == (True, False)
    assert DecoderConfig.from_hf(hf_config("qwen3")).qk_norm
    opt = DecoderConfig.from_hf(hf_config("opt"))
    assert (opt.norm, opt.activation, opt.gated, opt.rope) == ("layer", "relu", False, None)
    assert (opt.position_offset, opt.tied, opt.num_kv_heads) == (2, True, 4)
    biased = DecoderConfig.from_hf(hf_config("llama", attention_bias=True))
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, False)
    assert opt.mlp_bias


def test_a_sliding_window_bounds_the_context() -> None:
    assert DecoderConfig.from_hf(hf_config("mistral", sliding_window=100)).context_length == 100
    assert DecoderConfig.from_hf(hf_config("mistral", sliding_window=9999)).context_length == 512
    idle = hf_config("qwen2", sliding_window=100, use_sliding_window=False)
    assert DecoderConfig.from_hf(idle).context_length == 512
    some = hf_config("qwen2", sliding_window=100, use_sliding_window=True, max_window_layers=1)
    assert DecoderConfig.from_hf(some).context_length == 100


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rotary_frequencies_are_those_of_transformers(kind: str) -> None:
    scaling: dict[str, Any] = {
        "default": {"rope_type": "default", "rope_theta": 1e4},
        "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        "llama3": LLAMA3,
    }[kind]
    config = hf_config("llama", rope_parameters=scaling, head_dim=64)
    rope = DecoderConfig.from_hf(config).rope
    assert rope is not None
    if kind == "default":
        expected = 1 / 1e4 ** (torch.arange(0, 64, 2).float() / 64)
    else:
        expected, attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
        assert attention_scaling == 1
    torch.testing.assert_close(rope.inverse_frequencies(64), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("model_type", "changes", "says"),
    [
        ("gemma", {}, "gemma"),
        ("gpt2", {}, "gpt2"),
        ("llama", {"hidden_act": "mish"}, "mish"),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_type": "dynamic"}}, "dynamic"),
        ("llama", {"mlp_bias": True}, "gated MLP with biases"),
        ("opt", {"do_layer_norm_before": False}, "350m"),
        ("opt", {"word_embed_proj_dim": 16}, "projected"),
        ("opt", {"_remove_final_layer_norm": True}, "norms"),
    ],
)
def test_what_is_not_done_is_refused_by_name_and_the_hf_backend_named(
    model_type: str, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as error:
        DecoderConfig.from_hf(hf_config(model_type, **changes))
    assert "--backend hf" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_tensors_are_those_of_the_model_each_used_once(
    model_type: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(model_type, **changes)
    state = model.state_dict()
    plans = tensor_plans(DecoderConfig.from_hf(model.config))
    assert len({plan.name for plan in plans}) == len(plans)
    sources = [source for plan in plans for source in plan.sources]
    assert len(set(sources)) == len(sources)
    assert state.keys() - set(sources) == (
        {"lm_head.weight"} if plans[0].name != "embed" else set()
    )
    for plan in plans:
        parts = [state[source] for source in plan.sources]
        match plan.role:
            case Role.MLP:
                assert {tuple(part.shape) for part in parts[:-1]} == {plan.shape}
                assert tuple(parts[-1].t().shape) == plan.shape
            case _:
                assert tuple(torch.cat(parts).shape) == plan.shape


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin1")))
def test_a_damaged_description_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="damaged"):
        DecoderConfig.from_json(text)


@given(st.data())
def test_every_field_of_the_wrong_type_is_refused(data: st.DataObject) -> None:
    values = json.loads(DecoderConfig.from_hf(hf_config("llama")).to_json())
    name = data.draw(st.sampled_from([f.name for f in dataclasses.fields(DecoderConfig)]))
    values[name] = data.draw(st.sampled_from([[], {}, {"a": 1}, [1], -(2**40)]))
    if name == "norm_eps" and isinstance(values[name], int):
        values[name] = "small"
    if name == "bos_token_id" and isinstance(values[name], int):
        values[name] = "two"
    if name == "position_offset" and isinstance(values[name], int):
        values[name] = 1.5
    with pytest.raises(UserError):
        DecoderConfig.from_json(json.dumps(values))
