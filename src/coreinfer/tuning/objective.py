"""What candidates cost: quality on the prompts, bytes a token; nothing is measured twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields

from coreinfer.evaluation.answers import Answers, key_of
from coreinfer.evaluation.continuations import Quality, Window
from coreinfer.recording import RecordingPlan
from coreinfer.tuning.candidate import Candidate, Stores
from coreinfer.tuning.pools import Pool, Task

DENSE = "dense"


class Objective:
    """Measures candidates on parts of the prompts.

    Whatever the number of workers, a part is measured in the same batches, and a candidate beside
    those alone that record the same: its result does not depend on what else is measured.

    Args:
        pool: where it is done.
        parts: name -> windows.
        answers: what is known already, and grows.
        stores: that candidates may need.
        batch_size: windows prefilled together.
        on_progress: told of what is being measured.
    """

    def __init__(
        self,
        pool: Pool,
        parts: Mapping[str, Sequence[Window]],
        answers: Answers,
        stores: Stores,
        *,
        batch_size: int = 4,
        on_progress: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._pool = pool
        self._answers = answers
        self._stores = stores
        self._on_progress = on_progress
        self._batches = {
            part: [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
            for part, texts in parts.items()
        }
        self.measured = 0  # tasks that were not known already

    def measure(self, part: str, candidates: Sequence[Candidate], what: str) -> list[Quality]:
        """The quality of each candidate on a part.

        Args:
            part: its name.
            candidates: some of which may be equal.
            what: they are, for the progress.

        Raises:
            UserError: if a candidate does not fit the model.
        """
        batches = range(len(self._batches[part]))
        keys = list(dict.fromkeys(candidate.key for candidate in candidates))
        missing = {
            batch: [key for key in keys if self._name(part, batch, key) not in self._answers]
            for batch in batches
        }
        groups = self._groups(candidates)
        work = [
            (batch, [key for key in group if key in missing[batch]])
            for batch in batches
            for group in groups
        ]
        work = [(batch, group) for batch, group in work if group]
        pieces = -(-self._pool.workers // max(len(work), 1))  # so that every worker has one
        work = [(batch, piece) for batch, group in work for piece in _split(group, pieces)]
        tasks = [Task(self._batches[part][batch], piece) for batch, piece in work]
        if tasks:
            self._on_progress(f"{what}: {len(keys)} settings, {len(tasks)} tasks")
        for position, result in self._pool.map(tasks):
            batch = work[position][0]
            self._answers.add({self._name(part, batch, key): q for key, q in result.items()})
            self.measured += 1
        return [self._joined(part, candidate.key) for candidate in candidates]

    def dense(self, part: str) -> Quality:
        """Dense decoding on a part, known once anything was measured on it."""
        return self._joined(part, DENSE)

    def _name(self, part: str, batch: int, key: str) -> str:
        return key_of(part, batch, key)

    def _joined(self, part: str, key: str) -> Quality:
        rows = [
            self._answers[self._name(part, batch, key)] for batch in range(len(self._batches[part]))
        ]
        return Quality(
            **{f.name: [v for row in rows for v in row[f.name]] for f in fields(Quality)}
        )

    def _groups(self, candidates: Sequence[Candidate]) -> Iterator[list[str]] | list[list[str]]:
        """Keys of candidates that one prefill serves without a difference to any of them."""
        groups: dict[tuple[float | None, bool, bool], dict[str, None]] = {}
        for candidate in candidates:
            setting = candidate.setting(self._stores)
            plan = RecordingPlan.of(setting.selector, setting.stand_in)
            group = groups.setdefault((plan.alpha, plan.halves, plan.count_bos), {})
            group[candidate.key] = None
        return [list(group) for group in groups.values()]


def _split(keys: list[str], pieces: int) -> list[list[str]]:
    """Consecutive pieces of about the same size, none empty."""
    pieces = min(pieces, len(keys))
    ends = [len(keys) * i // pieces for i in range(pieces + 1)]
    return [keys[a:b] for a, b in itertools.pairwise(ends)]
