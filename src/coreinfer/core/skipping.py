"""Skipping: core neurons whose activation is too small, at this token, to be worth the reading.

A neuron's activation - gated: that of its gate - is known before the rest of its weights is read:
the up row and the down column, or the down column alone. Where it is small they are left out
(as CATS does, arXiv 2404.08763, with all neurons). Nothing is predicted: it was computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coreinfer.core.tokens import spread_order
from coreinfer.kernels.statistics import activation_sums

SAMPLED = 64  # tokens of a prompt that the thresholds come from


@dataclass
class GateStatistics:
    """What a prompt says of the gates of a layer, chunk by chunk.

    The sampled tokens depend on their positions alone, not on how the prefill was cut.

    Attributes:
        capacity: tokens whose gates are kept at most, `SAMPLED` or more.
        positions: [n] of the sampled tokens; gates: their activations [n, D], act(gate x) or, where
            the MLP is not gated, h itself; None before the first token.
        square_sum: of what the gate is multiplied by (1 where not gated), over the tokens where the
            gate is not zero, [D] float64; open: how many these are, [D] int64.
        tokens: all there were.
    """

    capacity: int = SAMPLED
    positions: Tensor | None = None
    gates: Tensor | None = None
    square_sum: Tensor | None = None
    open: Tensor | None = None
    tokens: int = 0

    def update(self, gates: Tensor, h: Tensor, positions: Tensor) -> None:
        """Add tokens: gates [T, D], h [T, D] = gates * up, their positions [T]."""
        if positions.numel() == 0:
            return
        self.tokens += positions.numel()
        gates = gates.detach()
        closed = gates == 0
        ups = (h.detach().float() / gates).masked_fill_(closed, 0.0)
        square_sum = activation_sums(ups, None).square_sum
        opened = len(gates) - closed.sum(dim=0)
        self.square_sum = square_sum if self.square_sum is None else self.square_sum + square_sum
        self.open = opened if self.open is None else self.open + opened
        # First of the new ones alone, to copy less.
        positions, gates = _sampled(positions, gates, self.capacity)
        if self.positions is not None and self.gates is not None:
            positions = torch.cat([self.positions, positions])
            gates = torch.cat([self.gates, gates])
            positions, gates = _sampled(positions, gates, self.capacity)
        self.positions, self.gates = positions, gates

    def least(self, kept: Tensor, active: float) -> Tensor:
        """The least magnitude of each kept neuron's activation that counts, [K] float32.

        What a neuron adds at a token is |activation| times what its gate is multiplied by, of which
        the root mean square is known. Over the sampled tokens and the kept neurons, `active` of
        these products are as large as the threshold, or larger.

        Args:
            kept: the core neurons, [K].
            active: in (0, 1].

        Raises:
            ValueError: if no token was added.
        """
        gates = self._gates(SAMPLED)
        kept = kept.long().to(gates.device)
        sizes = self._sizes().to(kept.device)[kept]
        products = (gates[:, kept].float().abs() * sizes).flatten().cpu().numpy()
        rank = len(products) - max(1, round(active * len(products)))
        threshold = float(np.partition(products, rank)[rank])
        return (threshold / sizes).cpu()

    def skipped(self, kept: Tensor, least: Tensor, tokens: int) -> Tensor:
        """Where a core neuron is too small to be read, at sampled tokens, [n, K] bool.

        Args:
            kept: the core neurons, [K].
            least: of each, the least magnitude that counts, [K].
            tokens: n, which are the tokens that any sample of so many has.

        Raises:
            ValueError: if no token was added, or fewer are kept than asked for.
        """
        gates = self._gates(tokens)
        if len(gates) < tokens:
            raise ValueError(f"the gates of {len(gates)} tokens are kept, not of {tokens}")
        gates = gates.index_select(1, kept.long().to(gates.device))
        # The one that the threshold was made of counts, however it was rounded.
        return gates.float().abs() < least.to(gates.device) * (1 - 1e-6)

    def _gates(self, tokens: int) -> Tensor:
        """Of so many tokens at most, [n, D]."""
        if self.positions is None or self.gates is None:
            raise ValueError("no token was recorded")
        if tokens >= len(self.gates):
            return self.gates
        return _sampled(self.positions, self.gates, tokens)[1]

    def _sizes(self) -> Tensor:
        """The root mean square of what each gate is multiplied by, [D] float32; of a gate that was
        never open, that of the others, or 1 where none was."""
        assert self.square_sum is not None  # as the gates, which were asked for first
        assert self.open is not None
        opened = self.open.to(self.square_sum.device)
        known = (opened > 0) & (self.square_sum > 0)
        mean_square = self.square_sum[known] / opened[known]
        sizes = torch.ones_like(self.square_sum)
        if known.any():
            sizes[:] = mean_square.mean().sqrt()
            sizes[known] = mean_square.sqrt()
        return sizes.float()


def _sampled(positions: Tensor, rows: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Copies of the first so many in spread order, in the order of their positions."""
    kept = spread_order(positions)[:tokens].sort().values
    return positions[kept], rows[kept]
