"""What a question is: a name, and a way to answer it from materials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from coreinfer.analysis.materials import Materials
from coreinfer.analysis.sections import Figure, Table
from coreinfer.analysis.settings import Settings


@dataclass(frozen=True)
class Answer:
    """What a question found: see `sections.Section`, which adds what was asked of what."""

    method: str
    findings: Sequence[str]
    figures: Sequence[Figure] = field(default_factory=tuple)
    tables: Sequence[Table] = field(default_factory=tuple)


class Question(Protocol):
    """One question, one file.

    Attributes:
        name: what the command line calls it.
        title: the question in words.
        needs_model: whether it is asked of a language model, each in turn, or once.
        needs_sources: of how many kinds there must be texts.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs_model: ClassVar[bool]
    needs_sources: ClassVar[int]

    def windows(self, settings: Settings) -> Sequence[tuple[int, int]]:
        """Tokens of prompt and continuation of the longest windows that it reads."""
        ...

    def ask(self, materials: Materials) -> Answer:
        """Measure and say what was found.

        Raises:
            UserError: if the materials are not enough.
        """
        ...
