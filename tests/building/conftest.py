"""Builds write a checkpoint after every batch here, however long writing takes."""

from __future__ import annotations

import pytest

from coreinfer.building import work


@pytest.fixture(autouse=True)
def _checkpoint_after_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SHARE", 0)
