"""Quality of every selector and stand-in at several keep ratios, as one table.

    python -m benchmarks.quality --model smollm2-135m-instruct --text wikitext2_raw_test.txt \\
        --clusters STORE --calibration STORE --dense-layers 0-2,28-29 \\
        --out benchmarks/results/quality-smollm2

Writes OUT.json (every number, a window each) and OUT.md (the table), after each batch, so a run
that is cut short leaves what it has. `--jobs N` measures N batches at a time, a process each.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.models import opened
from benchmarks.report import markdown, provenance, write_json, write_text
from benchmarks.texts import add_window_options, read_windows
from coreinfer.api import in_batches
from coreinfer.calibration.store import CalibrationStore
from coreinfer.cli.values import fractions, layer_list
from coreinfer.evaluation.continuations import Quality, Setting, Window, measure
from coreinfer.selectors import SELECTORS, Selector
from coreinfer.semantics.store import ClusterStore
from coreinfer.standins import STAND_INS

RULES = ("stability", "similarity", "auto", "impact", "griffin", "residual")
CONTROLS = ("static", "random", "oracle")


def settings(
    rules: Sequence[str],
    stand_ins: Sequence[str],
    keeps: Sequence[float],
    dense_layers: tuple[int, ...],
    stores: Mapping[str, Any],
) -> dict[str, Setting]:
    """Every rule with every stand-in at every keep ratio; named "rule/stand-in/keep".

    `stores` are those that rules and stand-ins take, by the name of the field; what needs one that
    is not there is left out.
    """
    made: dict[str, Setting] = {}
    for name in rules:
        rule = SELECTORS[name]
        if lacks(rule, stores):
            continue
        for keep in keeps:
            options: dict[str, Any] = {rule.keep_name: keep, "dense_layers": dense_layers}
            selector: Selector = rule(**options, **taken(rule, stores))
            for stand_in in stand_ins:
                kind = STAND_INS.get(stand_in)
                if kind is not None and lacks(kind, stores):
                    continue
                instance = None if kind is None else kind(**taken(kind, stores))
                made[f"{name}/{stand_in}/{keep:g}"] = Setting(selector, instance)
    return made


def taken(kind: type, stores: Mapping[str, Any]) -> dict[str, Any]:
    """The stores that a rule or a stand-in has a field for."""
    names = {field.name for field in fields(kind)}
    return {name: store for name, store in stores.items() if name in names}


def lacks(kind: type, stores: Mapping[str, Any]) -> bool:
    """Whether it needs a store that is not there."""
    names = {field.name for field in fields(kind)}
    return any(name in names and name not in stores for name in ("clusters", "calibration"))


def table(results: dict[str, Quality]) -> str:
    """One row a setting; KL and agreement with the standard error over the windows."""
    dense = results["dense"].summary()
    rows = [
        ["rule", "stand-in", "keep", "density", "bytes/dense", "perplexity", "KL to dense", "top-1"]
    ]
    for name, quality in results.items():
        rule, stand_in, keep = name.split("/") if name != "dense" else ("dense", "", "")
        s = quality.summary()
        rows.append(
            [
                rule,
                stand_in,
                keep,
                f"{s['density']:.3f}",
                f"{s['bytes_per_token'] / dense['bytes_per_token']:.3f}",
                f"{s['perplexity']:.1f}",
                f"{s['kl']:.3f} ± {s['kl_se']:.3f}",
                f"{s['agreement']:.3f} ± {s['agreement_se']:.3f}",
            ]
        )
    return markdown(rows)


class Worker:
    """The model and the settings of one process, loaded when its first batch comes."""

    current: Worker

    def __init__(self, args: argparse.Namespace) -> None:
        stores: dict[str, Any] = {}
        if args.clusters is not None:
            stores["clusters"] = ClusterStore.load(args.clusters)
        if args.calibration is not None:
            stores["calibration"] = CalibrationStore.load(args.calibration)
        self.backend = opened(args)
        self.settings = settings(args.rules, args.stand_ins, args.keeps, args.dense_layers, stores)

    @classmethod
    def start(cls, args: argparse.Namespace) -> None:
        cls.current = cls(args)

    @classmethod
    def measure(cls, batch: list[Window]) -> dict[str, Quality]:
        worker = cls.current
        (results,) = measure(worker.backend, batch, worker.settings, batch_size=len(batch))
        return results


def measured(
    args: argparse.Namespace, texts: Sequence[Window]
) -> Iterator[tuple[int, dict[str, Quality]]]:
    """All results so far after each batch, with the number of windows in them."""
    batches = list(in_batches(texts, args.batch_size))
    done: dict[int, dict[str, Quality]] = {}
    with ProcessPoolExecutor(
        args.jobs, get_context("spawn"), initializer=Worker.start, initargs=(args,)
    ) as pool:
        tasks = {pool.submit(Worker.measure, batch): i for i, batch in enumerate(batches)}
        for task in as_completed(tasks):
            done[tasks[task]] = task.result()
            parts = [done[i] for i in sorted(done)]
            yield sum(len(p["dense"].nll) for p in parts), joined(parts)


def joined(parts: Sequence[dict[str, Quality]]) -> dict[str, Quality]:
    """The windows of all parts, in their order."""
    return {
        name: Quality(
            **{
                f.name: [v for p in parts for v in getattr(p[name], f.name)]
                for f in fields(Quality)
            }
        )
        for name in parts[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--backend", choices=("hf", "native"), default="hf")
    parser.add_argument("--dtype")
    parser.add_argument(
        "--clusters", help="cluster store; rules that need one are left out without"
    )
    parser.add_argument("--calibration", help="calibration store, likewise for rules and stand-ins")
    parser.add_argument("--rules", nargs="+", default=RULES + CONTROLS)
    parser.add_argument("--stand-ins", nargs="+", default=("none", *STAND_INS))
    parser.add_argument("--keeps", type=fractions, default=(0.2, 0.4, 0.6, 0.8))
    parser.add_argument("--dense-layers", type=layer_list, default=())
    add_window_options(parser)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, help="threads of each process")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    args = parser.parse_args()

    backend = opened(args, print)
    texts = read_windows(backend, args)
    about = provenance("benchmarks.quality")
    title = (
        f"# {backend.model_name} on {args.text.name}\n\n"
        f"{args.windows} windows of {args.prompt_tokens} + {args.continuation_tokens} tokens, "
        f"dense layers {list(args.dense_layers)}, {backend.name}, {backend.dtype}. The first "
        "token of a continuation comes from the dense prefill and is not measured. ± is the "
        "standard error over the windows; bytes count the stand-in.\n\n"
        f"`{about['command']}`\n\n"
    )
    for done, results in measured(args, texts):
        print(f"{done} of {len(texts)} windows", flush=True)
        rows = {
            name: {**q.summary(), "kl_per_window": q.kl, "nll_per_window": q.nll}
            for name, q in results.items()
        }
        write_json(args.out.with_suffix(".json"), {"about": about, "windows": done, "rows": rows})
        write_text(args.out.with_suffix(".md"), title + table(results))


if __name__ == "__main__":
    main()
