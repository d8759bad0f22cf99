"""The fused step, native and twin, against transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from coreinfer.kernels.decode import decode_step
from coreinfer.kernels.decode_twin import decode_step_twin
from coreinfer.kernels.layout import PackedMlp
from coreinfer.kernels.packing import pack, pack_mlp
from coreinfer.kernels.weights import DecoderWeights, LayerWeights, Norm, Plan, Row
from tests.kernels.paths import NATIVE, using
from tests.kernels.test_decode import BFLOAT16, cache_of
from tests.tiny import tiny_model


def llama_from(model: PreTrainedModel) -> tuple[DecoderWeights, Plan]:
    """The weights of a transformers model of the Llama family, as they are."""
    config, state = model.config, model.state_dict()

    def packed(*names: str) -> Any:
        weight = torch.cat([state[f"{name}.weight"] for name in names])
        return pack(BFLOAT16.quantize(weight), weight.shape[1], BFLOAT16)

    layers, mlps = [], []
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        names = [f"{at}self_attn.{part}_proj" for part in "qkv"]
        biases = [state[f"{name}.bias"] for name in names if f"{name}.bias" in state]
        layers.append(
            LayerWeights(
                norm1=Norm(state[f"{at}input_layernorm.weight"]),
                norm2=Norm(state[f"{at}post_attention_layernorm.weight"]),
                qkv=packed(*names),
                o=packed(f"{at}self_attn.o_proj"),
                qkv_bias=torch.cat(biases) if biases else None,
                q_norm=state.get(f"{at}self_attn.q_norm.weight"),
                k_norm=state.get(f"{at}self_attn.k_norm.weight"),
            )
        )
        gate, up, down = (state[f"{at}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        records = torch.cat([BFLOAT16.quantize(part) for part in (gate, up, down.t())], dim=1)
        mlps.append(pack_mlp(records, config.hidden_size, BFLOAT16, gated=True))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = DecoderWeights(
        layers=layers,
        final_norm=Norm(state["model.norm.weight"]),
        head=packed("lm_head"),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        norm_eps=config.rms_norm_eps,
        activation="silu",
        embed=state["model.embed_tokens.weight"].to(torch.bfloat16),
        inverse_frequencies=model.model.rotary_emb.inv_freq,
    )
    return weights, Plan(mlps, [None] * len(mlps))


def opt_from(model: PreTrainedModel) -> tuple[DecoderWeights, Plan]:
    """The same of an OPT model."""
    config, state = model.config, model.state_dict()

    def packed(*names: str) -> Any:
        weight = torch.cat([state[f"{name}.weight"] for name in names])
        return pack(BFLOAT16.quantize(weight), weight.shape[1], BFLOAT16)

    def norm(name: str) -> Norm:
        return Norm(state[f"{name}.weight"], state[f"{name}.bias"])

    layers: list[LayerWeights] = []
    mlps: list[PackedMlp] = []
    for i in range(config.num_hidden_layers):
        at = f"model.decoder.layers.{i}."
        names = [f"{at}self_attn.{part}_proj" for part in "qkv"]
        layers.append(
            LayerWeights(
                norm1=norm(f"{at}self_attn_layer_norm"),
                norm2=norm(f"{at}final_layer_norm"),
                qkv=packed(*names),
                o=packed(f"{at}self_attn.out_proj"),
                qkv_bias=torch.cat([state[f"{name}.bias"] for name in names]),
                o_bias=state[f"{at}self_attn.out_proj.bias"],
                mlp_out_bias=state[f"{at}fc2.bias"],
            )
        )
        into, out = state[f"{at}fc1.weight"], state[f"{at}fc2.weight"]
        records = torch.cat([BFLOAT16.quantize(part) for part in (into, out.t())], dim=1)
        bias = state[f"{at}fc1.bias"]
        mlps.append(
            pack_mlp(
                records, config.hidden_size, BFLOAT16, gated=False, in_bias=bias, skip_zeros=True
            )
        )
    weights = DecoderWeights(
        layers=layers,
        final_norm=norm("model.decoder.final_layer_norm"),
        head=packed("lm_head"),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        norm_eps=1e-5,
        activation="relu",
        layer_norm=True,
        position=state["model.decoder.embed_positions.weight"],
    )
    return weights, Plan(mlps, [None] * len(mlps))


@pytest.mark.parametrize("path", [*NATIVE, None])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "opt"])
def test_a_step_is_what_transformers_computes(model_type: str, path: str | None) -> None:
    # Weights that bfloat16 holds exactly: nothing is rounded but in float32.
    model = tiny_model(model_type, dtype=torch.bfloat16).float()
    weights, plan = opt_from(model) if model_type == "opt" else llama_from(model)
    tokens = torch.tensor([[5, 9, 200, 13, 13, 77, 31]])
    with torch.no_grad():
        wanted = model(tokens).logits[0]
    cache = cache_of(weights)
    offset = 2 if model_type == "opt" else 0
    for step, token in enumerate(tokens[0].tolist()):
        rows = [Row(token, step + offset, step, plan, cache)]
        if path is None:
            found = decode_step_twin(weights, rows)
        else:
            with using(path):
                found = decode_step(weights, rows)
        torch.testing.assert_close(found[0], wanted[step], rtol=1e-4, atol=2e-4)
