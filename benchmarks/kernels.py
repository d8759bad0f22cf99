"""How near do decode steps come to memory speed? Random weights in the shapes of real models.

    python -m benchmarks.kernels --shape 7b --threads 2 --out benchmarks/results/kernels-7b

Each step is timed between plain sweeps over a large buffer, so that both see the same machine; the
fraction is the step's bytes a second over the sweep's. Packing is that of a layer's kept neurons,
into memory that was used before. With one thread the clock is that thread's
own processor time, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.report import markdown, provenance, write_json, write_text
from coreinfer.backends.native.tensors import head_format
from coreinfer.kernels.arena import Arena, Mappings
from coreinfer.kernels.decode import decode_step
from coreinfer.kernels.formats import DTYPES, WeightFormat
from coreinfer.kernels.layout import PackedMlp
from coreinfer.kernels.library import kernel_path
from coreinfer.kernels.packing import pack, pack_mlp
from coreinfer.kernels.weights import (
    DecoderWeights,
    KeyValueCache,
    LayerWeights,
    Norm,
    Plan,
    Row,
)

SWEEP_BYTES = 1 << 29
CACHE_TOKENS = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    hidden: int
    neurons: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = {
    "7b": Shape(4096, 11008, 32, 32, 32, 128, 32000),
    "135m": Shape(576, 1536, 30, 9, 3, 64, 49152),
}


def random_records(form: WeightFormat, rows: int, columns: int, parts: int = 1) -> Tensor:
    """Records of a few random rows, over and over: only their number matters here."""
    some = form.quantize(torch.randn(64, columns) / columns**0.5)
    return some.repeat(-(-rows // 64), parts)[:rows].contiguous()


def some_neurons(shape: Shape, keep: float) -> Tensor:
    """Which neurons of a layer are kept, int32."""
    count = round(keep * shape.neurons)
    return torch.randperm(shape.neurons)[:count].sort().values.to(torch.int32)


def model_of(
    shape: Shape, form: WeightFormat, layers: int, keep: float
) -> tuple[DecoderWeights, Plan]:
    """A random decoder, and a plan that keeps that part of each layer's neurons."""
    d, arena, ones = shape.hidden, Arena(), Norm(torch.ones(shape.hidden))
    q_rows, kv_rows = shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim
    chosen, head = some_neurons(shape, keep), head_format(form)
    records = random_records(form, shape.neurons, d, parts=3)
    linears, mlps = [], []
    for _ in range(layers):
        qkv = pack(random_records(form, q_rows + kv_rows, d), d, form, arena=arena)
        o = pack(random_records(form, d, q_rows), q_rows, form, arena=arena)
        linears.append(LayerWeights(ones, ones, qkv, o))
        mlps.append(pack_mlp(records, d, form, gated=True, index=chosen, arena=arena))
    weights = DecoderWeights(
        layers=linears,
        final_norm=ones,
        head=pack(random_records(head, shape.vocab, d), d, head, arena=arena),
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        norm_eps=1e-5,
        activation="silu",
        inverse_frequencies=1e4 ** -torch.linspace(0, 1, shape.head_dim // 2),
    )
    return weights, Plan(mlps, [None] * layers)


def packing_of(shape: Shape, form: WeightFormat, keep: float) -> Callable[[], PackedMlp]:
    """Packs that part of a layer's neurons, as after a prompt."""
    records = random_records(form, shape.neurons, shape.hidden, parts=3)
    chosen, mappings = some_neurons(shape, keep), Mappings()

    def packed() -> PackedMlp:
        arena = Arena(mappings=mappings)
        return pack_mlp(records, shape.hidden, form, gated=True, index=chosen, arena=arena)

    return packed


def bytes_of(weights: DecoderWeights, plan: Plan) -> int:
    """What a step reads."""
    linears = sum(layer.qkv.num_bytes + layer.o.num_bytes for layer in weights.layers)
    return linears + weights.head.num_bytes + sum(mlp.num_bytes for mlp in plan.mlps)


def timed(clock: Callable[[], float], work: Callable[[], object]) -> float:
    start = clock()
    work()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, to save memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape, clock = SHAPES[args.shape], time.thread_time if args.threads == 1 else time.perf_counter
    layers = args.layers or shape.layers
    buffer = torch.ones(SWEEP_BYTES // 8, dtype=torch.int64)
    results = []
    table = [["weights", "keep", "MB a token", "ms a token", "best", "of read bandwidth", "best"]]
    table[0] += ["MB packed a layer", "ms", "best"]
    for dtype in DTYPES:
        for keep in args.keep:
            weights, plan = model_of(shape, WeightFormat.named(dtype), layers, keep)
            cache = KeyValueCache.empty(
                layers, shape.kv_heads, CACHE_TOKENS, shape.head_dim, torch.bfloat16
            )
            row = Row(1, 100, 100, plan, cache)
            step = partial(decode_step, weights, [row], args.threads)
            packing = packing_of(shape, WeightFormat.named(dtype), keep)
            sweeps, steps, packings = [], [], []
            step()
            packed_bytes = packing().num_bytes
            for _ in range(args.steps):
                sweeps.append(timed(clock, buffer.sum) / SWEEP_BYTES)
                steps.append(timed(clock, step))
                packings.append(timed(clock, packing))
            size = bytes_of(weights, plan)
            fractions = [
                size * s / t
                for s, t in zip(
                    (median(sweeps), min(sweeps)), (median(steps), min(steps)), strict=True
                )
            ]
            results.append(
                {
                    "dtype": dtype,
                    "keep": keep,
                    "bytes": size,
                    "step_s": steps,
                    "packed_bytes": packed_bytes,
                    "pack_s": packings,
                    "sweep_bytes_per_s": [1 / s for s in sweeps],
                    "fraction": fractions[0],
                }
            )
            table.append(
                [
                    dtype,
                    f"{keep:g}",
                    f"{size / 1e6:.0f}",
                    f"{median(steps) * 1e3:.2f}",
                    f"{min(steps) * 1e3:.2f}",
                    f"{fractions[0]:.0%}",
                    f"{fractions[1]:.0%}",
                    f"{packed_bytes / 1e6:.0f}",
                    f"{median(packings) * 1e3:.2f}",
                    f"{min(packings) * 1e3:.2f}",
                ]
            )
            print(" ".join(table[-1]), flush=True)
    about = provenance("benchmarks.kernels") | {"kernels": kernel_path(), "layers": layers}
    write_json(args.out.with_suffix(".json"), {"about": about, "results": results})
    write_text(args.out.with_suffix(".md"), markdown(table))


if __name__ == "__main__":
    main()
