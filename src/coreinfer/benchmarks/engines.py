"""CoreInfer's own backends as engines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coreinfer.backends.base import Backend, Choice, Session
from coreinfer.backends.hf.session import HfBackend
from coreinfer.backends.native.backend import NativeBackend
from coreinfer.backends.native.container import is_converted
from coreinfer.backends.native.mlp import DenseMlps
from coreinfer.backends.native.open import open_native
from coreinfer.backends.native.products import compute_dtype
from coreinfer.benchmarks.decoding import Decoding, by_keep
from coreinfer.benchmarks.job import Job
from coreinfer.benchmarks.measure import About, Engine, Repeat, timed
from coreinfer.benchmarks.synthetic import no_tokenizer, synthetic_hf, synthetic_native
from coreinfer.errors import UserError
from coreinfer.kernels.formats import WeightFormat
from coreinfer.models.loading import DTYPES, load
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.cost import bytes_per_token
from coreinfer.selectors import Selector
from coreinfer.standins import StandIn


class BackendEngine:
    """A backend that decodes by a rule.

    Args:
        backend: the model.
        vocab_size: of it.
        selector: the rule.
        stand_in: takes the place of the neurons that are dropped; None for nothing.
    """

    def __init__(
        self, backend: Backend, vocab_size: int, selector: Selector, stand_in: StandIn | None
    ) -> None:
        self.vocab_size = vocab_size
        self._backend = backend
        self._selector = selector
        self._stand_in = stand_in
        self._plan = RecordingPlan.expecting(self._selector, self._stand_in)
        self._session: Session = backend.start(self._plan)
        self._choice: Choice | None = None

    def repeat(self, prompt: Sequence[int], answer: Sequence[int]) -> Repeat:
        return timed(self, prompt, answer)

    def prefill(self, token_ids: Sequence[int]) -> None:
        self._choice = None
        self._session = self._backend.start(self._plan)
        self._session.prefill([token_ids])
        self._backend.synchronize()

    def select(self) -> None:
        (self._choice,) = self._session.select(self._selector, self._stand_in)
        self._backend.synchronize()

    def decode(self, token_id: int) -> None:
        self._session.decode([[token_id]])
        self._backend.synchronize()

    def about(self) -> About:
        choice = self._chosen()
        (size,) = bytes_per_token(self._backend, self._session, self._selector, [choice])
        return About(
            dtype=self._backend.dtype,
            selector=self._selector.name,
            density=choice.core_set.density,
            active=round(self._selector.active_share(choice.core_set.layers), 3),
            bytes_per_token=size,
        )

    def _chosen(self) -> Choice:
        assert self._choice is not None, "nothing was run yet"
        return self._choice


class SkippingEngine(BackendEngine):
    """A ReLU model on the native backend, which does not read what a zero makes needless: the down
    column and, gated, the up row.

    Its dense rows call themselves "skip-zeros": the answer is the same, the bytes are fewer.
    """

    def __init__(
        self, backend: NativeBackend, selector: Selector, stand_in: StandIn | None
    ) -> None:
        super().__init__(backend, backend.weights.config.vocab_size, selector, stand_in)
        self._native = backend
        self._prompt: Sequence[int] = ()

    def prefill(self, token_ids: Sequence[int]) -> None:
        self._prompt = token_ids
        super().prefill(token_ids)

    def about(self) -> About:
        plain, core_set = super().about(), self._chosen().core_set
        zeros = self._zeros()
        assert plain.bytes_per_token is not None
        weights = self._native.weights
        skipped = (weights.mlp_parts - 1) * weights.format.row_bytes(weights.config.hidden_size)
        kept = sum(core_set.kept(layer) for layer in range(core_set.num_layers))
        return About(
            dtype=plain.dtype,
            selector="skip-zeros" if plain.selector == "dense" else plain.selector,
            density=plain.density,
            bytes_per_token=plain.bytes_per_token - round(zeros * kept * skipped),
            zero_activations=zeros,
        )

    @torch.no_grad()
    def _zeros(self) -> float:
        """Share of the kept neurons that are zero, over the prompt and all layers."""
        kept = self._chosen().core_set.layers
        shares: list[float] = []

        def observe(layer: int, _x: Tensor, h: Tensor, _gates: Tensor) -> Tensor | None:
            h = h[:, kept[layer].long()] if layer in kept else h
            shares.append(float((h == 0).float().mean()))
            return None

        native = self._native
        mlps = DenseMlps(native.weights, native.decoder.products, observe)
        native.decoder.read([self._prompt], [native.new_cache()], mlps)
        return sum(shares) / len(shares)


def open_native_engine(job: Job) -> Engine:
    """The native backend; one of the job's dtypes, synthetic or real weights."""
    if job.shape is not None:
        weights = synthetic_native(job.shape, job.model, WeightFormat.named(job.dtype))
        backend = NativeBackend(
            weights, no_tokenizer(), compute=compute_dtype(), skip_zeros=job.skip_zeros
        )
    else:
        assert job.source is not None
        backend = open_native(job.source, dtype=job.dtype, skip_zeros=job.skip_zeros)
    config = backend.weights.config
    selector, stand_in = _rule_of(job)
    if job.skip_zeros and config.activation == "relu" and not selector.skips:
        return SkippingEngine(backend, selector, stand_in)
    return BackendEngine(backend, config.vocab_size, selector, stand_in)


def open_hf_engine(job: Job) -> Engine:
    """The hf backend."""
    backend = hf_backend(job)
    return BackendEngine(backend, backend.vocab_size, *_rule_of(job))


def _rule_of(job: Job) -> tuple[Selector, StandIn | None]:
    if job.given is not None:
        return Decoding(**job.given).made()
    return by_keep(job.keep, job.active)


def hf_backend(job: Job) -> HfBackend:
    """The job's model in transformers.

    Raises:
        UserError: if it is not found, or converted for the native backend.
    """
    if job.shape is not None:
        model = synthetic_hf(job.shape, DTYPES[job.dtype])
        return HfBackend(model, no_tokenizer(), job.model)
    assert job.source is not None
    if is_converted(job.source):
        raise UserError("a converted model is for native alone; name the one it was made from")
    loaded = load(job.source, dtype=job.dtype)
    return HfBackend(loaded.model, loaded.tokenizer, loaded.name)
