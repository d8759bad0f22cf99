"""A tiny model on the native backend, and the same stored weights on transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from coreinfer.backends.hf.session import HfBackend
from coreinfer.backends.native.backend import NativeBackend
from coreinfer.backends.native.tensors import Role, format_of, tensor_plans
from coreinfer.backends.native.weights import NativeWeights, weights_from
from coreinfer.kernels.formats import WeightFormat
from tests.tiny import tiny_model, tiny_tokenizer

FORMATS = {
    "bfloat16": WeightFormat("bfloat16", 0),
    "int8": WeightFormat("int8", 16),
    "int4": WeightFormat("int4", 16),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> (model_type, what differs from the tiny configuration)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "smollm2": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 2, "head_dim": 16}),
    "biased": ("llama", {"attention_bias": True}),
    "gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "relu": ("llama", {"hidden_act": "relu"}),
    "mha": ("llama", {"num_key_value_heads": 4}),
    "mqa": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "opt": ("opt", {}),
    "opt-plain": ("opt", {"enable_bias": False, "activation_function": "gelu"}),
}
# Sizes that no group and no vector register divides.
ODD = {
    "hidden_size": 39,
    "intermediate_size": 51,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "vocab_size": 263,
}


@dataclass(frozen=True)
class Pair:
    """One model twice."""

    hf: HfBackend
    native: NativeBackend


def stored(model: PreTrainedModel, weights: NativeWeights) -> PreTrainedModel:
    """The model with the numbers that the native weights stand for, in float32."""
    model = model.float()
    state = model.state_dict()
    d = weights.config.hidden_size
    for plan in tensor_plans(weights.config):
        tensor = weights.tensors[plan.name]
        match plan.role:
            case Role.VECTOR:
                values = [tensor]
            case Role.MLP:
                parts = tensor.chunk(len(plan.sources), dim=1)
                values = [weights.format.dequantize(part.contiguous(), d) for part in parts]
                values[-1] = values[-1].t()
            case Role.TABLE:
                values = [WeightFormat("bfloat16", 0).dequantize(tensor, d)]
            case Role.LINEAR | Role.HEAD:
                form = format_of(plan, weights.format)
                values = [form.dequantize(tensor, plan.shape[1])]
        start = 0
        for source in plan.sources:
            target = state[source]
            if plan.role is Role.MLP:
                target.copy_(values.pop(0))
                continue
            target.copy_(values[0][start : start + target.shape[0]])
            start += target.shape[0]
    return model


def tiny_pair(
    variant: str = "llama",
    dtype: str = "bfloat16",
    *,
    seed: int = 0,
    chat: bool = False,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> Pair:
    """The two backends on equal weights; exact compute and an exact KV cache unless asked for."""
    model_type, own = VARIANTS[variant]
    model = tiny_model(model_type, seed=seed, **{**own, **(changes or {})})
    name = f"tiny-{variant}"
    weights = weights_from(model, FORMATS[dtype], name)
    tokenizer = tiny_tokenizer(chat=chat)
    options = {"cache_dtype": torch.float32, "compute": torch.float32, **options}
    hf = HfBackend(stored(model, weights), tokenizer, name)
    return Pair(hf, NativeBackend(weights, tokenizer, **options))


def tiny_native(variant: str = "llama", dtype: str = "bfloat16", **options: Any) -> NativeBackend:
    return tiny_pair(variant, dtype, **options).native
