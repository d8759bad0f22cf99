"""How soon is a prompt's core set known? Overlap with the final set against prompt length.

    python -m benchmarks.stability --model smollm2-135m-instruct --text wikitext2_raw_test.txt \\
        --out benchmarks/results/stability-smollm2

For each of many passages the core set after n tokens is compared with the set of the whole
passage, and with that of the next tokens alone, which is what decoding will need.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from statistics import fmean, quantiles

from benchmarks.report import provenance, write_json, write_png
from coreinfer.api import load
from coreinfer.core.measures import mean_overlap, stability_curve
from coreinfer.evaluation.continuations import windows
from coreinfer.evaluation.overlap import core_sets, growing_sets
from coreinfer.files import replace_when_done
from coreinfer.selectors import SELECTORS

LENGTHS = (4, 8, 16, 32, 64, 128, 256, 384, 512)
WITH_WHOLE, WITH_NEXT = "the whole prompt's set", "the set of the 64 tokens that follow"


def plot(curves: dict[str, dict[str, dict[int, list[float]]]], title: str, path: Path) -> None:
    """curves: what is compared with -> rule -> length -> values."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(11, 4.5), sharey=True, squeeze=False)
    for panel, (target, rules) in zip(axes[0], curves.items(), strict=True):
        for (rule, points), style in zip(rules.items(), ("-o", "--s", ":^"), strict=False):
            xs = list(points)
            panel.plot(xs, [fmean(v) for v in points.values()], style, label=rule)
            bands = [quantiles(v, n=10) if len(v) > 1 else [v[0]] * 9 for v in points.values()]
            panel.fill_between(xs, [b[0] for b in bands], [b[-1] for b in bands], alpha=0.15)
        panel.set_xscale("log", base=2)
        panel.set_xticks(xs, [str(x) for x in xs])
        panel.set_xlabel("tokens read")
        panel.set_title(f"overlap with {target}", fontsize=10)
        panel.legend()
    axes[0][0].set_ylabel("Jaccard, mean over layers (band: 10 to 90 % of passages)")
    figure.suptitle(title)
    write_png(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512, help="length of a passage")
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    args = parser.parse_args()

    backend = load(args.model, backend="hf", on_progress=print).backend
    lengths = [n for n in LENGTHS if n < args.tokens] + [args.tokens]
    texts = windows(
        backend,
        args.text.read_text(encoding="utf-8"),
        count=args.passages,
        prompt_tokens=args.tokens,
        continuation_tokens=64,
    )
    curves: dict[str, dict[str, dict[int, list[float]]]] = {WITH_WHOLE: {}, WITH_NEXT: {}}
    for rule in ("stability", "impact"):
        selector = SELECTORS[rule](beta=args.keep)
        for target in curves:
            curves[target][rule] = {n: [] for n in lengths}
        for number, text in enumerate(texts, start=1):
            sets = growing_sets(backend, text.prompt, lengths, selector)
            (following,) = core_sets(backend, [text.continuation], selector)
            for n, one, shared in zip(lengths, sets, stability_curve(sets), strict=True):
                curves[WITH_WHOLE][rule][n].append(shared)
                curves[WITH_NEXT][rule][n].append(mean_overlap(one.layers, following.layers))
            print(f"{rule}: {number} of {len(texts)} passages", flush=True)
    with replace_when_done(args.out.with_suffix(".csv")) as partial, partial.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["compared with", "rule", "tokens", "passage", "overlap"])
        for target, rules in curves.items():
            for rule, points in rules.items():
                for n, values in points.items():
                    writer.writerows([target, rule, n, i, f"{v:.4f}"] for i, v in enumerate(values))
    means = {
        target: {rule: {str(n): fmean(v) for n, v in points.items()} for rule, points in r.items()}
        for target, r in curves.items()
    }
    write_json(
        args.out.with_suffix(".json"),
        {
            "about": provenance("benchmarks.stability"),
            "random": args.keep / (2 - args.keep),
            "means": means,
        },
    )
    plot(curves, f"{backend.model_name}, keep {args.keep:g}", args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
