"""Quality by distance from the prompt, with and without choosing core neurons anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from coreinfer.backends.base import Backend, Phase, Session
from coreinfer.core.measures import kl_by_token
from coreinfer.evaluation.continuations import Setting, Window, widest
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.generation import prefill


class Policy(Protocol):
    """How a long continuation is decoded, one period after another."""

    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feed the tokens of the next period; logits after those measured, [B, m, V]."""
        ...

    @property
    def dense_share(self) -> float:
        """Which part of the tokens of a period, after the first one, is read densely."""
        ...


@dataclass
class Never:
    """The core set of the prompt, to the end."""

    session: Session
    setting: Setting
    skip: int

    def __post_init__(self) -> None:
        self.session.select(self.setting.selector, self.setting.stand_in)

    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        return self.session.decode(tokens, Phase.SCORE)[:, self.skip :]

    @property
    def dense_share(self) -> float:
        return 0.0


@dataclass
class Refresh:
    """The first `dense` tokens of each period are read densely and recorded; then a new set.

    The KV cache keeps what the core neurons computed, and the statistics of the prompt and of all
    dense steps add up, as in `Session.prefill`.
    """

    session: Session
    setting: Setting
    skip: int
    dense: int
    period: int
    started: bool = False

    def __post_init__(self) -> None:
        self.session.select(self.setting.selector, self.setting.stand_in)

    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        if self.started:
            self.session.prefill([row[: self.dense] for row in tokens])
            self.session.select(self.setting.selector, self.setting.stand_in)
            rest = [row[self.dense :] for row in tokens]
            return self.session.decode(rest, Phase.SCORE)[:, self.skip - self.dense :]
        self.started = True
        return self.session.decode(tokens, Phase.SCORE)[:, self.skip :]

    @property
    def dense_share(self) -> float:
        return self.dense / self.period


@dataclass
class Reread:
    """Each period begins with a dense prefill of all that was said: the most that can be done."""

    backend: Backend
    setting: Setting
    skip: int
    plan: RecordingPlan
    said: list[list[int]]

    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        session = prefill(self.backend, self.said, self.plan).session
        session.select(self.setting.selector, self.setting.stand_in)
        self.said = [[*old, *new] for old, new in zip(self.said, tokens, strict=True)]
        return session.decode(tokens, Phase.SCORE)[:, self.skip :]

    @property
    def dense_share(self) -> float:
        return 1.0


@dataclass
class Course:
    """KL to dense by distance: for each period, a number a window (mean over its tokens)."""

    dense_share: float
    kl: list[list[float]] = field(default_factory=list)


def courses(
    backend: Backend,
    windows: Sequence[Window],
    setting: Setting,
    *,
    period: int,
    dense_tokens: Sequence[int],
) -> dict[str, Course]:
    """Decode the continuations of some windows, teacher-forced, under each policy.

    The first max(dense_tokens) tokens of a period are measured under no policy, so that all are
    measured on the same tokens.

    Args:
        backend: the model.
        windows: of one continuation length, a multiple of the period.
        setting: the rule.
        period: tokens.
        dense_tokens: of the policies that refresh, how many tokens a period they read densely.
    """
    skip = max(dense_tokens)
    plan = widest([setting])
    read = prefill(backend, [w.prompt for w in windows], plan)
    dense = read.fork().session
    policies: dict[str, Policy] = {"never": Never(read.fork().session, setting, skip)}
    for count in dense_tokens:
        policies[f"refreshed, {count} dense of {period}"] = Refresh(
            read.fork().session, setting, skip, count, period
        )
    policies["all read again"] = Reread(backend, setting, skip, plan, [w.prompt for w in windows])
    found = {name: Course(policy.dense_share) for name, policy in policies.items()}
    for start in range(0, len(windows[0].continuation), period):
        tokens = [w.continuation[start : start + period] for w in windows]
        reference = dense.decode(tokens, Phase.SCORE)[:, skip:].float().log_softmax(dim=-1)
        for name, policy in policies.items():
            sparse = policy.read(tokens).float().log_softmax(dim=-1)
            found[name].kl.append(kl_by_token(reference, sparse).double().mean(dim=-1).tolist())
    return found
