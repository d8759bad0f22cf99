"""What the tests of `generate` inside `sparse` share: prompts, models and expectations."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from coreinfer.backends.hf.sparse import SparseRun
from coreinfer.selectors import Stability
from tests.hf.reference import activations, core_set, sparse_greedy
from tests.tiny import PAD, tiny_model

A = [5, 77, 200, 13, 13, 8, 250, 99, 41, 5, 77]
B = [90, 91, 200]
RULE = Stability(alpha=0.3, beta=0.4)
STEPS = 9


def make(family: str = "llama", **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model, and a twin for the reference that is never inside `sparse`."""
    model = tiny_model(family, **changes)
    model.generation_config.eos_token_id = None
    return model, copy.deepcopy(model)


def kept_of(model: PreTrainedModel, *prompts: list[int]) -> dict[int, list[int]]:
    """The core set of all that was prefilled, turns after one another in one context."""
    ids = [token for prompt in prompts for token in prompt]
    return {i: core_set(h, 0.3, 0.4) for i, (_, h) in enumerate(activations(model, ids))}


def expected(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    return sparse_greedy(model, prompt, kept_of(model, prompt), STEPS)[0]


def sets(run: SparseRun, prompt: int = 0) -> dict[int, list[int]]:
    return {i: t.tolist() for i, t in run.choices[prompt].core_set.layers.items()}


def greedy(model: PreTrainedModel, ids: Any, **options: Any) -> Any:
    options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": PAD} | options
    return model.generate(torch.tensor(ids), **options)


def padded(*prompts: list[int]) -> tuple[list[list[int]], Tensor]:
    width = max(map(len, prompts))
    ids = [[PAD] * (width - len(p)) + p for p in prompts]
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
