"""Recording a prefill: each sequence's statistics, and the token sample a stand-in is fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coreinfer.calibration.store import CalibrationStore
from coreinfer.core.skipping import SAMPLED, GateStatistics
from coreinfer.core.statistics import LayerStatistics, PromptStatistics
from coreinfer.errors import UserError
from coreinfer.selectors.base import Selector
from coreinfer.standins.base import StandIn
from coreinfer.standins.sample import LayerSample


@dataclass(frozen=True)
class Intent:
    """What will be asked for once the prompt is read."""

    selector: Selector
    stand_in: StandIn | None


@dataclass(frozen=True)
class RecordingPlan:
    """What a prefill has to record.

    Attributes:
        alpha: of the token-wise counts; None records no counts.
        count_bos: let the beginning-of-sequence token count like any other.
        halves: keep the two halves of the prompt apart.
        input_sums: sum the MLPs' inputs too.
        sample_tokens: tokens to keep for a stand-in at most; 0 keeps sums only, None nothing.
        calibration: whose predictions' residuals are summed; None sums none.
        gates: record what tells small activations from others.
        sample_gates: of all tokens that are sampled for a stand-in.
        observer: shown each layer's counted tokens, (layer, x [n, d], h [n, D]), a sequence at a
            time; without a BOS token unless that counts.
        intent: what is likely to be asked for afterwards, so that a backend may choose, fit and
            pack while it reads, and round the prefill's products as that takes. Nothing else may
            depend on it: anything that was recorded can still be asked for.
    """

    alpha: float | None = None
    count_bos: bool = False
    halves: bool = False
    input_sums: bool = False
    sample_tokens: int | None = None
    calibration: CalibrationStore | None = None
    gates: bool = False
    sample_gates: bool = False
    observer: Callable[[int, Tensor, Tensor], None] | None = None
    intent: Intent | None = None

    @classmethod
    def of(cls, selector: Selector, stand_in: StandIn | None = None) -> RecordingPlan:
        """The least that a selector and a stand-in need."""
        return cls(
            alpha=selector.counting_alpha,
            count_bos=selector.count_bos,
            halves=selector.needs_halves,
            input_sums=selector.needs_input_sums,
            sample_tokens=None if stand_in is None else stand_in.sample_tokens,
            calibration=selector.recorded_calibration,
            gates=selector.skips,
            sample_gates=selector.skips and stand_in is not None and stand_in.fit_skipped,
        )

    @classmethod
    def expecting(cls, selector: Selector, stand_in: StandIn | None = None) -> RecordingPlan:
        """The same, for a prefill after which nothing else is asked for."""
        return replace(cls.of(selector, stand_in), intent=Intent(selector, stand_in))

    def covers(self, other: RecordingPlan) -> bool:
        """Whether what this plan records serves where `other` was asked for."""
        return (
            other.alpha in (None, self.alpha)
            and other.count_bos == self.count_bos
            and (self.halves or not other.halves)
            and (self.input_sums or not other.input_sums)
            and (self.gates or not other.gates)
            and (self.sample_gates or not other.sample_gates)
            and other.calibration in (None, self.calibration)
            and other.observer in (None, self.observer)
            and (
                other.sample_tokens is None
                or (self.sample_tokens is not None and self.sample_tokens >= other.sample_tokens)
            )
        )


@dataclass(frozen=True)
class Window:
    """The real tokens of one sequence inside a forward pass.

    Attributes:
        columns: where they stand in the pass, [n] int64; padding is not among them.
        start: position in the sequence of the first of them.
        middle: position at which the second half of the prompt begins.
        bos: the first of them is the beginning-of-sequence token, at position 0.
    """

    columns: Tensor
    start: int
    middle: int
    bos: bool


class PromptRecorder:
    """What the prefill of one sequence leaves, fed layer by layer and chunk by chunk."""

    def __init__(self, plan: RecordingPlan, sizes: Sequence[tuple[int, int]]) -> None:
        """Sizes are (num_neurons, hidden_size) of every layer."""
        self.plan = plan
        self._parts = [PromptStatistics.zeros(sizes) for _ in range(2 if plan.halves else 1)]
        capacity = plan.sample_tokens or 0
        self._samples = [LayerSample(capacity) for _ in sizes]
        self._first = [LayerSample(capacity) for _ in sizes]  # the sink, only if nothing else is
        gates = max(SAMPLED, capacity) if plan.sample_gates else SAMPLED
        self._gates = [GateStatistics(gates) for _ in sizes]
        self._first_gates = [GateStatistics(gates) for _ in sizes]  # likewise

    def observe(
        self, layer: int, window: Window, x: Tensor, h: Tensor, gates: Tensor | None = None
    ) -> None:
        """Add tokens of one layer: the MLP's input x [n, d], activations h [n, D], and its gates
        [n, D] (h itself where it is not gated) where the plan asks for them."""
        if window.columns.numel() == 0:
            return
        positions = window.start + torch.arange(x.shape[0], device=x.device)
        sink = int(window.start == 0)
        alone = x.shape[0] <= sink
        if self.plan.sample_tokens is not None:
            if alone:
                self._first[layer].update(x, h, positions)
            else:
                self._samples[layer].update(x[sink:], h[sink:], positions[sink:])
        if self.plan.gates:
            assert gates is not None, "the plan asks for gates"
            if alone:
                self._first_gates[layer].update(gates, h, positions)
            else:
                self._gates[layer].update(gates[sink:], h[sink:], positions[sink:])
        start = window.start
        if window.bos and not self.plan.count_bos:
            if x.shape[0] == 1:  # with others beside it, it will never be asked for
                self._add(self._parts[0].bos[layer], layer, x, h)
            x, h, start = x[1:], h[1:], start + 1
        if self.plan.observer is not None and x.shape[0]:
            self.plan.observer(layer, x.detach(), h.detach())
        if self.plan.halves:
            cut = min(max(window.middle - start, 0), x.shape[0])
            self._add(self._parts[0].layers[layer], layer, x[:cut], h[:cut])
            self._add(self._parts[1].layers[layer], layer, x[cut:], h[cut:])
        else:
            self._add(self._parts[0].layers[layer], layer, x, h)

    def _add(self, statistics: LayerStatistics, layer: int, x: Tensor, h: Tensor) -> None:
        statistics.update(x, h, self.plan.alpha, input_sum=self.plan.input_sums)
        if self.plan.calibration is not None and x.shape[0]:
            prediction = self.plan.calibration.predictions[layer]
            statistics.update_residual(prediction.residual(x, h))

    def statistics(self) -> list[LayerStatistics]:
        """Of the whole prompt, as selection counts it.

        Raises:
            UserError: if an activation is not finite, for then no ranking means anything.
        """
        counted = [self.layer_statistics(layer) for layer in range(len(self._samples))]
        for layer, stats in enumerate(counted):
            if not stats.is_finite:
                raise UserError(
                    f"layer {layer} has activations that are not finite; "
                    "the weights are damaged, or the dtype is too narrow for this model"
                )
        return counted

    def layer_statistics(self, layer: int) -> LayerStatistics:
        """Of one layer, as selection counts it: the BOS token only if there is no other."""
        first, *others = self._parts
        own = first.layers[layer]
        for part in others:
            own = own + part.layers[layer]
        return own if own.tokens else first.bos[layer]

    def halves(self) -> tuple[list[LayerStatistics], list[LayerStatistics]] | None:
        """Of the two halves, if they were recorded."""
        if len(self._parts) == 1:
            return None
        return self._parts[0].layers, self._parts[1].layers

    def sample(self, layer: int) -> LayerSample:
        """The tokens to fit a stand-in on: all but the first; the first if there is no other."""
        sample = self._samples[layer]
        return sample if sample.tokens else self._first[layer]

    def gates(self, layer: int) -> GateStatistics:
        """Of all tokens but the first; of the first if there is no other."""
        gates = self._gates[layer]
        return gates if gates.tokens else self._first_gates[layer]


class BatchWindows:
    """Follows each sequence of a batch through the passes of its prefill."""

    def __init__(self, batch: int, bos_token_id: int | None) -> None:
        self._bos_token_id = bos_token_id
        self._seen = [0] * batch
        self._middles = [0] * batch

    def expect(self, lengths: Sequence[int]) -> None:
        """State how many real tokens each sequence is about to get, over one or more passes.

        In a further turn the new tokens are halved by themselves, and their halves add to those
        of the turns before.
        """
        self._middles = [
            seen + (length + 1) // 2 for seen, length in zip(self._seen, lengths, strict=True)
        ]

    def advance(self, mask: Tensor, token_ids: Tensor | None) -> list[Window]:
        """The windows of the next pass; mask [B, T] is true at real tokens, ids [B, T]."""
        windows = []
        for row, real in enumerate(mask.bool()):
            columns = real.nonzero().squeeze(-1)
            start = self._seen[row]
            first = start == 0 and columns.numel() > 0 and token_ids is not None
            bos = first and int(token_ids[row, columns[0]]) == self._bos_token_id  # type: ignore[index]
            windows.append(Window(columns, start, self._middles[row], bos))
            self._seen[row] += columns.numel()
        return windows
