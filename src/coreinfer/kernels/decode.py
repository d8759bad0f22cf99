"""A whole decode step, one token for each of up to eight rows, in one call.

What it computes is written down in plain torch in decode_twin.py; the native code keeps all threads
in one parallel region and reads every weight once for all rows. A model is described once
(`weights.DecoderWeights`), a sequence's chosen neurons once (`weights.Plan`), a step is
`decode_step`:

    weights = DecoderWeights(layers=[...], ...)
    plan = Plan([pack_mlp(...) for each layer], [None, StandInWeights.pack(...), ...])
    cache = KeyValueCache.empty(...)                 # or views into the session's own tensors
    logits = decode_step(weights, [Row(token, position, length, plan, cache)], threads=2)
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.kernels import abi
from coreinfer.kernels.decode_twin import decode_step_twin
from coreinfer.kernels.library import native, num_threads
from coreinfer.kernels.linear import MAX_ROWS
from coreinfer.kernels.weights import DecoderWeights, Row


def decode_step(weights: DecoderWeights, rows: Sequence[Row], threads: int | None = None) -> Tensor:
    """Logits [B, vocab] float32 that follow the B rows; their keys and values enter the caches.

    The result of a row does not depend, to the bit, on the other rows nor on the threads.

    Args:
        threads: of the native code; torch's own number unless given.

    Raises:
        UserError: if there are no rows or more than `MAX_ROWS`, a cache is full, a token or a
            position is outside its table, or a plan has not as many layers as the model.
    """
    _check(weights, rows)
    library = native()
    if library is None:
        return decode_step_twin(weights, rows)
    logits = torch.empty(len(rows), weights.head.rows)
    described = (abi.Row * len(rows))(*(_row(row) for row in rows))
    library.functions.ci_decode(
        library.path,
        num_threads(threads),
        ctypes.byref(weights.structure[0]),
        described,
        len(rows),
        ctypes.c_void_p(logits.data_ptr()),
    )
    return logits


def _check(weights: DecoderWeights, rows: Sequence[Row]) -> None:
    if not 1 <= len(rows) <= MAX_ROWS:
        raise UserError(f"a decode step takes 1 to {MAX_ROWS} rows, got {len(rows)}")
    for row in rows:
        if len(row.plan.mlps) != len(weights.layers):
            raise UserError(
                f"a plan of {len(row.plan.mlps)} layers does not fit a model of "
                f"{len(weights.layers)}"
            )
        if not 0 <= row.token < weights.head.rows:
            raise UserError(f"token {row.token} is outside the vocabulary of {weights.head.rows}")
        if not 0 <= row.length < row.cache.capacity:
            raise UserError(
                f"the cache has room for {row.cache.capacity} tokens, this would be number "
                f"{row.length + 1}; start with a larger one"
            )
        if weights.position is not None and not 0 <= row.position < len(weights.position):
            raise UserError(
                f"position {row.position} is outside the model's {len(weights.position)}"
            )


def _row(row: Row) -> abi.Row:
    keys, values = row.cache.keys, row.cache.values
    mlps, stand_ins, _ = row.plan.structures
    return abi.Row(
        row.token,
        row.position,
        row.length,
        mlps,
        stand_ins,
        keys.data_ptr(),
        values.data_ptr(),
        *keys.stride()[:3],
        None if row.skipped is None else row.skipped.data_ptr(),
        int(keys.dtype == torch.bfloat16),
    )
