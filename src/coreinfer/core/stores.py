"""What the stores have in common: a folder that they may share, written so that each is whole.

A store is two files: NAME.safetensors, whose metadata has its description (`about`), and NAME.json,
which is that description. So the tensors alone are a whole store, and one rename replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.files import remove_leftovers, replace_when_done

NAMES = ("clusters", "calibration")  # of all stores


def tensors_file(folder: Path, name: str) -> Path:
    """Where a store's tensors are."""
    return folder / f"{name}.safetensors"


def description_file(folder: Path, name: str) -> Path:
    """Where its description is."""
    return folder / f"{name}.json"


def is_there(folder: Path, name: str) -> bool:
    """Whether a folder holds a store of that name, or what is left of one."""
    return tensors_file(folder, name).is_file() or description_file(folder, name).is_file()


def require_place(folder: Path) -> None:
    """Raises UserError if something that is no store is where one is to be written."""
    if folder.exists() and not any(is_there(folder, name) for name in NAMES):
        raise UserError(
            f"{str(folder)!r} exists and is no calibration or cluster store; choose another path"
        )


def save_store(folder: Path, name: str, tensors: Mapping[str, Tensor], about: str) -> None:
    """Write a store's two files into a folder, which is made unless it is there.

    What else is there stays. A store of that name is replaced when the new one is whole: then its
    description goes first and comes last, so that none is ever beside tensors of another store.

    Raises:
        UserError: if it cannot be written, or something that is no store is there.
    """
    require_place(folder)
    saved = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    if not folder.exists():
        with replace_when_done(folder) as partial:
            partial.mkdir()
            save_file(saved, tensors_file(partial, name), {"about": about})
            description_file(partial, name).write_text(about + "\n", encoding="utf-8")
        return
    description = description_file(folder, name)
    with (
        replace_when_done(description) as text,  # renamed last
        replace_when_done(tensors_file(folder, name)) as partial,
    ):
        save_file(saved, partial, {"about": about})
        text.write_text(about + "\n", encoding="utf-8")
        description.unlink(missing_ok=True)


def remove_store_leftovers(folder: Path, name: str) -> None:
    """Remove what writers of a store that were killed have left, beside its folder and in it."""
    for path in (folder, tensors_file(folder, name), description_file(folder, name)):
        remove_leftovers(path)


def check_tensor(
    what: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Raises UserError unless a tensor has this shape and type, and finite numbers."""
    if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
        got = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise UserError(f"{what} must be {dtype} {shape}, got {got}")
    if not tensor.isfinite().all():
        raise UserError(f"{what} must be finite numbers")
