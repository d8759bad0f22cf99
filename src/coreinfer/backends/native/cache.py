"""The KV cache of one sequence: contiguous, ahead of what is needed, free to fork."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from coreinfer.backends.base import require_context
from coreinfer.backends.native.architecture import DecoderConfig

_STEP = 64  # capacities are multiples of it


class _Buffer:
    """Room for keys and values, [layers, 2, kv heads, capacity, head_dim], that forks share."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.used = 0  # positions that some cache holds; beyond them nobody reads


class KvCache:
    """Keys and values of one sequence, in every layer.

    Attributes:
        length: tokens it holds.
    """

    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        self._limit = config.context_length
        shape = (config.num_layers, 2, config.num_kv_heads, 0, config.head_dim)
        self._buffer = _Buffer(torch.empty(shape, dtype=dtype))
        self.length = 0

    @property
    def data(self) -> Tensor:
        """[layers, 2, kv heads, capacity, head_dim]; the first `length` positions are filled."""
        return self._buffer.data

    @property
    def capacity(self) -> int:
        return self.data.shape[3]

    def reserve(self, tokens: int) -> None:
        """Make room for more tokens, which this cache may then write and no fork of it sees.

        Raises:
            UserError: if the sequence would be longer than the model reads.
        """
        if tokens == 0:  # a fork may have gone on meanwhile: that is no reason to copy anything
            return
        needed = self.length + tokens
        require_context(self._limit, needed)
        if needed > self.capacity or self._buffer.used > self.length:
            roomy = max(needed, min(self._limit, needed + needed // 2))
            capacity = -(-roomy // _STEP) * _STEP
            shape = (*self.data.shape[:3], capacity, self.data.shape[4])
            larger = _Buffer(torch.zeros(shape, dtype=self.data.dtype))
            larger.data[:, :, :, : self.length] = self.data[:, :, :, : self.length]
            self._buffer = larger
        self._buffer.used = needed

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values of new tokens, [kv heads, n, head_dim], into reserved room."""
        place = slice(self.length, self.length + keys.shape[1])
        self.data[layer, 0, :, place] = keys
        self.data[layer, 1, :, place] = values

    def read(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `tokens` positions, float32 [kv heads, tokens, head_dim]."""
        keys, values = self.data[layer, :, :, :tokens].float()
        return keys, values

    def advance(self, tokens: int) -> None:
        """What was written into every layer now belongs to the sequence."""
        self.length += tokens

    def fork(self) -> KvCache:
        """A cache that goes on by its own; the memory is shared until both go on."""
        return copy.copy(self)
