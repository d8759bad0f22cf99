"""What selection needs to know of a native model, multiplied as its prefill multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coreinfer.backends.native.products import Products
from coreinfer.backends.native.weights import NativeWeights
from coreinfer.kernels.linear import dequantize
from coreinfer.kernels.weights import map_format
from coreinfer.standins import StandInTerms

_ROWS = 512  # columns of W_down dequantised at a time for their norms: they stay in the cache


@dataclass(frozen=True)
class StoredDown:
    """The down projection of a layer in its stored form; terms of a stand-in are float32."""

    products: Products
    records: Tensor  # [D, row_bytes(d)]
    size: int  # d

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def __call__(self, h: Tensor, neurons: Tensor) -> Tensor:
        return self.products.down(h, self.records, self.size, index=neurons.int())


class NativeView:
    """A native model as `coreinfer.backends.choose.choose` sees it."""

    def __init__(self, weights: NativeWeights, products: Products) -> None:
        self._weights = weights
        self._products = products
        self._norms: dict[int, Tensor] = {}

    @property
    def name(self) -> str:
        return self._weights.name

    @property
    def fingerprint(self) -> str:
        return self._weights.fingerprint

    @property
    def num_neurons(self) -> tuple[int, ...]:
        return self._weights.num_neurons

    def column_norms(self, layer: int) -> Tensor:
        """|W_down[:, n]|_2 of every neuron, [D] float64; computed once a layer."""
        if layer not in self._norms:
            size, form = self._weights.config.hidden_size, self._weights.format
            self._norms[layer] = torch.cat(
                [
                    torch.linalg.vector_norm(dequantize(part, size, form), dim=1)
                    for part in self._weights.mlp_part(layer, -1).split(_ROWS)
                ]
            ).double()
        return self._norms[layer]

    def down(self, layer: int) -> StoredDown:
        size = self._weights.config.hidden_size
        return StoredDown(self._products, self._weights.mlp_part(layer, -1), size)

    def stand_in_bytes(self, terms: StandInTerms) -> int:
        """Bytes that decode reads for the stand-in of a layer: a float32 offset, and the maps."""
        size = terms.offset.numel()
        bits = map_format(size).bits_per_weight * (terms.num_weights - size)
        return 4 * size + round(bits / 8)
