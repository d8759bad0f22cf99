"""Do prompts of similar meaning share core neurons? Overlap of core sets, as a plot and a CSV.

    python -m benchmarks.overlap --model smollm2-135m-instruct --prompts prompts.jsonl \\
        --out benchmarks/results/overlap-smollm2

The prompts (made by benchmarks.corpus) are cut to one length. Each pair of them is of the same
group (an article), of the same source (a kind of text), or of different sources; its overlap is
the mean Jaccard index over the layers, beside what two random sets of that size share. Every
pair's cosine in a sentence encoder's space says how similar the two are in meaning.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, median

import torch

from benchmarks.report import provenance, write_json, write_png
from coreinfer.api import in_batches, load
from coreinfer.backends.base import Backend
from coreinfer.core.measures import mean_overlap
from coreinfer.errors import UserError
from coreinfer.evaluation.overlap import core_sets
from coreinfer.files import replace_when_done
from coreinfer.jsonl import read_jsonl
from coreinfer.selectors import SELECTORS, Evidence
from coreinfer.semantics.encoders import SentenceEncoder

KINDS = ("same article", "same kind of text", "other kind of text")


@dataclass(frozen=True)
class Pair:
    kind: str
    cosine: float
    overlap: float


def read_prompts(
    path: Path, backend: Backend, tokens: int, per_group: int, groups: int
) -> tuple[list[dict[str, str]], list[list[int]]]:
    """At most `per_group` prompts of each of `groups` groups a source, cut to `tokens` tokens."""
    taken: dict[str, dict[str, int]] = {}
    rows, ids = [], []
    for _, row in read_jsonl(path, ["text", "source", "group"]):
        of_source = taken.setdefault(row["source"], {})
        if len(of_source) == groups and row["group"] not in of_source:
            continue
        if of_source.get(row["group"], 0) == per_group:
            continue
        prompt = list(backend.tokenizer(row["text"], verbose=False).input_ids)
        if len(prompt) >= tokens:
            of_source[row["group"]] = of_source.get(row["group"], 0) + 1
            rows.append(row)
            ids.append(prompt[:tokens])
    if len(ids) < 2:
        raise UserError(f"{str(path)!r} has {len(ids)} prompts of {tokens} tokens, 2 are needed")
    return rows, ids


def kind_of(a: dict[str, str], b: dict[str, str]) -> str:
    if a["source"] != b["source"]:
        return KINDS[2]
    # A source without groups says nothing of articles: each of its texts is one by itself.
    same = a["group"] == b["group"] and a["group"] != a["source"]
    return KINDS[0] if same else KINDS[1]


def no_norms(layer: int) -> torch.Tensor:
    raise AssertionError(f"the sentence encoder looks at no layer, not at {layer}")


def random_overlap(keep: float) -> float:
    """Expected Jaccard index of two random sets that keep this fraction."""
    return keep / (2 - keep)


def plot(pairs: list[Pair], keep: float, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    groups = [[p.overlap for p in pairs if p.kind == kind] for kind in KINDS]
    shown = [(kind, values) for kind, values in zip(KINDS, groups, strict=True) if values]
    left.boxplot([values for _, values in shown], whis=(5, 95), showfliers=False)
    left.set_xticks(range(1, len(shown) + 1), [f"{k}\n({len(v)} pairs)" for k, v in shown])
    left.set_ylabel("overlap of core sets (Jaccard, mean over layers)")
    for kind, marker in zip(KINDS, "ox+", strict=True):
        some = [p for p in pairs if p.kind == kind]
        right.scatter(
            [p.cosine for p in some],
            [p.overlap for p in some],
            s=12,
            marker=marker,
            alpha=0.5,
            label=kind,
        )
    right.set_xlabel("cosine of the two prompts (all-MiniLM-L6-v2)")
    for axes in (left, right):
        axes.axhline(random_overlap(keep), color="grey", linestyle=":", label="random sets")
    right.legend()
    figure.suptitle(title)
    write_png(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=100, help="length of every prompt")
    parser.add_argument("--groups", type=int, default=12, help="groups of each source")
    parser.add_argument("--per-group", type=int, default=3, help="prompts of each group")
    parser.add_argument("--selector", default="stability", choices=("stability", "impact"))
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    args = parser.parse_args()

    backend = load(args.model, backend="hf", on_progress=print).backend
    rows, ids = read_prompts(args.prompts, backend, args.tokens, args.per_group, args.groups)
    selector = SELECTORS[args.selector](beta=args.keep)
    sets = [one for batch in in_batches(ids, 8) for one in core_sets(backend, batch, selector)]
    texts = [str(backend.tokenizer.decode(prompt)) for prompt in ids]
    evidence = [Evidence(layers=(), column_norms=no_norms, text=text) for text in texts]
    vectors = torch.nn.functional.normalize(SentenceEncoder().encode(evidence), dim=-1)
    pairs = [
        Pair(
            kind_of(rows[a], rows[b]),
            float(vectors[a] @ vectors[b]),
            mean_overlap(sets[a].layers, sets[b].layers),
        )
        for a, b in combinations(range(len(rows)), 2)
    ]
    with replace_when_done(args.out.with_suffix(".csv")) as partial, partial.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "cosine", "overlap"])
        writer.writerows([p.kind, f"{p.cosine:.4f}", f"{p.overlap:.4f}"] for p in pairs)
    cosine = torch.tensor([p.cosine for p in pairs])
    shared = torch.tensor([p.overlap for p in pairs])
    summary = {
        "about": provenance("benchmarks.overlap"),
        "prompts": len(rows),
        "random": random_overlap(args.keep),
        "correlation_with_cosine": float(torch.corrcoef(torch.stack([cosine, shared]))[0, 1]),
        "kinds": {
            kind: {"pairs": len(values), "mean": fmean(values), "median": median(values)}
            for kind in KINDS
            if (values := [p.overlap for p in pairs if p.kind == kind])
        },
    }
    write_json(args.out.with_suffix(".json"), summary)
    title = f"{backend.model_name}, {args.selector}, keep {args.keep:g}, {args.tokens} tokens"
    plot(pairs, args.keep, title, args.out.with_suffix(".png"))
    print(summary)


if __name__ == "__main__":
    main()
