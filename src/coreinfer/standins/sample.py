"""A bounded, order-independent sample of a prompt's tokens, for fitting a stand-in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coreinfer.core.statistics import column_sum
from coreinfer.core.tokens import spread_order
from coreinfer.standins.down import DownProjection


@dataclass
class LayerSample:
    """Inputs and activations of sampled tokens of one MLP layer, and the exact mean of all.

    A token is kept when the hash of its position is among the `capacity` smallest, so the sample
    depends on the tokens alone, not on how the prefill was chunked or batched.

    Attributes:
        capacity: how many tokens are kept at most.
        positions: [n] int64; x: [n, d]; h: [n, D]; None before the first token. Where all tokens
            of an update are kept they are not copied, and must not be written to.
        tokens: how many tokens were seen.
    """

    capacity: int
    positions: Tensor | None = None
    x: Tensor | None = None
    h: Tensor | None = None
    tokens: int = 0
    _others_sum: Tensor | None = None  # of h of the tokens that are not kept, [D] float64

    def update(self, x: Tensor, h: Tensor, positions: Tensor) -> None:
        """Add tokens: x [T, d], h [T, D], their positions in the sequence [T]."""
        if positions.numel() == 0:
            return
        x, h = x.detach(), h.detach()
        self.tokens += positions.numel()
        x, h, positions = self._kept(x, h, positions)  # first of the new ones alone, to copy less
        if self.positions is not None and self.x is not None and self.h is not None:
            positions = torch.cat([self.positions, positions])
            x, h = torch.cat([self.x, x]), torch.cat([self.h, h])
            x, h, positions = self._kept(x, h, positions)
        self.positions, self.x, self.h = positions, x, h

    @property
    def h_sum(self) -> Tensor | None:
        """The sum of h over all tokens seen, exact to float64, [D]; None before the first."""
        if self.h is None:
            return None
        own = column_sum(self.h)
        return own if self._others_sum is None else own + self._others_sum

    def _kept(self, x: Tensor, h: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is sampled of these tokens, in order; the others are added up."""
        if len(positions) <= self.capacity:
            return _compact(x), _compact(h), positions
        order = spread_order(positions)
        kept, left = order[: self.capacity].sort().values, order[self.capacity :]
        others = column_sum(h[left])
        self._others_sum = others if self._others_sum is None else self._others_sum + others
        return x[kept], h[kept], positions[kept]

    @property
    def inputs(self) -> Tensor:
        """x of the sampled tokens, [n, d].

        Raises:
            ValueError: if no token was sampled.
        """
        if self.x is None:
            raise ValueError("no token was sampled")
        return self.x

    def left_out(
        self,
        down: DownProjection,
        dropped: Tensor,
        known: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> Tensor:
        """What decode leaves out of the output at the sampled tokens, [n, d] float32.

        Args:
            down: the down projection; dropped: the neurons, int64.
            known: that part of every token read so far, each at its position, [T, d] float32,
                where it was computed already.
            skipped: what is left out beside them at the sampled tokens, [n, d] float32.

        Raises:
            ValueError: if no token was sampled.
        """
        if self.h is None or self.positions is None:
            raise ValueError("no token was sampled")
        if known is None:
            r = down(self.h.index_select(1, dropped), dropped)
        else:
            r = known.index_select(0, self.positions)
        return r if skipped is None else r + skipped

    def skipped_part(self, down: DownProjection, kept: Tensor, small: Tensor) -> Tensor:
        """What core neurons would add at the sampled tokens where they are skipped, [n, d] float32.

        Args:
            down: the down projection; kept: the core neurons [K], int64.
            small: where they are skipped, [n, K] bool.

        Raises:
            ValueError: if no token was sampled.
        """
        if self.h is None:
            raise ValueError("no token was sampled")
        return down(self.h.index_select(1, kept).masked_fill(~small, 0.0), kept)


def _compact(rows: Tensor) -> Tensor:
    """The same rows, copied if they would keep alive far more memory than their own."""
    return rows.clone() if rows.untyped_storage().nbytes() > 2 * rows.nbytes else rows
