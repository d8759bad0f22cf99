"""The decode step in plain torch: what the native one must equal within float rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from coreinfer.kernels.linear_twin import linear_twin, mlp_twin
from coreinfer.kernels.packing_twin import unpack_row
from coreinfer.kernels.weights import DecoderWeights, LayerWeights, Norm, Row, StandInWeights


def decode_step_twin(weights: DecoderWeights, rows: Sequence[Row]) -> Tensor:
    """As `decode.decode_step`; every row on its own, layer by layer, so that causality is plain."""
    x = torch.cat([_embedding(weights, row) for row in rows])
    for index, layer in enumerate(weights.layers):
        qkv = _biased(linear_twin(layer.qkv, _norm(weights, layer.norm1, x)), layer.qkv_bias)
        # All keys are written before any is read: rows of one sequence see each other.
        queries = [
            _write(weights, layer, row, index, part) for row, part in zip(rows, qkv, strict=True)
        ]
        seen = [
            _attend(weights, layer, row, index, query)
            for row, query in zip(rows, queries, strict=True)
        ]
        x = x + _biased(linear_twin(layer.o, torch.stack(seen)), layer.o_bias)
        normed = _norm(weights, layer.norm2, x)
        added = [_mlp(weights, row, index, part) for row, part in zip(rows, normed, strict=True)]
        x = x + _biased(torch.cat(added), layer.mlp_out_bias)
    return linear_twin(weights.head, _norm(weights, weights.final_norm, x))


def _embedding(weights: DecoderWeights, row: Row) -> Tensor:
    """[1, d]."""
    if weights.embed is None:
        x = unpack_row(weights.head, row.token)
    else:
        x = weights.embed[row.token].to(torch.float32)
    if weights.position is not None:
        x = x + weights.position[row.position]
    return x[None]


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def _norm(weights: DecoderWeights, norm: Norm, x: Tensor) -> Tensor:
    if weights.layer_norm:
        return functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, weights.norm_eps)
    return functional.rms_norm(x, x.shape[-1:], norm.weight, weights.norm_eps)


def _write(
    weights: DecoderWeights, layer: LayerWeights, row: Row, index: int, qkv: Tensor
) -> Tensor:
    """Puts a row's key and value into its cache; its query [num_heads, head_dim]."""
    queries, keys = weights.num_heads, weights.num_kv_heads
    heads = qkv.view(-1, weights.head_dim)
    query, key, value = heads[:queries], heads[queries : queries + keys], heads[queries + keys :]
    if layer.q_norm is not None:
        query = functional.rms_norm(query, query.shape[-1:], layer.q_norm, weights.norm_eps)
    if layer.k_norm is not None:
        key = functional.rms_norm(key, key.shape[-1:], layer.k_norm, weights.norm_eps)
    if layer.rope and weights.inverse_frequencies is not None:
        angles = weights.inverse_frequencies * row.position
        query = _rotate(query, angles, weights.rope_factor)
        key = _rotate(key, angles, weights.rope_factor)
    row.cache.keys[index, :, row.length] = key.to(row.cache.keys.dtype)
    row.cache.values[index, :, row.length] = value.to(row.cache.values.dtype)
    return query


def _rotate(heads: Tensor, angles: Tensor, factor: float) -> Tensor:
    """RoPE: the first half of each head is rotated against the second."""
    cosine, sine = angles.cos() * factor, angles.sin() * factor
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _attend(
    weights: DecoderWeights, layer: LayerWeights, row: Row, index: int, query: Tensor
) -> Tensor:
    """[num_heads * head_dim], over the keys up to the row's own."""
    end = row.length + 1
    start = max(0, end - layer.window) if layer.window else 0
    keys, values = (
        part[index, :, start:end]
        .to(torch.float32)
        .repeat_interleave(weights.num_heads // weights.num_kv_heads, dim=0)
        for part in (row.cache.keys, row.cache.values)
    )
    scores = torch.einsum("hd,htd->ht", query, keys) * weights.head_dim**-0.5
    return torch.einsum("ht,htd->hd", scores.softmax(-1), values).flatten()


def _mlp(weights: DecoderWeights, row: Row, index: int, x: Tensor) -> Tensor:
    """[1, d]."""
    y, _, skipped = mlp_twin(row.plan.mlps[index], x[None], weights.activation)
    if row.skipped is not None:
        row.skipped.add_(skipped)
    stand_in = row.plan.stand_ins[index]
    return y if stand_in is None else y + stand_in_twin(stand_in, x[None])


def stand_in_twin(stand_in: StandInWeights, x: Tensor) -> Tensor:
    """[B, d] of the MLP's input [B, d]."""
    if stand_in.left is None or stand_in.right is None:
        return stand_in.offset.expand(len(x), -1)
    return stand_in.offset + linear_twin(stand_in.left, linear_twin(stand_in.right, x))
