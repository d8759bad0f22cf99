"""Quality of sparse decoding on continuations: perplexity, KL to dense, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from coreinfer.backends.base import Backend
from coreinfer.core.measures import kl_by_token
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.cost import bytes_per_token
from coreinfer.runtime.generation import Prefilled, prefill
from coreinfer.runtime.scoring import continuation_logits
from coreinfer.selectors import Dense, Selector
from coreinfer.standins import StandIn


@dataclass(frozen=True)
class Window:
    """A piece of text as tokens: a prompt, what follows it, and the prompt's text."""

    prompt: list[int]
    continuation: list[int]
    text: str


def require_window(backend: Backend, prompt_tokens: int, continuation_tokens: int) -> None:
    """Raises UserError if a window of so many tokens is longer than the model reads."""
    length = backend.context_length
    if length is not None and prompt_tokens + continuation_tokens > length:
        raise UserError(
            f"windows of {prompt_tokens} + {continuation_tokens} tokens are longer than the "
            f"{length} that {backend.model_name} reads; use shorter ones"
        )


def windows(
    backend: Backend, text: str, *, count: int, prompt_tokens: int, continuation_tokens: int
) -> list[Window]:
    """`count` windows of a text, evenly spaced and not overlapping.

    Raises:
        UserError: if the text has too few tokens for them, or the model reads no such long ones.
    """
    require_window(backend, prompt_tokens, continuation_tokens)
    ids = list(backend.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    size = prompt_tokens + continuation_tokens
    if count < 1 or prompt_tokens < 1 or continuation_tokens < 1 or len(ids) < count * size:
        raise UserError(
            f"the text has {len(ids)} tokens, {count} windows of {prompt_tokens} + "
            f"{continuation_tokens} need {count * size}; ask for fewer or shorter ones"
        )
    starts = [row * len(ids) // count for row in range(count)]
    # What the tokenizer puts before a text by itself, such as a BOS token.
    head = encoded_prefix(backend)
    return [
        Window(
            head + ids[start : start + prompt_tokens - len(head)],
            ids[start + prompt_tokens - len(head) : start + size - len(head)],
            str(backend.tokenizer.decode(ids[start : start + prompt_tokens - len(head)])),
        )
        for start in starts
    ]


def encoded_prefix(backend: Backend) -> list[int]:
    """The special tokens that the tokenizer puts before every text."""
    plain = list(backend.tokenizer("a", add_special_tokens=False, verbose=False).input_ids)
    whole = list(backend.tokenizer("a", verbose=False).input_ids)
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])


@dataclass(frozen=True)
class Setting:
    """One way to decode."""

    selector: Selector
    stand_in: StandIn | None = None

    def describe(self) -> dict[str, Any]:
        """Plain JSON."""
        stand_in = None if self.stand_in is None else self.stand_in.describe()
        return {"selector": self.selector.describe(), "stand_in": stand_in}

    @property
    def uses_a_store(self) -> bool:
        parts = [part for part in self.describe().values() if part is not None]
        return any(part.get(name) for part in parts for name in ("clusters", "calibration"))


@dataclass
class Quality:
    """What a setting costs, a number a window (means over the window's tokens).

    Attributes:
        nll: negative log-likelihood of the continuation's tokens, nats.
        kl: KL(dense || sparse) of the next-token distributions, nats.
        agreement: how often the argmax is the dense one, 0 to 1.
        density: kept neurons / all neurons.
        bytes_per_token: weights read to decode a token.
    """

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    bytes_per_token: list[int] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """exp of the mean over the windows, each of which counts the same whatever its length."""
        return math.exp(fmean(self.nll))

    def summary(self) -> dict[str, Any]:
        """Means with standard errors over the windows, plain JSON."""
        return {
            "perplexity": self.perplexity,
            "nll": fmean(self.nll),
            "nll_se": standard_error(self.nll),
            "kl": fmean(self.kl),
            "kl_se": standard_error(self.kl),
            "agreement": fmean(self.agreement),
            "agreement_se": standard_error(self.agreement),
            "density": fmean(self.density),
            "bytes_per_token": fmean(self.bytes_per_token),
            "windows": len(self.nll),
        }


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def measure(
    backend: Backend,
    texts: Sequence[Window],
    settings: Mapping[str, Setting],
    *,
    batch_size: int = 8,
) -> Iterator[dict[str, Quality]]:
    """Score every window under every setting, from one dense prefill of each.

    The first token of a continuation is predicted by the dense prefill whatever the setting, so
    it is left out: what is measured is decoded with the core neurons alone.

    Yields:
        All results so far, after each batch; dense decoding is among them as "dense".

    Raises:
        UserError: if a setting or a window does not fit the model.
    """
    for window in texts:
        require_window(backend, len(window.prompt), len(window.continuation))
    dense_rule = next((Dense.beside(s.selector) for s in settings.values()), Dense())
    everything = {"dense": Setting(dense_rule), **settings}
    for setting in everything.values():
        backend.check(setting.selector, setting.stand_in)
    plan = widest(everything.values())
    looks_ahead = any(setting.selector.needs_future for setting in everything.values())
    results = {name: Quality() for name in everything}
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        read = prefill(backend, [w.prompt for w in batch], plan, [w.text for w in batch])
        continuations = [w.continuation for w in batch]
        if looks_ahead:
            read.session.look_ahead(continuations)
        dense = _distributions(read.fork(), continuations)
        for name, setting in everything.items():
            fork = read.fork()
            choices = fork.session.select(setting.selector, setting.stand_in)
            sparse = dense if name == "dense" else _distributions(fork, continuations)
            quality = results[name]
            quality.bytes_per_token += bytes_per_token(
                backend, fork.session, setting.selector, choices
            )
            for row, choice in enumerate(choices):
                _add(quality, dense[row], sparse[row], continuations[row][1:])
                quality.density.append(choice.core_set.density)
        yield results


def widest(settings: Iterable[Setting]) -> RecordingPlan:
    """The least plan that serves all settings.

    Raises:
        UserError: if they differ in alpha or in whether BOS counts, which one prefill cannot serve.
    """
    plans = [RecordingPlan.of(setting.selector, setting.stand_in) for setting in settings]
    alphas = {plan.alpha for plan in plans if plan.alpha is not None}
    if len(alphas) > 1 or len({plan.count_bos for plan in plans}) > 1:
        raise UserError(f"settings measured together must share one alpha, got {sorted(alphas)}")
    calibrations = [plan.calibration for plan in plans if plan.calibration is not None]
    if len({id(calibration) for calibration in calibrations}) > 1:
        raise UserError("settings measured together must share one calibration store")
    samples = [plan.sample_tokens for plan in plans if plan.sample_tokens is not None]
    return RecordingPlan(
        alpha=next(iter(alphas), None),
        count_bos=plans[0].count_bos,
        halves=any(plan.halves for plan in plans),
        input_sums=any(plan.input_sums for plan in plans),
        sample_tokens=max(samples, default=None),
        calibration=next(iter(calibrations), None),
        gates=any(plan.gates for plan in plans),
        sample_gates=any(plan.sample_gates for plan in plans),
    )


def sharing_a_prefill(settings: Mapping[str, Setting]) -> list[list[str]]:
    """The names of the settings in groups, each of which one recording serves."""
    groups: list[list[str]] = []
    for name, setting in settings.items():
        for group in groups:
            try:
                widest([*(settings[other] for other in group), setting])
            except UserError:
                continue
            group.append(name)
            break
        else:
            groups.append([name])
    return groups


def _distributions(read: Prefilled, continuations: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities at the second and later tokens of each continuation, [B, T - 1, V]."""
    blocks = [logits for start, logits in continuation_logits(read, continuations) if start > 0]
    return torch.cat(blocks, dim=1).float().log_softmax(dim=-1)


def _add(quality: Quality, dense: Tensor, sparse: Tensor, tokens: Sequence[int]) -> None:
    """One window: log-probabilities [T, V] of both, and the tokens that came, T or fewer."""
    dense, sparse = dense[: len(tokens)], sparse[: len(tokens)]
    index = torch.tensor(list(tokens)).unsqueeze(-1)
    quality.nll.append(-float(sparse.gather(-1, index).double().mean()))
    quality.kl.append(float(kl_by_token(dense, sparse).double().mean()))
    same = dense.argmax(dim=-1) == sparse.argmax(dim=-1)
    quality.agreement.append(float(same.double().mean()))
