"""Models of the Hugging Face hub: from its local cache, or downloaded into it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from coreinfer.errors import UserError
from coreinfer.files import describe_os_error
from coreinfer.models.assemble import one_line
from coreinfer.models.checkpoint import CONFIG, TOKENIZERS, weight_files

# Weights as safetensors alone: never pickles, never code.
_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.jinja",
]


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name, re.ASCII) is not None


def fetch(model_id: str, on_progress: Callable[[str], None] = lambda _line: None) -> Path:
    """The folder of a model of the hub; nothing is asked of the network if all of it is there.

    Raises:
        UserError: if it is neither in the cache nor to be had: no such model, one that asks for
            its licence to be accepted, no network, no space.
    """
    try:
        folder = Path(snapshot_download(model_id, local_files_only=True, allow_patterns=_FILES))
        if _is_complete(folder):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    on_progress(f"downloading {model_id} from the Hugging Face hub")
    try:
        return Path(snapshot_download(model_id, allow_patterns=_FILES))
    except GatedRepoError:
        raise UserError(
            f"{model_id} asks for its licence to be accepted: do so at "
            f"https://huggingface.co/{model_id}, then run 'hf auth login'"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"the Hugging Face hub has no model {model_id!r} (or it is private: 'hf auth login')"
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        offline = constants.HF_HUB_OFFLINE or isinstance(error, OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else "the Hugging Face hub cannot be reached"
        raise UserError(
            f"{model_id} is not in the local cache, and {why}; "
            "give a folder or a .gguf file, or a short name"
        ) from None
    except Exception as error:  # of its HTTP library, of the file system, of the hub
        if isinstance(error, OSError) and error.errno is not None:
            where = error.filename or "the cache of the Hugging Face hub"
            raise UserError(describe_os_error(error, where)) from None
        raise UserError(
            f"cannot download {model_id}: {type(error).__name__}: {one_line(error)}"
        ) from None


def _is_complete(folder: Path) -> bool:
    try:
        weight_files(folder)
    except UserError:
        return False
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in TOKENIZERS)
