"""What a ReLU model reads where neurons that are exactly zero are skipped, and what that costs.

    python -m benchmarks.relu --model opt-relu --text wikitext2_raw_test.txt \\
        --calibration STORE --keeps 0.75,0.8,0.85,0.9 --out benchmarks/results/calibration-relu

A kept neuron reads its row of fc1 for each token, and its column of fc2 only where it is not zero,
which is counted here at the tokens that are scored. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from benchmarks.report import markdown, provenance, write_json, write_text
from coreinfer.api import load
from coreinfer.backends.base import Phase
from coreinfer.backends.hf.session import HfBackend
from coreinfer.calibration.store import CalibrationStore
from coreinfer.cli.values import fractions
from coreinfer.core.measures import kl_by_token
from coreinfer.evaluation.continuations import Setting, standard_error, widest, windows
from coreinfer.runtime.generation import Prefilled, prefill
from coreinfer.selectors import Dense, Impact, Residual
from coreinfer.standins import Calibrated, Linear


@dataclass
class Row:
    """Of a setting, over the windows: KL to dense, and the share of the dense MLP bytes read."""

    kl: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)


class ActiveCount:
    """Counts the down columns that passes of the model need: activations that are not zero."""

    def __init__(self, backend: HfBackend) -> None:
        self._layers = backend.anatomy.layers
        self.columns = 0

    def watch(self, stack: ExitStack) -> None:
        for layer in self._layers:
            hook = layer.output.module.register_forward_pre_hook(self._count)
            stack.callback(hook.remove)

    def _count(self, _module: Any, args: tuple[Tensor, ...]) -> None:
        self.columns += int((args[0] != 0).sum())


def settings(
    keeps: Sequence[float], ranks: Sequence[int], store: CalibrationStore
) -> dict[str, Setting]:
    made = {"dense": Setting(Dense())}
    for keep in keeps:
        made[f"impact/none/{keep:g}"] = Setting(Impact(beta=keep))
        made[f"residual/none/{keep:g}"] = Setting(Residual(calibration=store, beta=keep))
        for rank in ranks:
            linear = Setting(Impact(beta=keep), Linear(rank=rank))
            made[f"impact/linear {rank}/{keep:g}"] = linear
            made[f"residual/calibrated {rank}/{keep:g}"] = Setting(
                Residual(calibration=store, beta=keep), Calibrated(calibration=store, rank=rank)
            )
    return made


def log_probabilities(read: Prefilled, tokens: Sequence[int]) -> Tensor:
    return read.session.decode([tokens], Phase.SCORE)[0].float().log_softmax(dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True, help="a plain text file")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--keeps", type=fractions, default=(0.75, 0.8, 0.85, 0.9))
    parser.add_argument("--ranks", type=int, nargs="+", default=(16, 32))
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    args = parser.parse_args()

    backend = load(args.model, backend="hf", threads=args.threads, on_progress=print).backend
    assert isinstance(backend, HfBackend)
    text = args.text.read_text(encoding="utf-8")
    texts = windows(backend, text, count=args.windows, prompt_tokens=200, continuation_tokens=60)
    made = settings(args.keeps, args.ranks, CalibrationStore.load(args.calibration))
    rows = {name: Row() for name in made}
    cost = backend.cost
    count = ActiveCount(backend)
    # fc1's row has a bias, fc2's column none.
    element = backend.model.dtype.itemsize
    column = backend.anatomy.layers[0].hidden_size * element
    for window in texts:
        read = prefill(backend, [window.prompt], widest(made.values()))
        fed = window.continuation[:-1]
        dense: Tensor | None = None
        for name, setting in made.items():
            fork = read.fork()
            (choice,) = fork.session.select(setting.selector, setting.stand_in)
            with ExitStack() as stack:
                count.watch(stack)
                count.columns = 0
                sparse = log_probabilities(fork, fed)
            dense = sparse if dense is None else dense
            rows[name].kl.append(float(kl_by_token(dense, sparse).double().mean()))
            kept = sum(
                (size - column) * choice.core_set.kept(layer)
                for layer, size in enumerate(cost.per_neuron)
            )
            columns = column * count.columns / len(fed)
            rows[name].share.append((kept + columns + choice.stand_in_bytes) / cost.mlp)
    about = provenance("benchmarks.relu")
    lines = [["rule", "stand-in", "keep", "MLP bytes / dense", "KL to dense"]]
    for name, row in rows.items():
        rule, stand_in, keep = name.split("/") if name != "dense" else ("dense", "", "1")
        kl_text = f"{fmean(row.kl):.4f} ± {standard_error(row.kl):.4f}"
        lines.append([rule, stand_in, keep, f"{fmean(row.share):.3f}", kl_text])
    title = (
        f"# Skipped zeros: {backend.model_name} on {args.text.name}\n\n{args.windows} windows of "
        "200 + 60 tokens, no layer dense; bytes of the MLPs and of the stand-ins, without the "
        f"columns of neurons that are exactly zero.\n\n`{about['command']}`\n\n"
    )
    data = {name: vars(row) for name, row in rows.items()}
    write_json(args.out.with_suffix(".json"), {"about": about, "rows": data})
    write_text(args.out.with_suffix(".md"), title + markdown(lines))


if __name__ == "__main__":
    main()
