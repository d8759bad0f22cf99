"""What candidates cost: quality on parts of the prompts; nothing is measured twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import pairwise
from statistics import fmean
from typing import Any

from tqdm import tqdm

from coreinfer.evaluation.continuations import Quality, Window
from coreinfer.journal import Journal, key_of
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.stores import Stores
from coreinfer.tuning.candidate import Candidate
from coreinfer.tuning.pools import Pool
from coreinfer.tuning.work import DENSE, Measure, Weigh

WINDOWS_A_TASK = 4  # prefilled together: the same whatever the workers, so that results are
SETTINGS_A_TASK = 4  # measured on them at most: what Ctrl-C may cost, against prefilling anew
BATCHES_A_STEP = 2  # that a step of the budgets' descent follows from
WINDOWS_A_STEP = BATCHES_A_STEP * WINDOWS_A_TASK
FINAL_WINDOWS = 48  # that the best designs are compared on


class Objective:
    """Measures candidates on parts of the prompts.

    Whatever the number of workers, a part is measured in the same batches, and a candidate beside
    those alone that record the same: its result does not depend on what else is measured.

    Args:
        pool: where it is done.
        parts: name -> windows.
        journal: what is known already; it grows.
        stores: that candidates may need.
        about: what else results depend on, plain JSON.
    """

    def __init__(
        self,
        pool: Pool,
        parts: Mapping[str, Sequence[Window]],
        journal: Journal,
        stores: Stores,
        *,
        about: Mapping[str, Any],
    ) -> None:
        self._pool = pool
        self._journal = journal
        self._stores = stores
        self._batches = {
            part: [texts[i : i + WINDOWS_A_TASK] for i in range(0, len(texts), WINDOWS_A_TASK)]
            for part, texts in parts.items()
        }
        # Of each batch: what its results are kept under.
        self._names = {
            part: [key_of([dict(about), [asdict(window) for window in batch]]) for batch in batches]
            for part, batches in self._batches.items()
        }

    def measure(self, part: str, candidates: Sequence[Candidate], what: str) -> list[Quality]:
        """The quality of each candidate on a part.

        Args:
            part: its name.
            candidates: some of which may be equal.
            what: they are, for the progress bar.

        Raises:
            UserError: if a candidate does not fit the model, or the workers failed.
        """
        groups = self._groups(candidates)
        work = [
            (name, batch, missing)
            for name, batch in zip(self._names[part], self._batches[part], strict=True)
            for group in groups
            if (missing := [key for key in group if self._key(name, key) not in self._journal])
        ]
        least = -(-self._pool.workers // max(len(work), 1))  # so that every worker has one
        work = [
            (name, batch, piece)
            for name, batch, keys in work
            for piece in _split(keys, max(least, -(-len(keys) // SETTINGS_A_TASK)))
        ]
        tasks = [Measure(batch, keys) for _, batch, keys in work]
        # disable=None: where nobody watches, nothing is drawn.
        bar = tqdm(self._pool.map(tasks), what, len(tasks), leave=False, unit="task", disable=None)
        for position, result in bar:
            name = work[position][0]
            self._journal.add({self._key(name, key): asdict(one) for key, one in result.items()})
        return [self._joined(part, candidate.key) for candidate in candidates]

    def worth(self, part: str, number: int, now: Candidate, more: Candidate) -> list[float | None]:
        """By how much the loss falls from one to the other, layer by layer: nats a token, mean over
        some of a part.

        Args:
            part: its name.
            number: of the step, from 0; each takes the next `BATCHES_A_STEP` batches, round and
                round.
            now, more: a candidate, and the same with more in its layers.

        Raises:
            UserError: if a candidate does not fit the model, or the workers failed.
        """
        count = len(self._batches[part])
        first = number * BATCHES_A_STEP
        places = [place % count for place in range(first, first + min(BATCHES_A_STEP, count))]
        keys = [key_of([self._names[part][i], now.key, more.key]) for i in places]
        missing = [i for i, key in enumerate(keys) if key not in self._journal]
        tasks = [Weigh(self._batches[part][places[i]], now.key, more.key) for i in missing]
        for position, result in self._pool.map(tasks):
            self._journal.add({keys[missing[position]]: asdict(result)})
        rows = [self._journal[key]["gains"] for key in keys]
        return [_mean(column) for column in zip(*rows, strict=True)]

    def dense(self, part: str) -> Quality:
        """Dense decoding on a part, known once anything was measured on it."""
        return self._joined(part, DENSE)

    @staticmethod
    def _key(name: str, key: str) -> str:
        return key_of([name, key])

    def _joined(self, part: str, key: str) -> Quality:
        rows = [self._journal[self._key(name, key)] for name in self._names[part]]
        names = [field.name for field in fields(Quality)]
        return Quality(**{n: [value for row in rows for value in row[n]] for n in names})

    def _groups(self, candidates: Sequence[Candidate]) -> list[list[str]]:
        """Keys of candidates that one prefill serves without a difference to any of them."""
        groups: dict[tuple[float | None, bool, bool], dict[str, None]] = {}
        for candidate in candidates:
            setting = candidate.setting(self._stores)
            plan = RecordingPlan.of(setting.selector, setting.stand_in)
            group = groups.setdefault((plan.alpha, plan.halves, plan.count_bos), {})
            group[candidate.key] = None
        return [list(group) for group in groups.values()]


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is not known."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _split(keys: list[str], pieces: int) -> list[list[str]]:
    """Consecutive pieces of about the same size, none empty."""
    pieces = min(pieces, len(keys))
    ends = [len(keys) * i // pieces for i in range(pieces + 1)]
    return [keys[a:b] for a, b in pairwise(ends)]
