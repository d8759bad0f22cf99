"""What a layer's next neurons are worth: how the loss falls where it keeps a few more."""

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
        per_neuron: of each layer, by how much that falls a neuron more, to first order; None where
            the layer is dense or was not made larger.
    """

    loss: float
    per_neuron: list[float | None]


@dataclass(frozen=True)
class Step:
    """An MLP layer on its way from its core neurons to more of them: now + gate * (more - now).

    At gate 0 it is `now`, and the slope of the loss along the gate is, to first order, what the
    neurons that `more` adds would change, the stand-in that is theirs no longer among it.

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
    """The worth of a few neurons more in every layer, all layers by one backward pass.

    A continuation is read after its densely prefilled prompt, through the core neurons; its first
    token is the prefill's and does not count.

    Args:
        backend: the model; its weights need no gradients, and get none.
        prompts: token ids, a batch.
        continuations: what follows each, two tokens or more.
        now: the rule.
        more: the same rule with larger budgets, in some layers or in all.
        stand_in: what takes the place of the dropped neurons.
        texts: of the prompts, for rules that embed them.
    """
    read = backend.start(RecordingPlan.of(more, stand_in))
    read.prefill(prompts, texts)
    steps, added = steps_between(read, now, more, stand_in)
    if not steps:
        raise ValueError("no layer keeps more neurons in one rule than in the other")
    loss = continuation_loss(read, {**read.compact, **steps}, continuations)
    gates = [step.gate for step in steps.values()]
    slopes = torch.autograd.grad(loss, gates)
    per_neuron: list[float | None] = [None] * len(backend.anatomy.layers)
    for layer, slope in zip(steps, slopes, strict=True):
        per_neuron[layer] = -float(slope) / added[layer]
    return Worth(float(loss.detach()), per_neuron)


def steps_between(
    read: HfSession, now: Selector, more: Selector, stand_in: StandIn | None
) -> tuple[dict[int, Step], dict[int, int]]:
    """Of each layer that `more` makes larger, the way there and how many neurons it adds.

    Args:
        read: a session after its prefill; `now` is selected in it.
    """
    larger = read.fork()
    wider = [choice.core_set.layers for choice in larger.select(more, stand_in)]
    kept = [choice.core_set.layers for choice in read.select(now, stand_in)]
    steps, added = {}, {}
    for layer, compact in read.compact.items():
        if layer not in larger.compact:
            continue
        pairs = [(a[layer].long(), b[layer].long()) for a, b in zip(kept, wider, strict=True)]
        grown = len(pairs[0][1]) - len(pairs[0][0])
        if grown <= 0:
            continue
        places = torch.stack([torch.searchsorted(b, a) for a, b in pairs])
        gate = torch.zeros((), requires_grad=True)
        device = compact.output.weight.device
        steps[layer] = Step(compact, larger.compact[layer], places.to(device), gate)
        added[layer] = grown
    return steps, added
