"""Scoring continuations through the sparse layers, as decoding would compute them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from coreinfer.backends.base import Backend, Phase, Session
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.cost import bytes_per_token
from coreinfer.runtime.generation import Prefilled, prefill
from coreinfer.runtime.text import encode_pair
from coreinfer.selectors import Selector
from coreinfer.standins import StandIn

LOGITS_BYTES = 256 * 2**20  # logits held at a time, at most (of one column at the least)


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a continuation after its context.

    Attributes:
        logprob: sum of the natural log-probabilities of its tokens.
        num_tokens: how many there are.
        greedy: whether each of them is the argmax after those before it.
        density: kept neurons / all neurons that its tokens were computed with.
        bytes_per_token: weights read to decode one of them.
    """

    logprob: float
    num_tokens: int
    greedy: bool
    density: float
    bytes_per_token: int

    def to_json(self) -> dict[str, Any]:
        """What `coreinfer score` prints."""
        found = asdict(self)
        del found["bytes_per_token"]
        return found


@dataclass(frozen=True)
class Pair:
    """A context and a continuation as token ids, and the context's text."""

    context: list[int]
    continuation: list[int]
    text: str

    @classmethod
    def of(cls, backend: Backend, context: str, continuation: str) -> Pair:
        """Tokenise.

        Raises:
            UserError: if either is empty or both together do not fit the model's context.
        """
        pair = cls(*encode_pair(backend.tokenizer, context, continuation), context)
        total = len(pair.context) + len(pair.continuation)
        if backend.context_length is not None and total > backend.context_length:
            raise UserError(
                f"context and continuation have {total} tokens, {backend.model_name} reads "
                f"{backend.context_length} at most; shorten the context"
            )
        return pair


def score(
    backend: Backend,
    pairs: Sequence[Pair],
    selector: Selector,
    stand_in: StandIn | None = None,
) -> list[Score]:
    """Score a batch: dense prefill of each context, its core set, then its continuation.

    The core set is chosen from the context alone (the oracle looks at the continuation, which is
    what makes it a control). The first token of a continuation is predicted by the prefill, as in
    generation; the others by the sparse layers.

    Raises:
        UserError: if the selector does not fit the model.
    """
    if not pairs:
        return []
    backend.check(selector, stand_in)
    read = prefill(
        backend,
        [pair.context for pair in pairs],
        RecordingPlan.of(selector, stand_in),
        [pair.text for pair in pairs],
    )
    wanted = [[pair.continuation] for pair in pairs]
    scored = score_choices(backend, read, wanted, selector, stand_in)
    return [scores[0] for scores in scored]


def score_choices(
    backend: Backend,
    read: Prefilled,
    continuations: Sequence[Sequence[Sequence[int]]],
    selector: Selector,
    stand_in: StandIn | None = None,
) -> list[list[Score]]:
    """Score one or more continuations of each context that was read, with one core set for all.

    Args:
        backend: the model.
        read: the contexts, prefilled for this selector and stand-in; its session has the core
            neurons selected afterwards, and stays where it is.
        continuations: of each context, at least one, none of them empty.
        selector, stand_in: the rule, and what takes the place of the dropped neurons.

    Returns:
        Of each context, a score for each of its continuations.
    """
    selected = None if selector.needs_future else read.session.select(selector, stand_in)
    scores: list[list[Score]] = [[] for _ in continuations]
    for column in range(max(len(row) for row in continuations)):
        # A context with fewer continuations repeats its last one, to be dropped below.
        tokens = [row[min(column, len(row) - 1)] for row in continuations]
        fork = read.fork()
        choices = selected
        if choices is None:
            fork.session.look_ahead(tokens)
            choices = fork.session.select(selector, stand_in)
        found = _logprobs(fork, tokens)
        read_a_token = bytes_per_token(backend, fork.session, selector, choices)
        for row, (logprob, greedy) in enumerate(found):
            if column < len(continuations[row]):
                density, size = choices[row].core_set.density, read_a_token[row]
                scores[row].append(Score(logprob, len(tokens[row]), greedy, density, size))
    return scores


def _logprobs(read: Prefilled, continuations: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
    """Of each continuation, and whether it is the greedy one."""
    logprobs = [0.0] * len(continuations)
    greedy = [True] * len(continuations)
    for start, logits in continuation_logits(read, continuations):
        for row, tokens in enumerate(continuations):
            here = torch.tensor(tokens[start : start + logits.shape[1]], dtype=torch.long)
            given = logits[row, : here.numel()].float()
            chosen = given.log_softmax(dim=-1).gather(-1, here.unsqueeze(-1))
            logprobs[row] += float(chosen.double().sum())
            greedy[row] &= bool((given.argmax(dim=-1) == here).all())
    return list(zip(logprobs, greedy, strict=True))


def continuation_logits(
    read: Prefilled, continuations: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Tensor]]:
    """Teacher-force continuations: what the model predicts at each of their tokens.

    The session of `read` is moved on through SCORE passes, with the core neurons it has chosen
    (densely if it has chosen none).

    Yields:
        Blocks (start, logits [B, t, V]): the predictions of tokens start to start + t - 1.
        Rows of shorter continuations mean nothing past their end.
    """
    yield 0, read.logits.unsqueeze(1)
    session: Session = read.session
    longest = max(len(tokens) for tokens in continuations)
    width = max(1, LOGITS_BYTES // (read.logits.numel() * read.logits.element_size()))
    for start in range(0, longest - 1, width):
        # The last token of a continuation predicts nothing that is asked for.
        fed = [tokens[:-1][start : start + width] for tokens in continuations]
        yield start + 1, session.decode(fed, Phase.SCORE)
