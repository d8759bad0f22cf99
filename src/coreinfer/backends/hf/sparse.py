"""`with coreinfer.sparse(model, selector): model.generate(...)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coreinfer.backends.base import Choice, Phase
from coreinfer.backends.hf.choose import Anatomy, choose, evidence_of
from coreinfer.backends.hf.switch import Switchboard
from coreinfer.errors import UserError
from coreinfer.recording import BatchWindows, PromptRecorder, RecordingPlan, Window
from coreinfer.selectors import Selector
from coreinfer.standins import StandIn


class SparseRun:
    """The state of a model inside `sparse`: its phase, and what was chosen.

    `model.generate` moves through the phases by itself. Where the model is called directly, the
    caller moves them: passes are dense and recorded until `select()`, and compute with the core
    neurons from there until `reset()`.

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
        self._recorders: list[PromptRecorder] = []
        self.reset()

    @property
    def density(self) -> float:
        """Mean over the prompts of kept neurons / all neurons; 1.0 before selection."""
        densities = [choice.core_set.density for choice in self.choices]
        return sum(densities) / len(densities) if densities else 1.0

    def reset(self) -> None:
        """Forget what was recorded and chosen: the next pass begins a new batch of prompts."""
        self.choices: list[Choice] = []
        self._recorders = []
        self._windows = BatchWindows(0, None)
        self._rows_per_prompt = 1
        self._ahead: Tensor | None = None  # mask of a prefill that comes in several passes
        self._resume_prefill()

    def select(self) -> list[Choice]:
        """Choose the core neurons of what was recorded; passes from here on use them alone.

        Raises:
            UserError: if nothing was recorded, or its activations are not finite.
        """
        if not self._recorders:
            raise UserError("nothing was prefilled yet: call the model on a prompt first")
        with torch.no_grad():
            evidence = evidence_of(self._anatomy, self._recorders)
            chosen = choose(
                self._anatomy, self._recorders, evidence, self._selector, self._stand_in
            )
        self._board.compute_with(chosen.compact)
        self.choices = chosen.choices
        self.phase = Phase.DECODE
        return self.choices

    def around_prefill(self, prefill: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`'s own prefill, recorded, with the selection after it."""

        def run(
            input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **options: Any
        ) -> Any:
            if not model_kwargs.get("use_cache", True):
                raise UserError("sparse decoding needs the KV cache, got use_cache=False")
            cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
            past = 0 if cache is None else int(cache.get_seq_length())
            # Beams and returned sequences of a prompt are consecutive rows with one core set.
            step = max(generation_config.num_beams, generation_config.num_return_sequences)
            batch = input_ids.shape[0] // step
            if past == 0 or len(self._recorders) != batch:
                self.reset()
            self._rows_per_prompt = step
            mask = model_kwargs.get("attention_mask")
            if mask is None:  # transformers drops a mask of ones, and notes its length
                width = getattr(generation_config, "_mask_length", input_ids.shape[1])
                mask = torch.ones(input_ids.shape[0], width)
            self._ahead = mask[:, past:].bool().cpu()
            self._begin(batch, self._ahead[::step].sum(dim=1).tolist())
            self._resume_prefill()
            output = prefill(input_ids, generation_config, model_kwargs, **options)
            self._ahead = None
            self.select()
            return output

        return run

    def before_forward(self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: note which tokens the pass is about to read."""
        if self.phase is not Phase.PREFILL:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        shaped = ids if ids is not None else kwargs["inputs_embeds"]
        batch, width = shaped.shape[:2]
        if self._ahead is not None:
            mask, self._ahead = self._ahead[:, :width], self._ahead[:, width:]
        else:
            given = kwargs.get("attention_mask")
            mask = torch.ones(batch, width) if given is None else given[:, -width:].cpu()
            self._begin(batch, mask.bool().sum(dim=1).tolist())
        step = self._rows_per_prompt
        self._shape = (batch, width)
        ids = None if ids is None else ids[::step].cpu()
        self._seen: list[Window] = self._windows.advance(mask[::step], ids)

    def _begin(self, batch: int, lengths: list[int]) -> None:
        """Expect `lengths` real tokens of each of `batch` prompts, new ones or known ones."""
        if not self._recorders:
            plan = RecordingPlan.of(self._selector, self._stand_in)
            self._recorders = [PromptRecorder(plan, self._anatomy.sizes) for _ in range(batch)]
            self._windows = BatchWindows(batch, self._anatomy.bos_token_id)
        self._windows.expect(lengths)

    def _resume_prefill(self) -> None:
        self.phase = Phase.PREFILL
        self._board.observe(self._observe)

    def _observe(self, layer: int, x: Tensor, h: Tensor) -> None:
        x, h = x.reshape(*self._shape, -1), h.reshape(*self._shape, -1)
        for recorder, window, row in zip(
            self._recorders, self._seen, range(0, self._shape[0], self._rows_per_prompt), strict=True
        ):
            columns = window.columns.to(h.device)
            recorder.observe(layer, x[row, columns], h[row, columns], window)


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
    Each prefill is dense; what is generated is decoded sparsely and is not counted.

    Args:
        model: any causal model of a known family; it is changed in place, and on leaving the
            block, also by an exception, it is bit for bit what it was.
        selector: the rule that chooses the core neurons.
        stand_in: what takes the place of the dropped neurons; None drops them.
        name: what the core sets call the model; by default what transformers calls it.

    Yields:
        The run: its phase, and after a prefill the choices (core sets) and their density.

    Raises:
        UserError: if the architecture is unknown or the selector does not fit the model.
        RuntimeError: if the model is already inside `sparse`.
    """
    anatomy = Anatomy(model, name or model.config.name_or_path or model.config.model_type)
    anatomy.check(selector)
    if selector.needs_future:
        raise UserError(
            f"the {selector.name} selector needs the tokens that follow the prompt, which "
            "transformers' generate does not know; use coreinfer.load(...)"
        )
    with Switchboard(anatomy.layers).installed() as board:
        run = SparseRun(anatomy, board, selector, stand_in)
        hook = model.register_forward_pre_hook(run.before_forward, with_kwargs=True)
        # The one place where generate says by itself that the prefill begins and ends.
        routes = {
            "_prefill": run.around_prefill(model._prefill),
            "_assisted_decoding": _refuse_assistant,
        }
        model.__dict__.update(routes)
        try:
            yield run
        finally:
            for route in routes:
                del model.__dict__[route]
            hook.remove()


def _refuse_assistant(*_args: Any, **_kwargs: Any) -> None:
    raise UserError(
        "assisted generation is not supported inside sparse(); drop assistant_model, "
        "prompt_lookup_num_tokens and the like"
    )
