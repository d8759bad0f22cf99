"""Every way that this machine can compute, for tests that must hold of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from coreinfer.kernels.library import VARIABLE, supported_paths

PATHS = supported_paths()
NATIVE = [path for path in PATHS if path != "twin"] or [
    pytest.param("none", marks=pytest.mark.skip(reason="no native kernels were built"))
]


@contextmanager
def using(path: str) -> Iterator[None]:
    """Computes that way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, path)
        yield
