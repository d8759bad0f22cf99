"""Weights for a shape: random numbers, for speed only.

Native weights are made as records at once, and every layer reads the same ones: what a decode step
reads are packed copies, a layer its own, so that a model takes its own size and one layer more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from coreinfer.backends.native.architecture import DecoderConfig
from coreinfer.backends.native.tensors import Role, TensorPlan, format_of, tensor_plans
from coreinfer.backends.native.weights import NativeWeights
from coreinfer.benchmarks.shapes import config_of
from coreinfer.kernels.formats import WeightFormat
from coreinfer.models.assemble import assemble, skeleton

# Of a ReLU model's neurons, how many are not zero at a token. Trained OPT models have 3 to 10 %
# (Deja Vu, arXiv 2310.17157), so that this is on the careful side.
ACTIVE = 0.10

_POOL = 2**22 + 1  # random numbers, over and over; a row's length does not divide it
_SEED = 0


class SyntheticTensors(Mapping[str, Tensor]):
    """The tensors of a native model, by the names of `tensor_plans`; made when first asked for.

    Args:
        config: the architecture.
        weight_format: how its linears are stored.
        active: for a ReLU model with MLP biases, the share of neurons that are not zero.
    """

    def __init__(
        self, config: DecoderConfig, weight_format: WeightFormat, active: float = ACTIVE
    ) -> None:
        self._config = config
        self._format = weight_format
        self._active = active
        self._plans = {plan.name: plan for plan in tensor_plans(config)}
        self._made: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def __getitem__(self, name: str) -> Tensor:
        plan = self._plans[name]
        key = name.rpartition(".")[2] if name.startswith("layers.") else name
        if plan.role is Role.VECTOR:
            return self._vector(plan)
        if key not in self._made:
            self._made[key] = self._records(plan)
        return self._made[key]

    def _vector(self, plan: TensorPlan) -> Tensor:
        if plan.name.endswith("_in_bias") and self._config.activation == "relu":
            # Inputs are normalised and weights have variance 1/d: sums are standard normal.
            return torch.full(plan.shape, NormalDist().inv_cdf(self._active))
        return torch.zeros(plan.shape) if "bias" in plan.name else torch.ones(plan.shape)

    def _records(self, plan: TensorPlan) -> Tensor:
        rows, columns = plan.shape
        parts = len(plan.sources) if plan.role is Role.MLP else 1
        form = format_of(plan, self._format)
        made = random_records(form, rows * parts, columns)
        return made.view(rows, parts * form.row_bytes(columns))


def random_records(form: WeightFormat, rows: int, columns: int) -> Tensor:
    """Records of a random matrix with weights of mean 0 and variance 1/columns."""
    std = columns**-0.5
    if form.dtype == "bfloat16":
        return random_weights((rows, columns), std, torch.bfloat16).view(torch.uint8)
    size, groups = form.row_bytes(columns), columns // form.group_size
    q_bytes = size - 2 * groups * form.scales_per_group
    records = torch.empty(rows, size, dtype=torch.uint8)
    low, high = (0, 256) if form.dtype == "int4" else (-127, 128)
    pool = torch.randint(low, high, (_POOL,), generator=_generator(), dtype=torch.int16)
    records[:, :q_bytes] = _repeated(pool.to(torch.uint8), rows * q_bytes).view(rows, q_bytes)
    # Whole numbers 0..n, all as likely, have the variance n (n + 2) / 12.
    steps = 15 if form.dtype == "int4" else 254
    scale = std / math.sqrt(steps * (steps + 2) / 12)
    numbers = torch.full((groups * form.scales_per_group,), scale)
    numbers[groups:] = -scale * steps / 2  # int4's minima
    records[:, q_bytes:] = numbers.to(torch.float16).view(torch.uint8)
    return records


def random_weights(shape: tuple[int, ...], std: float, dtype: torch.dtype) -> Tensor:
    """Normal numbers of a mean of 0, drawn from a pool: as fast as memory is copied."""
    pool = torch.randn(_POOL, generator=_generator()).mul_(std).to(dtype)
    return _repeated(pool, math.prod(shape)).view(shape)


def synthetic_native(
    values: Mapping[str, Any], name: str, weight_format: WeightFormat
) -> NativeWeights:
    """A native model of a shape's configuration."""
    config = DecoderConfig.from_hf(config_of(values))
    tensors = SyntheticTensors(config, weight_format)
    return NativeWeights(config, weight_format, tensors, name, f"synthetic:{name}")


def synthetic_hf(values: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A transformers model of a shape's configuration; every layer has weights of its own."""
    config = config_of(values)
    tensors = {
        name: _parameter(name, tuple(parameter.shape), dtype)
        for name, parameter in skeleton(config, "the shape").named_parameters()
    }
    return assemble(config, tensors, "the shape", dtype=dtype)


def no_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for a model that has none: it is never asked."""
    empty = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=empty, unk_token="<unk>")


def _parameter(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if len(shape) > 1:
        return random_weights(shape, shape[-1] ** -0.5, dtype)
    return torch.zeros(shape, dtype=dtype) if "bias" in name else torch.ones(shape, dtype=dtype)


def _repeated(pool: Tensor, count: int) -> Tensor:
    """The first `count` numbers of the pool, repeated; in memory of their own."""
    made = torch.empty(count, dtype=pool.dtype)
    for start in range(0, count, len(pool)):
        part = made[start : start + len(pool)]
        part.copy_(pool[: len(part)])
    return made


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)
