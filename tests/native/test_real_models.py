"""The native backend on models that were trained: the ReLU model, and the default model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import coreinfer
from coreinfer.backends.base import Backend
from coreinfer.backends.native.open import open_native
from coreinfer.core.measures import jaccard
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Dense, Impact, Selector, Stability
from tests.native.pairs import stored

# What a float16 prefill leaves of the core sets of an exact one: Jaccard of every layer, at least.
# Measured on SmolLM2: 0.99 for impact; counts have more near-ties, 0.97 for stability.
LIKENESS = {"impact": 0.97, "stability": 0.93}
TEXT = (
    "Once upon a time there was a poor woman who lived at the edge of a great forest. She had "
    "two sons, and when the winter came and the snow lay deep, the elder said to the younger: "
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Conversions go here."""
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def compare(hf: Backend, native: Backend, rule: Selector) -> float:
    """KL of native to hf of what follows TEXT and four more tokens; checks the core sets."""
    ids = hf.tokenizer(TEXT)["input_ids"]
    found = []
    for backend in (hf, native):
        session = backend.start(RecordingPlan.of(rule))
        first = session.prefill([ids])
        (choice,) = session.select(rule)
        rest = session.decode([ids[1:5]])[0]
        found.append((torch.cat([first, rest]).log_softmax(dim=-1), choice.core_set))
    (want, one), (got, two) = found
    assert one.layers.keys() == two.layers.keys()
    for layer, kept in one.layers.items():
        assert kept.shape == two.layers[layer].shape
        assert jaccard(kept, two.layers[layer]) >= LIKENESS[rule.name]
    return float((want.exp() * (want - got)).sum(dim=-1).mean())


@pytest.mark.shared
@pytest.mark.usefixtures("cache")
def test_the_relu_model_is_decoded_as_transformers_does(shared: Path) -> None:
    """Zeros are skipped, exactly: the same numbers as the full product gives."""
    folder = str(shared / "models" / "opt-relu")
    native = open_native(folder)
    assert native.weights.config.activation == "relu"
    loaded = coreinfer.load(folder, backend="hf").backend
    stored(loaded.model, native.weights)  # type: ignore[attr-defined]
    for rule in (Dense(), Impact(beta=0.4), Stability(beta=0.4)):
        assert compare(loaded, native, rule) < 1e-3


@pytest.mark.shared
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.01), ("int4", 0.3)])
def test_the_relu_model_quantised_stays_close(shared: Path, dtype: str, most: float) -> None:
    folder = str(shared / "models" / "opt-relu")
    native, hf = open_native(folder, dtype=dtype), coreinfer.load(folder, backend="hf").backend
    assert compare(hf, native, Dense()) < most


@pytest.mark.model
@pytest.mark.usefixtures("cache")
def test_the_default_model_is_decoded_as_transformers_does(
    default_model_dir: Path,
) -> None:
    native = open_native(str(default_model_dir))
    hf = coreinfer.load(str(default_model_dir)).backend
    assert compare(hf, native, Dense()) < 1e-3
    assert compare(hf, native, Impact(beta=0.4)) < 0.02
