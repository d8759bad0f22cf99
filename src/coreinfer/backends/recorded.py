"""What a session's prefills have recorded of its batch; forks share it until one reads on."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from coreinfer.backends.choose import ModelView, evidence_of
from coreinfer.errors import UserError
from coreinfer.recording import BatchWindows, PromptRecorder, RecordingPlan
from coreinfer.selectors.evidence import Evidence


class Recorded:
    """The recorders of a batch of sequences, the way through their tokens, and their texts.

    Attributes:
        recorders: one a sequence; none before the first tokens.
        windows: how far each sequence has been read.
        futures: recorders of the tokens to come, where they were looked at.
    """

    def __init__(
        self, plan: RecordingPlan, sizes: Sequence[tuple[int, int]], bos_token_id: int | None
    ) -> None:
        """Sizes are (num_neurons, hidden_size) of every layer."""
        self.recorders: list[PromptRecorder] = []
        self.windows = BatchWindows(0, bos_token_id)
        self.futures: list[PromptRecorder] | None = None
        self._texts: list[str] | None = None
        self._plan = plan
        self._sizes = sizes
        self._bos_token_id = bos_token_id
        self._shared = False  # the recorders are also those of a fork

    def begin(self, token_ids: Sequence[Sequence[int]], texts: Sequence[str] | None) -> bool:
        """Make ready to record these tokens; whether they are the first ones.

        Raises:
            UserError: if a sequence gets no token.
        """
        if not all(token_ids):
            raise UserError("the prompt is empty: there is no token to read")
        first = not self.recorders
        if first:
            self.windows = BatchWindows(len(token_ids), self._bos_token_id)
            self.recorders = self._new_recorders(len(token_ids))
        elif self._shared:
            self.windows = copy.deepcopy(self.windows)
            self.recorders = copy.deepcopy(self.recorders)
        self._shared = False
        self.futures = None
        self._texts = None if texts is None else list(texts)
        return first

    def begin_ahead(self, batch: int) -> tuple[list[PromptRecorder], BatchWindows]:
        """Recorders of tokens to come, and a way through them that leaves this one where it is."""
        self.futures = self._new_recorders(batch)
        return self.futures, copy.deepcopy(self.windows)

    def evidence(self, model: ModelView) -> list[Evidence]:
        """What a selector sees of each sequence."""
        return evidence_of(model, self.recorders, self._texts, self.futures)

    def fork(self) -> Recorded:
        """The same for another session; whichever reads on first takes copies."""
        twin = copy.copy(self)
        self._shared = twin._shared = True
        return twin

    def _new_recorders(self, batch: int) -> list[PromptRecorder]:
        return [PromptRecorder(self._plan, self._sizes) for _ in range(batch)]
