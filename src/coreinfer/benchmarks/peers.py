"""Other engines on the same machine, the same sizes and the same prompt."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from coreinfer.benchmarks.engines import hf_backend
from coreinfer.benchmarks.gguf_files import bytes_read, file_type, gguf_of
from coreinfer.benchmarks.job import Job
from coreinfer.benchmarks.measure import About, Engine, Repeat, timed
from coreinfer.benchmarks.target import Target
from coreinfer.errors import UserError
from coreinfer.models.assemble import one_line


class Peer(Protocol):
    """An engine that is not ours. What it cannot do it says by UserError, which becomes a note."""

    package: str  # what has to be installed
    hint: str  # how

    def forms(self, target: Target, dtypes: Sequence[str]) -> list[str]:
        """What it calls the dtypes that it has rows for."""
        ...

    def file(self, target: Target, form: str, folder: Path) -> Path | None:
        """The file that it reads, written into `folder` if need be; None if it takes the model."""
        ...

    def open(self, job: Job) -> Engine:
        """Load the model; in the process that measures."""
        ...


def is_installed(peer: Peer) -> bool:
    return find_spec(peer.package) is not None


class Transformers:
    """transformers, as it is: its own forward pass with a growing cache."""

    package = "transformers"
    hint = "pip install transformers"

    def forms(self, target: Target, dtypes: Sequence[str]) -> list[str]:
        return [dtype for dtype in dtypes if dtype in ("float32", "bfloat16")]

    def file(self, target: Target, form: str, folder: Path) -> Path | None:
        return None

    def open(self, job: Job) -> Engine:
        return _TransformersEngine(job)


class _TransformersEngine:
    def __init__(self, job: Job) -> None:
        backend = hf_backend(job)
        self.vocab_size = backend.vocab_size
        self._model = backend.model
        self._cache_argument = backend.cache_argument
        self._only_last = {"logits_to_keep": 1} if backend.keeps_logits else {}
        self._about = About(backend.dtype, bytes_per_token=backend.cost.dense)
        self._cache: Any = None

    def repeat(self, prompt: Sequence[int], answer: Sequence[int]) -> Repeat:
        return timed(self, prompt, answer)

    def prefill(self, token_ids: Sequence[int]) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        self._forward(token_ids)

    def select(self) -> None:
        """All neurons."""

    def decode(self, token_id: int) -> None:
        self._forward([token_id])

    def about(self) -> About:
        return self._about

    @torch.no_grad()
    def _forward(self, token_ids: Sequence[int]) -> None:
        cache = {self._cache_argument: self._cache}
        ids = torch.tensor([list(token_ids)])
        self._model(input_ids=ids, use_cache=True, **cache, **self._only_last)


class LlamaCpp:
    """llama.cpp, through the functions of its own interface."""

    package = "llama_cpp"
    hint = "pip install 'coreinfer[bench]'"

    def forms(self, target: Target, dtypes: Sequence[str]) -> list[str]:
        named = [{"int8": "Q8_0", "int4": "Q4_0"}[d] for d in dtypes if d in ("int8", "int4")]
        if target.gguf is None:
            return named
        return list(dict.fromkeys([file_type(target.gguf), *named]))

    def file(self, target: Target, form: str, folder: Path) -> Path | None:
        return gguf_of(target, form, folder)

    def open(self, job: Job) -> Engine:
        return LlamaCppEngine(job)


class LlamaCppEngine:
    """One GGUF file in llama.cpp."""

    def __init__(self, job: Job) -> None:
        import llama_cpp

        assert job.gguf is not None
        self._llama: Any = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            job.gguf.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise UserError(f"llama.cpp does not load {Path(job.gguf).name!r}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = job.prompt_tokens + job.decode_tokens + 1
        settings.n_threads = settings.n_threads_batch = job.threads
        settings.n_batch = max(job.prompt_tokens, settings.n_batch)
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise UserError("llama.cpp cannot make a context for this model")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self._about = About(job.dtype, bytes_per_token=bytes_read(Path(job.gguf)))

    def repeat(self, prompt: Sequence[int], answer: Sequence[int]) -> Repeat:
        return timed(self, prompt, answer)

    def prefill(self, token_ids: Sequence[int]) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._decode(token_ids)

    def select(self) -> None:
        """All neurons."""

    def decode(self, token_id: int) -> None:
        self._decode([token_id])

    def logits(self) -> torch.Tensor:
        """After the last token that was read, [V]."""
        pointer = self._llama.llama_get_logits(self._context)
        return torch.tensor(pointer[: self.vocab_size])

    def about(self) -> About:
        return self._about

    def _decode(self, token_ids: Sequence[int]) -> None:
        tokens = (self._llama.llama_token * len(token_ids))(*token_ids)
        batch = self._llama.llama_batch_get_one(tokens, len(token_ids))
        if code := self._llama.llama_decode(self._context, batch):
            raise UserError(f"llama.cpp ends with {code}")
        self._llama.llama_synchronize(self._context)


class OpenVino:
    """OpenVINO GenAI, which reads GGUF files of a few families.

    Its default attention keeps the prompt for the next run, so that there would be no prefill to
    time; the other one does not. It times itself: its time to the first token is the prefill, its
    time per output token, which drawing the token is part of, makes the decode speed. It decodes
    tokens of its own.
    """

    package = "openvino_genai"
    hint = "pip install openvino-genai"

    def forms(self, target: Target, dtypes: Sequence[str]) -> list[str]:
        if target.gguf is None:
            raise UserError("OpenVINO GenAI needs a GGUF file of a model with its tokenizer")
        return [file_type(target.gguf)]

    def file(self, target: Target, form: str, folder: Path) -> Path | None:
        return target.gguf

    def open(self, job: Job) -> Engine:
        return _OpenVinoEngine(job)


class _OpenVinoEngine:
    def __init__(self, job: Job) -> None:
        import openvino
        import openvino_genai

        assert job.gguf is not None
        self._genai: Any = openvino_genai
        try:
            self._pipeline = openvino_genai.LLMPipeline(
                job.gguf,
                "CPU",
                ATTENTION_BACKEND="SDPA",
                INFERENCE_NUM_THREADS=job.threads,
            )
        except RuntimeError as error:
            raise UserError(f"OpenVINO GenAI does not load it: {one_line(error)}") from None
        self._tensor = openvino.Tensor
        self.vocab_size = len(self._pipeline.get_tokenizer().get_vocab())
        self._about = About(job.dtype)

    def repeat(self, prompt: Sequence[int], answer: Sequence[int]) -> Repeat:
        import numpy as np

        settings = self._genai.GenerationConfig()
        settings.max_new_tokens = len(answer) + 1
        settings.ignore_eos = True
        settings.do_sample = False
        ids = np.array([list(prompt)], dtype=np.int64)
        given = self._genai.TokenizedInputs(self._tensor(ids), self._tensor(np.ones_like(ids)))
        found = self._pipeline.generate(given, settings).perf_metrics
        seconds = found.get_tpot().mean / 1e3 * len(answer)
        return Repeat(found.get_ttft().mean / 1e3, 0.0, seconds, len(answer))

    def about(self) -> About:
        return self._about


PEERS: MappingProxyType[str, Peer] = MappingProxyType(
    {"transformers": Transformers(), "llama.cpp": LlamaCpp(), "openvino": OpenVino()}
)
