"""The MLPs of a pass: all neurons, shown to an observer, or the core neurons of each sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coreinfer.backends.native.architecture import DecoderConfig
from coreinfer.backends.native.products import Products
from coreinfer.backends.native.weights import NativeWeights
from coreinfer.standins import StandInTerms

# (layer, x [N, d], h [N, D]): the MLP's input and activations, all tokens of a pass
Observer = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class CoreMlp:
    """The core neurons of one sequence in one layer, as they are stored.

    Attributes:
        parts: records [K, row_bytes(d)] of each input's rows, then of the down columns.
        in_bias: [K], of a plain MLP, or None.
        terms: the stand-in for the other neurons, or None.
    """

    parts: tuple[Tensor, ...]
    in_bias: Tensor | None = None
    terms: StandInTerms | None = None


def gather(
    weights: NativeWeights, layer: int, kept: Tensor | None, terms: StandInTerms | None = None
) -> CoreMlp:
    """The kept neurons [K] of a layer; None keeps all, in place."""
    parts = [weights.mlp_part(layer, part) for part in range(weights.mlp_parts)]
    bias = weights.vector(f"layers.{layer}.mlp_in_bias")
    if kept is not None:
        index = kept.long()
        parts = [part.index_select(0, index) for part in parts]
        bias = None if bias is None else bias.index_select(0, index)
    return CoreMlp(tuple(parts), bias, terms)


class Mlps:
    """Computes the MLPs of a pass.

    Args:
        weights, products: the model, and how it multiplies.
        core: of each sparse layer, the core neurons of each sequence; the others are dense.
        lengths: tokens of each sequence in the pass, in order.
        observe: sees x and h of the dense layers.
    """

    def __init__(
        self,
        weights: NativeWeights,
        products: Products,
        *,
        core: Mapping[int, Sequence[CoreMlp]] | None = None,
        lengths: Sequence[int] = (),
        observe: Observer | None = None,
    ) -> None:
        self._weights = weights
        self._products = products
        self._core = core or {}
        self._lengths = list(lengths)
        self._observe = observe

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """x [N, d] -> the MLP's output [N, d]."""
        if layer not in self._core:
            return self._compute(layer, gather(self._weights, layer, None), x)
        shares = zip(self._core[layer], x.split(self._lengths), strict=True)
        return torch.cat([self._compute(layer, core, rows) for core, rows in shares])

    def _compute(self, layer: int, core: CoreMlp, x: Tensor) -> Tensor:
        inputs = [self._products.linear(x, part, core.in_bias) for part in core.parts[:-1]]
        h = activate(self._weights.config, inputs)
        if self._observe is not None:
            self._observe(layer, x, h)
        bias = self._weights.vector(f"layers.{layer}.mlp_out_bias")
        y = self._products.down(h, core.parts[-1], x.shape[1], bias)
        if core.terms is not None:
            y += core.terms.offset
            if core.terms.left is not None and core.terms.right is not None:
                y += (x @ core.terms.right.t()) @ core.terms.left.t()
        return y


def activate(config: DecoderConfig, inputs: Sequence[Tensor]) -> Tensor:
    """The MLP's activations h from what its input linears give."""
    match config.activation:
        case "silu":
            h = F.silu(inputs[0])
        case "relu":
            h = F.relu(inputs[0])
        case "gelu":
            h = F.gelu(inputs[0])
        case _:
            h = F.gelu(inputs[0], approximate="tanh")
    return h.mul_(inputs[1]) if config.gated else h
