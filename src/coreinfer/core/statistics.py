"""Streaming, additive statistics of MLP activations over the tokens of a prompt.

Everything here is a sum over tokens, so chunks of a prompt, turns of a conversation and
the prompts of a cluster all merge by adding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from coreinfer.errors import require_ratio
from coreinfer.kernels.statistics import activation_sums, top_mask


def column_sum(x: Tensor) -> Tensor:
    """The sum over the rows of x [T, n], exact to float64, [n]."""
    return x.sum(dim=0, dtype=torch.float64)


def token_core_sizes(positives: Tensor, alpha: float) -> Tensor:
    """ceil(alpha * |A_t+|), at least 1 where a token has a positive activation at all.

    The nearest double to alpha and its product with |A_t+| may each be off by half a unit in the
    last place; a product that is so close above a whole number is that number. (0.07 of 100 is 7,
    though in floating point 0.07 * 100 is above 7.)

    Args:
        positives: |A_t+| of each token, shape [T].
        alpha: in (0, 1].

    Returns:
        int64, shape [T].
    """
    product = require_ratio("alpha", alpha) * positives.double()
    return (product * (1 - 2**-51)).ceil().long().clamp(min=1).minimum(positives)


def token_core_mask(h: Tensor, alpha: float) -> Tensor:
    """Token-wise core neurons C_alpha(t) (arXiv 2410.18311, section 3).

    A neuron is in C_alpha(t) when its activation is among the ceil(alpha * |A_t+|) largest of
    A_t+, the positive entries of h_t. Equal activations go to the smaller index; a token with
    no positive activation has no core neuron.

    Args:
        h: MLP intermediate activations (input of the down projection), finite, shape [T, D].
        alpha: fraction of the positive activations, in (0, 1].

    Returns:
        Boolean tensor of shape [T, D].

    Raises:
        UserError: if alpha is out of range.
    """
    return top_mask(h, _core_sizes(h.shape[-1], require_ratio("alpha", alpha)))


@lru_cache(maxsize=64)
def _core_sizes(num_neurons: int, alpha: float) -> Tensor:
    """|C_alpha(t)| by the number of positive activations of t, 0 to D."""
    return token_core_sizes(torch.arange(num_neurons + 1), alpha)


@dataclass
class LayerStatistics:
    """Sums over the counted tokens of one sequence (or of many, merged) for one MLP layer.

    Attributes:
        counts: f(n), tokens t with n in C_alpha(t); [D], int64 (float64 after `scaled`).
        positive_sum: sum of the positive activations, the tie-break of f and recorded with it;
            [D] float64.
        square_sum: sum of h^2; [D] float64.
        unit_square_sum: sum of (h / |h|_2)^2, as in GRIFFIN (arXiv 2404.01365); [D] float64.
        input_sum: sum of the MLP's input x, where it was asked for; [d] float64.
        tokens: number of tokens summed over.
        residual_sum: sum of (h - its prediction from x)^2; [D] float64; None unless recorded.
    """

    counts: Tensor
    positive_sum: Tensor
    square_sum: Tensor
    unit_square_sum: Tensor
    input_sum: Tensor
    tokens: float = 0
    residual_sum: Tensor | None = None

    @classmethod
    def zeros(cls, num_neurons: int, hidden_size: int) -> LayerStatistics:
        def empty(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64)

        return cls(
            counts=torch.zeros(num_neurons, dtype=torch.int64),
            positive_sum=empty(num_neurons),
            square_sum=empty(num_neurons),
            unit_square_sum=empty(num_neurons),
            input_sum=empty(hidden_size),
        )

    @property
    def num_neurons(self) -> int:
        return self.counts.numel()

    def update(self, x: Tensor, h: Tensor, alpha: float | None, *, input_sum: bool = True) -> None:
        """Add tokens.

        Args:
            x: the MLP's input, shape [T, d].
            h: its intermediate activations, shape [T, D].
            alpha: fraction for `counts`; None leaves them and their tie-break alone, which cost
                more than all other sums together.
            input_sum: whether x is summed.
        """
        if h.shape[0] == 0:
            return
        h = h.detach()
        tops = None if alpha is None else _core_sizes(h.shape[-1], require_ratio("alpha", alpha))
        sums = activation_sums(h, tops)
        self.square_sum = _add(self.square_sum, sums.square_sum)
        self.unit_square_sum = _add(self.unit_square_sum, sums.unit_square_sum)
        if sums.counts is not None and sums.positive_sum is not None:
            self.counts = _add(self.counts, sums.counts)
            self.positive_sum = _add(self.positive_sum, sums.positive_sum)
        if input_sum:
            self.input_sum = _add(self.input_sum, column_sum(x.detach()))
        self.tokens += h.shape[0]

    def update_residual(self, residual: Tensor) -> None:
        """Add what a prediction has left of the activations of tokens, shape [T, D]."""
        if residual.shape[0]:
            square_sum = activation_sums(residual.detach(), None).square_sum
            self.residual_sum = _sum_of(self.residual_sum, square_sum)

    @property
    def is_finite(self) -> bool:
        """Whether every activation was a finite number."""
        return bool(torch.isfinite(self.square_sum).all())

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        return LayerStatistics(
            counts=self.counts + other.counts,
            positive_sum=self.positive_sum + other.positive_sum,
            square_sum=self.square_sum + other.square_sum,
            unit_square_sum=self.unit_square_sum + other.unit_square_sum,
            input_sum=self.input_sum + other.input_sum,
            tokens=self.tokens + other.tokens,
            residual_sum=_sum_of(self.residual_sum, other.residual_sum),
        )

    def scaled(self, weight: float) -> LayerStatistics:
        """The same statistics as if every token had counted `weight` times."""
        return LayerStatistics(
            counts=self.counts.double() * weight,
            positive_sum=self.positive_sum * weight,
            square_sum=self.square_sum * weight,
            unit_square_sum=self.unit_square_sum * weight,
            input_sum=self.input_sum * weight,
            tokens=self.tokens * weight,
            residual_sum=None if self.residual_sum is None else self.residual_sum * weight,
        )


def _add(total: Tensor, term: Tensor) -> Tensor:
    return total + term.to(total.device)


def _sum_of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """None is a sum of nothing."""
    if a is None or b is None:
        return b if a is None else a
    return _add(a, b)


@dataclass
class PromptStatistics:
    """The statistics of one sequence: one `LayerStatistics` a layer, the BOS token kept apart.

    The beginning-of-sequence token is an attention sink with outlier activations; it counts
    only where nothing else is there (or where the recorder was told to count it).
    """

    layers: list[LayerStatistics]
    bos: list[LayerStatistics]

    @classmethod
    def zeros(cls, sizes: Sequence[tuple[int, int]]) -> PromptStatistics:
        """Empty statistics for layers of the given (num_neurons, hidden_size)."""
        return cls(
            layers=[LayerStatistics.zeros(*size) for size in sizes],
            bos=[LayerStatistics.zeros(*size) for size in sizes],
        )

    def __add__(self, other: PromptStatistics) -> PromptStatistics:
        return PromptStatistics(
            layers=[a + b for a, b in zip(self.layers, other.layers, strict=True)],
            bos=[a + b for a, b in zip(self.bos, other.bos, strict=True)],
        )
