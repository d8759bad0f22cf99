"""Tiny models written as GGUF, by an independent conversion: llama.cpp's names and layouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

from tests.tiny import BOS, EOS, PAD, tiny_model

Arrays = dict[str, NDArray[np.float32]]

CHAT = "{% for m in messages %}<bos>{{ m.content }}<eos>{% endfor %}"

_LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA2 = {
    **_LLAMA,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "transformer.h": "blk",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_FALCON = {
    "transformer.word_embeddings": "token_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "transformer.h": "blk",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "input_layernorm": "attn_norm",
    "ln_attn": "attn_norm_2",
    "ln_mlp": "attn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}

# GGUF architecture -> (model_type, changes to the tiny configuration, names)
ARCHITECTURES: Mapping[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "llama": ("llama", {}, _LLAMA),
    "qwen2": ("qwen2", {}, _LLAMA),
    "qwen3": ("qwen3", {}, _LLAMA),
    "phi3": ("phi3", {}, _LLAMA),
    "gemma": ("gemma", {}, _LLAMA),
    "gemma2": ("gemma2", {}, _GEMMA2),
    "gemma3": ("gemma3_text", {}, _GEMMA2),
    "gpt2": ("gpt2", {}, _GPT2),
    "falcon": ("falcon", {"multi_query": True, "bias": False}, _FALCON),
}


def gguf_model(architecture: str, **changes: Any) -> PreTrainedModel:
    """A tiny model that GGUF can express."""
    model_type, fixed, _ = ARCHITECTURES[architecture]
    model = tiny_model(model_type, **{**fixed, **changes})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight") or ".ln_" in name:  # so that a lost norm shows
                weight.add_(torch.linspace(-0.2, 0.2, weight.numel()))
    return model


def gguf_arrays(model: PreTrainedModel, architecture: str) -> Arrays:
    """The model's tensors as a GGUF file names and lays them out."""
    table = ARCHITECTURES[architecture][2]
    tied = model.config.tie_word_embeddings
    arrays: Arrays = {}
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stored = _renamed(name, table)
        arrays[stored] = _stored(stored, tensor.float().numpy(), model.config, architecture)
    return arrays


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for theirs, ours in table.items():  # whole dotted parts only
        name = f".{name}".replace(f".{theirs}.", f".{ours}.").removeprefix(".")
    return name


def _stored(
    name: str, values: NDArray[np.float32], config: Any, architecture: str
) -> NDArray[np.float32]:
    if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
        return _interleave(values, heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + np.float32(1)
    if architecture == "gpt2" and values.ndim == 2 and name.startswith("blk."):
        return np.ascontiguousarray(values.T)
    if architecture == "falcon" and name.endswith("attn_qkv.weight"):
        return _split_groups(values, config)
    return values


def _interleave(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Row i and row i + half of every head side by side."""
    out, width = np.empty_like(values), len(values) // heads
    for head in range(heads):
        for i in range(width // 2):
            out[head * width + 2 * i] = values[head * width + i]
            out[head * width + 2 * i + 1] = values[head * width + width // 2 + i]
    return out


def _split_groups(values: NDArray[np.float32], config: Any) -> NDArray[np.float32]:
    """Groups of (queries, key, value) taken apart: all queries, all keys, all values."""
    groups = config.num_kv_heads if config.new_decoder_architecture else 1
    width = config.hidden_size // config.num_attention_heads
    each = config.num_attention_heads // groups
    parts: list[list[NDArray[np.float32]]] = [[], [], []]
    row = 0
    for _ in range(groups):
        for part, count in zip(parts, (each, 1, 1), strict=True):
            part.append(values[row : row + count * width])
            row += count * width
    return np.concatenate([array for part in parts for array in part])


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and merges: every byte, one merge, and the special tokens."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += ["<bos>", "<eos>", "<pad>", "Ġt"]
    return tokens, [1] * 256 + [3] * 3 + [1], ["Ġ t"]


def gguf_metadata(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    """What the file states of the model, without the architecture's prefix."""
    config = model.config
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "context_length": getattr(config, "max_position_embeddings", 512),
    }
    if architecture == "gpt2":
        found |= {"feed_forward_length": config.n_inner}
        found |= {"attention.layer_norm_epsilon": config.layer_norm_epsilon}
        return found
    if architecture == "falcon":
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
        found |= {"feed_forward_length": config.ffn_hidden_size}
        found |= {"attention.layer_norm_epsilon": config.layer_norm_epsilon}
        return found | {"attention.head_count_kv": groups}
    rope = config.rope_parameters
    found |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    if getattr(config, "head_dim", None):
        found["attention.key_length"] = config.head_dim
    if architecture in ("gemma2", "gemma3"):
        found["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        found["attn_logit_softcapping"] = config.attn_logit_softcapping
        found["final_logit_softcapping"] = config.final_logit_softcapping
    return found


def write_gguf(
    path: Path,
    architecture: str,
    arrays: Arrays,
    metadata: Mapping[str, Any],
    *,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    tokenizer: bool = True,
    pre: str = "gpt-2",
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write the file with gguf's own writer; `kinds` quantises tensors, `extra` are whole keys."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, f"{architecture}.{key}", value)
    if tokenizer:
        tokens, types, merges = vocabulary()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(BOS)
        writer.add_eos_token_id(EOS)
        writer.add_pad_token_id(PAD)
        writer.add_chat_template(CHAT)
    for key, value in (extra or {}).items():
        _add(writer, key, value)
    for name, values in arrays.items():
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_uint32(key, value)


def tiny_gguf(path: Path, architecture: str = "llama", **options: Any) -> PreTrainedModel:
    """Write a tiny model; return the model that the file holds."""
    model = gguf_model(architecture)
    write_gguf(
        path,
        architecture,
        gguf_arrays(model, architecture),
        gguf_metadata(model, architecture),
        **options,
    )
    return model
