"""Full-size architectures by name, for which synthetic weights are made: speed without a download.

The sizes are those of the published configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from coreinfer.errors import UserError, meant


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
        "activation_function": "relu",
    }


# name -> config.json, without what does not change the speed.
SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama2-7b": {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "vocab_size": 32000,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
        },
        "llama3.1-8b": {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "vocab_size": 128256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": False,
        },
        "opt-6.7b": _opt(4096, 32, 32),
        "opt-13b": _opt(5120, 40, 40),
        "opt-30b": _opt(7168, 48, 56),
        "smollm2-135m": {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "vocab_size": 49152,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
        },
    }
)


def shape_named(name: str, shapes: Mapping[str, Mapping[str, Any]] = SHAPES) -> dict[str, Any]:
    """The configuration of a shape.

    Raises:
        UserError: if there is none of that name, with the nearest ones.
    """
    if name in shapes:
        return dict(shapes[name])
    raise UserError(f"no shape {name!r}; {meant(name, shapes)}known are {', '.join(shapes)}")


def config_of(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The transformers configuration of a shape."""
    config = CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
    assert isinstance(config, PreTrainedConfig)
    return config
