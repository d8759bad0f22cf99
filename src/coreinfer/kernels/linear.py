"""Products with packed weights: the native call where there is one, else its torch twin."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.kernels.abi import Matrix
from coreinfer.kernels.abi import Mlp as AbiMlp
from coreinfer.kernels.formats import DTYPES, WeightFormat
from coreinfer.kernels.layout import Packed, PackedMlp, check_index
from coreinfer.kernels.library import native, num_threads
from coreinfer.kernels.linear_twin import ACTIVATIONS, activate, linear_twin, mlp_twin

MAX_ROWS = 8  # rows that one pass over the weights serves

# Codes of csrc/coreinfer_kernels.h.
_OUT_DTYPES = {torch.bfloat16: 0, torch.float32: 3, torch.float16: 4}


def linear(packed: Packed, x: Tensor, threads: int | None = None) -> Tensor:
    """y [B, rows] = x [B, columns] @ W^T, float32; `linear_twin` says how it is rounded.

    Up to eight rows of x share one pass over the weights; more take further passes.

    Args:
        threads: torch's own number unless given.

    Raises:
        UserError: if x does not fit the matrix.
    """
    x = _checked(x, packed.columns)
    library = native()
    if library is None:
        return linear_twin(packed, x)
    y = torch.empty(len(x), packed.rows)
    matrix = abi_matrix(packed)
    for start in range(0, len(x), MAX_ROWS):
        part = x[start : start + MAX_ROWS]
        library.functions.ci_linear(
            library.path,
            num_threads(threads),
            ctypes.byref(matrix),
            ctypes.c_void_p(part.data_ptr()),
            len(part),
            ctypes.c_void_p(y[start:].data_ptr()),
        )
    return y


def mlp(packed: PackedMlp, x: Tensor, activation: str, threads: int | None = None) -> Tensor:
    """y [B, d] of x [B, d]: the chosen neurons' part of the MLP; as `mlp_twin`.

    Raises:
        UserError: if x does not fit, or there is no such activation.
    """
    x = _checked(x, packed.into.columns)
    library = native()
    if library is None or packed.num_neurons == 0:
        return mlp_twin(packed, x, activation)[0]
    activate(x[:0], activation)  # refuses a name that is not there
    y = torch.empty(len(x), packed.down.outputs)
    described = abi_mlp(packed)
    for start in range(0, len(x), MAX_ROWS):
        part = x[start : start + MAX_ROWS]
        library.functions.ci_mlp(
            library.path,
            num_threads(threads),
            ctypes.byref(described),
            ACTIVATIONS.index(activation),
            ctypes.c_void_p(part.data_ptr()),
            len(part),
            ctypes.c_void_p(y[start:].data_ptr()),
        )
    return y


def dequantize(
    records: Tensor,
    columns: int,
    form: WeightFormat,
    *,
    dtype: torch.dtype = torch.float32,
    index: Tensor | None = None,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """As `form.dequantize(records[index], columns, dtype)`, to the bit, and at memory speed.

    Args:
        records: [R, row_bytes(columns)], or such columns of wider records.
        index: int32 [K], the rows to take; all of them unless given.
        out: where to put them, contiguous [R or K, columns] of `dtype`; memory that was used before
            spares the page faults of fresh memory, which take as long as the work.

    Raises:
        UserError: if records are not as long as their format says, or a row is not there.
    """
    check_index(index, len(records))
    library = native()
    wanted = form.row_bytes(columns)
    fits = records.dim() == 2 and records.dtype == torch.uint8 and records.shape[1] == wanted
    if library is None or not fits or dtype not in _OUT_DTYPES:
        found = form.dequantize(records if index is None else records[index], columns, dtype)
        return found if out is None else out.copy_(found)
    source = records if records.stride(1) == 1 else records.contiguous()
    choice = None if index is None else index.contiguous()
    rows = len(source) if choice is None else len(choice)
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype)
    library.functions.ci_dequantize(
        library.path,
        num_threads(threads),
        ctypes.c_void_p(source.data_ptr()),
        ctypes.c_int64(source.stride(0)),
        ctypes.c_void_p(None if choice is None else choice.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        DTYPES.index(form.dtype),
        form.group_size,
        _OUT_DTYPES[dtype],
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


def abi_matrix(packed: Packed) -> Matrix:
    """The structure that the native code takes; the tensors of `packed` must outlive it."""
    return _matrix(packed.data, packed.rows, packed.columns, packed.format)


def abi_mlp(packed: PackedMlp) -> AbiMlp:
    """As `abi_matrix`, of an MLP."""
    down, up = packed.down, packed.up
    return AbiMlp(
        abi_matrix(packed.into),
        Matrix() if up is None else _matrix(up.data, up.outputs, up.neurons, up.format),
        _matrix(down.data, down.outputs, down.neurons, down.format),
        None if packed.in_bias is None else packed.in_bias.data_ptr(),
        None if packed.least is None else packed.least.data_ptr(),
        int(packed.gated),
        int(down.by_neuron),
    )


def _matrix(data: Tensor, rows: int, columns: int, form: WeightFormat) -> Matrix:
    return Matrix(data.data_ptr(), rows, columns, DTYPES.index(form.dtype), form.group_size)


def _checked(x: Tensor, columns: int) -> Tensor:
    if x.dim() != 2 or x.shape[1] != columns:
        raise UserError(f"rows of {columns} numbers are wanted, got shape {tuple(x.shape)}")
    return x.detach().to("cpu", torch.float32).contiguous()
