"""What squad.yaml and xsum.yaml are scored by; the metrics are those of reference packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def squad(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 against the best of the answers, 0 to 1."""
    from torchmetrics.functional.text import squad as squad_scores

    scores = squad_scores(
        {"prediction_text": results[0].strip(), "id": "0"},
        {"answers": {"text": list(doc["answers"]["text"]), "answer_start": [0]}, "id": "0"},
    )
    return {name: float(scores[name]) / 100 for name in ("exact_match", "f1")}


def rouge(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measures with stemming, 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scores = RougeScorer(names, use_stemmer=True).score(doc["summary"], results[0].strip())
    return {name: scores[name].fmeasure for name in names}
