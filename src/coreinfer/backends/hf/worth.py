"""What more in a layer is worth: how the loss falls where it keeps, or computes, a few more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
        gains: of each way, of each layer, by how much that falls on the whole way, to first order;
            None where the layer is the same at both ends, or dense at one, or neither end has all
            neurons of the other.
    """

    loss: float
    gains: list[list[float | None]]


@dataclass(frozen=True)
class Part:
    """A layer with some of the neurons that another has.

    Attributes:
        mlp: it.
        places: where its neurons are among those of the other, [G, K] of G groups of rows.
    """

    mlp: CompactMlp
    places: Tensor

    def project(self, h: Tensor, x: Tensor, first: Tensor) -> Tensor:
        """As of a `CompactMlp`, h and `first` being those of the other layer."""
        size = h.shape[-1]
        return self.mlp.project(self._own(h, size), x, self._own(first, size))

    def _own(self, y: Tensor, size: int) -> Tensor:
        """Its neurons among those `size`, of each of the parts of y."""
        groups = self.places.shape[0]
        rows = y.reshape(groups, -1, y.shape[-1] // size, size)  # [G, rows, parts, size]
        places = self.places[:, None, None].expand(-1, *rows.shape[1:3], -1)
        return rows.gather(-1, places).reshape(*y.shape[:-1], -1)


@dataclass(frozen=True)
class Step:
    """An MLP layer on its ways to others: now + gate * (other - now) + gate' * (other' - now) + ...

    At gates 0 it is `now`, and the slope of the loss along a gate is, to first order, what that way
    would change: where it adds neurons, the stand-in that is theirs no longer among it.

    Attributes:
        now: the layer with a core set.
        ways: by their place among all, the others.
        inputs: of the one that has the neurons of all of them.
        gates: 0, one a way, [ways].
    """

    now: Part
    ways: Mapping[int, Part]
    inputs: Sequence[Callable[[Tensor], Tensor]]
    gates: Tensor

    def project(self, h: Tensor, x: Tensor, first: Tensor) -> Tensor:
        now = self.now.project(h, x, first)
        y = now
        for way, other in self.ways.items():
            with torch.no_grad():
                change = other.project(h, x, first) - now
            y = y + self.gates[way].to(y.dtype) * change
        return y


def worth(
    backend: HfBackend,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    now: Selector,
    ways: Sequence[Selector],
    stand_in: StandIn | None,
    texts: Sequence[str] | None = None,
) -> Worth:
    """The worth of more in every layer, all layers and ways by one backward pass.

    A continuation is read after its densely prefilled prompt, through the core neurons; its first
    token is the prefill's and does not count.

    Args:
        backend: the model; its weights need no gradients, and get none.
        prompts: token ids, a batch.
        continuations: what follows each, two tokens or more.
        now: the rule.
        ways: the same rule with more, or less, in some layers or in all: of their neurons, or of
            those that are active.
        stand_in: what takes the place of the dropped neurons.
        texts: of the prompts, for rules that embed them.
    """
    read = backend.start(RecordingPlan.of(now, stand_in))
    read.prefill(prompts, texts)
    steps = steps_to(read, now, ways, stand_in)
    gains: list[list[float | None]] = [[None] * len(backend.anatomy.layers) for _ in ways]
    loss = continuation_loss(read, {**read.compact, **steps}, continuations)
    if steps:
        slopes = torch.autograd.grad(loss, [step.gates for step in steps.values()])
        for (layer, step), slope in zip(steps.items(), slopes, strict=True):
            for way in step.ways:
                gains[way][layer] = -float(slope[way])
    return Worth(float(loss.detach()), gains)


def steps_to(
    read: HfSession, now: Selector, ways: Sequence[Selector], stand_in: StandIn | None
) -> dict[int, Step]:
    """The ways of each layer that differs on one of them.

    Where a rule's order of neurons itself depends on how many are kept, the neurons of one way may
    not contain those of another; such a way is left out.

    Args:
        read: a session after its prefill; `now` is selected in it.
    """
    forks = [read.fork() for _ in ways]
    places = [[choice.core_set.layers for choice in read.select(now, stand_in)]]
    for fork, way in zip(forks, ways, strict=True):
        places.append([choice.core_set.layers for choice in fork.select(way, stand_in)])
    steps = {}
    for layer in read.compact:
        if any(layer not in fork.compact for fork in forks):
            continue
        mlps = [session.compact[layer] for session in (read, *forks)]
        kept = [[row[layer].long() for row in rows] for rows in places]
        widest = max(range(len(mlps)), key=lambda one: mlps[one].num_neurons)
        if not _within(kept[0], kept[widest]):
            continue
        others = {
            place: _part(mlps[place + 1], kept[place + 1], kept[widest])
            for place, way in enumerate(ways)
            if (
                mlps[place + 1].num_neurons != mlps[0].num_neurons
                or way.active_in(layer) != now.active_in(layer)
            )
            and _within(kept[place + 1], kept[widest])
        }
        if others:
            gates = torch.zeros(len(ways), requires_grad=True)
            begin = _part(mlps[0], kept[0], kept[widest])
            steps[layer] = Step(begin, others, mlps[widest].inputs, gates)
    return steps


def _within(kept: Sequence[Tensor], of_all: Sequence[Tensor]) -> bool:
    pairs = zip(kept, of_all, strict=True)
    return all(bool(torch.isin(own, larger).all()) for own, larger in pairs)


def _part(mlp: CompactMlp, kept: Sequence[Tensor], of_all: Sequence[Tensor]) -> Part:
    """Of a layer that has its neurons and more: its own inputs are then of no use."""
    pairs = zip(kept, of_all, strict=True)
    places = torch.stack([torch.searchsorted(larger, own) for own, larger in pairs])
    return Part(replace(mlp, inputs=()), places.to(mlp.output.weight.device))
