"""Building a calibration store: a corpus of any size in a bounded amount of memory.

First its tokens are counted, and the basis is made from a share of its documents; then the one pass
over all of it sums what the predictions and the priors are made from; then comes training, if it is
asked for, and what each layer loses, on a few documents.
An interrupted build goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from coreinfer.backends.base import Backend
from coreinfer.backends.hf.session import HfBackend
from coreinfer.building.corpus import corpus_identity
from coreinfer.building.layer_errors import measure_errors
from coreinfer.building.reading import Skips, TokenCorpus, TokenDocument
from coreinfer.building.sample import CalibrationCorpus
from coreinfer.building.settings import CalibrationSettings, memory_needed
from coreinfer.building.training import require_length, train
from coreinfer.building.work import Checkpoint, WorkFolder, work_folder
from coreinfer.building.written import WRITTEN, own_corpus
from coreinfer.calibration.store import NAME, CalibrationStore
from coreinfer.calibration.sums import (
    BasisSums,
    PredictionSums,
    flat,
    restore,
    sketch_of,
)
from coreinfer.core.layer_errors import LayerErrors
from coreinfer.core.statistics import LayerStatistics
from coreinfer.core.stores import remove_store_leftovers, require_place
from coreinfer.errors import UserError
from coreinfer.jsonl import OnSkip
from coreinfer.recording import RecordingPlan

CHECKPOINT_SECONDS = 60.0
TOKENS_A_RANK = 32  # of the corpus, below which predictions learn its accidents
STAGES = ("basis", "sums", "training")
KEEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def calibrate(
    backend: Backend,
    corpus: Path | None,
    out: Path,
    settings: CalibrationSettings | None = None,
    *,
    differentiable: HfBackend | None = None,
    on_skip: OnSkip,
    on_note: Callable[[str], None] = lambda _note: None,
    progress: bool = True,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> CalibrationStore:
    """Learn, from a corpus, to predict a model's neurons from the inputs of its MLPs.

    The work folder `.{out's name}.calibration` lies beside `out` until the store is written. The
    same call after an interruption goes on from there, and the store is the same to the last bit.
    Another batch size gives the same store up to the rounding of the model's own arithmetic.

    Args:
        backend: the model.
        corpus: a file as `read_corpus` takes it; None lets the model write its own.
        out: the store's folder, which may be a cluster store's; a calibration that is there is
            replaced when the new one is whole.
        settings: how; by default as `CalibrationSettings` says.
        differentiable: the same model where a backward pass can go through it, for training.
        on_skip: told of every document or line that is skipped, once each.
        on_note: told of the memory that it takes, and of a former run's work.
        progress: draw progress bars on stderr, where that is a terminal.
        checkpoint_seconds: seconds between checkpoints at least.

    Raises:
        UserError: for settings out of range, a corpus that cannot be read or has no usable
            document, or a place that cannot be written.
    """
    settings = settings or CalibrationSettings()
    out = Path(out)
    require_place(out)
    place = out.with_name(f".{out.name}.calibration")
    with work_folder(place, STAGES, on_note, checkpoint_seconds, also=(WRITTEN,)) as work:
        if corpus is None:
            path = own_corpus(
                backend, work.path, settings.own_tokens, settings.seed, on_note, progress
            )
            identity: dict[str, Any] = {
                **corpus_identity(path),
                "name": "written by the model",
                "seed": settings.seed,
            }
        else:
            path = Path(corpus)
            identity = corpus_identity(path)
        # A context that is full would leave no room for the answer on which errors are measured.
        most = min(settings.max_tokens, (backend.context_length or settings.max_tokens + 1) - 1)
        reader = TokenCorpus(
            path, backend.tokenizer, most, settings.batch_size, settings.min_chars, Skips(on_skip)
        )
        counted = CalibrationCorpus.counted(reader, progress)
        if settings.train_steps:
            require_length(counted.longest)
        build = _Build(backend, counted, settings, work, on_note, progress)
        made_with = {
            "model_fingerprint": backend.fingerprint,
            "backend": backend.name,
            "dtype": backend.dtype,
            "corpus": identity,
            **{name: value for name, value in vars(settings).items() if name != "train_steps"},
        }
        basis = build.basis(made_with)
        store = build.store(basis, made_with, identity)
        if settings.train_steps:
            if differentiable is None:
                raise ValueError("training needs the model on hf")
            store = build.trained(store, basis, made_with, differentiable)
        store = build.measured(store)
        if corpus is not None and corpus_identity(path) != identity:
            raise UserError(f"{str(corpus)!r} was changed while it was read; start again")
        store.save(out)
        remove_store_leftovers(out, NAME)  # of a run that was killed while it saved
    return store


class _Build:
    """The stages, each of which goes on from its checkpoint or begins at the beginning."""

    def __init__(
        self,
        backend: Backend,
        corpus: CalibrationCorpus,
        settings: CalibrationSettings,
        work: WorkFolder,
        on_note: Callable[[str], None],
        progress: bool,
    ) -> None:
        self._corpus = corpus
        self._backend = backend
        self._settings = settings
        self._work = work
        self._on_note = on_note
        self._progress = progress

    def basis(self, made_with: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """First stage: (x_mean, basis) of each layer, from tokens of all over the corpus."""
        sizes, norms = self._anatomy
        rank = min(self._settings.rank, *(hidden for _, hidden in sizes))
        if rank < self._settings.rank:
            self._on_note(f"rank {rank}, the model's hidden size, not {self._settings.rank}")
        if self._corpus.tokens < TOKENS_A_RANK * rank:
            self._on_note(
                f"note: {self._corpus.tokens:,} tokens are few to learn predictions of rank {rank} "
                f"from; {TOKENS_A_RANK * rank:,} or more would do"
            )
        needed = memory_needed(sizes, rank)
        self._on_note(f"calibration takes up to {needed / 1e9:.1f} GB beside the model")
        generator = torch.Generator().manual_seed(self._settings.seed)
        sketches = {
            neurons: sketch_of(neurons, rank, generator)
            for neurons in sorted({n for n, _ in sizes})
        }
        sums = [
            BasisSums.zeros(sketches[neurons], norms(layer), hidden)
            for layer, (neurons, hidden) in enumerate(sizes)
        ]

        def observe(layer: int, x: Tensor, h: Tensor) -> None:
            sums[layer].add(x, h)

        found = self._work.load("basis", made_with)
        state = {"batches": 0, "documents": 0, "complete": False}
        if found:
            state = dict(found.state)
            if state["complete"]:
                return [
                    (found.tensors[f"mean.{layer}"], found.tensors[f"basis.{layer}"])
                    for layer in range(len(sizes))
                ]
            restore(sums, found.tensors)
            for one in sums:
                one.tokens = int(state["tokens"])
        plan = RecordingPlan(observer=observe)
        share = min(1.0, self._settings.basis_tokens / self._corpus.tokens)
        with self._bar("basis", state["documents"], self._corpus.documents_of(share)) as bar:
            for batch in islice(self._corpus.batches(share), state["batches"], None):
                self._prefill(batch, plan)
                state["batches"] += 1
                state["documents"] += len(batch)
                state["tokens"] = sums[0].tokens
                bar.update(len(batch))
                if self._work.is_due:
                    self._work.save("basis", made_with, Checkpoint(state, flat(sums)))
        made = [one.basis(rank, self._settings.basis) for one in sums]
        tensors = {f"mean.{layer}": mean for layer, (mean, _) in enumerate(made)}
        tensors |= {f"basis.{layer}": basis for layer, (_, basis) in enumerate(made)}
        self._work.save("basis", made_with, Checkpoint({**state, "complete": True}, tensors))
        return made

    def store(
        self,
        basis: Sequence[tuple[Tensor, Tensor]],
        made_with: dict[str, Any],
        identity: dict[str, Any],
    ) -> CalibrationStore:
        """The pass over the whole corpus, and what is made of its sums."""
        sizes, _ = self._anatomy
        sums = self._prediction_sums(basis)
        priors = [LayerStatistics.zeros(*size) for size in sizes]
        state = {"batches": 0, "documents": 0, "cut": 0}
        if found := self._work.load("sums", made_with):
            state = dict(found.state)
            restore(sums, found.tensors)
            _restore_priors(priors, found.tensors, state["tokens"])

        def observe(layer: int, x: Tensor, h: Tensor) -> None:
            sums[layer].add(x, h)

        plan = RecordingPlan(alpha=self._settings.alpha, input_sums=True, observer=observe)
        with self._bar("summing", state["documents"], self._corpus.documents) as bar:
            for batch in islice(self._corpus.batches(), state["batches"], None):
                for layers in self._prefill(batch, plan):
                    priors = [a + b for a, b in zip(priors, layers, strict=True)]
                state = {
                    "batches": state["batches"] + 1,
                    "documents": state["documents"] + len(batch),
                    "cut": state["cut"] + sum(document.cut for document in batch),
                    "tokens": int(priors[0].tokens),
                }
                bar.update(len(batch))
                if self._work.is_due:
                    tensors = flat(sums) | _flat_priors(priors)
                    self._work.save("sums", made_with, Checkpoint(state, tensors))
        self._work.save("sums", made_with, Checkpoint(state, flat(sums) | _flat_priors(priors)))
        predictions = []
        for one, prior in zip(sums, priors, strict=True):
            prediction, prior.residual_sum = one.prediction(prior)
            predictions.append(prediction)
        about = {**identity, "documents": state["documents"], "cut_documents": state["cut"]}
        return CalibrationStore(
            model=self._backend.model_name,
            model_fingerprint=self._backend.fingerprint,
            alpha=self._settings.alpha,
            predictions=predictions,
            statistics=priors,
            layer_errors=LayerErrors((1.0,), torch.zeros(len(sizes), 1, dtype=torch.float64)),
            corpus={**about, **vars(self._settings)},
        )

    def trained(
        self,
        store: CalibrationStore,
        basis: Sequence[tuple[Tensor, Tensor]],
        made_with: dict[str, Any],
        differentiable: HfBackend,
    ) -> CalibrationStore:
        """With predictions trained on what decoding loses, and what they leave of the corpus."""
        settings = self._settings
        trained_with = {**made_with, "train_steps": settings.train_steps}
        found = self._work.load("training", trained_with)

        def keep(step: int, tensors: Mapping[str, Tensor]) -> None:
            if self._work.is_due or step == settings.train_steps:
                self._work.save("training", trained_with, Checkpoint({"steps": step}, tensors))

        made = train(
            differentiable,
            store,
            lambda: (document.ids for document in self._corpus.read()),
            settings.train_steps,
            settings.seed,
            done=0 if found is None else int(found.state["steps"]),
            tensors=None if found is None else found.tensors,
            keep=keep,
            progress=self._progress,
        )
        sums = self._prediction_sums(basis)
        summed = self._work.load("sums", made_with)
        assert summed is not None  # `store` has saved them
        restore(sums, summed.tensors)
        left = [
            replace(prior, residual_sum=one.residual_sum(prediction.coefficients, prior))
            for one, prediction, prior in zip(sums, made.predictions, made.statistics, strict=True)
        ]
        return replace(made, statistics=left)

    def measured(self, store: CalibrationStore) -> CalibrationStore:
        """With what each layer loses."""
        documents = self._corpus.long_ones(self._settings.error_documents)
        return measure_errors(self._backend, store, documents, KEEPS, self._progress)

    def _prediction_sums(self, basis: Sequence[tuple[Tensor, Tensor]]) -> list[PredictionSums]:
        return [
            PredictionSums.zeros(mean, directions, neurons)
            for (mean, directions), (neurons, _) in zip(basis, self._anatomy[0], strict=True)
        ]

    @cached_property
    def _anatomy(self) -> tuple[list[tuple[int, int]], Callable[[int], Tensor]]:
        """(D, d) of every layer, and layer -> |W_down[:, n]|_2."""
        evidence = self._read([[0]], RecordingPlan())[0]
        sizes = [(one.num_neurons, one.input_sum.numel()) for one in evidence.layers]
        return sizes, evidence.column_norms

    def _prefill(
        self, batch: Sequence[TokenDocument], plan: RecordingPlan
    ) -> Iterator[Sequence[LayerStatistics]]:
        return (one.layers for one in self._read([d.ids for d in batch], plan))

    def _read(self, token_ids: Sequence[Sequence[int]], plan: RecordingPlan) -> list[Any]:
        session = self._backend.start(plan)
        session.prefill(token_ids)
        return session.evidence()

    def _bar(self, what: str, done: int, total: int) -> Any:
        if done:
            self._on_note(f"going on with the {what} after {done} of {total} documents")
        # None is tqdm's "unless stderr is no terminal".
        disable = None if self._progress else True
        return tqdm(desc=what, unit="doc", initial=done, total=total, disable=disable)


_PRIORS = ("counts", "positive_sum", "square_sum", "unit_square_sum", "input_sum")


def _flat_priors(priors: Sequence[LayerStatistics]) -> dict[str, Tensor]:
    return {
        f"{name}.{layer}": getattr(one, name).cpu()
        for layer, one in enumerate(priors)
        for name in _PRIORS
    }


def _restore_priors(priors: Sequence[LayerStatistics], tensors: Any, tokens: int) -> None:
    for layer, one in enumerate(priors):
        for name in _PRIORS:
            setattr(one, name, tensors[f"{name}.{layer}"])
        one.tokens = tokens
