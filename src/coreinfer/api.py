"""The Python surface: load a model, stream an answer, select, score, converse."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from coreinfer.backends.base import Backend
from coreinfer.core.coreset import CoreSet
from coreinfer.errors import UnsupportedModelError, UserError
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.conversation import Conversation
from coreinfer.runtime.generation import continue_from, generate, prefill, require_room
from coreinfer.runtime.records import GenerationRecord, Piece
from coreinfer.runtime.sampling import SamplingParams
from coreinfer.runtime.scoring import Pair, Score, score
from coreinfer.runtime.text import Message, encode_prompt, encode_raw
from coreinfer.selectors import Dense, Impact, Selector
from coreinfer.standins import Linear, StandIn

if TYPE_CHECKING:
    from coreinfer.backends.hf.session import HfBackend

BACKENDS = ("hf", "native")
# Bytes in float32 for a byte of the native backend's weights, by dtype.
FLOAT32_BYTES = MappingProxyType({"bfloat16": 2.0, "int8": 3.8, "int4": 7.1})
LARGE = 8 * 2**30  # bytes of a model in float32

# What the quality tables in benchmarks/results find best at equal bytes.
DEFAULT_SELECTOR = Impact()
DEFAULT_STAND_IN = Linear()

T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """One prompt answered densely and sparsely, from the same prefill.

    Attributes:
        dense, sparse: the two records.
        first_difference: index of the first generated token that differs; None where the answers
            are the same.
    """

    dense: GenerationRecord
    sparse: GenerationRecord

    @property
    def first_difference(self) -> int | None:
        a, b = self.dense.token_ids, self.sparse.token_ids
        differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        return next(differing, None if len(a) == len(b) else min(len(a), len(b)))

    @property
    def speed_ratio(self) -> float | None:
        """Decode speed, sparse / dense; None where an answer is too short to time."""
        a, b = self.dense.decode_tokens_per_s, self.sparse.decode_tokens_per_s
        return b / a if a and b else None

    def to_json(self) -> dict[str, Any]:
        """The sparse record, with the dense one and the difference beside it."""
        return {
            **self.sparse.to_json(),
            "dense": self.dense.to_json(),
            "first_difference": self.first_difference,
            "speed_ratio": self.speed_ratio,
        }


class LLM:
    """A loaded model.

    Every method takes a `selector` (by default `Impact()`; the paper's rule is `Stability()`) and a
    `stand_in` for the other neurons (by default `Linear()`; None drops them, as the paper does).
    Sampling options are the fields of `SamplingParams`, given by keyword.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @property
    def name(self) -> str:
        return self.backend.model_name

    def stream(
        self,
        prompt: str,
        selector: Selector = DEFAULT_SELECTOR,
        stand_in: StandIn | None = DEFAULT_STAND_IN,
        *,
        raw: bool = False,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Answer one prompt piece by piece; the last piece carries the record.

        Args:
            prompt: the text; it goes through the model's chat template where it has one.
            selector: the rule that chooses the core neurons.
            stand_in: what takes the place of the dropped neurons; None drops them.
            raw: send the text as it is.
            sampling: fields of `SamplingParams`.

        Raises:
            UserError: for an empty or too long prompt, or settings out of range.
        """
        params = SamplingParams(**sampling)
        ids = encode_prompt(self.backend.tokenizer, prompt, raw=raw)
        return generate(self.backend, [ids], selector, stand_in, params, texts=[prompt])

    def generate(
        self,
        prompts: str | Sequence[str],
        selector: Selector = DEFAULT_SELECTOR,
        stand_in: StandIn | None = DEFAULT_STAND_IN,
        *,
        raw: bool = False,
        batch_size: int = 8,
        **sampling: Any,
    ) -> list[GenerationRecord]:
        """Answer prompts, `batch_size` at a time; each has its own core set."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        params = SamplingParams(**sampling)
        records = []
        for batch in in_batches(prompts, batch_size):
            ids = [encode_prompt(self.backend.tokenizer, text, raw=raw) for text in batch]
            pieces = generate(self.backend, ids, selector, stand_in, params, texts=batch)
            records += [piece.record for piece in pieces if piece.record is not None]
        return records

    def check_prompt(self, prompt: str, *, raw: bool = False) -> None:
        """Raises UserError if a prompt is empty or leaves no room in the context."""
        ids = encode_prompt(self.backend.tokenizer, prompt, raw=raw)
        require_room(self.backend, len(ids))

    def compare(
        self,
        prompt: str,
        selector: Selector = DEFAULT_SELECTOR,
        stand_in: StandIn | None = DEFAULT_STAND_IN,
        *,
        raw: bool = False,
        on_piece: Callable[[str, Piece], None] = lambda _engine, _piece: None,
        **sampling: Any,
    ) -> Comparison:
        """Answer one prompt densely and sparsely, after one prefill of it.

        The two answers take turns, so that what else the machine does slows both alike.

        Args:
            prompt, selector, stand_in, raw, sampling: as for `stream`.
            on_piece: told of each piece as it comes, with "dense" or "sparse".
        """
        params = SamplingParams(**sampling)
        self.backend.check(selector)
        ids = encode_prompt(self.backend.tokenizer, prompt, raw=raw)
        read = prefill(self.backend, [ids], RecordingPlan.of(selector, stand_in), [prompt])
        dense = continue_from(self.backend, read.fork(), Dense.beside(selector), None, params)
        sparse = continue_from(self.backend, read, selector, stand_in, params)
        records: dict[str, GenerationRecord] = {}
        for pair in zip_longest(dense, sparse):
            for engine, piece in zip(("dense", "sparse"), pair, strict=True):
                if piece is None:
                    continue
                on_piece(engine, piece)
                if piece.record is not None:
                    records[engine] = piece.record
        return Comparison(**records)

    def select(self, prompt: str, selector: Selector = DEFAULT_SELECTOR) -> CoreSet:
        """The core set of a prompt, sent as it is (no chat template).

        Raises:
            UserError: if the prompt is empty or too long.
        """
        self.backend.check(selector)
        ids = encode_raw(self.backend.tokenizer, prompt)
        read = prefill(self.backend, [ids], RecordingPlan.of(selector), [prompt])
        return read.session.select(selector)[0].core_set

    def score(
        self,
        pairs: Iterable[tuple[str, str]],
        selector: Selector = DEFAULT_SELECTOR,
        stand_in: StandIn | None = DEFAULT_STAND_IN,
        *,
        batch_size: int = 8,
    ) -> Iterator[Score]:
        """Log-likelihoods of continuations after their contexts, decoded sparsely.

        Args:
            pairs: (context, continuation) texts, as they are (no chat template); streamed.
            selector, stand_in: as for `stream`; the core set comes from the context alone.
            batch_size: pairs computed together.

        Raises:
            UserError: for an empty context or continuation, or a pair that is too long.
        """
        for batch in in_batches(pairs, batch_size):
            made = [Pair.of(self.backend, *pair) for pair in batch]
            yield from score(self.backend, made, selector, stand_in)

    def conversation(self, messages: list[Message] | None = None) -> Conversation:
        """A chat, with the history given or none."""
        return Conversation(self.backend, messages)


def load(
    model: str,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    on_progress: Callable[[str], None] = lambda _line: None,
) -> LLM:
    """Load a model.

    Args:
        model: "smollm2-135m-instruct", a Hugging Face id, a folder with safetensors, or a .gguf
            file. Weights are never unpickled and no code of a model is run.
        backend: "native", the decoder for CPUs, which converts a model when it is first used, or
            "hf", transformers with its MLPs rerouted. None for native on a CPU, where it knows the
            architecture and the dtype and its kernels are built, else for hf.
        dtype: of native: "bfloat16", "int8" or "int4", None for bfloat16 or what a converted folder
            holds; of hf: "float32", "bfloat16" or "float16", None for float32 on a CPU.
        device: any that torch has; None for the CPU, which is all that native knows.
        threads: CPU threads for this process; None leaves them as they are.
        on_progress: told what is going on where it takes long.

    Raises:
        UserError: if the model is not found, damaged, or of an unknown architecture.
    """
    if backend not in (None, *BACKENDS):
        raise UserError(f"there is no backend {backend!r} here; there is {', '.join(BACKENDS)}")
    if threads is not None:
        _use_threads(threads)
    if backend == "native":
        return LLM(_load_native(model, dtype, device, on_progress))
    if backend is None and _native_serves(model, dtype, device):
        try:
            return LLM(_load_native(model, dtype, device, on_progress))
        except UnsupportedModelError as error:
            if dtype in _native_dtypes():
                raise
            on_progress(f"on the hf backend: {str(error).split('; ')[0]}")
    return LLM(_load_hf(model, dtype, device, on_progress))


def _native_serves(model: str, dtype: str | None, device: str | None) -> bool:
    from coreinfer.backends.native.container import is_converted
    from coreinfer.kernels.formats import DTYPES
    from coreinfer.kernels.library import native

    if is_converted(model):
        return True
    if device not in (None, "cpu") or dtype not in (None, *DTYPES):
        return False
    return native() is not None or dtype in _native_dtypes()


def _native_dtypes() -> tuple[str, ...]:
    """Those that no other backend has."""
    from coreinfer.models.loading import NATIVE_DTYPES

    return NATIVE_DTYPES


def _load_native(
    model: str, dtype: str | None, device: str | None, on_progress: Callable[[str], None]
) -> Backend:
    from coreinfer.backends.native.open import open_native

    if device not in (None, "cpu"):
        raise UserError(
            f"the native backend computes on the CPU, not on {device!r}; use --backend hf"
        )
    return open_native(model, dtype=dtype, on_progress=on_progress)


def _load_hf(
    model: str, dtype: str | None, device: str | None, on_progress: Callable[[str], None]
) -> Backend:
    from coreinfer.backends.hf.session import HfBackend
    from coreinfer.backends.native.container import is_converted
    from coreinfer.models.loading import load as load_weights

    if is_converted(model):
        raise UserError(f"{model!r} is a converted model; use --backend native for it")
    loaded = load_weights(model, dtype=dtype, device=device, on_progress=on_progress)
    return HfBackend(loaded.model, loaded.tokenizer, loaded.name)


def differentiable(
    backend: Backend,
    model: str,
    *,
    device: str | None = None,
    threads: int | None = None,
    on_progress: Callable[[str], None] = lambda _line: None,
) -> HfBackend:
    """A loaded model on hf, where a backward pass can go through it: itself, or loaded once more.

    In float32 on a CPU, as hf has it, but for models of more than `LARGE` bytes in bfloat16.

    Args:
        backend: the model as it was loaded; model: what `load` was told for it, as are the others.

    Raises:
        UserError: if it is a converted model, or one that hf does not know.
    """
    from coreinfer.backends.hf.session import HfBackend

    if isinstance(backend, HfBackend):
        return backend
    require_differentiable(model)
    dtype = "bfloat16" if float32_bytes(backend) > LARGE else None
    made = load(
        model, backend="hf", dtype=dtype, device=device, threads=threads, on_progress=on_progress
    ).backend
    assert isinstance(made, HfBackend)
    return made


def float32_bytes(backend: Backend) -> int:
    """Of a model on native, in float32, about."""
    return int(FLOAT32_BYTES[backend.dtype] * backend.cost.dense)


def require_differentiable(model: str) -> None:
    """Raises UserError if `model` names a converted model, which native alone can read."""
    from coreinfer.backends.native.container import is_converted

    if is_converted(model):
        raise UserError(
            f"no backward pass goes through the converted model {model!r}; name the model that it "
            "was made from"
        )


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` items, the last one shorter."""
    if size < 1:
        raise UserError(f"the batch size must be at least 1, got {size}")
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _use_threads(threads: int) -> None:
    import torch

    if threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}")
    cores = os.cpu_count() or threads
    if threads > cores:
        raise UserError(f"threads must be at most {cores}, this machine's cores, got {threads}")
    torch.set_num_threads(threads)
