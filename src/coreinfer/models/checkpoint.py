"""A model from a folder as transformers writes it: config.json, safetensors, a tokenizer.

Nothing in the folder is run: no pickles, no code that config.json points to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from coreinfer.errors import UserError
from coreinfer.jsonl import open_to_read
from coreinfer.models.assemble import assemble, make_config, one_line, quiet_transformers

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def load_folder(
    folder: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model folder.

    Raises:
        UserError: if a part is missing or damaged, the weights are pickled only, or they do not
            fit the configuration.
    """
    folder = Path(folder)
    values = read_config(folder)
    require_tokenizer(folder)
    shards = weight_files(folder)
    tensors = _read_tensors(shards)
    config = make_config(values, len(tensors), repr(str(folder / CONFIG)))
    generation = _read_generation(folder / GENERATION)
    tokenizer = _read_tokenizer(folder, config)
    model = assemble(config, tensors, repr(str(folder)), dtype=dtype, generation=generation)
    return model, tokenizer


def read_companions(
    folder: Path, tensor_count: int
) -> tuple[PreTrainedTokenizerBase, GenerationConfig]:
    """What lies beside the weights of a model folder.

    Args:
        folder: the model's.
        tensor_count: how many tensors its weights have.

    Raises:
        UserError: if a part is missing or damaged.
    """
    require_tokenizer(folder)
    config = make_config(read_config(folder), tensor_count, repr(str(folder / CONFIG)))
    generation = _read_generation(folder / GENERATION)
    tokenizer = _read_tokenizer(folder, config)
    return tokenizer, generation or GenerationConfig.from_model_config(config)


def require_tokenizer(folder: Path) -> None:
    """Raises UserError unless a model folder has a tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(
            f"{str(folder)!r} has no tokenizer; put the model's tokenizer.json beside its weights"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        UserError: if there are none, saying what is there in their place.
    """
    index = folder / INDEX
    if index.is_file():
        table = _read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise UserError(f"{str(index)!r} has no weight_map; get the model's files again")
        names = sorted({str(name) for name in table.values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"{str(folder)!r} has no {name!r}, which {INDEX} names")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if (folder / WEIGHTS) in found:
        return [folder / WEIGHTS]
    if len(found) == 1:
        return found
    if found:
        raise UserError(f"{str(folder)!r} has {len(found)} safetensors files, but no {INDEX}")
    if files := sorted(folder.glob("*.gguf")):
        raise UserError(f"{str(folder)!r} has no safetensors weights; give {str(files[0])!r}")
    pickled = [file for kind in ("*.bin", "*.pt", "*.pth", "*.pkl") for file in folder.glob(kind)]
    if pickled:
        raise UserError(
            f"{str(folder)!r} has only pickled weights ({pickled[0].name}), which can run code "
            f"when they are read; use the model's safetensors, or convert it where you trust it"
        )
    raise UserError(f"{str(folder)!r} has no weights; expected {WEIGHTS}")


def read_config(folder: Path) -> dict[str, Any]:
    """What a model folder's `config.json` states.

    Raises:
        UserError: if there is none, or it is no JSON object.
    """
    if not (folder / CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{str(folder)!r} is an adapter; merge it into its model first")
        if files := sorted(folder.glob("*.gguf")):
            raise UserError(f"{str(folder)!r} has no {CONFIG}; give {str(files[0])!r}")
        raise UserError(
            f"{str(folder)!r} has no {CONFIG}; a model folder holds {CONFIG}, {WEIGHTS} "
            "and a tokenizer"
        )
    return _read_json(folder / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with open_to_read(path) as file:
            value = json.loads(file.read().decode("utf-8"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} is not a JSON object")
    return value


def _read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors by name, mapped rather than read where the system can."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(file)!r} is damaged or truncated: {one_line(error)}; get the file again"
            ) from None
    return tensors


def _read_generation(path: Path) -> GenerationConfig | None:
    if not path.is_file():
        return None
    values = _read_json(path)
    try:
        with quiet_transformers():
            return GenerationConfig.from_dict(values)
    except Exception as error:
        raise UserError(f"{str(path)!r} is not usable: {one_line(error)}") from error


def _read_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                folder,
                config=config,  # or it would read config.json by itself, unchecked
                local_files_only=True,
                trust_remote_code=False,
            )
    except BaseException as error:  # the Rust side panics with a BaseException of its own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{str(folder)!r}: its tokenizer cannot be read: {one_line(error)}"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
