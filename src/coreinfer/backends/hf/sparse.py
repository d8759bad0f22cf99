"""`with coreinfer.sparse(model, selector): model.generate(...)`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor
from transformers import Cache, PreTrainedModel

from coreinfer.backends.base import Choice, Phase
from coreinfer.backends.hf.choose import Anatomy, choose, evidence_of
from coreinfer.backends.hf.switch import Override, Switchboard, installed
from coreinfer.errors import UserError
from coreinfer.recording import BatchWindows, PromptRecorder, RecordingPlan, Window
from coreinfer.selectors import Selector
from coreinfer.standins import StandIn


@dataclass(frozen=True)
class _Recording:
    """What was recorded of a batch of prompts, over all turns of their conversations."""

    recorders: list[PromptRecorder]
    windows: BatchWindows


@dataclass(frozen=True)
class _Pass:
    """The dense pass that is running: its shape [B, T], and each prompt's tokens in it."""

    batch: int
    width: int
    windows: list[Window]


class SparseRun:
    """The state of a model inside `sparse`: its phase, and what was chosen.

    `model.generate` moves through the phases by itself. Where the model is called directly, the
    caller moves them: passes are dense and recorded until `select()`, and compute with the core
    neurons from there until `reset()`, whatever their number of tokens.

    Attributes:
        phase: PREFILL or DECODE.
        choices: one a prompt, after selection.
    """

    def __init__(
        self, anatomy: Anatomy, board: Switchboard, selector: Selector, stand_in: StandIn | None
    ) -> None:
        self._anatomy = anatomy
        self._board = board
        self._selector = selector
        self._stand_in = stand_in
        # So that several conversations can take turns: a cache goes on with its own statistics.
        self._of_cache: WeakKeyDictionary[Cache, _Recording] = WeakKeyDictionary()
        self._generating = False
        self._must_prefill = False  # generate has begun, its prefill has not
        self.reset()

    @property
    def density(self) -> float:
        """Mean over the prompts of kept neurons / all neurons; 1.0 before selection."""
        densities = [choice.core_set.density for choice in self.choices]
        return sum(densities) / len(densities) if densities else 1.0

    def reset(self) -> None:
        """Forget what was chosen: the next pass is dense and begins a new batch of prompts."""
        self.choices: list[Choice] = []
        self._recording: _Recording | None = None
        self._rows_per_prompt = 1
        self._ahead: Tensor | None = None  # mask of what is left of generate's prefill
        self._pass: _Pass | None = None
        self.phase = Phase.PREFILL
        self._board.observe(self._observe, gates=self._selector.skips)

    def select(self) -> list[Choice]:
        """Choose the core neurons of what was recorded; passes from here on use them alone.

        Raises:
            UserError: if nothing was recorded, or its activations are not finite.
        """
        if self._recording is None:
            raise UserError("nothing was prefilled yet: call the model on a prompt first")
        recorders = self._recording.recorders
        with torch.no_grad():
            evidence = evidence_of(self._anatomy, recorders)
            chosen = choose(self._anatomy, recorders, evidence, self._selector, self._stand_in)
        self._board.compute_with(chosen.compact)
        self.choices = chosen.choices
        self.phase = Phase.DECODE
        return self.choices

    def around_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`, known to be running: what it computes is never taken for direct passes."""

        @functools.wraps(generate)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._generating:
                raise UserError(
                    "generate is already running inside this sparse() block; let it finish first"
                )
            self._generating = self._must_prefill = True
            try:
                return generate(*args, **kwargs)
            finally:
                self._generating = self._must_prefill = False

        return run

    def around_prefill(self, prefill: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`'s own prefill, recorded, with the selection after it."""

        def run(
            input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **options: Any
        ) -> Any:
            if not model_kwargs.get("use_cache", True):
                raise UserError("sparse decoding needs the KV cache, got use_cache=False")
            cache = _cache_in(model_kwargs)
            past = 0 if cache is None else int(cache.get_seq_length())
            # Beams and returned sequences of a prompt are consecutive rows with one core set.
            step = max(generation_config.num_beams, generation_config.num_return_sequences)
            mask = model_kwargs.get("attention_mask")
            if mask is None:  # transformers drops a mask of ones, and notes its length
                width = getattr(generation_config, "_mask_length", None) or input_ids.shape[1]
                mask = torch.ones(input_ids.shape[0], width)
            recording = self._go_on_with(cache, mask.shape[0] // step) if past else None
            self.reset()
            self._recording = recording
            self._rows_per_prompt = step
            self._ahead = mask[:, past:].bool().cpu()
            self._expect(self._ahead[::step], cache)
            self._must_prefill = False
            try:
                output = prefill(input_ids, generation_config, model_kwargs, **options)
                self._ahead = None
                self.select()
            except BaseException:
                if cache is not None:
                    self._of_cache.pop(cache, None)  # half a turn was recorded
                self.reset()
                raise
            return output

        return run

    def before_forward(self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: note which tokens the pass is about to read."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        shaped = ids if ids is not None else kwargs["inputs_embeds"]
        batch, width = shaped.shape[:2]
        if self._must_prefill:
            _refuse_generation()
        if self.phase is not Phase.PREFILL:
            prompts = len(self.choices)
            if prompts > 1 and batch != prompts * self._rows_per_prompt:
                raise UserError(
                    f"the core neurons are those of {prompts} prompts, the pass has {batch} rows; "
                    "call reset() to begin with other prompts"
                )
            return
        if self._ahead is not None:
            mask, self._ahead = self._ahead[:, :width], self._ahead[:, width:]
        else:
            mask = _mask_of_pass(kwargs.get("attention_mask"), batch, width)
            self._expect(mask, _cache_in(kwargs))
        step = self._rows_per_prompt
        assert self._recording is not None
        ids = None if ids is None else ids[::step].cpu()
        windows = self._recording.windows.advance(mask[::step], ids)
        self._pass = _Pass(batch, width, windows)

    def close(self) -> None:
        """Let go of everything but the choices."""
        self._recording = self._pass = None
        self._of_cache.clear()

    def _expect(self, mask: Tensor, cache: Cache | None) -> None:
        """Expect the real tokens of `mask` [prompts, T], of new prompts or of known ones."""
        prompts = mask.shape[0]
        if self._recording is None:
            plan = RecordingPlan.of(self._selector, self._stand_in)
            self._recording = _Recording(
                [PromptRecorder(plan, self._anatomy.sizes) for _ in range(prompts)],
                BatchWindows(prompts, self._anatomy.bos_token_id),
            )
        elif len(self._recording.recorders) != prompts:
            raise UserError(
                f"{len(self._recording.recorders)} prompts were being read, the pass has "
                f"{prompts}; call reset() to begin with other prompts"
            )
        if cache is not None:
            self._of_cache[cache] = self._recording
        self._recording.windows.expect(mask.sum(dim=1).tolist())

    def _go_on_with(self, cache: Cache | None, prompts: int) -> _Recording:
        """What was recorded of the conversation in `cache`."""
        recording = None if cache is None else self._of_cache.get(cache)
        if recording is None:
            raise UserError(
                "the cache holds tokens whose statistics were not recorded in this sparse() "
                "block; begin the conversation inside the block"
            )
        if len(recording.recorders) != prompts:
            raise UserError(
                f"the cache is of {len(recording.recorders)} prompts, generate got {prompts}"
            )
        return recording

    def _observe(self, layer: int, x: Tensor, h: Tensor, gates: Tensor | None) -> None:
        now, recording = self._pass, self._recording
        if now is None or recording is None:
            raise UserError("inside sparse(), call the model itself, not a part of it")
        parts = [x, h] if gates is None else [x, h, gates]
        parts = [part.reshape(now.batch, now.width, -1) for part in parts]
        rows = range(0, now.batch, self._rows_per_prompt)
        for recorder, window, row in zip(recording.recorders, now.windows, rows, strict=True):
            columns = window.columns.to(h.device)
            recorder.observe(layer, window, *(part[row, columns] for part in parts))
        if layer == len(self._anatomy.layers) - 1:
            self._pass = None


@contextmanager
def sparse(
    model: PreTrainedModel,
    selector: Selector,
    stand_in: StandIn | None = None,
    *,
    name: str | None = None,
) -> Iterator[SparseRun]:
    """Decode a Hugging Face model with its core neurons while the block runs.

    Works with transformers' own `generate`: greedy, sampling, beams, streamers, left-padded
    batches (each prompt has its own core set), chunked prefill, static caches. Passing the cache
    of an earlier call goes on with that conversation: the new tokens' statistics add to the old.
    Each prefill is dense; what is generated is decoded sparsely and is not counted. Assisted
    generation and `use_cache=False` are refused, and transformers compiles nothing meanwhile.

    Args:
        model: any causal model of a known family, in evaluation mode and not compiled; it is
            changed in place, and on leaving the block, also by an exception, it is bit for bit
            what it was.
        selector: the rule that chooses the core neurons.
        stand_in: what takes the place of the dropped neurons; None drops them.
        name: what the core sets call the model; by default what transformers calls it.

    Yields:
        The run: its phase, and after a prefill the choices (core sets) and their density.

    Raises:
        UserError: if the architecture is unknown, the model is compiled or in training mode, or
            the selector does not fit the model.
        RuntimeError: if the model is already inside `sparse`.
    """
    anatomy = Anatomy(model, name or model.config.name_or_path or model.config.model_type)
    anatomy.check(selector, stand_in)
    if model.training:
        raise UserError("the model is in training mode, its dropout is on; call model.eval()")
    if selector.needs_future:
        raise UserError(
            f"the {selector.name} selector needs the tokens that follow the prompt, which "
            "transformers' generate does not know; use coreinfer.load(...)"
        )
    _require_prefill(model)
    with Switchboard(anatomy.layers).installed() as board:
        run = SparseRun(anatomy, board, selector, stand_in)
        causal: Any = model  # transformers types these methods on a mixin
        overrides = [
            Override(model, "generate", run.around_generate(causal.generate)),
            # The one place where generate says by itself that the prefill begins and ends.
            Override(model, "_prefill", run.around_prefill(causal._prefill)),
            # A compiled pass would not notice that the linears change under it.
            Override(model, "get_compiled_call", lambda _config: model.__call__),
        ]
        # Refused by `before_forward` in any case; here before they have begun to change the model.
        overrides += [
            Override(model, method, _refuse_generation)
            for method in ("_get_candidate_generator", "generate_batch", "init_continuous_batching")
            if hasattr(model, method)
        ]
        hook = model.register_forward_pre_hook(run.before_forward, with_kwargs=True)
        try:
            with installed(overrides):
                yield run
        finally:
            hook.remove()
            run.close()


def _refuse_generation(*_args: Any, **_kwargs: Any) -> None:
    raise UserError(
        "this way of generating is not supported inside sparse(): assisted, contrastive, custom "
        "and continuously batched generation have no prefill of their own; use greedy search, "
        "sampling or beams"
    )


def _require_prefill(model: PreTrainedModel) -> None:
    """`_prefill` is no public method: say so where a later transformers has changed it."""
    prefill = getattr(model, "_prefill", None)
    names = [] if prefill is None else list(inspect.signature(prefill).parameters)
    if names[:3] != ["input_ids", "generation_config", "model_kwargs"]:
        raise UserError(
            f"transformers {transformers.__version__} prefills in a way that is not known here; "
            "install transformers 5.20 to 5.24"
        )


def _cache_in(kwargs: dict[str, Any]) -> Cache | None:
    """The KV cache among the arguments; transformers renamed it within version 5."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def _mask_of_pass(given: Any, batch: int, width: int) -> Tensor:
    """Which tokens of a direct pass are real, [B, T]."""
    if given is None:
        return torch.ones(batch, width, dtype=torch.bool)
    if not isinstance(given, Tensor) or given.dim() != 2:
        raise UserError("inside sparse(), give the attention mask as a 2-D tensor, [batch, tokens]")
    return given[:, -width:].bool().cpu()
