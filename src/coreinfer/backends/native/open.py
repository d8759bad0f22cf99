"""Opening a model on the native backend: converted once, then mapped into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

from coreinfer.backends.native.backend import NativeBackend
from coreinfer.backends.native.container import is_converted, open_container
from coreinfer.backends.native.convert import converted
from coreinfer.backends.native.memory import needed_memory, require_memory
from coreinfer.backends.native.products import compute_dtype
from coreinfer.backends.native.weights import NativeWeights
from coreinfer.errors import UserError
from coreinfer.kernels.formats import DTYPES, WeightFormat
from coreinfer.kernels.library import missing
from coreinfer.models.checkpoint import read_companions
from coreinfer.models.loading import find


def open_native(
    model: str,
    *,
    dtype: str | None = None,
    skip_zeros: bool = True,
    on_progress: Callable[[str], None] = lambda _line: None,
) -> NativeBackend:
    """A model on the native backend.

    Args:
        model: a folder that `coreinfer convert` wrote, or whatever `coreinfer.load` takes; that is
            converted when it is first used, into the local cache.
        dtype: "bfloat16", "int8" or "int4"; None for what a converted folder holds, or bfloat16.
        skip_zeros: do not read the down columns, nor a gated MLP's up rows, of neurons whose ReLU
            is exactly zero.
        on_progress: told, a line each, what takes long.

    Raises:
        UserError: if the model is not found or damaged, its architecture is not one of the native
            backend's, there is no such dtype, or not enough memory.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(
            f"the native backend stores {', '.join(DTYPES)}, not {dtype}; use --backend hf for it"
        )
    _tell_of_missing_kernels()
    path, _ = find(model, on_progress)
    if path.is_dir() and is_converted(path):
        folder = path
    else:
        form = WeightFormat.named(dtype or "bfloat16")
        folder = converted(model, form, on_progress=on_progress)
    container = open_container(folder, dtype=dtype)
    manifest = container.manifest
    needed = needed_memory(manifest.decoder, manifest.data_bytes)
    require_memory(needed, manifest.model, manifest.format.dtype)
    tokenizer, generation = read_companions(folder, len(container))
    weights = NativeWeights(
        manifest.decoder,
        manifest.format,
        container,
        manifest.model,
        manifest.model_fingerprint,
    )
    return NativeBackend(
        weights,
        tokenizer,
        generation=generation,
        compute=compute_dtype(),
        skip_zeros=skip_zeros,
    )


@cache
def _tell_of_missing_kernels() -> None:
    """Once a process, on stderr unless the program logs elsewhere: nothing else shows why."""
    problem = missing()
    if problem is not None:
        logging.getLogger(__name__).warning(
            "the native backend computes with plain torch, far slower: %s", problem
        )
