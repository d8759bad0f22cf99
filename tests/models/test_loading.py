"""`load`: each thing a user can name, and each that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coreinfer.errors import UserError
from coreinfer.models import loading
from coreinfer.models.loading import DTYPES, load
from tests.models.folders import tiny_folder
from tests.models.gguf_writer import tiny_gguf


def refusal(model: str, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        load(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tiny_folder(tmp_path / "mine")
    loaded = load(str(tmp_path / "mine"))
    assert loaded.name == "mine"
    assert loaded.model.config.name_or_path == "mine"
    assert torch.equal(loaded.model.lm_head.weight, saved.lm_head.weight)
    monkeypatch.chdir(tmp_path / "mine")
    assert load(".").name == "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/mine").name == "mine"


def test_a_folder_that_looks_like_an_id_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_folder(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert load("owner/name").name == "name"


def test_a_gguf_file(tmp_path: Path) -> None:
    saved = tiny_gguf(tmp_path / "mine.gguf")
    said: list[str] = []
    loaded = load(str(tmp_path / "mine.gguf"), on_progress=said.append)
    assert loaded.name == "mine"
    assert said
    assert torch.equal(loaded.model.lm_head.weight, saved.lm_head.weight)
    (tmp_path / "mine.gguf").rename(tmp_path / "blob")  # as content-addressed stores keep it
    assert load(str(tmp_path / "blob")).name == "blob"


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "owner/name"])
def test_what_is_not_there_yet_is_pulled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_folder(tmp_path)
    pulled: list[str] = []

    def pull(model: str, **_options: object) -> Path:
        pulled.append(model)
        return tmp_path

    monkeypatch.setattr(loading, "pull", pull)
    assert load(name).name == name
    assert pulled == [name]


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_dtypes(name: str, tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    model = load(str(tmp_path), dtype=name).model
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, name)}
    assert model.dtype == getattr(torch, name)


def test_float32_is_the_default_on_a_cpu(tmp_path: Path) -> None:
    tiny_folder(tmp_path, dtype=torch.bfloat16)
    assert load(str(tmp_path)).model.dtype == torch.float32


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_dtypes_of_the_native_backend(name: str) -> None:
    message = refusal("anything", dtype=name)
    assert "native backend" in message
    assert name in message


@pytest.mark.parametrize("name", ["float64", "fp16", "", "torch.float32"])
def test_no_dtype(name: str) -> None:
    message = refusal("anything", dtype=name)
    assert all(known in message for known in DTYPES)


def test_devices(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    assert load(str(tmp_path), device="cpu").model.device.type == "cpu"
    assert "'abacus'" in refusal(str(tmp_path), device="abacus")
    if not torch.cuda.is_available():
        assert "'cuda'" in refusal(str(tmp_path), device="cuda")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'?"),
        ("SmolLM2-135M", "smollm2-135m-instruct"),
        ("nothing", "owner/name"),
        ("", "smollm2-135m-instruct"),
        ("absent.gguf", "no model at 'absent.gguf'"),
        ("owner/absent.gguf", "no model at 'owner/absent.gguf'"),
        ("/nowhere/at/all", "no model at '/nowhere/at/all'"),
        ("./nowhere", "no model at './nowhere'"),
        ("a\0b", r"a\x00b"),
        ("x" * 5000, "no name and no path"),
        ("~nobody-of-that-name/x", "no name and no path"),
    ],
)
def test_what_is_no_model(model: str, expected: str) -> None:
    assert expected in refusal(model)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    assert "give its folder" in refusal(str(tmp_path / "model.safetensors"))
    assert "no GGUF file" in refusal(str(tmp_path / "config.json"))
    (tmp_path / "x.gguf").write_text("text")
    assert "x.gguf" in refusal(str(tmp_path / "x.gguf"))
