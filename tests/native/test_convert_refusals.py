"""What conversion refuses, before it writes anything, and what it passes over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coreinfer.backends.native.container import WEIGHTS
from coreinfer.backends.native.convert import convert
from coreinfer.backends.native.weights import weights_from
from coreinfer.errors import UserError
from coreinfer.kernels.formats import WeightFormat
from coreinfer.models.checkpoint import load_folder
from tests.models.folders import edit_json, edit_tensors, tiny_folder
from tests.native.test_convert import BFLOAT16, FORMATS, INT4, INT8, assert_same, tensors_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny llama."""
    tiny_folder(tmp_path / "tiny", tie_word_embeddings=True)
    return tmp_path / "tiny"


def refused(folder: Path, weight_format: WeightFormat = INT8) -> str:
    """The line of a conversion that is refused, and that leaves nothing behind."""
    out = folder.parent / "out"
    before = sorted(folder.parent.iterdir())
    with pytest.raises(UserError) as error:
        convert(str(folder), weight_format, out)
    assert sorted(folder.parent.iterdir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "phi3", "falcon", "gpt_neox", "smollm3"])
def test_other_architectures_are_refused_by_name(tmp_path: Path, model_type: str) -> None:
    tiny_folder(tmp_path / "tiny", model_type)
    line = refused(tmp_path / "tiny")
    assert model_type in line
    assert "--backend hf" in line


def test_groups_that_do_not_divide_are_refused_with_those_that_do(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "tiny", hidden_size=96, num_attention_heads=4)
    line = refused(tmp_path / "tiny", WeightFormat("int8", 64))
    assert "groups of 64 do not divide the 96 columns of layers.0.qkv" in line
    assert "--group-size 16 or 32" in line
    tiny_folder(tmp_path / "odd", hidden_size=36, num_attention_heads=3, num_key_value_heads=3)
    assert "use bfloat16" in refused(tmp_path / "odd", INT4)
    assert convert(str(tmp_path / "odd"), BFLOAT16, tmp_path / "fine").is_dir()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.dtype)
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(
    folder: Path, name: str, weight_format: WeightFormat, value: float
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    edit_tensors(folder, spoil)
    assert f"tensor '{name}' has weights that are not finite" in refused(folder, weight_format)


def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(folder: Path) -> None:
    keep = folder.parent.parent / f"{folder.parent.name}-keep"
    shutil.copytree(folder, keep)

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def cut(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.1.mlp.down_proj.weight"
        tensors[name] = tensors[name][:, :-1]

    def round_(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    edits: list[tuple[Callable[[], object], str]] = [
        (lambda: edit_tensors(folder, drop), "'model.layers.1.mlp.up_proj.weight' is missing"),
        (lambda: edit_tensors(folder, cut), "do not make layers.1.mlp (48, 32)"),
        (lambda: edit_tensors(folder, round_), "holds I8, not floating-point"),
        (lambda: edit_json(folder / "config.json", num_hidden_layers=4), "is missing (and"),
        (lambda: edit_json(folder / "config.json", num_hidden_layers=2), "layers.2."),
        (lambda: edit_json(folder / "config.json", intermediate_size=64), "do not make"),
        (lambda: edit_json(folder / "config.json", rope_parameters={"rope_type": "yarn",
            "rope_theta": 1e4, "factor": 2.0}), "yarn"),
        (lambda: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda: (folder / "config.json").unlink(), "has no config.json"),
        (lambda: (folder / WEIGHTS).unlink(), "has no weights"),
        (lambda: os.truncate(folder / WEIGHTS, 30_000), "is damaged or truncated"),
    ]  # fmt: skip
    for edit, message in edits:
        shutil.rmtree(folder)
        shutil.copytree(keep, folder)
        edit()
        assert message in refused(folder), message
    shutil.rmtree(keep)


def test_too_little_room_is_refused_before_it_is_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    line = refused(folder)
    assert "has 1 MB free, the converted model needs 34 MB" in line


def test_a_place_that_cannot_be_written_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-folder"):
        convert(str(folder), INT8, tmp_path / "no-such-folder" / "out")
    with pytest.raises(UserError, match="no model"):
        convert(str(tmp_path / "nothing/here"), INT8, tmp_path / "out")


@pytest.mark.parametrize("kind", ["F64", "I64"])
def test_what_the_model_does_not_use_is_passed_over(folder: Path, kind: str) -> None:
    """Old checkpoints carry the rotary table along; whole numbers are a sign of quantisation."""
    tensors = load_file(folder / WEIGHTS)
    dtype = torch.float64 if kind == "F64" else torch.int64
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if kind == "I64":
        assert "holds I64" in refused(folder)
    else:
        model, _ = load_folder(folder)
        out = convert(str(folder), INT8, folder.parent / "out")
        assert_same(tensors_of(out), dict(weights_from(model, INT8).tensors))
