"""The MLPs of a prefill: all neurons, shown to an observer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from coreinfer.backends.native.products import Products
from coreinfer.backends.native.weights import NativeWeights
from coreinfer.kernels.linear_twin import activate

# (layer, x [N, d], h [N, D], gates [N, D]): the MLP's input and activations, and what is known of
# them before they are multiplied by up (h itself where nothing is), all tokens of a pass
# -> h W_down^T [N, d], if that was worked out on the way
Observer = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]


class DenseMlps:
    """Computes the MLPs of a pass with all their neurons.

    Args:
        weights, products: the model, and how it multiplies.
        observe: sees x and h of every layer.
    """

    def __init__(self, weights: NativeWeights, products: Products, observe: Observer) -> None:
        self._weights = weights
        self._products = products
        self._observe = observe

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """x [N, d] -> the MLP's output [N, d]."""
        weights, products = self._weights, self._products
        name = f"layers.{layer}.mlp"
        bias = weights.vector(f"{name}_in_bias")
        gate_or_fc1, *up = (
            products.linear(x, weights.mlp_part(layer, part), bias)
            for part in range(weights.mlp_parts - 1)
        )
        gates = activate(gate_or_fc1, weights.config.activation)
        h = up[0].mul_(gates) if up else gates
        bias = weights.vector(f"{name}_out_bias")
        product = self._observe(layer, x, h, gates)
        if product is not None:
            return product if bias is None else product.add_(bias)
        return products.down(h, weights.mlp_part(layer, -1), x.shape[1], bias)
