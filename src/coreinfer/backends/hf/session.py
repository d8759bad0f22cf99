"""Sessions on a Hugging Face model: dense prefill, selection, sparse decode."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from coreinfer.backends.base import Choice, Phase, require_context
from coreinfer.backends.hf.choose import Anatomy, choose
from coreinfer.backends.hf.compact import CompactMlp
from coreinfer.backends.hf.switch import Observer, SmallMlp, Switchboard
from coreinfer.backends.recorded import Recorded
from coreinfer.backends.spared import Spared
from coreinfer.core.measures import ReadCost
from coreinfer.errors import UserError
from coreinfer.recording import BatchWindows, PromptRecorder, RecordingPlan
from coreinfer.selectors import Selector
from coreinfer.selectors.evidence import Evidence
from coreinfer.standins import StandIn
from coreinfer.standins.sample import LayerSample


class HfBackend:
    """A Hugging Face causal language model, decoded with core neurons. Any device, any dtype.

    Args:
        model: the model, put into evaluation mode; it is rerouted only while a pass of a session
            runs, so sessions take turns and never compute at the same time.
        tokenizer: its tokenizer.
        name: what core sets and records call it.
        prefill_chunk: tokens a prefill pass reads at most.

    Raises:
        UserError: if the architecture is not known, or the model is compiled, quantised, wrapped
            by adapters or offloaded.
    """

    name = "hf"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        prefill_chunk: int = 2048,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.anatomy = Anatomy(model, name)
        self.prefill_chunk = prefill_chunk
        parameters = inspect.signature(model.forward).parameters
        # transformers renamed the argument within version 5; the old name warns in the new one.
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self.keeps_logits = "logits_to_keep" in parameters

    @property
    def model_name(self) -> str:
        return self.anatomy.name

    @property
    def family(self) -> str:
        return str(self.model.config.model_type)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def fingerprint(self) -> str:
        return self.anatomy.fingerprint

    @property
    def cost(self) -> ReadCost:
        return self.anatomy.cost

    @property
    def context_length(self) -> int | None:
        length = getattr(self.model.config, "max_position_embeddings", None)
        return length if isinstance(length, int) else None

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        ids = self.model.generation_config.eos_token_id
        ids = self.tokenizer.eos_token_id if ids is None else ids
        if ids is None:
            return frozenset()
        return frozenset([ids] if isinstance(ids, int) else ids)

    def check(self, selector: Selector, stand_in: StandIn | None = None) -> None:
        self.anatomy.check(selector, stand_in)

    def start(self, plan: RecordingPlan) -> HfSession:
        return HfSession(self, plan)

    def synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


class HfSession:
    """A batch of sequences on an `HfBackend`. See `coreinfer.backends.base.Session`."""

    def __init__(self, backend: HfBackend, plan: RecordingPlan) -> None:
        self._backend = backend
        anatomy = backend.anatomy
        self._recorded = Recorded(plan, anatomy.sizes, anatomy.bos_token_id)
        self._board = Switchboard(backend.anatomy.layers)
        self._cache = DynamicCache(config=backend.model.config)
        self._mask = torch.zeros(0, 0, dtype=torch.bool)  # [B, tokens so far], true at real ones
        self._compact: dict[int, CompactMlp] = {}
        self._spared = Spared.nothing(0)

    @property
    def length(self) -> int:
        """Columns in the KV cache, padding included."""
        return self._mask.shape[1]

    def prefill(
        self, token_ids: Sequence[Sequence[int]], texts: Sequence[str] | None = None
    ) -> Tensor:
        if self._recorded.begin(token_ids, texts):
            self._mask = torch.zeros(len(token_ids), 0, dtype=torch.bool)
            self._spared = Spared.nothing(len(token_ids))
        return self._record(token_ids, self._recorded.recorders, self._recorded.windows)

    def look_ahead(self, token_ids: Sequence[Sequence[int]]) -> None:
        ahead = self.fork()
        ahead._record(token_ids, *self._recorded.begin_ahead(len(token_ids)), pad_left=False)

    def evidence(self) -> list[Evidence]:
        return self._recorded.evidence(self._backend.anatomy)

    def select(self, selector: Selector, stand_in: StandIn | None = None) -> list[Choice]:
        with torch.no_grad():
            recorders = self._recorded.recorders
            chosen = choose(self._backend.anatomy, recorders, self.evidence(), selector, stand_in)
        self._compact = chosen.compact
        self._spared = Spared.nothing(len(chosen.choices))
        return chosen.choices

    @torch.no_grad()
    def decode(self, token_ids: Sequence[Sequence[int]], phase: Phase = Phase.DECODE) -> Tensor:
        lengths = [len(row) for row in token_ids]
        fed = [row for row, length in enumerate(lengths) if length]
        small = self._compact
        if len(fed) < len(lengths):
            small = {layer: compact.only(fed) for layer, compact in small.items()}
        logits = self.decode_with(small, token_ids)
        self._spared = self._spared.plus(self._just_spared(lengths), lengths)
        return logits

    def spared(self) -> list[float | None]:
        return self._spared.means

    def _just_spared(self, lengths: Sequence[int]) -> list[float]:
        """Bytes that the last pass did not need of the rows' first tokens, so many a row."""
        if not max(lengths):
            return [0.0] * len(lengths)
        left_out = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        left_out = left_out.to(self._backend.model.device)  # added up there: looked at once
        for layer, compact in self._compact.items():
            if compact.skip is not None and compact.skip.skipped is not None:
                skipped = compact.skip.skipped.reshape(left_out.shape).to(left_out.device)
                left_out += skipped * self._backend.cost.behind_gate[layer]
        by_token = left_out.cpu()
        return [float(row[:length].sum()) for row, length in zip(by_token, lengths, strict=True)]

    def decode_with(
        self, small: Mapping[int, SmallMlp], token_ids: Sequence[Sequence[int]]
    ) -> Tensor:
        """As `decode`, through other MLPs than the selected ones; what is in them gets gradients.

        Args:
            small: by layer; the others are dense.
        """
        ids, mask = _pad(token_ids, left=False)
        if ids.shape[1] == 0:
            return torch.empty(*ids.shape, self._backend.vocab_size)
        return self._forward(ids, mask, small=small, logits_to_keep=ids.shape[1])

    @property
    def compact(self) -> Mapping[int, CompactMlp]:
        """The layers that were made smaller by `select`."""
        return self._compact

    def sample(self, row: int, layer: int) -> LayerSample:
        """The tokens of a prompt that a stand-in was fitted on."""
        return self._recorded.recorders[row].sample(layer)

    def fork(self) -> HfSession:
        twin = copy.copy(self)
        twin._board = Switchboard(self._backend.anatomy.layers)
        twin._cache = _fork_cache(self._cache)
        twin._recorded = self._recorded.fork()
        return twin

    @torch.no_grad()
    def _record(
        self,
        token_ids: Sequence[Sequence[int]],
        recorders: Sequence[PromptRecorder],
        windows: BatchWindows,
        *,
        pad_left: bool = True,
    ) -> Tensor:
        """A dense pass, chunk by chunk, shown to the recorders; the last column's logits [B, V]."""
        ids, mask = _pad(token_ids, left=pad_left)
        if pad_left:
            self._require_window(mask)
        windows.expect([len(row) for row in token_ids])
        logits = torch.empty(0)
        size = self._backend.prefill_chunk
        for start in range(0, ids.shape[1], size):
            chunk, real = ids[:, start : start + size], mask[:, start : start + size]
            seen = windows.advance(real, chunk)

            def observe(layer: int, x: Tensor, h: Tensor, gates: Tensor | None) -> None:
                parts = [x, h] if gates is None else [x, h, gates]
                shape = chunk.shape  # noqa: B023  # called before the loop moves on
                parts = [part.reshape(*shape, -1) for part in parts]
                for row, window in enumerate(seen):  # noqa: B023
                    columns = window.columns.to(h.device)
                    recorders[row].observe(layer, window, *(p[row, columns] for p in parts))

            asked = recorders[0].plan.gates
            logits = self._forward(chunk, real, observe=observe, gates=asked)
        return logits[:, -1]

    def _require_window(self, mask: Tensor) -> None:
        """Padding between the turns of a batch would take room in a sliding window."""
        windows = [
            layer.sliding_window for layer in self._cache.layers if hasattr(layer, "sliding_window")
        ]
        total = self.length + mask.shape[1]
        if self.length and not bool(mask.all()) and total > min(windows, default=total):
            raise UserError(
                f"{self._backend.model_name} attends to {min(windows)} tokens, so turns of "
                "different lengths cannot be read in one batch; read the conversations one by one"
            )

    def _forward(
        self,
        ids: Tensor,
        mask: Tensor,
        *,
        observe: Observer | None = None,
        gates: bool = False,
        small: Mapping[int, SmallMlp] | None = None,
        logits_to_keep: int = 1,
    ) -> Tensor:
        """A pass: dense and observed, or through the MLPs in `small`; logits [B, T kept, V]."""
        before = self._mask.sum(dim=1, keepdim=True)
        after = before + mask.sum(dim=1, keepdim=True)
        require_context(self._backend.context_length, int(after.max()))
        self._mask = torch.cat([self._mask, mask], dim=1)
        device = self._backend.model.device
        positions = (before + mask.cumsum(dim=1) - 1).clamp(min=0)
        arguments: dict[str, Any] = {
            "input_ids": ids.to(device),
            "position_ids": positions.to(device),
            self._backend.cache_argument: self._cache,
            "use_cache": True,
        }
        if not bool(self._mask.all()):
            arguments["attention_mask"] = self._mask.long().to(device)
        if self._backend.keeps_logits:
            arguments["logits_to_keep"] = logits_to_keep
        with self._board.installed() as board:
            if small is None:
                board.observe(observe, gates=gates)
            else:
                board.compute_with(small)
            logits = self._backend.model(**arguments).logits
        assert isinstance(logits, Tensor)
        return logits.cpu()


def _fork_cache(cache: DynamicCache) -> DynamicCache:
    """A cache that grows on its own; what is in it already is shared, since a layer never writes
    into its tensors but replaces them by longer ones."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def _pad(token_ids: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids [B, T] padded with 0, and the mask of the real ones."""
    width = max(len(row) for row in token_ids)
    ids = torch.zeros(len(token_ids), width, dtype=torch.long)
    mask = torch.zeros(len(token_ids), width, dtype=torch.bool)
    for row, tokens in enumerate(token_ids):
        place = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, place] = torch.tensor(list(tokens), dtype=torch.long)
        mask[row, place] = True
    return ids, mask
