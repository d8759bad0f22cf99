"""Records into the layouts that the kernels stream (layout.py)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.kernels.arena import Arena
from coreinfer.kernels.formats import DTYPES, WeightFormat
from coreinfer.kernels.layout import (
    Packed,
    PackedDown,
    PackedMlp,
    check_index,
    down_bytes,
    packed_bytes,
    padded,
    padded_vector,
)
from coreinfer.kernels.library import native, num_threads
from coreinfer.kernels.packing_twin import pack_down, pack_rows


def pack(
    records: Tensor,
    columns: int,
    form: WeightFormat,
    *,
    index: Tensor | None = None,
    arena: Arena | None = None,
    threads: int | None = None,
) -> Packed:
    """A matrix of records [R, row_bytes(columns)] for products with it.

    Args:
        index: int32 [K], the rows to take, in this order; all of them unless given.
        arena: where to put it; its own memory unless given.
        threads: torch's own number unless given.

    Raises:
        UserError: if records are not as long as their format says, or a row is not there.
    """
    check_index(index, len(records))
    _check_records(records, form.row_bytes(columns))
    rows = len(records) if index is None else len(index)
    out = _memory(arena, packed_bytes(form, rows, columns))
    _pack_rows(records, 0, 1, index, columns, form, out, threads)
    return Packed(form, rows, columns, out)


def pack_mlp(
    records: Tensor,
    hidden_size: int,
    form: WeightFormat,
    *,
    gated: bool,
    index: Tensor | None = None,
    in_bias: Tensor | None = None,
    skip_zeros: bool = False,
    arena: Arena | None = None,
    threads: int | None = None,
) -> PackedMlp:
    """The chosen neurons of an MLP.

    Args:
        records: uint8 [D, 3 * row_bytes(d)] (gate row, up row, down column of each neuron) or,
            not gated, [D, 2 * row_bytes(d)] (row of fc1, column of fc2).
        hidden_size: d.
        index: int32 [K], the neurons to take; all of them unless given.
        in_bias: float32 [D], of fc1; for MLPs that are not gated.
        skip_zeros: store what comes after the activation function by neuron (the down column and,
            gated, the up row), so that neurons for which it is exactly zero are not read: for ReLU.
        arena, threads: as in `pack`.

    Raises:
        UserError: if records are not as long as their format says, or a neuron is not there.
    """
    parts = 3 if gated else 2
    size = form.row_bytes(hidden_size)
    check_index(index, len(records))
    _check_records(records, parts * size)
    if gated and in_bias is not None:
        raise UserError("biases of the neurons are known of plain MLPs alone, this one is gated")
    neurons = len(records) if index is None else len(index)
    in_tiles = 1 if skip_zeros else parts - 1
    rows = in_tiles * padded(neurons)
    into = _memory(arena, packed_bytes(form, rows, hidden_size))
    _pack_rows(records, size, in_tiles, index, hidden_size, form, into, threads)

    def by_neuron_or_streamed(part: int) -> PackedDown:
        out = _memory(arena, down_bytes(form, neurons, hidden_size, skip_zeros))
        _pack_down(records, part * size, index, hidden_size, form, skip_zeros, out, threads)
        return PackedDown(form, neurons, hidden_size, skip_zeros, out)

    bias = None
    if in_bias is not None:
        bias = padded_vector(in_bias if index is None else in_bias[index])
    return PackedMlp(
        into=Packed(form, rows, hidden_size, into),
        down=by_neuron_or_streamed(parts - 1),
        gated=gated,
        in_bias=bias,
        up=by_neuron_or_streamed(1) if gated and skip_zeros else None,
    )


def _check_records(records: Tensor, wanted: int) -> None:
    if records.dim() != 2 or records.dtype != torch.uint8 or records.shape[1] != wanted:
        raise UserError(
            f"records are uint8 of {wanted} bytes here, got {records.dtype} of shape "
            f"{tuple(records.shape)}"
        )


def _memory(arena: Arena | None, num_bytes: int) -> Tensor:
    # Its own mapping is no larger than it has to be.
    return (arena or Arena(chunk_bytes=0)).take(num_bytes)


def _pack_rows(
    records: Tensor,
    part_stride: int,
    parts: int,
    index: Tensor | None,
    columns: int,
    form: WeightFormat,
    out: Tensor,
    threads: int | None,
) -> None:
    """Tiles of the first `parts` parts of the records, alternating."""
    library = native()
    if library is None:
        size = form.row_bytes(columns)
        chosen = records if index is None else records[index]
        pieces = [chosen[:, part * size : (part + 1) * size] for part in range(parts)]
        out.copy_(pack_rows(pieces, columns, form))
        return
    source, rows, choice = _source(records, index)
    library.functions.ci_pack_rows(
        num_threads(threads),
        ctypes.c_void_p(source.data_ptr()),
        ctypes.c_int64(source.stride(0)),
        ctypes.c_int64(part_stride),
        parts,
        ctypes.c_void_p(None if choice is None else choice.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        DTYPES.index(form.dtype),
        form.group_size,
        ctypes.c_void_p(out.data_ptr()),
    )


def _pack_down(
    records: Tensor,
    offset: int,
    index: Tensor | None,
    outputs: int,
    form: WeightFormat,
    by_neuron: bool,
    out: Tensor,
    threads: int | None,
) -> None:
    """A part of the records, from byte `offset` on: streamed as a down projection, or as it is."""
    library = native()
    if library is None:
        chosen = records if index is None else records[index]
        chosen = chosen[:, offset : offset + form.row_bytes(outputs)]
        out.copy_(chosen.flatten() if by_neuron else pack_down(chosen, outputs, form))
        return
    source, neurons, choice = _source(records, index)
    library.functions.ci_pack_down(
        num_threads(threads),
        ctypes.c_void_p(source.data_ptr() + offset),
        ctypes.c_int64(source.stride(0)),
        ctypes.c_void_p(None if choice is None else choice.data_ptr()),
        ctypes.c_int64(neurons),
        ctypes.c_int64(outputs),
        DTYPES.index(form.dtype),
        form.group_size,
        int(by_neuron),
        ctypes.c_void_p(out.data_ptr()),
    )


def _source(records: Tensor, index: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
    """Records whose bytes are neighbours, how many rows are wanted, and which."""
    source = records if records.stride(1) == 1 else records.contiguous()
    if index is None:
        return source, len(source), None
    return source, len(index), index.contiguous()
