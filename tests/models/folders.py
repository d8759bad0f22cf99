"""Tiny model folders, as transformers writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import tiny_model, tiny_tokenizer


def tiny_folder(
    folder: Path, model_type: str = "llama", *, shard_size: str = "5GB", **changes: Any
) -> PreTrainedModel:
    """Write a tiny model and its tokenizer; return the model."""
    model = tiny_model(model_type, **changes)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return model


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; None drops one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a model folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})
