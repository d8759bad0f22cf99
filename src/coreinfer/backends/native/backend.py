"""The native backend: a model in the decoder's own form, on a CPU."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from coreinfer.backends.choose import check
from coreinfer.backends.native.cache import KvCache
from coreinfer.backends.native.decoder import Decoder
from coreinfer.backends.native.products import Products
from coreinfer.backends.native.session import NativeSession
from coreinfer.backends.native.steps import Stepper
from coreinfer.backends.native.view import NativeView
from coreinfer.backends.native.weights import NativeWeights
from coreinfer.core.measures import ReadCost
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Selector
from coreinfer.standins import StandIn


class NativeBackend:
    """A model of the Llama family or of OPT, decoded with core neurons on a CPU.

    Args:
        weights: the model.
        tokenizer: its tokenizer.
        generation: says which tokens end an answer; by default the tokenizer does.
        compute: what a prefill multiplies in; float32 is exact.
        cache_dtype: of keys and values, bfloat16 or float32.
        prefill_chunk: tokens that a prefill pass reads at most, over all sequences.
        skip_zeros: do not read the down columns, nor a gated MLP's up rows, of neurons whose ReLU
            is exactly zero.
    """

    name = "native"

    def __init__(
        self,
        weights: NativeWeights,
        tokenizer: PreTrainedTokenizerBase,
        *,
        generation: GenerationConfig | None = None,
        compute: torch.dtype = torch.float32,
        cache_dtype: torch.dtype = torch.bfloat16,
        prefill_chunk: int = 512,
        skip_zeros: bool = True,
    ) -> None:
        self.weights = weights
        self.tokenizer = tokenizer
        products = Products(weights.format, compute)
        self.decoder = Decoder(weights, products)
        self.view = NativeView(weights, products)
        self.stepper = Stepper(weights, skip_zeros=skip_zeros)
        self.prefill_chunk = prefill_chunk
        self._generation = generation
        self._cache_dtype = cache_dtype
        self._cost = weights.read_cost()

    @property
    def model_name(self) -> str:
        return self.weights.name

    @property
    def family(self) -> str:
        return self.weights.config.model_type

    @property
    def dtype(self) -> str:
        return self.weights.format.dtype

    @property
    def fingerprint(self) -> str:
        return self.weights.fingerprint

    @property
    def cost(self) -> ReadCost:
        return self._cost

    @property
    def context_length(self) -> int:
        return self.weights.config.context_length

    @property
    def vocab_size(self) -> int:
        return self.weights.config.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        ids = None if self._generation is None else self._generation.eos_token_id
        ids = self.tokenizer.eos_token_id if ids is None else ids
        if ids is None:
            return frozenset()
        return frozenset([ids] if isinstance(ids, int) else ids)

    def check(self, selector: Selector, stand_in: StandIn | None = None) -> None:
        check(self.view, selector, stand_in)

    def start(self, plan: RecordingPlan) -> NativeSession:
        return NativeSession(self, plan)

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def new_cache(self) -> KvCache:
        """The empty KV cache of a sequence."""
        return KvCache(self.weights.config, self._cache_dtype)
