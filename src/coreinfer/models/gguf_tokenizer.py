"""The tokenizer that a GGUF file describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
)

from coreinfer.errors import UserError
from coreinfer.models.assemble import one_line, quiet_transformers
from coreinfer.models.gguf import GgufFile

_GPT2 = frozenset({"None", "default", "gpt-2", "gpt2", "phi-2", "olmo", "mpt", "jais"})


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _falcon() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )


# How byte-level vocabularies cut text before merging, where transformers has no entry of its own.
_SPLITS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = MappingProxyType(
    {
        "smollm": _single_digits,
        "starcoder": _single_digits,
        "refact": _single_digits,
        "command-r": _single_digits,
        "falcon": _falcon,
    }
)


def gguf_tokenizer(file: GgufFile, on_progress: Callable[[str], None]) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its special tokens and chat template.

    Args:
        file: the file.
        on_progress: told if the file cuts text in a way that is not known.

    Raises:
        UserError: if the file has no vocabulary, or one that no tokenizer can be built from.
    """

    def of(key: str) -> Any:
        return file.metadata.get(f"tokenizer.ggml.{key}")

    tokens = of("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{str(file.path)!r} has no vocabulary; use a GGUF with its tokenizer")
    parts = {
        "tokenizer_type": of("model"),
        "pre_tokenizer_type": of("pre"),
        "tokens": tokens,
        "scores": of("scores"),
        "token_type": of("token_type"),
        "merges": of("merges"),
        "bos_token_id": of("bos_token_id"),
        "eos_token_id": of("eos_token_id"),
    }
    parts = {key: value for key, value in parts.items() if value is not None}
    sentencepiece = of("model") == "llama"
    special = {
        "bos_token": of("bos_token_id"),
        "eos_token": of("eos_token_id"),
        "unk_token": of("unknown_token_id"),
        "pad_token": of("padding_token_id"),
    }
    add_bos = of("add_bos_token")
    try:
        with quiet_transformers():
            backend, _ = convert_gguf_tokenizer(file.architecture, parts)
            if of("model") == "gpt2":
                _set_split(backend, str(of("pre")), on_progress)
            return PreTrainedTokenizerFast(
                tokenizer_object=backend,
                **{name: tokens[index] for name, index in special.items() if index is not None},
                add_bos_token=sentencepiece if add_bos is None else bool(add_bos),
                add_eos_token=bool(of("add_eos_token")),
                chat_template=file.metadata.get("tokenizer.chat_template"),
                clean_up_tokenization_spaces=False,
                model_max_length=file.metadata.get(f"{file.architecture}.context_length"),
            )
    except BaseException as error:  # the Rust side panics with a BaseException of its own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{str(file.path)!r}: its tokenizer cannot be built: {one_line(error)}"
        ) from error


def _set_split(backend: Any, pre: str, on_progress: Callable[[str], None]) -> None:
    if pre in _SPLITS:
        backend.pre_tokenizer = _SPLITS[pre]()
    elif pre not in GGUF_PRE_TOKENIZER_SPLITS and pre not in _GPT2:
        on_progress(f"the file cuts text in a way that is not known ({pre}); GPT-2's is used")
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
