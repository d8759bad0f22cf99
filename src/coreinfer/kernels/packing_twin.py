"""The layouts of layout.py in plain torch: how they are made, and how they are read back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from coreinfer.kernels.formats import WeightFormat
from coreinfer.kernels.layout import TILE, Packed, PackedDown, padded, tile_bytes


def pack_rows(parts: list[Tensor], columns: int, form: WeightFormat) -> Tensor:
    """Tiles of records, uint8 [bytes]; the tiles of several parts of equal shape alternate.

    Args:
        parts: records [R, row_bytes(columns)] each.
    """
    tiles = [_row_tiles(records, columns, form) for records in parts]
    return torch.stack(tiles, dim=1).flatten()


def _row_tiles(records: Tensor, columns: int, form: WeightFormat) -> Tensor:
    """[tiles, tile_bytes]."""
    rows = len(records)
    q, scales = _split(records, columns, form)
    q = pad(q, (0, -q.shape[1] % 4, 0, -rows % TILE))
    if form.dtype == "int8":
        q = q ^ 128
    words = q.view(len(q) // TILE, TILE, q.shape[1] // 4, 4).permute(0, 2, 1, 3).flatten(1)
    if form.dtype == "bfloat16":
        return words
    # [tiles, 16, scale or minimum, groups] float16 -> [tiles, groups, scale or minimum, 16]
    scales = pad(scales, (0, 0, 0, 0, 0, -rows % TILE)).unflatten(0, (-1, TILE))
    scales = scales.permute(0, 3, 2, 1).contiguous()
    tile = torch.cat([words, scales.flatten(1).view(torch.uint8)], dim=1)
    return pad(tile, (0, tile_bytes(form, columns) - tile.shape[1]))


def _split(records: Tensor, columns: int, form: WeightFormat) -> tuple[Tensor, Tensor]:
    """The q bytes [R, n], and float16 [R, scales per group, groups] (none for bfloat16)."""
    if form.dtype == "bfloat16":
        return records, torch.empty(0)
    q_bytes = _q_bytes(form, columns)
    numbers = records[:, q_bytes:].contiguous().view(torch.float16)
    groups = columns // form.group_size
    return records[:, :q_bytes], numbers.view(len(records), form.scales_per_group, groups)


def pack_down(records: Tensor, outputs: int, form: WeightFormat) -> Tensor:
    """Tiles of 16 outputs of records [K, row_bytes(outputs)] of columns, uint8 [bytes]."""
    neurons = len(records)
    if form.dtype == "bfloat16":
        columns = pad(
            records.contiguous().view(torch.int16), (0, -outputs % TILE, 0, -neurons % TILE)
        )
        pairs = columns.view(padded(neurons) // 2, 2, -1, TILE).permute(2, 0, 3, 1)
        return pairs.contiguous().view(torch.uint8).flatten()
    q, scales, minima = form.parts(records, outputs)
    q = pad(q.view(torch.uint8), (0, 0, 0, -neurons % TILE))
    if form.dtype == "int8":
        tiles = (q ^ 128).view(-1, 4, outputs // TILE, TILE).permute(2, 0, 3, 1)
    else:
        halves = q.view(-1, 2, 4, outputs // TILE, TILE).permute(1, 3, 0, 4, 2)
        tiles = halves[0] | (halves[1] << 4)
    numbers = [scales] if form.dtype == "int8" else [scales, minima]
    return torch.cat([tiles.flatten(), *(_transposed_halves(part) for part in numbers)])


def _transposed_halves(numbers: Tensor) -> Tensor:
    """[K, groups] -> bytes of float16 [groups, K16]."""
    halves = pad(numbers.to(torch.float16), (0, 0, 0, -len(numbers) % TILE))
    return halves.t().flatten().view(torch.uint8)


def unpack_rows(packed: Packed) -> Tensor:
    """The weights [rows, columns] float32."""
    form, columns = packed.format, packed.columns
    size = tile_bytes(form, columns)
    tiles = packed.data.view(-1, size)
    word_bytes = TILE * (2 * padded(columns, 2) if not form.group_size else _q_bytes(form, columns))
    words = tiles[:, :word_bytes].view(len(tiles), word_bytes // TILE // 4, TILE, 4)
    q = words.permute(0, 2, 1, 3).reshape(len(tiles) * TILE, word_bytes // TILE)
    if form.dtype == "bfloat16":
        return q.view(torch.bfloat16)[: packed.rows, :columns].to(torch.float32)
    if form.dtype == "int8":
        q = q ^ 128
    groups = columns // form.group_size
    halves = tiles[:, word_bytes : word_bytes + 2 * TILE * groups * form.scales_per_group]
    numbers = halves.contiguous().view(torch.float16).view(-1, groups, form.scales_per_group, TILE)
    numbers = numbers.permute(0, 3, 2, 1).reshape(len(q), groups * form.scales_per_group)
    # One number a row passes for contiguous whatever its stride, and cannot be viewed as bytes.
    numbers = numbers.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return form.dequantize(torch.cat([q, numbers], dim=1), columns)[: packed.rows]


def unpack_row(packed: Packed, row: int) -> Tensor:
    """One row of the weights, [columns] float32."""
    size = tile_bytes(packed.format, packed.columns)
    tile = packed.data[row // TILE * size :][:size]
    return unpack_rows(Packed(packed.format, TILE, packed.columns, tile))[row % TILE]


def _q_bytes(form: WeightFormat, columns: int) -> int:
    return columns if form.dtype == "int8" else columns // 2


def unpack_records(part: PackedDown) -> Tensor:
    """The weights [K, outputs] float32 of a part that is stored by neuron."""
    form, outputs = part.format, part.outputs
    return form.dequantize(part.data.view(part.neurons, form.row_bytes(outputs)), outputs)


def unpack_down(down: PackedDown) -> tuple[Tensor, Tensor, Tensor]:
    """q [K, outputs], scales and minima [K, groups], float32; no groups for bfloat16."""
    form, outputs, neurons = down.format, down.outputs, padded(down.neurons)
    if form.dtype == "bfloat16":
        if down.by_neuron:
            q = unpack_records(down)
        else:
            pairs = down.data.view(torch.bfloat16)
            pairs = pairs.view(padded(outputs) // TILE, neurons // 2, TILE, 2)
            q = pairs.permute(1, 3, 0, 2).reshape(neurons, padded(outputs))
            q = q[: down.neurons, :outputs]
        return q.to(torch.float32), torch.empty(len(q), 0), torch.empty(len(q), 0)
    if down.by_neuron:
        records = down.data.view(down.neurons, form.row_bytes(outputs))
        q, scales, minima = form.parts(records, outputs)
        return q.to(torch.float32), scales, minima
    q_bytes = neurons * _q_bytes(form, outputs)
    tiles = down.data[:q_bytes].view(outputs // TILE, q_bytes // outputs // 4, TILE, 4)
    if form.dtype == "int8":
        q = (tiles ^ 128).view(torch.int8).permute(1, 3, 0, 2)
    else:
        q = torch.stack((tiles & 15, tiles >> 4)).permute(2, 0, 4, 1, 3)
    q = q.reshape(neurons, outputs)[: down.neurons].to(torch.float32)
    numbers = down.data[q_bytes:].view(torch.float16)
    numbers = numbers.view(form.scales_per_group, outputs // form.group_size, neurons)
    numbers = numbers.to(torch.float32).transpose(1, 2)[:, : down.neurons]
    return q, numbers[0], numbers[1] if form.dtype == "int4" else torch.zeros_like(numbers[0])
