"""Sessions of the native backend: dense prefill, selection, sparse decode."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coreinfer.backends.base import Choice, Phase
from coreinfer.backends.choose import choose
from coreinfer.backends.native.ahead import Ahead
from coreinfer.backends.native.cache import KvCache
from coreinfer.backends.native.mlp import DenseMlps
from coreinfer.backends.recorded import Recorded
from coreinfer.backends.spared import Spared
from coreinfer.kernels.weights import Plan
from coreinfer.recording import BatchWindows, PromptRecorder, RecordingPlan
from coreinfer.selectors import Selector
from coreinfer.selectors.evidence import Evidence
from coreinfer.standins import StandIn

if TYPE_CHECKING:
    from coreinfer.backends.native.backend import NativeBackend


class NativeSession:
    """A batch of sequences on a `NativeBackend`. See `coreinfer.backends.base.Session`.

    Sequences are never padded: each has a KV cache of its own length.
    """

    def __init__(self, backend: NativeBackend, plan: RecordingPlan) -> None:
        self._backend = backend
        config = backend.weights.config
        sizes = [(config.num_neurons, config.hidden_size)] * config.num_layers
        self._recorded = Recorded(plan, sizes, config.bos_token_id)
        self._caches: list[KvCache] = []
        self._plans: list[Plan] | None = None  # before the selection: all neurons
        self._ahead: Ahead | None = None  # what the last prefill has chosen already
        self._spared = Spared.nothing(0)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence so far."""
        return [cache.length for cache in self._caches]

    def prefill(
        self, token_ids: Sequence[Sequence[int]], texts: Sequence[str] | None = None
    ) -> Tensor:
        first = self._recorded.begin(token_ids, texts)
        self._ahead = self._look_for(token_ids) if first else None
        if first:
            self._caches = [self._backend.new_cache() for _ in token_ids]
            self._spared = Spared.nothing(len(token_ids))
        recorded = self._recorded
        hidden = self._record(token_ids, recorded.recorders, recorded.windows, self._ahead)
        return self._backend.stepper.logits(hidden)

    def look_ahead(self, token_ids: Sequence[Sequence[int]]) -> None:
        ahead = self.fork()
        ahead._record(token_ids, *self._recorded.begin_ahead(len(token_ids)))

    def evidence(self) -> list[Evidence]:
        return self._recorded.evidence(self._backend.view)

    @torch.no_grad()
    def select(self, selector: Selector, stand_in: StandIn | None = None) -> list[Choice]:
        stepper = self._backend.stepper
        evidence = self.evidence()
        if self._ahead is not None and self._ahead.serves(selector, stand_in):
            chosen = self._ahead.chosen()
        else:
            self._ahead = self._plans = None  # their memory can serve the new ones
            chosen = choose(
                self._backend.view,
                self._recorded.recorders,
                evidence,
                selector,
                stand_in,
                stepper.pack_layer,
            )
        self._plans = [
            stepper.plan({layer: rows[row] for layer, rows in chosen.compact.items()})
            for row in range(len(self._caches))
        ]
        self._spared = Spared.nothing(len(self._caches))
        return chosen.choices

    @torch.no_grad()
    def decode(self, token_ids: Sequence[Sequence[int]], phase: Phase = Phase.DECODE) -> Tensor:
        lengths = [len(row) for row in token_ids]
        vocab = self._backend.weights.config.vocab_size
        found = torch.zeros(len(lengths), max(lengths), vocab)
        if not any(lengths):
            return found
        stepper = self._backend.stepper
        plans = self._plans or [stepper.dense_plan] * len(lengths)
        skipped = [torch.zeros(1, dtype=torch.int64) for _ in lengths]
        logits = stepper.decode(token_ids, self._caches, plans, skipped)
        size = self._backend.cost.behind_gate[0]  # all layers are alike
        self._spared = self._spared.plus([int(count) * size for count in skipped], lengths)
        for row, part in zip(found, logits.split(lengths), strict=True):
            row[: len(part)] = part
        return found

    def spared(self) -> list[float | None]:
        return self._spared.means

    def fork(self) -> NativeSession:
        twin = copy.copy(self)
        twin._caches = [cache.fork() for cache in self._caches]
        twin._recorded = self._recorded.fork()
        return twin

    def _look_for(self, token_ids: Sequence[Sequence[int]]) -> Ahead | None:
        """The choice to make on the way, where one pass is about to read all of one prompt."""
        backend = self._backend
        if len(token_ids) > 1 or len(token_ids[0]) > backend.prefill_chunk:
            return None
        (recorder,) = self._recorded.recorders
        return Ahead.of(backend.view, backend.decoder.products, backend.stepper, recorder)

    @torch.no_grad()
    def _record(
        self,
        token_ids: Sequence[Sequence[int]],
        recorders: Sequence[PromptRecorder],
        windows: BatchWindows,
        ahead: Ahead | None = None,
    ) -> Tensor:
        """A dense pass, part by part, shown to the recorders.

        Returns:
            The hidden state of each sequence's last token, [B, d]; zero where it got none.
        """
        decoder = self._backend.decoder
        windows.expect([len(row) for row in token_ids])
        last = torch.zeros(len(token_ids), decoder.config.hidden_size)
        for part in in_parts(token_ids, self._backend.prefill_chunk):
            lengths = torch.tensor([len(row) for row in part])
            owner = torch.repeat_interleave(torch.arange(len(part)), lengths)
            ids = torch.tensor([token for row in part for token in row]).expand(len(part), -1)
            seen = windows.advance(owner == torch.arange(len(part)).unsqueeze(1), ids)

            ends = lengths.cumsum(0)

            def observe(layer: int, x: Tensor, h: Tensor, gates: Tensor) -> Tensor | None:
                for row, recorder in enumerate(recorders):
                    own = slice(int(ends[row] - lengths[row]), int(ends[row]))  # noqa: B023
                    recorder.observe(layer, seen[row], x[own], h[own], gates[own])  # noqa: B023
                return None if ahead is None else ahead.pass_layer(layer, h)

            mlps = DenseMlps(decoder.weights, decoder.products, observe)
            hidden = decoder.read(part, self._caches, mlps)
            last[lengths > 0] = hidden[ends[lengths > 0] - 1]
        return last


def in_parts(token_ids: Sequence[Sequence[int]], size: int) -> Iterator[list[list[int]]]:
    """Consecutive tokens of all sequences, `size` at a time, one sequence after the other."""
    part: list[list[int]] = [[] for _ in token_ids]
    room = size
    for row, tokens in enumerate(token_ids):
        rest = list(tokens)
        while rest:
            part[row] += rest[:room]
            rest, room = rest[room:], room - min(room, len(rest))
            if room == 0:
                yield part
                part, room = [[] for _ in token_ids], size
    if any(part):
        yield part
