"""`load`: a model and its tokenizer, from whatever a user can name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coreinfer.errors import UserError
from coreinfer.models.assemble import one_line
from coreinfer.models.catalog import CATALOG, nearest_names
from coreinfer.models.checkpoint import load_folder
from coreinfer.models.gguf import MAGIC
from coreinfer.models.gguf_model import load_gguf
from coreinfer.models.hub import is_hub_id
from coreinfer.models.pull import Progress, pull, silent

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
NATIVE_DTYPES = ("int8", "int4")


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and what records and core sets call it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load(
    model: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    on_progress: Progress = silent,
) -> LoadedModel:
    """Load a model.

    Args:
        model: a short name (pulled if it is not there yet), a folder with safetensors, a .gguf
            file, or an id of the Hugging Face hub ("owner/name").
        dtype: "float32", "bfloat16" or "float16"; by default float32 on a CPU, else bfloat16.
        device: as torch names it; the CPU by default.
        on_progress: told, a line each, what takes long.

    Raises:
        UserError: if nothing of that name is there, or what is there is no whole model of a known
            architecture.
    """
    place = _device(device)
    number = _dtype(dtype, place)
    path, name = find(model, on_progress)
    if path.is_dir():
        loaded, tokenizer = load_folder(path, dtype=number)
    else:
        loaded, tokenizer = load_gguf(path, dtype=number, on_progress=on_progress)
    try:
        loaded.to(place)  # type: ignore[arg-type]
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"cannot use the device {device!r}: {one_line(error)}") from None
    loaded.config.name_or_path = name
    return LoadedModel(loaded, tokenizer, name)


def find(model: str, on_progress: Progress = silent) -> tuple[Path, str]:
    """The folder or the .gguf file of a model, and what records and core sets call it.

    A path that exists goes before an id of the hub; what is not on this machine yet is pulled.

    Raises:
        UserError: if nothing of that name is there.
    """
    if model in CATALOG:
        return pull(model, on_progress=on_progress), model
    if not model:
        raise UserError("the model has no name; " + nearest_names(model))
    try:
        path = Path(model).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, an unknown ~user
        raise UserError(f"{model!r} is no name and no path: {one_line(error)}") from None
    if is_folder:
        return path, path.resolve().name
    if is_file:
        _require_gguf(path)
        return path, path.stem
    if is_hub_id(model) and path.suffix != ".gguf":
        return pull(model, on_progress=on_progress), model
    if path.suffix == ".gguf" or "/" in model:
        raise UserError(f"no model at {model!r}; expected a folder or a .gguf file")
    raise UserError(
        f"no model {model!r}: it is no short name, folder, .gguf file or hub id (owner/name); "
        + nearest_names(model)
    )


def _require_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    if magic == MAGIC or path.suffix == ".gguf":
        return
    if path.suffix == ".safetensors":
        raise UserError(f"{str(path)!r} is one file of a model; give its folder")
    raise UserError(f"{str(path)!r} is no GGUF file; expected a .gguf file or a model folder")


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name in NATIVE_DTYPES:
        raise UserError(
            f"dtype {name!r} belongs to the native backend; use --backend native, "
            f"or {', '.join(DTYPES)}"
        )
    if name not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or "cpu")
    except RuntimeError:
        raise UserError(f"no device {name!r}; use cpu, cuda, cuda:1, mps or the like") from None
