"""A model from a GGUF file. A new architecture is one entry of `ARCHITECTURES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from coreinfer.errors import UserError
from coreinfer.models.assemble import assemble, make_config, skeleton
from coreinfer.models.gguf import GgufFile, read_gguf
from coreinfer.models.gguf_tokenizer import gguf_tokenizer

Values = NDArray[np.float32]
# (name in the file, values, configuration) -> the values as transformers stores them
Undo = Callable[[str, Values, PreTrainedConfig], Values]

ROPE_FACTORS = "rope_freqs.weight"
_TURNED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")  # of GPT-2


def _as_is(_name: str, values: Values, _config: PreTrainedConfig) -> Values:
    return values


def _pair_halves(name: str, values: Values, config: PreTrainedConfig) -> Values:
    """Llama's query and key rows are stored with the two halves of each head interleaved."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return values
    rest = values.shape[1:]
    return values.reshape(count, -1, 2, *rest).swapaxes(1, 2).reshape(-1, *rest)


def _minus_one(name: str, values: Values, _config: PreTrainedConfig) -> Values:
    """Gemma's norms scale by 1 + w; the file holds 1 + w."""
    return values - 1 if name.endswith("norm.weight") else values


def _transpose(name: str, values: Values, _config: PreTrainedConfig) -> Values:
    """GPT-2's linears are stored [in, out] in transformers."""
    return values.T if name.endswith(tuple(f".{part}.weight" for part in _TURNED)) else values


def _group_heads(name: str, values: Values, config: PreTrainedConfig) -> Values:
    """Falcon's fused rows go group by group: its queries, its key, its value."""
    groups = config.num_kv_heads
    if not name.endswith("attn_qkv.weight") or groups == 1:
        return values
    width = config.hidden_size // config.num_attention_heads
    queries, keys, stored = np.split(
        values, [config.hidden_size, config.hidden_size + groups * width]
    )
    parts = [part.reshape(groups, -1, width, values.shape[1]) for part in (queries, keys, stored)]
    return np.concatenate(parts, axis=1).reshape(values.shape)


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture maps to one of transformers.

    Attributes:
        model_type: its name in transformers.
        undo: takes back what the conversion to GGUF did to the values.
        moved: the parts whose rows `undo` moves or turns: these it needs whole.
        keys: metadata key, without the architecture -> field of the configuration, beyond those
            that all share.
        facts: further fields of the configuration, from the file.
    """

    model_type: str
    undo: Undo = _as_is
    moved: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    facts: Callable[[GgufFile], dict[str, Any]] = lambda _file: {}


_COMMON = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_REQUIRED = ("block_count", "embedding_length", "attention.head_count")
_GEMMA2 = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def _biases(file: GgufFile) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _falcon_facts(file: GgufFile) -> dict[str, Any]:
    heads = file.metadata.get("falcon.attention.head_count_kv", 1)
    return {
        "num_kv_heads": heads,
        "multi_query": heads == 1,
        "new_decoder_architecture": "blk.0.attn_norm_2.weight" in file.tensors,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
    }


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(
            "llama", _pair_halves, ("attn_q", "attn_k"), facts=_biases
        ),  # Mistral says llama too
        "qwen2": Architecture("qwen2"),
        "qwen3": Architecture("qwen3"),
        "phi3": Architecture("phi3", keys={"attention.sliding_window": "sliding_window"}),
        "gemma": Architecture("gemma", _minus_one),
        "gemma2": Architecture("gemma2", _minus_one, keys=_GEMMA2),
        "gemma3": Architecture("gemma3_text", _minus_one, keys=_GEMMA2),
        "gpt2": Architecture(
            "gpt2",
            _transpose,
            _TURNED,
            {
                "context_length": "n_positions",
                "feed_forward_length": "n_inner",
                "attention.layer_norm_epsilon": "layer_norm_epsilon",
            },
        ),
        "falcon": Architecture(
            "falcon",
            _group_heads,
            ("attn_qkv",),
            {
                "feed_forward_length": "ffn_hidden_size",
                "attention.layer_norm_epsilon": "layer_norm_epsilon",
            },
            _falcon_facts,
        ),
    }
)


@dataclass(frozen=True)
class GgufModel:
    """The model that a GGUF file holds: its configuration, and its tensors by transformers' names.

    Attributes:
        stored: name in transformers -> name in the file, of every tensor.
    """

    file: GgufFile
    architecture: Architecture
    config: PreTrainedConfig
    stored: Mapping[str, str]

    @classmethod
    def open(cls, path: str | Path) -> GgufModel:
        """Read everything but the tensors' values.

        Raises:
            UserError: if the file is damaged, its architecture is not known, or it holds a tensor
                that the architecture has not.
        """
        file = read_gguf(path)
        architecture = _architecture(file)
        config = _config(file, architecture)
        expected = skeleton(config, repr(str(file.path))).state_dict()
        return cls(file, architecture, config, _names(file, expected, config))

    def tensor(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A tensor, or some of its rows, float32.

        Raises:
            UserError: if it cannot be dequantised or does not fit the configuration.
        """
        stored = self.stored[name]
        moved = stored.split(".")[-2] in self.architecture.moved
        try:
            values = self.file.values(stored, slice(None) if moved else rows)
            undone = self.architecture.undo(stored, values, self.config)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{str(self.file.path)!r}: tensor {stored!r} has shape "
                f"{self.file.tensors[stored].shape}, which does not fit "
                f"{self.config.num_attention_heads} heads"
            ) from error
        return torch.from_numpy(np.ascontiguousarray(undone[rows] if moved else undone))

    def generation(self) -> GenerationConfig:
        """How answers end: the file's end of sequence, and its ends of turn and of message."""

        def of(key: str) -> Any:
            return self.file.metadata.get(f"tokenizer.ggml.{key}_token_id")

        ends = list(dict.fromkeys(end for end in map(of, ("eos", "eot", "eom")) if end is not None))
        return GenerationConfig(
            bos_token_id=of("bos"),
            eos_token_id=ends[0] if len(ends) == 1 else ends or None,
            pad_token_id=of("padding"),
        )


def load_gguf(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[str], None] = lambda _line: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file, dequantised: the model computes with exactly the numbers of the file.

    Raises:
        UserError: if the file is damaged, its architecture is not known, a tensor is missing or
            unknown, or its tokenizer cannot be built.
    """
    whole = GgufModel.open(path)
    tokenizer = gguf_tokenizer(whole.file, on_progress)
    on_progress(f"dequantising {len(whole.file.tensors)} tensors of {whole.file.path.name}")
    model = assemble(
        whole.config,
        {name: whole.tensor(name) for name in whole.stored},
        repr(str(whole.file.path)),
        dtype=dtype,
        generation=whole.generation(),
    )
    return model, tokenizer


def _architecture(file: GgufFile) -> Architecture:
    name = file.architecture
    known = ARCHITECTURES.get(name)
    if known is None or file.metadata.get(f"{name}.expert_count"):
        what = f"{name} (mixture of experts)" if known else name
        raise UserError(
            f"{str(file.path)!r} has the architecture {what!r}; "
            f"known in GGUF files are {', '.join(sorted(ARCHITECTURES))}"
        )
    return known


def _config(file: GgufFile, architecture: Architecture) -> PreTrainedConfig:
    def of(key: str) -> Any:
        return file.metadata.get(f"{file.architecture}.{key}")

    for key in _REQUIRED:
        if not isinstance(of(key), int):
            raise UserError(
                f"{str(file.path)!r}: {file.architecture}.{key} is {of(key)!r}, expected a number"
            )
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{str(file.path)!r}: tensor 'token_embd.weight' is missing")
    fields = {**_COMMON, **architecture.keys}
    values = {name: of(key) for key, name in fields.items() if of(key) is not None}
    values |= architecture.facts(file)
    values |= {
        "model_type": architecture.model_type,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if scaling := _rope_scaling(file):
        values["rope_scaling"] = scaling
    config = make_config(values, len(file.tensors), repr(str(file.path)))
    if ROPE_FACTORS in file.tensors:
        _check_llama3_rope(file, config)
    return config


def _rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    """The position scaling that the file states, in transformers' terms."""

    def of(key: str) -> Any:
        return file.metadata.get(f"{file.architecture}.rope.{key}")

    if ROPE_FACTORS in file.tensors:  # Llama 3.1 and later; what the file has is its result
        factor = float(file.values(ROPE_FACTORS).max())
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    kind = of("scaling.type")
    if kind in (None, "none"):
        linear = of("scale_linear")
        return {"rope_type": "linear", "factor": linear} if linear not in (None, 1.0) else None
    if kind not in ("linear", "yarn"):
        raise UserError(
            f"{str(file.path)!r}: rope scaling {kind!r} is not known; linear and yarn are"
        )
    scaling = {"rope_type": kind, "factor": of("scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = of("scaling.original_context_length")
    return scaling


def _check_llama3_rope(file: GgufFile, config: PreTrainedConfig) -> None:
    """Refuse factors that are not what Llama 3's rule gives: positions would be wrong."""
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (
        torch.arange(0, config.head_dim, 2).double() / config.head_dim
    )
    rule, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = torch.from_numpy(file.values(ROPE_FACTORS)).double()
    if plain.shape != factors.shape or not torch.allclose(
        plain / factors, rule.double(), rtol=1e-4, atol=0
    ):
        raise UserError(f"{str(file.path)!r}: its rope factors are not those of Llama 3")


def _names(file: GgufFile, expected: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, str]:
    """Name in transformers -> name in the file, for every tensor of the file.

    Raises:
        UserError: naming a tensor that the model has no place for.
    """
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    names = {}
    for name in expected:
        stem, dot, leaf = name.rpartition(".")
        stored = table.get_name(stem)
        if stored is not None:
            names[f"{stored}{dot}{leaf}"] = name
    for stored in file.tensors:
        if stored not in names and stored != ROPE_FACTORS:
            raise UserError(
                f"{str(file.path)!r}: tensor {stored!r} has no place in a "
                f"{config.model_type} model of {config.num_hidden_layers} layers"
            )
    return {name: stored for stored, name in names.items() if stored in file.tensors}
