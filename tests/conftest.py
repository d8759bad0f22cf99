"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no failure: an example may take as long as it takes. A change turns the suite
# red, not chance; COREINFER_EXPLORE=1 looks for examples that nobody has seen.
settings.register_profile(
    "coreinfer", deadline=None, derandomize="COREINFER_EXPLORE" not in os.environ
)
settings.load_profile("coreinfer")

# What a test loads lies on this machine; a look at the hub would only wait for a time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with evaluation data that lies beside the checkout, where there is one."""
    folder = Path(os.environ.get("COREINFER_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no evaluation data at {folder} (set COREINFER_SHARED to its folder)")
    return folder


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """The folder of the default model, pulled if it is not in the cache; for tests marked model."""
    from coreinfer.models.pull import pull

    return pull("smollm2-135m-instruct")
