"""Question 2: stability-guided, similarity-guided and auto by prompt length and by coherence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from coreinfer.analysis.disturbances import mixed, shuffled_sentences
from coreinfer.analysis.intervals import difference
from coreinfer.analysis.materials import Materials
from coreinfer.analysis.question import Answer
from coreinfer.analysis.sections import Cell, Chart, Figure, Table
from coreinfer.analysis.settings import Settings
from coreinfer.analysis.texts import ending, window_of
from coreinfer.evaluation.continuations import Quality, Window, encoded_prefix

RULES = ("stability", "similarity", "auto", "static", "impact")
PIECES = 4  # topics of a mixed prompt, where there are so many windows
METHOD = (
    "The same continuations after prompts of different lengths, each the text that stands before "
    "them; then after prompts of one length that were made less coherent. KL is taken between "
    "dense and sparse decoding after the same prompt, so it says what sparsity costs there, not "
    "what the prompt is worth. All rules keep the same number of neurons, but the one that skips "
    "half of them at each token: it keeps more, to read the same bytes."
)


class PromptLength:
    """KL of the rules over prompt lengths, and over kinds of incoherence."""

    name: ClassVar[str] = "prompt-length"
    title: ClassVar[str] = "Stability-guided, similarity-guided or auto, by length and coherence"
    needs_model: ClassVar[bool] = True
    needs_sources: ClassVar[int] = 1

    def windows(self, settings: Settings) -> Sequence[tuple[int, int]]:
        return [(max(*settings.lengths, settings.prompt_tokens), settings.continuation_tokens)]

    def ask(self, materials: Materials) -> Answer:
        s = materials.settings
        longest = materials.interleaved(prompt_tokens=max(*s.lengths, s.prompt_tokens))
        by_length: dict[Cell, dict[str, Quality]] = {}
        for length in s.lengths:
            materials.on_progress(f"prompt-length: {length} tokens")
            by_length[length] = self._measure(
                materials, [ending(materials.backend, w, length) for w in longest]
            )
        by_kind: dict[Cell, dict[str, Quality]] = {}
        for kind, windows in kinds(materials, longest).items():
            materials.on_progress(f"prompt-length: {kind}")
            by_kind[kind] = self._measure(materials, windows)
        about = f"{len(longest)} windows, keep {s.keep:g}"
        lengths = Table.of(
            "lengths",
            f"KL to dense by prompt length; {about}.",
            materials.rows("tokens", by_length),
        )
        coherence = Table.of(
            "coherence",
            f"KL to dense by what was done to prompts of {s.prompt_tokens} tokens; {about}.",
            materials.rows("prompt", by_kind),
        )
        drawn: Any = {"y": "kl", "series": "rule", "low": "kl_low", "high": "kl_high"}
        return Answer(
            METHOD,
            [*findings(by_length, "{} tokens"), *findings(by_kind, "{}")],
            [
                Figure(
                    lengths,
                    Chart("lines", x="tokens", x_label="prompt tokens", log_x=True,
                          y_label="KL to dense, nats", **drawn),
                ),
                Figure(
                    coherence, Chart("bars", x="prompt", y_label="KL to dense, nats", **drawn)
                ),
            ],
        )  # fmt: skip

    def _measure(self, materials: Materials, windows: list[Window]) -> dict[str, Quality]:
        settings = materials.rules(RULES)
        settings["auto, choice"] = materials.setting("auto", mode="choice")
        measured = materials.measure(windows, settings)
        return {rule: measured[rule] for rule in settings}


def kinds(materials: Materials, longest: list[Window]) -> dict[str, list[Window]]:
    """The same prompts whole, with their sentences shuffled, mixed with others, and one word."""
    backend, s = materials.backend, materials.settings
    whole = [ending(backend, w, s.prompt_tokens) for w in longest]
    shuffled = [
        window_of(backend, shuffled_sentences(w.text, s.seed + i), s.prompt_tokens, w.continuation)
        for i, w in enumerate(whole)
    ]
    pieces = min(PIECES, len(whole))
    blend = [
        Window(w.prompt, w.continuation, str(backend.tokenizer.decode(w.prompt)))
        for w in mixed(whole, pieces, len(encoded_prefix(backend)))
    ]
    words = [
        window_of(backend, w.text.split()[-1] if w.text.split() else w.text, s.prompt_tokens,
                  w.continuation)
        for w in whole
    ]  # fmt: skip
    return {
        "as it is": whole,
        "sentences shuffled": shuffled,
        f"{pieces} topics mixed": blend,
        "a single word": words,
    }


def findings(results: Mapping[Cell, Mapping[str, Quality]], how: str) -> Iterator[str]:
    """Paired differences to the stability rule; negative is better than it."""
    for key, by_rule in results.items():
        leads = ", ".join(
            f"{rule} {difference(by_rule[rule].kl, by_rule['stability'].kl)}"
            for rule in by_rule
            if rule != "stability"
        )
        yield f"{how.format(key)}: KL less that of stability, on the same windows: {leads}."
