"""What a question is asked of: a model, texts, and cluster stores made from other texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from coreinfer.analysis.intervals import mean
from coreinfer.analysis.sections import Cell
from coreinfer.analysis.settings import Settings
from coreinfer.analysis.texts import Source
from coreinfer.backends.base import Backend
from coreinfer.building.clusters import build_clusters
from coreinfer.calibration.store import CalibrationStore
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Quality, Setting, Window, measure
from coreinfer.files import replace_when_done
from coreinfer.selectors import SELECTORS
from coreinfer.semantics.encoders import default_encoder, encoder_named
from coreinfer.semantics.store import ClusterStore
from coreinfer.standins import STAND_INS

ALPHA = 0.4  # of the counts where alpha is not what is varied
CALIBRATED = "residual+calibrated"
HALF_ACTIVE = "impact, half active"  # which keeps more neurons, for the same bytes


@dataclass(frozen=True)
class Materials:
    """What a question is asked of.

    Attributes:
        load: gives the model; called when it is first needed.
        sources: texts; windows come from their first halves, cluster stores from their second.
        settings: how much is measured.
        work: folder for cluster stores that are made on the way.
        clusters: the model's cluster store, where the user has one.
        calibration: its calibration, where the user has one.
        on_progress: told what is going on.
    """

    load: Callable[[], Backend]
    sources: tuple[Source, ...]
    settings: Settings
    work: Path
    clusters: ClusterStore | None = None
    calibration: CalibrationStore | None = None
    on_progress: Callable[[str], None] = lambda _line: None

    @cached_property
    def backend(self) -> Backend:
        return self.load()

    @property
    def num_layers(self) -> int:
        return len(self.backend.cost.num_neurons)

    @property
    def sparse_layers(self) -> list[int]:
        return [i for i in range(self.num_layers) if i not in self.settings.dense_layers]

    def windows(
        self, prompt_tokens: int | None = None, continuation_tokens: int | None = None,
        count: int | None = None,
    ) -> dict[str, list[Window]]:  # fmt: skip
        """Windows of each source, from its first half; sizes are those of the settings.

        Raises:
            UserError: where a source has too little text.
        """
        s = self.settings
        prompt = prompt_tokens or s.prompt_tokens
        continuation = continuation_tokens or s.continuation_tokens
        return {
            source.name: source.half(0).windows(
                self.backend, count or s.windows, prompt, continuation
            )
            for source in self.sources
        }

    def interleaved(
        self, prompt_tokens: int | None = None, continuation_tokens: int | None = None
    ) -> list[Window]:
        """`settings.windows` windows in all, the sources in turn, so that neighbours differ."""
        share = -(-self.settings.windows // max(len(self.sources), 1))
        by_source = self.windows(prompt_tokens, continuation_tokens, max(share, 2)).values()
        turns = [window for turn in zip(*by_source, strict=True) for window in turn]
        return turns[: max(self.settings.windows, len(self.sources))]

    @cached_property
    def store(self) -> ClusterStore:
        """The user's cluster store, or one of all sources' second halves."""
        return self.clusters or self.make_store(ALPHA, self.sources)

    def make_store(self, alpha: float, sources: Sequence[Source]) -> ClusterStore:
        """A cluster store of the second halves of some sources; made once for the same settings.

        Raises:
            UserError: if it cannot be written.
        """
        documents = [text for source in sources for text in self._documents(source, len(sources))]
        about = {
            "model": self.backend.fingerprint,
            "backend": [self.backend.name, self.backend.dtype],
            "alpha": alpha,
            "tokens": self.settings.document_tokens,
            "encoder": default_encoder(),
            "seed": self.settings.seed,
            "documents": documents,
        }
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        folder = self.work / "stores"
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / name
        if not out.exists():
            told = " and ".join(source.name for source in sources)
            self.on_progress(f"a cluster store of {told}, alpha {alpha:g}")
            corpus = folder / f"{name}.jsonl"
            with replace_when_done(corpus) as partial:
                lines = [json.dumps({"text": text}) + "\n" for text in documents]
                partial.write_text("".join(lines), encoding="utf-8")
            build_clusters(
                self.backend, corpus, out, alpha=alpha, seed=self.settings.seed,
                encoder=encoder_named(default_encoder(), self.num_layers),
                max_tokens=self.settings.document_tokens, batch_size=self.settings.batch_size,
                on_skip=self.on_progress, progress=False,
            )  # fmt: skip
        return ClusterStore.load(out)

    def _documents(self, source: Source, sources: int) -> list[str]:
        texts = source.half(1).paragraphs()
        if not texts:
            raise UserError(f"{source.name} has no paragraph in its second half")
        count = min(len(texts), max(2, self.settings.corpus_documents // sources))
        return [texts[i * len(texts) // count] for i in range(count)]

    def rules(self, names: Sequence[str]) -> dict[str, Setting]:
        """Rules by name, as `setting` takes them; then `impact` with half of its core neurons
        skipped at each token, and with a calibration its own rule and stand-in."""
        made = {name: self.setting(name, store=self.store) for name in names}
        made[HALF_ACTIVE] = self.setting(
            "impact", store=self.store, keep=self._keep_of_bytes(0.5), active=0.5
        )
        if self.calibration is not None:
            made[CALIBRATED] = self.setting(CALIBRATED, store=self.store)
        return made

    def _keep_of_bytes(self, active: float) -> float:
        """The keep that, with so much of it active, reads the bytes of the settings' keep."""
        cost, layer = self.backend.cost, next(iter(self.sparse_layers), 0)
        return min(self.settings.keep * cost.per_neuron[layer] / cost.neuron(layer, active), 1.0)

    def setting(
        self, name: str, keep: float | None = None, store: ClusterStore | None = None, **more: Any
    ) -> Setting:
        """A rule by name, "impact", or with a stand-in, "impact+linear".

        Args:
            name: of the rule.
            keep: that of the settings unless given.
            store: the cluster store to use; the materials' own unless given.
            more: further options of the rule.
        """
        rule_name, _, stand_in = name.partition("+")
        rule = SELECTORS[rule_name]
        takes = {field.name for field in fields(rule)}
        options: dict[str, Any] = {
            rule.keep_name: keep or self.settings.keep,
            "dense_layers": self.settings.dense_layers,
            **more,
        }
        if "clusters" in takes:
            options["clusters"] = store or self.store
        elif "alpha" in takes:
            # What is measured together shares one prefill, so one alpha.
            options.setdefault("alpha", store.alpha if store else ALPHA)
        if "seed" in takes:
            options.setdefault("seed", self.settings.seed)
        if "calibration" in takes:
            options["calibration"] = self.calibration
        if not stand_in:
            return Setting(rule(**options))
        calibrated = {"calibration": self.calibration} if stand_in == "calibrated" else {}
        return Setting(rule(**options), STAND_INS[stand_in](**calibrated))

    def measure(
        self, windows: Sequence[Window], settings: Mapping[str, Setting]
    ) -> dict[str, Quality]:
        """`evaluation.continuations.measure`, to its end; "dense" is among the results."""
        size = self.settings.batch_size
        *_, results = measure(self.backend, windows, settings, batch_size=size)
        return results

    def cells(self, quality: Quality) -> dict[str, Cell]:
        """A result as columns: KL with its interval, agreement, perplexity, what is read."""
        summary = quality.summary()
        return {
            **mean(quality.kl).cells("kl"),
            "agreement": summary["agreement"],
            "perplexity": summary["perplexity"],
            "density": summary["density"],
            "bytes_of_dense": summary["bytes_per_token"] / self.backend.cost.dense,
            "windows": len(quality.kl),
        }

    def rows(
        self, name: str, results: Mapping[Cell, Mapping[str, Quality]]
    ) -> list[dict[str, Cell]]:
        """A row for each rule at each value of what is varied, which is called `name`."""
        return [
            {name: key, "rule": rule, **self.cells(quality)}
            for key, by_rule in results.items()
            for rule, quality in by_rule.items()
        ]
