"""Small corpora about different things, and builds of stores from them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coreinfer.backends.base import Backend
from coreinfer.building.clusters import build_clusters
from coreinfer.jsonl import refuse
from coreinfer.semantics.encoders import HiddenEncoder
from coreinfer.semantics.store import ClusterStore

# No letter is in two subjects, so that a random byte-level model can tell them apart.
SUBJECTS = (("abc", "cab", "bb"), ("xyz", "zyx", "yy"), ("123", "321", "22"))


def documents(count: int = 30, *, seed: int = 0, words: tuple[int, int] = (2, 12)) -> list[str]:
    """Documents whose subjects go round; lengths vary."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(SUBJECTS[i % len(SUBJECTS)], k=draw.randint(*words)))
        for i in range(count)
    ]


def write_corpus(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def build(backend: Backend, corpus: Path, out: Path, **options: Any) -> ClusterStore:
    """A store, with the settings of most tests."""
    settings = {
        "encoder": HiddenEncoder(1),
        "alpha": 0.4,
        "k": 3,
        "on_skip": refuse,
        "progress": False,
        "checkpoint_seconds": 0.0,
    }
    return build_clusters(backend, corpus, out, **{**settings, **options})
