"""What more in a layer is worth: how the loss falls where it keeps, or computes, a few more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coreinfer.backends.hf.compact import CompactMlp
from coreinfer.backends.hf.loss import continuation_loss
from coreinfer.backends.hf.session import HfBackend, HfSession
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Selector
from coreinfer.standins import StandIn


@dataclass(frozen=True)
class Worth:
    """Of the layers of a model, at a core set, on some prompts.

    Attributes:
        loss: KL(dense || sparse) of the next-token distributions, nats a token.
        gains: of each layer, by how much that falls on the whole way to more, to first order; None
            where more is the same, or dense, or lacks some of the neurons.
    """

    loss: float
    gains: list[float | None]


@dataclass(frozen=True)
class Step:
    """An MLP layer on its way to more: now + gate * (more - now).

    At gate 0 it is `now`, and the slope of the loss along the gate is, to first order, what the way
    would change: where it adds neurons, the stand-in that is theirs no longer among it.

    Attributes:
        now, more: the layer with a core set, and with one that contains it.
        places: where the neurons of `now` are among those of `more`, [G, K] of G groups of rows.
        gate: 0, a scalar.
    """

    now: CompactMlp
    more: CompactMlp
    places: Tensor
    gate: Tensor

    @property
    def inputs(self) -> Sequence[Callable[[Tensor], Tensor]]:
        return self.more.inputs

    def project(self, h: Tensor, x: Tensor, first: Tensor) -> Tensor:
        y = self.now.project(self._of_now(h, h.shape[-1]), x, self._of_now(first, h.shape[-1]))
        with torch.no_grad():
            change = self.more.project(h, x, first) - y
        return y + self.gate.to(y.dtype) * change

    def _of_now(self, y: Tensor, size: int) -> Tensor:
        """Those of `now` among the `size` neurons of `more`, of each of the parts of y."""
        groups = self.places.shape[0]
        rows = y.reshape(groups, -1, y.shape[-1] // size, size)  # [G, rows, parts, K of more]
        places = self.places[:, None, None].expand(-1, *rows.shape[1:3], -1)
        return rows.gather(-1, places).reshape(*y.shape[:-1], -1)


def worth(
    backend: HfBackend,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    now: Selector,
    more: Selector,
    stand_in: StandIn | None,
    texts: Sequence[str] | None = None,
) -> Worth:
    """The worth of more in every layer, all layers by one backward pass.

    A continuation is read after its densely prefilled prompt, through the core neurons; its first
    token is the prefill's and does not count.

    Args:
        backend: the model; its weights need no gradients, and get none.
        prompts: token ids, a batch.
        continuations: what follows each, two tokens or more.
        now: the rule.
        more: the same rule with more, in some layers or in all: of their neurons, or of those that
            are active.
        stand_in: what takes the place of the dropped neurons.
        texts: of the prompts, for rules that embed them.
    """
    read = backend.start(RecordingPlan.of(now, stand_in))
    read.prefill(prompts, texts)
    steps = steps_between(read, now, more, stand_in)
    gains: list[float | None] = [None] * len(backend.anatomy.layers)
    loss = continuation_loss(read, {**read.compact, **steps}, continuations)
    if steps:
        slopes = torch.autograd.grad(loss, [step.gate for step in steps.values()])
        for layer, slope in zip(steps, slopes, strict=True):
            gains[layer] = -float(slope)
    return Worth(float(loss.detach()), gains)


def steps_between(
    read: HfSession, now: Selector, more: Selector, stand_in: StandIn | None
) -> dict[int, Step]:
    """Of each layer that has more, the way there.

    Where a rule's order of neurons itself depends on how many are kept, `more` may lack some of
    those that `now` keeps; such a layer has no way.

    Args:
        read: a session after its prefill; `now` is selected in it.
    """
    larger = read.fork()
    wider = [choice.core_set.layers for choice in larger.select(more, stand_in)]
    kept = [choice.core_set.layers for choice in read.select(now, stand_in)]
    steps = {}
    for layer, compact in read.compact.items():
        if layer not in larger.compact:
            continue
        grown = larger.compact[layer].num_neurons > compact.num_neurons
        if not grown and more.active_in(layer) <= now.active_in(layer):
            continue
        pairs = [(a[layer].long(), b[layer].long()) for a, b in zip(kept, wider, strict=True)]
        if not all(torch.isin(own, larger_set).all() for own, larger_set in pairs):
            continue
        places = torch.stack([torch.searchsorted(b, a) for a, b in pairs])
        gate = torch.zeros((), requires_grad=True)
        device = compact.output.weight.device
        steps[layer] = Step(compact, larger.compact[layer], places.to(device), gate)
    return steps
