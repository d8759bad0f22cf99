"""Tiny random models of every known family, and a tokenizer, made in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from coreinfer.backends.hf.session import HfBackend

VOCAB = 260  # 256 bytes, bos, eos, pad and one to spare
BOS, EOS, PAD = 256, 257, 258

_SPECIAL = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB,
}

# model_type -> the arguments of its configuration.
CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": None},
    "qwen2": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "smollm3": _LLAMA_LIKE,
    "gemma": {**_LLAMA_LIKE, "head_dim": 8},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 64},
    "gemma3_text": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 64},
    "phi3": _LLAMA_LIKE,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 32,
        "vocab_size": VOCAB,
    },
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB},
    "gpt_neox": {**_LLAMA_LIKE, "rotary_pct": 0.25},
    "falcon": {
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "new_decoder_architecture": False,
        "bias": True,
        "max_position_embeddings": 512,
        "vocab_size": VOCAB,
    },
}


def tiny_model(
    model_type: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A random model: weights large enough that its logits differ and its answers vary."""
    config = CONFIG_MAPPING[model_type](**{**CONFIGS[model_type], **_SPECIAL, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.15)
            elif name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.05)
    return model.to(dtype).eval()


def tiny_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: every byte a token, so any text has tokens and round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    vocab |= {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD, "<spare>": PAD + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    if chat:
        fast.chat_template = (
            "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
        )
    return fast


def tiny_backend(
    model_type: str = "llama", *, seed: int = 0, chat: bool = False, **options: Any
) -> HfBackend:
    """An hf backend on a tiny random model."""
    model = tiny_model(model_type, seed=seed)
    return HfBackend(model, tiny_tokenizer(chat=chat), f"tiny-{model_type}", **options)
