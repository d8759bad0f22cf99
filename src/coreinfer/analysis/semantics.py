"""Question 4: do prompts of similar meaning share core neurons? Layer by layer, for encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coreinfer.analysis.intervals import Estimate, pair_correlation
from coreinfer.analysis.materials import Materials
from coreinfer.analysis.question import Answer
from coreinfer.analysis.sections import Cell, Chart, Figure, Table
from coreinfer.analysis.settings import Settings
from coreinfer.api import in_batches
from coreinfer.core.coreset import CoreSet
from coreinfer.evaluation.overlap import pairwise_overlap, random_overlap
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.generation import prefill
from coreinfer.selectors import Evidence
from coreinfer.semantics.clustering import directions
from coreinfer.semantics.encoders import HiddenEncoder, SentenceEncoder

ALL, WITHIN = "all pairs", "pairs of one kind of text"
BINS = 8
METHOD = (
    "Prompts of one length and several kinds of text. For each pair of them the overlap (Jaccard) "
    "of their core sets, layer by layer, by the paper's rule and by impact, beside the cosine of "
    "their vectors by several encoders: a sentence encoder (all-MiniLM-L6-v2), TF-IDF, which sees "
    "words and no meaning, and the model's own mean hidden state before the first and before the "
    "middle MLP. The correlation is taken over all pairs, and over pairs of one kind of text "
    "alone, since texts of a kind share their words and their form too. Intervals: bootstrap over "
    "prompts, for pairs that share a prompt are not independent."
)


class Semantics:
    """Correlation of overlap with similarity, by layer, encoder and rule."""

    name: ClassVar[str] = "semantics"
    title: ClassVar[str] = "Semantic similarity against core-neuron overlap"
    needs_model: ClassVar[bool] = True
    needs_sources: ClassVar[int] = 2

    def windows(self, settings: Settings) -> Sequence[tuple[int, int]]:
        return [(settings.prompt_tokens, settings.continuation_tokens)]

    def ask(self, materials: Materials) -> Answer:
        s, backend = materials.settings, materials.backend
        windows = materials.windows(count=2 * s.windows)
        kinds = [name for name, texts in windows.items() for _ in texts]
        prompts = [w for texts in windows.values() for w in texts]
        rules = {
            rule: materials.setting(rule, dense_layers=()).selector
            for rule in ("stability", "impact")
        }
        plan = replace(RecordingPlan.of(rules["stability"]), input_sums=True)
        evidence: list[Evidence] = []
        sets: dict[str, list[CoreSet]] = {rule: [] for rule in rules}
        for batch in in_batches(prompts, s.batch_size):
            materials.on_progress(f"semantics: {len(evidence)} of {len(prompts)} prompts")
            read = prefill(backend, [w.prompt for w in batch], plan, [w.text for w in batch])
            evidence += read.session.evidence()
            for rule, selector in rules.items():
                chosen = read.fork().session.select(selector)
                sets[rule] += [choice.core_set for choice in chosen]
        similar = cosines(evidence, materials.num_layers)
        same = np.array([[a == b for b in kinds] for a in kinds])
        rows: list[dict[str, Cell]] = []
        curves: list[dict[str, Cell]] = []
        means: dict[tuple[str, str, str], Estimate] = {}
        for rule, of_rule in sets.items():
            overlaps = {
                layer: matrix.numpy()
                for layer, matrix in pairwise_overlap(
                    [one.layers for one in of_rule], of_rule[0].num_neurons
                ).items()
            }
            whole = np.mean(list(overlaps.values()), axis=0)
            for encoder, cosine in similar.items():
                for scope, pairs in ((ALL, None), (WITHIN, same)):
                    means[(rule, encoder, scope)] = pair_correlation(
                        cosine, whole, pairs, seed=s.seed
                    )
                    for layer, matrix in overlaps.items():
                        r = pair_correlation(cosine, matrix, pairs, seed=s.seed)
                        rows.append(
                            {"rule": rule, "pairs": scope, "panel": f"{rule}, {scope}",
                             "encoder": encoder, "layer": layer, **r.cells("r")}
                        )  # fmt: skip
                curves += binned(rule, encoder, cosine, whole)
        by_kind = kinds_table(sets["stability"], kinds)
        about = f"{len(prompts)} prompts of {s.prompt_tokens} tokens, keep {s.keep:g}"
        correlation = Table.of("correlation", f"Correlation by layer; {about}.", rows)
        shape = Table.of(
            "overlap-by-cosine",
            f"Mean overlap over the layers, of pairs in {BINS} equal parts by cosine; {about}.",
            curves,
        )
        summary = Table.of(
            "correlation-of-the-mean",
            "Correlation of the overlap that is averaged over the layers.",
            [
                {"rule": rule, "pairs": scope, "encoder": encoder, **r.cells("r")}
                for (rule, encoder, scope), r in means.items()
            ],
        )
        return Answer(
            METHOD,
            list(findings(means, by_kind, s.keep)),
            [
                Figure(correlation, Chart("lines", x="layer", y="r", series="encoder",
                                          panel="panel", low="r_low", high="r_high",
                                          y_label="Pearson's r", reference=("none", 0.0))),
                Figure(shape, Chart("lines", x="cosine", y="overlap", series="encoder",
                                    panel="rule", y_label="Jaccard, mean over layers",
                                    reference=("random sets", random_overlap(s.keep)))),
            ],
            [summary, by_kind],
        )  # fmt: skip


def cosines(evidence: Sequence[Evidence], num_layers: int) -> dict[str, NDArray[np.float64]]:
    """Cosines of each two prompts by each encoder, vectors seen from their mean: [n, n]."""
    middle = num_layers // 2
    vectors = {
        "MiniLM": SentenceEncoder().encode(evidence),
        "TF-IDF": tf_idf([evidence_.text or "" for evidence_ in evidence]),
        "hidden, layer 0": HiddenEncoder(0).encode(evidence),
        f"hidden, layer {middle}": HiddenEncoder(middle).encode(evidence),
    }
    found = {}
    for name, raw in vectors.items():
        units = directions(raw, raw.mean(dim=0))
        found[name] = (units @ units.T).double().numpy()
    return found


def tf_idf(texts: Sequence[str]) -> Tensor:
    """Word weights of each text, [n, words] float32."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Any run of letters or digits, so that no text is without a word.
    weights = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+|\S").fit_transform(texts)
    return torch.from_numpy(weights.toarray()).float()


def binned(
    rule: str, encoder: str, cosine: NDArray[np.float64], overlap: NDArray[np.float64]
) -> list[dict[str, Cell]]:
    """Pairs in equal parts by cosine: mean cosine and mean overlap of each."""
    i, j = np.triu_indices(len(cosine), k=1)
    order = np.argsort(cosine[i, j], kind="stable")
    return [
        {
            "rule": rule,
            "encoder": encoder,
            "cosine": float(cosine[i, j][part].mean()),
            "overlap": float(overlap[i, j][part].mean()),
            "pairs": len(part),
        }
        for part in np.array_split(order, BINS)
        if len(part)
    ]


def kinds_table(sets: Sequence[CoreSet], kinds: Sequence[str]) -> Table:
    """Mean overlap of prompts of each two kinds of text."""
    overlaps = pairwise_overlap([one.layers for one in sets], sets[0].num_neurons)
    whole = torch.stack(list(overlaps.values())).mean(dim=0)
    shared: dict[tuple[str, str], list[float]] = {}
    for i, a in enumerate(kinds):
        for j, b in enumerate(kinds[:i]):
            shared.setdefault((b, a), []).append(float(whole[i, j]))
    rows: list[dict[str, Cell]] = [
        {"kind": a, "other": b, "overlap": fmean(values), "pairs": len(values)}
        for (a, b), values in sorted(shared.items())
    ]
    return Table.of("overlap-by-kind", "Mean overlap by kinds of text, the paper's rule.", rows)


def findings(
    means: Mapping[tuple[str, str, str], Estimate], by_kind: Table, keep: float
) -> Iterator[str]:
    for (rule, encoder, scope), r in means.items():
        yield f"{rule}, {encoder}, {scope}: r = {r}."
    same: list[float] = []
    other: list[float] = []
    for a, b, value in zip(
        by_kind.column("kind"), by_kind.column("other"), by_kind.column("overlap"), strict=True
    ):
        (same if a == b else other).append(float(value or 0))
    yield (
        f"Overlap within a kind of text {fmean(same):.2f}, between kinds {fmean(other):.2f}, of "
        f"random sets {random_overlap(keep):.2f}."
    )
