"""How far decoding through smaller MLPs is from dense decoding, for a backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coreinfer.backends.hf.compact import CompactMlp
from coreinfer.backends.hf.session import HfSession
from coreinfer.backends.hf.switch import SmallMlp
from coreinfer.core.measures import kl_by_token


def continuation_loss(
    read: HfSession, small: Mapping[int, SmallMlp], continuations: Sequence[Sequence[int]]
) -> Tensor:
    """KL(dense || sparse) of the next-token distributions, nats a token, mean over the sequences.

    The first token of a continuation is the dense prefill's and does not count.

    Args:
        read: a session after its prefill; it stays as it is.
        small: the MLPs to decode through, by layer; the others are dense.
        continuations: of each sequence, two tokens or more.
    """
    with torch.no_grad():
        dense = read.fork().decode_with({}, continuations)[:, :-1].float().log_softmax(dim=-1)
    sparse = read.fork().decode_with(small, continuations)[:, :-1].float().log_softmax(dim=-1)
    kl = kl_by_token(dense, sparse)
    counts = torch.tensor([len(row) - 1 for row in continuations])
    real = torch.arange(kl.shape[1]) < counts.unsqueeze(1)
    return (kl * real).sum(dim=1).div(counts).mean()


@dataclass(frozen=True)
class OutputSlopes:
    """How the loss changes with the outputs of the sparse layers.

    Attributes:
        loss: nats a token.
        inputs: of each sparse layer, the MLP's inputs over the continuations, [B, T, d].
        slopes: d loss / d output, [B, T, d]; 0 at padding.
    """

    loss: float
    inputs: dict[int, Tensor]
    slopes: dict[int, Tensor]


class _Nudged:
    """A smaller MLP with nothing added to its output: a tensor whose slope is asked for."""

    def __init__(self, compact: CompactMlp) -> None:
        self.inputs = compact.inputs
        self._compact = compact
        self.x = self.nudge = torch.empty(0)

    def project(self, h: Tensor, x: Tensor, first: Tensor) -> Tensor:
        y = self._compact.project(h, x, first)
        self.x, self.nudge = x.detach(), torch.zeros_like(y, requires_grad=True)
        return y + self.nudge


def output_slopes(read: HfSession, continuations: Sequence[Sequence[int]]) -> OutputSlopes:
    """Of all layers that `read` has made smaller, by one backward pass.

    Args:
        read: a session after prefill and selection.
        continuations: as `continuation_loss` takes them.
    """
    nudged = {layer: _Nudged(compact) for layer, compact in read.compact.items()}
    loss = continuation_loss(read, nudged, continuations)
    slopes = torch.autograd.grad(loss, [one.nudge for one in nudged.values()])
    batch = len(continuations)
    return OutputSlopes(
        float(loss.detach()),
        {layer: one.x.reshape(batch, -1, one.x.shape[-1]) for layer, one in nudged.items()},
        {
            layer: slope.reshape(batch, -1, slope.shape[-1])
            for layer, slope in zip(nudged, slopes, strict=True)
        },
    )
