"""From logits to the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from coreinfer.errors import UserError, require_whole


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a continuation is drawn and when it ends.

    Args:
        max_new_tokens: tokens to generate at most, at least 1.
        temperature: 0 is greedy; above 0 samples.
        top_k: sample among the k likeliest tokens; 0 is all.
        top_p: sample among the likeliest tokens that hold this much probability, in (0, 1].
        min_p: sample among the tokens at least this times as likely as the likeliest, in [0, 1];
            0 is all.
        repetition_penalty: divides the positive logits of tokens that are in the prompt or the
            answer already, and multiplies the negative ones; above 0, 1 changes nothing. It counts
            in greedy decoding too.
        seed: of the sampling; every sequence has a generator of its own, so a prompt's output
            does not depend on what runs beside it.
        stop: texts that end the answer; they are not part of it.
        ignore_eos: go on after an end-of-sequence token.

    Raises:
        UserError: if a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be 0 (all) to 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(
                f"repetition_penalty must be above 0 (1 is none), got {self.repetition_penalty}"
            )
        require_whole("the seed", self.seed, 0, 2**63 - 1)
        if "" in self.stop:
            raise UserError("a stop text must not be empty")


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(self, params: SamplingParams) -> None:
        self._greedy = params.temperature == 0
        self._generator = torch.Generator().manual_seed(params.seed)
        self._penalty: LogitsProcessor | None = None
        if params.repetition_penalty != 1:
            self._penalty = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
        self._warpers: list[LogitsProcessor] = []
        if not self._greedy:
            # Below the least float32 it would be zero there; that is the likeliest token anyway.
            temperature = max(float(params.temperature), torch.finfo(torch.float32).tiny)
            self._warpers.append(TemperatureLogitsWarper(temperature))
        if params.top_k:
            self._warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self._warpers.append(TopPLogitsWarper(params.top_p))
        if params.min_p > 0:
            self._warpers.append(MinPLogitsWarper(float(params.min_p)))

    def __call__(self, logits: Tensor, so_far: Sequence[int] = ()) -> int:
        """The next token.

        Args:
            logits: [V].
            so_far: the tokens before it, prompt and answer, which a repetition penalty is about.
        """
        scores = logits.float().unsqueeze(0)
        history = torch.empty(1, 0, dtype=torch.long)
        if self._penalty is not None:
            history = torch.tensor([list(so_far)], dtype=torch.long)
            scores = self._penalty(history, scores)
        if self._greedy:
            return int(scores[0].argmax())
        scores = scores - scores.max()  # the same chances, and no temperature makes them overflow
        for warper in self._warpers:
            scores = warper(history, scores)
        return int(torch.multinomial(scores.softmax(dim=-1)[0], 1, generator=self._generator))
