"""The order in which the kernels stream weights: tiles of 16 outputs, four bytes of each at a time.

Records (formats.py) are rows. A product y = W x reads a tile of 16 rows at once, so that one
64-byte load holds the next four bytes of 16 rows and one scale step serves all of them:

- A tile of a row-wise matrix (`Packed`): [words][16 rows][4 bytes], then for int8 and int4 the
  float16 scales [groups][16 rows], each followed by its 16 minima for int4; padded to 64 bytes.
  Four bytes are 2 bfloat16, 4 int8 (stored as q + 128) or 8 int4 inputs, as in the record.
- The down projection (`PackedDown`) is stored a column a neuron; a tile is 16 outputs:
  [neurons / n][16 outputs][4 bytes] with n = 2, 4 or 8 neurons; int4 byte j holds neuron j in its
  low and neuron j + 4 in its high half. After all tiles: scales [groups][neurons], then minima.
  With `by_neuron` it is the records themselves, so that a neuron that is exactly zero (ReLU), or
  whose activation is too small to count, is not read at all. Gated, its up row is then a record
  too, read where the gate is not zero.

Rows, neurons and outputs are padded to 16 with zeros. `coreinfer.kernels.packing` makes both, in
native code or with the torch twins that define these layouts, in `coreinfer.kernels.packing_twin`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from coreinfer.errors import UserError
from coreinfer.kernels.formats import WeightFormat

TILE = 16


def padded(count: int, multiple: int = TILE) -> int:
    """`count` rounded up to a multiple."""
    return -(-count // multiple) * multiple


def padded_vector(vector: Tensor) -> Tensor:
    """float32, with zeros behind it up to a multiple of 16."""
    return pad(vector.to(torch.float32), (0, -len(vector) % TILE)).contiguous()


@dataclass(frozen=True)
class Packed:
    """A matrix [rows, columns] in tiles of 16 rows.

    Attributes:
        data: uint8, 64-byte aligned, `packed_bytes(format, rows, columns)` of them.
    """

    format: WeightFormat
    rows: int
    columns: int
    data: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes that a product reads."""
        return self.data.numel()


@dataclass(frozen=True)
class PackedDown:
    """A down projection [outputs, neurons], its neurons chosen.

    Attributes:
        by_neuron: records neuron by neuron, for models whose neurons are often exactly zero.
        data: uint8, 64-byte aligned, `down_bytes(...)` of them.
    """

    format: WeightFormat
    neurons: int
    outputs: int
    by_neuron: bool
    data: Tensor


@dataclass(frozen=True)
class PackedMlp:
    """The chosen neurons of an MLP.

    Attributes:
        into: [K16, d] or, gated, [2 * K16, d]: tiles of gate and up alternate; K16 = padded(K).
        in_bias: float32 [K16], zeros in the padding; None where there is none.
        up: the up rows of a gated MLP by neuron, whose `into` is then the gate's [K16, d] alone.
        least: float32 [K16], stored by neuron alone: a neuron whose activation (gated: of the gate)
            is of smaller magnitude counts as zero, and is skipped as such.
    """

    into: Packed
    down: PackedDown
    gated: bool
    in_bias: Tensor | None = None
    up: PackedDown | None = None
    least: Tensor | None = None

    @property
    def num_neurons(self) -> int:
        """K."""
        return self.down.neurons

    def skipping(self, least: Tensor) -> PackedMlp:
        """The same weights, of which activations below `least` [K] count as zero.

        Raises:
            UserError: if it is not stored by neuron.
        """
        if not self.down.by_neuron:
            raise UserError("small activations are skipped where an MLP is stored by neuron alone")
        return replace(self, least=padded_vector(least))

    @property
    def num_bytes(self) -> int:
        """Bytes that a product reads, if no neuron is skipped."""
        vectors = (self.in_bias, self.least)
        floats = 4 * sum(vector.numel() for vector in vectors if vector is not None)
        up = 0 if self.up is None else self.up.data.numel()
        return self.into.num_bytes + up + self.down.data.numel() + floats


def tile_bytes(form: WeightFormat, columns: int) -> int:
    """Bytes of a tile of 16 rows.

    Raises:
        UserError: if the group size does not divide the columns.
    """
    if form.dtype == "bfloat16":
        return TILE * 2 * padded(columns, 2)
    return padded(TILE * form.row_bytes(columns), 64)


def packed_bytes(form: WeightFormat, rows: int, columns: int) -> int:
    """Bytes of a `Packed`."""
    return padded(rows) // TILE * tile_bytes(form, columns)


def down_bytes(form: WeightFormat, neurons: int, outputs: int, by_neuron: bool) -> int:
    """Bytes of a `PackedDown`."""
    if by_neuron:
        return neurons * form.row_bytes(outputs)
    if form.dtype == "bfloat16":
        return padded(neurons) * padded(outputs) * 2
    return padded(neurons) * form.row_bytes(outputs)


def check_index(index: Tensor | None, count: int) -> None:
    """Raises UserError unless `index` is int32 [K] with neurons 0..count-1, or None."""
    if index is None:
        return
    if index.dim() != 1 or index.dtype != torch.int32:
        raise UserError(
            f"neuron indices are one row of int32, got {index.dtype} of shape {tuple(index.shape)}"
        )
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < count:
        raise UserError(
            f"neuron indices {int(index.min())}..{int(index.max())} do not fit a layer of {count}"
        )
