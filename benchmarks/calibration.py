"""Calibrated decoding at the bytes of plain dropping: by store, by rank, beside the other rules.

    python -m benchmarks.calibration --model smollm2-135m-instruct --text wikitext2_raw_test.txt \\
        --stores mixed=STORE science=OTHER --ranks 64,128 --keep 0.5 --dense-layers 0-2,28-29 \\
        --out benchmarks/results/calibration-smollm2

Every row reads at most the bytes of plain dropping at `--keep`: a stand-in's maps are paid for by
keeping fewer neurons, and where only `--active` of them are computed whole more are kept: so many
that the bytes are used up, by what is read on the first windows, with `--fill`. With
`--descend FILE` there are also budgets by descent, as `tune` makes them, on windows of another text
or of a corpus (`.jsonl`); what they were weighed by is kept in OUT.descent.jsonl. Writes OUT.json
(every number, a window each) and OUT.md (the table).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.models import opened
from benchmarks.report import markdown, provenance, write_json, write_text
from benchmarks.texts import add_window_options, read_windows
from coreinfer.backends.base import Backend
from coreinfer.calibration.store import CalibrationStore
from coreinfer.cli.values import fractions, layer_list, whole_numbers
from coreinfer.evaluation.continuations import Quality, Setting, Window, measure, windows
from coreinfer.journal import Journal
from coreinfer.jsonl import read_text
from coreinfer.runtime.stores import Stores
from coreinfer.selectors import Impact, Residual, Stability
from coreinfer.standins import Calibrated, Linear
from coreinfer.tuning.budgets import Curve, allocate
from coreinfer.tuning.design import Design, Planner, Profile
from coreinfer.tuning.goal import Goal
from coreinfer.tuning.objective import WINDOWS_A_STEP, Objective
from coreinfer.tuning.pools import Pool, Processes
from coreinfer.tuning.prices import Prices
from coreinfer.tuning.tuner import DESCENT, Tuner
from coreinfer.tuning.work import WorkerSpec

FILLED_ON = 8  # windows, of which it is asked what is read


@dataclass(frozen=True)
class Limit:
    """What every row may read: the bytes of plain dropping.

    Attributes:
        prices: of neurons and stand-ins.
        keep: of the layers that are not dense; dense: those that are.
    """

    prices: Prices
    keep: float
    dense: tuple[int, ...]

    def keep_beside(self, rank: int, active: float = 1.0) -> float:
        """The keep of a layer that, with a map of this rank and its offset, and `active` of its
        neurons computed whole, reads no more bytes."""
        prices, neurons = self.prices, self.prices.cost.num_neurons[0]
        left = round(self.keep * neurons) * prices.cost.per_neuron[0]
        left -= prices.stand_in("linear", {"rank": rank})
        return min(max(left // prices.neuron(0, active), 1) / neurons, 1.0)

    @property
    def share(self) -> float:
        """Of the dense MLPs' bytes."""
        layers = len(self.prices.cost.num_neurons)
        return (self.keep * (layers - len(self.dense)) + len(self.dense)) / layers

    def filled(self, backend: Backend, texts: Sequence[Window], setting: Setting) -> Limit:
        """One for planning with, so that what a setting reads of these texts uses up the bytes.

        More are planned for than are read where core neurons are skipped.
        """
        cost = self.prices.cost
        *_, last = measure(backend, texts, {"planned": setting})
        read = fmean(last["planned"].bytes_per_token) - cost.shared
        return replace(self, keep=self.keep * self.share * cost.mlp / read)


Plan = Callable[[Limit], Setting]


@dataclass(frozen=True)
class Way:
    """How the calibrated stand-in is used: its rank, how many core neurons are active, and whether
    it is fitted to the others of them as well."""

    rank: int
    active: float = 1.0
    fit_skipped: bool = False

    @property
    def fit(self) -> dict[str, Any]:
        """Its options."""
        return {"rank": self.rank} | ({"fit_skipped": True} if self.fit_skipped else {})

    def __str__(self) -> str:
        skipping = "" if self.active == 1 else f", active {self.active:g}"
        return f"calibrated {self.rank}{skipping}{' fitted' if self.fit_skipped else ''}"


def baselines(limit: Limit, actives: Sequence[float]) -> dict[str, Setting]:
    keep, dense, lower = limit.keep, limit.dense, limit.keep_beside(Linear().rank)
    made = {
        "stability": Setting(Stability(beta=keep, dense_layers=dense)),
        "impact": Setting(Impact(beta=keep, dense_layers=dense)),
        "impact, linear": Setting(Impact(beta=lower, dense_layers=dense), Linear()),
    }
    for active in actives:
        if active == 1:
            continue
        more = Impact(beta=limit.keep_beside(0, active), dense_layers=dense, active=active)
        made[f"impact, active {active:g}"] = Setting(more)
        paid = replace(more, beta=limit.keep_beside(Linear().rank, active))
        made[f"impact, linear, active {active:g}"] = Setting(paid, Linear())
    return made


def calibrated(store: CalibrationStore, ways: Sequence[Way]) -> dict[str, Plan]:
    rules = ("residual", "impact", "residual by layer")
    return {
        f"{rule}, {way}": partial(_calibrated, rule, store, way) for way in ways for rule in rules
    }


def _calibrated(rule: str, store: CalibrationStore, way: Way, limit: Limit) -> Setting:
    lower = limit.keep_beside(way.rank, way.active)
    stand_in = Calibrated(calibration=store, **way.fit)
    if rule == "impact":
        return Setting(Impact(beta=lower, dense_layers=limit.dense, active=way.active), stand_in)
    made = Residual(calibration=store, beta=lower, dense_layers=limit.dense, active=way.active)
    if rule == "residual by layer":
        made = replace(made, budgets=half_way(store, lower, limit.dense))
    return Setting(made, stand_in)


@dataclass(frozen=True)
class Descent:
    """What budgets descend on."""

    pool: Pool
    texts: Sequence[Window]
    steps: int
    journal: Journal

    def plans(self, store: CalibrationStore, ways: Sequence[Way], limit: Limit) -> dict[str, Plan]:
        """Budgets within the limit, for each way to use the stand-in."""
        stores, about = Stores({}, {"calibration": store}), store.describe()
        planner = Planner(limit.prices, store.layer_errors)
        objective = Objective(self.pool, {DESCENT: self.texts}, self.journal, stores, about=about)
        tuner = Tuner(Goal.of_bytes(limit.share), planner, objective)
        profile = ends(limit.dense, store.num_layers)
        made: dict[str, Plan] = {}

        def plan(design: Design, within: Limit) -> Setting:
            return planner.candidate(design, within.share).setting(stores)

        for way in ways:
            rule = {} if way.active == 1 else {"active": way.active}
            start = Design("residual", rule, "calibrated", way.fit, profile)
            found = tuner.descended(start, limit.share, self.steps)
            made[f"residual by descent, {way}"] = partial(plan, found)
        return made


def ends(dense: tuple[int, ...], layers: int) -> Profile:
    """Raises ValueError where the dense layers are not at the ends of the model."""
    first = next((n for n in range(layers) if n not in dense), layers)
    profile = Profile(first=first, last=len(dense) - first, spread=0.5)
    if sorted(dense) != [*range(first), *range(layers - profile.last, layers)]:
        raise ValueError(f"budgets descend between dense ends, got dense layers {dense}")
    return profile


def half_way(store: CalibrationStore, keep: float, dense: tuple[int, ...]) -> dict[int, float]:
    """Budgets of the same bytes, half way from equal ones to those of least error in total."""
    errors = store.layer_errors
    sparse = [layer for layer in range(store.num_layers) if layer not in dense]
    curves = [
        Curve(errors.keeps, tuple(errors.errors[layer].tolist())).smooth() for layer in sparse
    ]
    shares = allocate(curves, keep * len(sparse))
    return {
        layer: min((keep + share) / 2, 1.0) for layer, share in zip(sparse, shares, strict=True)
    }


def rows_of(
    backend: Backend, texts: Sequence[Window], args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Quality]]]:
    """The results of the other rules, then of each store."""
    limit = Limit(Prices.of(backend, texts[0]), args.keep, args.dense_layers)
    ways = [
        Way(rank, active, args.fit_skipped and active < 1)
        for rank in args.ranks
        for active in args.active
    ]
    if not args.no_baselines:
        others = baselines(limit, args.active)
        *_, last = measure(backend, texts, others, batch_size=args.batch_size)
        yield "", last
    for name, path in args.stores:
        store = CalibrationStore.load(path)
        plans = calibrated(store, ways)
        if args.residual_alone:
            plans = {key: plan for key, plan in plans.items() if key.startswith("residual,")}
        if args.descend is not None:
            with descent_of(backend, path, args) as descent:
                plans |= descent.plans(store, ways, limit)
        settings = {key: plan(limit) for key, plan in plans.items()}
        if args.fill:
            for key, setting in settings.items():
                if setting.selector.skips:
                    settings[key] = plans[key](limit.filled(backend, texts[:FILLED_ON], setting))
        *_, last = measure(backend, texts, settings, batch_size=args.batch_size)
        yield name, last


@contextmanager
def descent_of(backend: Backend, store: str, args: argparse.Namespace) -> Iterator[Descent]:
    """Processes that weigh neurons on the text of `--descend`."""
    text = read_text(args.descend)
    if args.descend.suffix == ".jsonl":
        text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines())
    texts = windows(
        backend,
        text,
        count=args.steps * WINDOWS_A_STEP,
        prompt_tokens=args.prompt_tokens,
        continuation_tokens=args.continuation_tokens,
    )
    random.Random(0).shuffle(texts)  # neighbours are alike
    spec = WorkerSpec(args.model, "hf", threads=1, stores={"calibration": store})
    pool = Processes(spec, args.jobs)
    try:
        yield Descent(pool, texts, args.steps, Journal(args.out.with_suffix(".descent.jsonl")))
    finally:
        pool.close()


def table(found: dict[str, dict[str, Quality]]) -> str:
    """A row a setting; KL with the standard error over the windows."""
    rows = [
        ["store", "rule, stand-in", "density", "bytes/dense", "perplexity", "of dense",
         "KL to dense", "top-1"]
    ]  # fmt: skip
    reference = next(iter(found.values()))["dense"]
    dense = reference.summary()
    rows.append(["", "dense", "1.000", "1.000", f"{dense['perplexity']:.1f}", "1", "0", "1"])
    by_perplexity = Goal("ppl")
    for store, results in found.items():
        for name, quality in results.items():
            if name == "dense":
                continue
            s = quality.summary()
            share = s["bytes_per_token"] / dense["bytes_per_token"]
            rise = by_perplexity.loss(quality, reference)
            rows.append(
                [
                    store,
                    name,
                    f"{s['density']:.3f}",
                    f"{share:.3f}",
                    f"{s['perplexity']:.1f}",
                    f"{1 + rise.mean:.3f} ± {rise.error:.3f}",
                    f"{s['kl']:.3f} ± {s['kl_se']:.3f}",
                    f"{s['agreement']:.3f}",
                ]
            )
    return markdown(rows)


def named_path(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"expected NAME=STORE, got {text!r}")
    return name, path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--stores", type=named_path, nargs="+", required=True, metavar="NAME=STORE")
    parser.add_argument("--ranks", type=whole_numbers, default=(64,), help="of the stand-in")
    parser.add_argument("--active", type=fractions, default=(1.0,), help="of the core neurons")
    parser.add_argument("--fit-skipped", action="store_true", help="the stand-in, to these too")
    parser.add_argument("--fill", action="store_true", help="use up the bytes where neurons skip")
    parser.add_argument("--keep", type=float, default=0.5, help="whose bytes every row may read")
    parser.add_argument("--dense-layers", type=layer_list, default=())
    parser.add_argument("--backend", choices=("native", "hf"), default="native")
    parser.add_argument("--dtype")
    parser.add_argument("--no-baselines", action="store_true", help="the stores alone")
    parser.add_argument("--residual-alone", action="store_true", help="equal budgets, no impact")
    parser.add_argument("--descend", type=Path, metavar="FILE", help="text that budgets descend on")
    parser.add_argument("--steps", type=int, default=40, help="of the descent")
    parser.add_argument("--jobs", type=int, default=1, help="processes for the descent")
    add_window_options(parser)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    args = parser.parse_args()

    backend = opened(args, print)
    texts = read_windows(backend, args)
    about = provenance("benchmarks.calibration")
    title = (
        f"# Calibrated decoding: {backend.model_name} on {args.text.name}\n\n"
        f"{args.windows} windows of {args.prompt_tokens} + {args.continuation_tokens} tokens, "
        f"dense layers {list(args.dense_layers)}, at the bytes of plain dropping at keep "
        f"{args.keep:g}; {backend.name}, {backend.dtype}. "
        "± is the standard error over the windows.\n\n"
        f"`{about['command']}`\n\n"
    )
    found: dict[str, dict[str, Quality]] = {}
    for store, results in rows_of(backend, texts, args):
        found[store] = results
        print(f"{store or 'other rules'}: done", flush=True)
        rows = {
            f"{store}: {name}" if store else name: {
                **q.summary(),
                "kl_per_window": q.kl,
                "nll_per_window": q.nll,
            }
            for store, each in found.items()
            for name, q in each.items()
        }
        write_json(args.out.with_suffix(".json"), {"about": about, "rows": rows})
        write_text(args.out.with_suffix(".md"), title + table(found))


if __name__ == "__main__":
    main()
