"""The fused step: the native code against its twin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.kernels.decode import decode_step
from coreinfer.kernels.decode_twin import decode_step_twin
from coreinfer.kernels.formats import WeightFormat
from coreinfer.kernels.packing import pack, pack_mlp
from coreinfer.kernels.weights import (
    DecoderWeights,
    KeyValueCache,
    LayerWeights,
    Norm,
    Plan,
    Row,
    StandInWeights,
)
from tests.kernels.paths import NATIVE, using

BFLOAT16 = WeightFormat("bfloat16", 0)
FORMATS = [BFLOAT16, WeightFormat("int8", 16), WeightFormat("int4", 32)]
VOCAB = 71

# Shapes and variants: what differs from a Llama of d 96, 80 neurons, 4 heads and 2 kv heads of 24.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "wide heads": {"head_dim": 64, "window": 3, "tied": False},
    "qwen": {"biases": True, "qk_norm": True, "head_dim": 16},
    "opt": {"opt": True, "biases": True, "activation": "relu"},
    "gelu": {"activation": "gelu_tanh", "rope_factor": 1.3},
}


def model_of(
    form: WeightFormat,
    *,
    head_dim: int = 24,
    window: int = 0,
    tied: bool = True,
    biases: bool = False,
    qk_norm: bool = False,
    opt: bool = False,
    activation: str = "silu",
    rope_factor: float = 1.0,
) -> tuple[DecoderWeights, Tensor]:
    """Random weights and neuron-major records of one MLP."""
    generator = torch.Generator().manual_seed(7)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    d, neurons, heads, kv_heads = 96, 80, 4, 2
    if form.dtype == "bfloat16":  # sizes that no tile divides
        d, neurons = 90, 77
    rows = (heads + 2 * kv_heads) * head_dim

    def norm() -> Norm:
        return Norm(1 + numbers(d), numbers(d) if opt else None)

    def layer() -> LayerWeights:
        return LayerWeights(
            norm1=norm(),
            norm2=norm(),
            qkv=pack(form.quantize(numbers(rows, d)), d, form),
            o=pack(form.quantize(numbers(d, heads * head_dim)), heads * head_dim, form),
            qkv_bias=numbers(rows) * 5 if biases else None,
            o_bias=numbers(d) if biases else None,
            mlp_out_bias=numbers(d) if biases else None,
            q_norm=1 + numbers(head_dim) if qk_norm else None,
            k_norm=1 + numbers(head_dim) if qk_norm else None,
            window=window,
        )

    layers = [layer(), replace(layer(), rope=False), layer()]
    weights = DecoderWeights(
        layers=layers,
        final_norm=norm(),
        head=pack(form.quantize(numbers(VOCAB, d) * 3), d, form),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=1e-5,
        activation=activation,
        layer_norm=opt,
        embed=None if tied else numbers(VOCAB, d).to(torch.bfloat16),
        position=numbers(50, d) if opt else None,
        inverse_frequencies=None if opt else 0.5 ** torch.arange(head_dim // 2),
        rope_factor=rope_factor,
    )
    parts = [form.quantize(numbers(neurons, d)) for _ in range(2 if opt else 3)]
    return weights, torch.cat(parts, dim=1)


def plan_of(
    weights: DecoderWeights, records: Tensor, form: WeightFormat, seed: int | None, **kind: Any
) -> Plan:
    """Every neuron, or those and the stand-ins that a seed gives; the second layer stays dense."""
    d, gated = weights.hidden_size, weights.position is None
    if seed is None:
        mlps = [pack_mlp(records, d, form, gated=gated, **kind)] * len(weights.layers)
        return Plan(mlps, [None] * len(mlps))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(records), generator=generator)[: 20 + seed].sort().values
    some = pack_mlp(records, d, form, gated=gated, index=chosen.to(torch.int32), **kind)
    every = pack_mlp(records, d, form, gated=gated, **kind)
    offset, left, right = torch.randn(d), torch.randn(d, 5) / 5, torch.randn(5, d) / 9
    stand_ins = [StandInWeights.pack(offset, left, right), None, StandInWeights.pack(offset)]
    return Plan([some, every, some], stand_ins)


def cache_of(
    weights: DecoderWeights, dtype: torch.dtype = torch.float32, capacity: int = 40
) -> KeyValueCache:
    return KeyValueCache.empty(
        len(weights.layers), weights.num_kv_heads, capacity, weights.head_dim, dtype
    )


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def steps(
    weights: DecoderWeights,
    plans: Sequence[Plan],
    path: str | None,
    dtype: torch.dtype = torch.float32,
    *,
    count: int = 7,
    threads: int = 2,
) -> list[Tensor]:
    """Logits of each step, a sequence a plan, all decoded together; None is the twin itself."""
    caches = [cache_of(weights, dtype) for _ in plans]
    found = []
    for step in range(count):
        rows = [
            Row((11 * step + 5 * b) % VOCAB, step + b, step, plan, cache)
            for b, (plan, cache) in enumerate(zip(plans, caches, strict=True))
        ]
        if path is None:
            found.append(decode_step_twin(weights, rows))
            continue
        with using(path):
            found.append(decode_step(weights, rows, threads=threads))
    return found


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_native_steps_equal_the_twins(variant: str, form: WeightFormat, path: str) -> None:
    weights, records = model_of(form, **VARIANTS[variant])
    if (weights.num_heads * weights.head_dim) % max(1, form.group_size):
        pytest.skip("the group size does not divide the heads")
    skip = {"skip_zeros": weights.activation == "relu"}
    dense = plan_of(weights, records, form, None, **skip)
    plans = [dense, plan_of(weights, records, form, 1, **skip), dense]
    plans.append(plan_of(weights, records, form, 2, **skip))
    for dtype in (torch.float32, torch.bfloat16):
        exact = form.dtype == "bfloat16" and dtype == torch.float32
        wanted = steps(weights, plans, None, dtype)
        for found, want in zip(steps(weights, plans, path, dtype), wanted, strict=True):
            # Where something is rounded, last bits may turn a number at the middle either way.
            assert distance(found, want) < (2e-5 if exact else 2e-2)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("variant", ["llama", "opt"])
def test_native_steps_skip_what_the_twins_skip(
    variant: str, form: WeightFormat, path: str, threads: int
) -> None:
    """Rows that share core neurons, one that has others, and one that skips none."""
    weights, records = model_of(form, **VARIANTS[variant])
    least = torch.rand(22, generator=torch.Generator().manual_seed(3)) / 4
    some = plan_of(weights, records, form, 2, skip_zeros=True)
    sparse = some.mlps[0].skipping(least)
    skipping = Plan([sparse, some.mlps[1], sparse], some.stand_ins)
    plans = [skipping, plan_of(weights, records, form, None), skipping, some]
    counts: dict[str | None, list[int]] = {}
    logits: dict[str | None, Tensor] = {}
    for which in (None, path):
        caches = [cache_of(weights) for _ in plans]
        skipped = [torch.zeros(1, dtype=torch.int64) for _ in plans]
        for step in range(3):
            rows = [
                Row((11 * step + 5 * b) % VOCAB, step + b, step, plan, cache, count)
                for b, (plan, cache, count) in enumerate(zip(plans, caches, skipped, strict=True))
            ]
            if which is None:
                logits[which] = decode_step_twin(weights, rows)
            else:
                with using(which):
                    logits[which] = decode_step(weights, rows, threads=threads)
        counts[which] = [int(count) for count in skipped]
    assert distance(logits[path], logits[None]) < 5e-2
    assert counts[None][1] == counts[None][3] == counts[path][1] == counts[path][3] == 0
    for row in (0, 2):
        assert 10 < counts[None][row] < 3 * 2 * 22 - 10
        # Where inputs are rounded, one at the threshold may fall on either side.
        assert abs(counts[path][row] - counts[None][row]) <= (2 if form.group_size else 0)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_row_depends_neither_on_its_company_nor_on_threads(form: WeightFormat, path: str) -> None:
    weights, records = model_of(form)
    dense = plan_of(weights, records, form, None)
    plans = [dense, plan_of(weights, records, form, 3), dense, dense]
    plans += [plan_of(weights, records, form, seed) for seed in (1, 2)] + [dense] * 2
    together = steps(weights, plans, path, count=3)
    for threads in (1, 2, 3):
        alone = steps(weights, plans[:1], path, count=3, threads=threads)
        for found, all_rows in zip(alone, together, strict=True):
            assert torch.equal(found[0], all_rows[0])
    fewer = steps(weights, plans[:3], path, count=3)
    for found, all_rows in zip(fewer, together, strict=True):
        assert torch.equal(found, all_rows[:3])


@pytest.mark.parametrize("path", [*NATIVE, None])
def test_rows_of_one_sequence_see_each_other_causally(path: str | None) -> None:
    weights, records = model_of(BFLOAT16)
    plan = plan_of(weights, records, BFLOAT16, None)
    one_by_one = steps(weights, [plan], path, count=6)
    cache = cache_of(weights)
    rows = [Row(11 * step % VOCAB, step, step, plan, cache) for step in range(6)]
    if path is None:
        together = decode_step_twin(weights, rows)
    else:
        with using(path):
            together = decode_step(weights, rows, threads=2)
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", NATIVE)
def test_a_cache_may_be_a_view(path: str) -> None:
    weights, records = model_of(BFLOAT16)
    plan = plan_of(weights, records, BFLOAT16, None)
    whole = torch.zeros(3, 2, weights.num_kv_heads, 2, 20, weights.head_dim)
    view = KeyValueCache(whole[:, 1, :, 0], whole[:, 1, :, 1])
    own = cache_of(weights, capacity=20)
    with using(path):
        for step in range(4):
            found = decode_step(weights, [Row(step, step, step, plan, view)])
            wanted = decode_step(weights, [Row(step, step, step, plan, own)])
            assert torch.equal(found, wanted)
    assert torch.equal(view.keys, own.keys)
    assert torch.equal(view.values, own.values)
    assert not whole[:, 0].any()  # and nothing else was written


def test_what_does_not_fit_is_refused() -> None:
    weights, records = model_of(BFLOAT16, **VARIANTS["opt"])
    plan = plan_of(weights, records, BFLOAT16, None)
    good = Row(1, 1, 1, plan, cache_of(weights))
    refused = [
        ([], "1 to 8 rows"),
        ([good] * 9, "1 to 8 rows, got 9"),
        ([replace(good, token=VOCAB)], "token 71 is outside"),
        ([replace(good, token=-1)], "token -1 is outside"),
        ([replace(good, length=40)], "room for 40 tokens"),
        ([replace(good, position=50)], "position 50 is outside"),
        ([replace(good, plan=Plan(plan.mlps[:1], [None]))], "plan of 1 layers"),
    ]
    for rows, message in refused:
        with pytest.raises(UserError, match=message):
            decode_step(weights, rows)
    with pytest.raises(UserError, match="no activation"):
        replace(weights, activation="tanh")
