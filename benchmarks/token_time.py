"""Where does the time of a token go? A decode step against the same step with a part taken out.

    python -m benchmarks.token_time --shape 135m --out benchmarks/results/token-time-135m

Random weights in the shapes of real models. The steps take turns, so that a machine that slows
down does so for all; a turn is a few steps, of which the first brings the weights of a small model
back into the processor's cache and does not count. What a part takes is the median difference to
the whole step of the same turn.
What no part explains are norms, the threads' meetings and Python: timed alone, as a decoder of the
same depth that has next to nothing to multiply.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.kernels import SHAPES, Shape, model_of
from benchmarks.report import markdown, provenance, write_json, write_text
from coreinfer.kernels.decode import decode_step
from coreinfer.kernels.formats import WeightFormat
from coreinfer.kernels.library import kernel_path
from coreinfer.kernels.weights import KeyValueCache, Row

HEAD_DIM = 64  # of the one head that is left where attention is taken out


@dataclass(frozen=True)
class Variant:
    """A decoder, and how many tokens its cache holds.

    Attributes:
        alone: what it takes is what is asked for, not what it takes less than the whole step.
    """

    shape: Shape
    tokens: int
    keep: float
    alone: bool = False


def variants(shape: Shape, tokens: int, keep: float) -> dict[str, Variant]:
    """The whole step, and the step without each of its parts."""
    whole = Variant(shape, tokens, keep, alone=True)
    no_head = {"vocab": 16}
    no_attention = {"heads": 1, "kv_heads": 1, "head_dim": HEAD_DIM}
    no_mlp = 16 / shape.neurons
    part = replace(whole, alone=False)
    least = replace(shape, **no_head, **no_attention)
    return {
        "whole": whole,
        "MLPs": replace(part, keep=no_mlp),
        "attention's products": replace(part, shape=replace(shape, **no_attention)),
        f"looking at {tokens} tokens": replace(part, tokens=1),
        "head": replace(part, shape=replace(shape, **no_head)),
        "norms, meetings of threads, Python": Variant(least, 1, no_mlp, alone=True),
        "of it outside the layers": Variant(replace(least, layers=1), 1, no_mlp, alone=True),
    }


def step_of(variant: Variant, form: WeightFormat, threads: int) -> Callable[[], object]:
    shape = variant.shape
    weights, plan = model_of(shape, form, shape.layers, variant.keep)
    size = (shape.layers, shape.kv_heads, variant.tokens + 1, shape.head_dim)
    cache = KeyValueCache.empty(*size, torch.bfloat16)
    row = Row(1, variant.tokens, variant.tokens, plan, cache)
    return partial(decode_step, weights, [row], threads)


def seconds(step: Callable[[], object], steps: int) -> float:
    """Of a step: the median of some, after one more."""
    step()
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, to save memory")
    parser.add_argument("--dtype", default="int4")
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.4])
    parser.add_argument("--tokens", type=int, default=128, help="in the KV cache")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    shape = replace(shape, layers=args.layers or shape.layers)
    form = WeightFormat.named(args.dtype)
    table, results = [["keep", "part", "ms", "of the token"]], []
    for keep in args.keep:
        found = variants(shape, args.tokens, keep)
        steps = {name: step_of(variant, form, args.threads) for name, variant in found.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.turns):
            for name, step in steps.items():
                times[name].append(seconds(step, args.steps))
        whole = median(times["whole"])
        for name, taken_by in times.items():
            part = median(
                taken if found[name].alone else all_of_it - taken
                for all_of_it, taken in zip(times["whole"], taken_by, strict=True)
            )
            results.append({"keep": keep, "part": name, "seconds": part, "of_token": part / whole})
            table.append([f"{keep:g}", name, f"{part * 1e3:.3f}", f"{part / whole:.0%}"])
            print(" ".join(table[-1]), flush=True)
    about = provenance("benchmarks.token_time") | {"kernels": kernel_path(), "layers": shape.layers}
    write_json(args.out.with_suffix(".json"), {"about": about, "results": results})
    write_text(args.out.with_suffix(".md"), markdown(table))


if __name__ == "__main__":
    main()
