"""Streaming, additive statistics of MLP activations over the tokens of a prompt.

Everything here is a sum over tokens, so chunks of a prompt, turns of a conversation and
the prompts of a cluster all merge by adding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def token_core_mask(h: Tensor, alpha: float) -> Tensor:
    """Token-wise core neurons C_alpha(t) (arXiv 2410.18311, section 3).

    A neuron is in C_alpha(t) when its activation is among the ceil(alpha * |A_t+|) largest of
    A_t+, the positive entries of h_t. Equal activations go to the smaller index; a token with
    no positive activation has no core neuron.

    Args:
        h: MLP intermediate activations (input of the down projection), shape [T, D].
        alpha: fraction of the positive activations, in (0, 1].

    Returns:
        Boolean tensor of shape [T, D].
    """
    positives = (h > 0).sum(dim=-1)
    size = torch.ceil(alpha * positives.double()).long().clamp(min=1).minimum(positives)  # [T]
    # The size-th largest value of each token; ties at that value are settled below.
    ordered = h.sort(dim=-1, descending=True).values
    threshold = ordered.gather(-1, (size - 1).clamp(min=0).unsqueeze(-1))  # [T, 1]
    above = h > threshold
    tied = h == threshold
    room = (size - above.sum(dim=-1)).unsqueeze(-1)  # how many of the tied ones still fit
    return above | (tied & (tied.cumsum(dim=-1) <= room))


@dataclass
class LayerStatistics:
    """Sums over the counted tokens of one sequence (or of many, merged) for one MLP layer.

    Attributes:
        counts: f(n), tokens t with n in C_alpha(t); [D], int64 (float64 after `scaled`).
        positive_sum: sum of the positive activations, the tie-break of f; [D] float64.
        square_sum: sum of h^2; [D] float64.
        unit_square_sum: sum of (h / |h|_2)^2, as in GRIFFIN (arXiv 2404.01365); [D] float64.
        input_sum: sum of the MLP's input x; [d] float64.
        tokens: number of tokens summed over.
    """

    counts: Tensor
    positive_sum: Tensor
    square_sum: Tensor
    unit_square_sum: Tensor
    input_sum: Tensor
    tokens: float = 0

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

    def update(self, x: Tensor, h: Tensor, alpha: float | None) -> None:
        """Add tokens.

        Args:
            x: the MLP's input, shape [T, d].
            h: its intermediate activations, shape [T, D].
            alpha: fraction for `counts`; None leaves the counts alone (they cost a sort).
        """
        if h.shape[0] == 0:
            return
        x, h = x.detach().float(), h.detach().float()
        double = torch.float64  # so that the order of chunks does not move a near-tie

        def add(total: Tensor, term: Tensor) -> Tensor:
            return total + term.to(total.device)

        if alpha is not None:
            self.counts = add(self.counts, token_core_mask(h, alpha).sum(dim=0))
        self.positive_sum = add(self.positive_sum, h.clamp(min=0).sum(dim=0, dtype=double))
        squares = h.square()
        self.square_sum = add(self.square_sum, squares.sum(dim=0, dtype=double))
        norms = squares.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        self.unit_square_sum = add(self.unit_square_sum, (squares / norms).sum(dim=0, dtype=double))
        self.input_sum = add(self.input_sum, x.sum(dim=0, dtype=double))
        self.tokens += h.shape[0]

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        return LayerStatistics(
            counts=self.counts + other.counts,
            positive_sum=self.positive_sum + other.positive_sum,
            square_sum=self.square_sum + other.square_sum,
            unit_square_sum=self.unit_square_sum + other.unit_square_sum,
            input_sum=self.input_sum + other.input_sum,
            tokens=self.tokens + other.tokens,
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
        )


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

    def counted(self) -> list[LayerStatistics]:
        """What selection sees: the BOS token only if there is no other."""
        return self.layers if any(layer.tokens for layer in self.layers) else self.bos
