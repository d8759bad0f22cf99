"""The smaller matrices that sparse decoding computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from coreinfer.models.mlp import Linear, MlpLayer
from coreinfer.standins.base import StandInTerms


@dataclass(frozen=True)
class SmallLinear:
    """A linear for all rows alike.

    weight: [out, in]; bias: [out] or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return F.linear(x, self.weight, self.bias)

    def only(self, _groups: Sequence[int]) -> SmallLinear:
        """Itself: its weights are read once, for however many rows."""
        return self

    def weight_of(self, _group: int) -> Tensor:
        """[out, in]."""
        return self.weight


@dataclass(frozen=True)
class GroupedLinear:
    """A linear with its own weights for each of G groups of rows.

    weight: [G, out, in]; bias: [G, out] or None; groups: those to compute, None for all.
    """

    weight: Tensor
    bias: Tensor | None
    groups: tuple[int, ...] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in], the G groups in equal consecutive shares of the rows -> [..., out], zero
        for the groups that are not computed."""
        rows = x.reshape(self.weight.shape[0], -1, x.shape[-1])  # [G, rows, in]
        if self.groups is None:
            y = rows @ self.weight.transpose(1, 2)
            if self.bias is not None:
                y = y + self.bias.unsqueeze(1)
        else:
            y = rows.new_zeros(*rows.shape[:2], self.weight.shape[1])
            for group in self.groups:
                bias = None if self.bias is None else self.bias[group]
                y[group] = F.linear(rows[group], self.weight[group], bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def only(self, groups: Sequence[int]) -> GroupedLinear:
        """The same for some of the groups: the weights of the others are not read."""
        return replace(self, groups=tuple(groups))

    def weight_of(self, group: int) -> Tensor:
        """[out, in]."""
        return self.weight[group]


@dataclass
class Skip:
    """Leaves out, token by token, the core neurons whose activation is small.

    It is computed with zeros here, where nothing is saved: the native backend does not read them.

    Attributes:
        layer: what tells the activations.
        least: of each of G groups of rows, the least magnitude that counts, [G, K].
        skipped: of the last pass, how many were left out at each token, [B * T].
    """

    layer: MlpLayer
    least: Tensor
    skipped: Tensor | None = None

    def __call__(self, h: Tensor, first: Tensor) -> Tensor:
        """h [..., K], and the output of the first input linear -> h with zeros."""
        rows = self.layer.gates(first, h).reshape(self.least.shape[0], -1, h.shape[-1])
        small = (rows.abs() < self.least.unsqueeze(1)) | (rows == 0)
        self.skipped = small.sum(dim=-1).flatten()
        return h.masked_fill(small.reshape(h.shape), 0.0)


@dataclass(frozen=True)
class CompactMlp:
    """One MLP layer cut down to its core neurons, plus the stand-in for the others."""

    inputs: tuple[SmallLinear | GroupedLinear, ...]
    output: SmallLinear | GroupedLinear
    left: SmallLinear | GroupedLinear | None = None
    right: SmallLinear | GroupedLinear | None = None
    skip: Skip | None = None

    @property
    def num_neurons(self) -> int:
        """K."""
        return self.output.weight.shape[-1]

    def only(self, groups: Sequence[int]) -> CompactMlp:
        """The same for some of the groups; what comes out for the others means nothing."""
        return replace(
            self,
            inputs=tuple(linear.only(groups) for linear in self.inputs),
            output=self.output.only(groups),
            left=None if self.left is None else self.left.only(groups),
            right=None if self.right is None else self.right.only(groups),
        )

    def project(self, h: Tensor, x: Tensor, first: Tensor) -> Tensor:
        """h [..., K], the MLP's input x [..., d] and what the first of `inputs` made of it -> the
        MLP's output [..., d]."""
        y = self.output(h if self.skip is None else self.skip(h, first))
        if self.left is not None and self.right is not None:
            y = y + self.left(self.right(x))
        return y


def compact_mlp(
    layer: MlpLayer,
    kept: Sequence[Tensor],
    terms: Sequence[StandInTerms] | None,
    least: Sequence[Tensor] | None = None,
) -> CompactMlp:
    """Gather the weights of the kept neurons, one copy a group; no copy where all are kept.

    Args:
        layer: the full layer.
        kept: for each group its sorted neuron indices, [K] each.
        terms: for each group its stand-in, or None. Its offset joins the output bias, so a
            constant stand-in costs no further operation.
        least: for each group the least activation of each kept neuron that counts, [K], or None.
    """
    device = layer.output.weight.device
    skip = None
    if least is not None:
        skip = Skip(layer, torch.stack([one.to(device) for one in least]))
    kept = [index.long().to(device) for index in kept]
    size = layer.num_neurons
    if terms is None and kept[0].numel() == size:
        *inputs, output = (
            SmallLinear(one.weight, one.bias) for one in (*layer.inputs, layer.output)
        )
        return CompactMlp(tuple(inputs), output, skip=skip)

    def rows(linear: Linear) -> SmallLinear | GroupedLinear:
        picks = [torch.cat([i, size + i]) if layer.fused else i for i in kept]
        bias = linear.bias
        return _linear(
            [linear.weight.index_select(0, i) for i in picks],
            None if bias is None else [bias.index_select(0, i) for i in picks],
        )

    bias = layer.output.bias
    biases = None if bias is None else [bias] * len(kept)
    left = right = None
    if terms is not None:
        biases = [term.offset if bias is None else bias + term.offset for term in terms]
        lefts = [term.left for term in terms if term.left is not None]
        rights = [term.right for term in terms if term.right is not None]
        if lefts:
            # A short prompt has a smaller rank; zeros bring it to that of the others.
            rank = max(part.shape[1] for part in lefts)
            lefts = [F.pad(part, (0, rank - part.shape[1])) for part in lefts]
            rights = [F.pad(part, (0, 0, 0, rank - part.shape[0])) for part in rights]
            left, right = _linear(lefts, None), _linear(rights, None)
    down = [layer.output.weight.index_select(1, i).contiguous() for i in kept]
    return CompactMlp(
        tuple(rows(linear) for linear in layer.inputs), _linear(down, biases), left, right, skip
    )


def _linear(
    weights: Sequence[Tensor], biases: Sequence[Tensor] | None
) -> SmallLinear | GroupedLinear:
    if len(weights) == 1:  # nothing to stack: no second copy, and a plain product in decode
        return SmallLinear(weights[0], None if biases is None else biases[0])
    return GroupedLinear(
        torch.stack(list(weights)), None if biases is None else torch.stack(list(biases))
    )
