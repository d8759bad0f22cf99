"""`coreinfer select`, `score`, `info` and `pull` on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from coreinfer.core.coreset import CoreSet
from coreinfer.kernels.library import kernel_path
from tests.cli.conftest import Cli, refusal
from tests.semantics.stores import random_store
from tests.tiny import tiny_model, tiny_tokenizer


def test_select_writes_the_documented_file(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "core.safetensors"
    run = cli(
        "select", "--model", model_dir, "--prompt", "some text", "--out", out, "--beta", 0.25,
        "--dense-layers", "0", "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(metadata) == {
        "format", "model", "model_fingerprint", "num_layers", "num_neurons", "selector"
    }  # fmt: skip
    assert metadata["format"] == "coreinfer.coreset/1"
    assert (metadata["model"], metadata["num_layers"], metadata["num_neurons"]) == (
        "tiny",
        "3",
        "48",
    )
    assert json.loads(metadata["selector"])["name"] == "impact"
    assert set(tensors) == {"layers.1", "layers.2"}
    assert all(t.shape == (12,) and str(t.dtype) == "torch.int32" for t in tensors.values())
    assert json.loads(run.out)["density"] == pytest.approx((48 + 12 + 12) / 144)


def test_select_is_always_raw(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    tiny_model().save_pretrained(plain / "tiny")
    tiny_tokenizer().save_pretrained(plain / "tiny")  # the same model without a chat template
    for model, name in ((model_dir, "a"), (plain / "tiny", "b")):
        cli("select", "--model", model, "--prompt", "some text", "--out", tmp_path / name)
    a, b = CoreSet.load(tmp_path / "a"), CoreSet.load(tmp_path / "b")
    assert all(bool((a.layers[i] == b.layers[i]).all()) for i in range(3))


def test_score_prints_an_object_a_pair(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"context": "Once upon", "continuation": " a time"},
        {"context": "x", "continuation": "y"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = cli("score", "--model", model_dir, "--pairs", path, "--json")
    assert run.code == 0, run.err
    first, second = (json.loads(line) for line in run.out.splitlines())
    assert set(first) == {"logprob", "num_tokens", "greedy", "density"}
    assert (first["num_tokens"], second["num_tokens"]) == (7, 1)
    assert first["logprob"] < 0
    for batch_size in (1, 3):
        again = cli(
            "score", "--model", model_dir, "--pairs", path, "--json", "--batch-size", batch_size
        )
        for line, row in zip(again.out.splitlines(), (first, second), strict=True):
            assert json.loads(line)["logprob"] == pytest.approx(row["logprob"], abs=1e-4)
    assert "7 tokens" in cli("score", "--model", model_dir, "--pairs", path).out


def test_score_names_bad_lines_and_goes_on(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"context": "a", "continuation": "b"}\n{"context": "a"}\n{oops\n'
        '{"context": " ", "continuation": "b"}\n{"context": "a", "continuation": ""}\n'
        + json.dumps({"context": "a" * 600, "continuation": "b"})
        + '\n{"context": "c", "continuation": "d"}\n'
    )
    run = cli("score", "--model", model_dir, "--pairs", path, "--json")
    assert run.code == 2
    assert len(run.out.splitlines()) == 2
    told = run.err.splitlines()
    assert [f"line {n}" in line for n, line in zip((2, 3, 4, 5, 6), told, strict=True)] == [
        True
    ] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["score"], "the following arguments are required: --pairs"),
        (["score", "--pairs", "absent"], "no file at 'absent'"),
        (["select", "--prompt", "a"], "the following arguments are required: --out"),
        (["select", "--prompt", "", "--out", "x"], "the prompt is empty"),
        (["select", "--prompt", "a", "--out", "no/such/folder/x"], "no/such/folder/x"),
        (["select", "--prompt", "a", "--out", "x", "--selector", "oracle"], "oracle"),
        (["info", "--keep", "0.2,2"], "keep must be above 0 and at most 1, got 2.0"),
        (["info", "--keep", "0.2,"], "'' is not a number"),
    ],
)
def test_a_mistake_is_one_line(cli: Cli, model_dir: Path, options: list[str], message: str) -> None:
    assert message in refusal(cli(*options, "--model", model_dir))


def test_info_on_a_model(cli: Cli, model_dir: Path) -> None:
    about = json.loads(cli("info", model_dir, "--json").out)
    assert about["family"] == "llama"
    assert about["num_layers"] == 3
    assert about["num_neurons"] == [48, 48, 48]
    assert about["mlp_bytes_per_token"] == 3 * 48 * 3 * 32 * 2  # bfloat16, as native decodes
    assert about["mlp_share"] == about["mlp_bytes_per_token"] / about["dense_bytes_per_token"]
    ceiling = next(row for row in about["ceilings"] if row["keep"] == 0.4)
    share = about["mlp_share"]
    assert ceiling["speed_up_at_most"] == pytest.approx(1 / (1 - 0.6 * share))
    assert about == json.loads(cli("info", "--model", model_dir, "--json").out)
    text = cli("info", model_dir).out
    for part in ("family: llama", "num layers: 3", "48 in every layer", "speed-up at most"):
        assert part in text


def test_info_converts_nothing(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COREINFER_CACHE", str(tmp_path))
        assert cli("info", model_dir).code == 0
        assert not list(tmp_path.iterdir())
        wide = json.loads(cli("info", model_dir, "--dtype", "float32", "--json").out)
    assert wide["mlp_bytes_per_token"] == 3 * 48 * 3 * 32 * 4


def test_info_on_a_core_set_and_on_this_machine(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "core.safetensors"
    cli("select", "--model", model_dir, "--prompt", "text", "--out", out)
    plain = tmp_path / "core"  # known by what is in it, whatever it is called
    cli("select", "--model", model_dir, "--prompt", "text", "--out", plain)
    about = json.loads(cli("info", out, "--json").out)
    assert (about["kind"], about["kept"]) == ("core set", [19, 19, 19])
    assert json.loads(cli("info", plain, "--json").out) == about
    assert "selector: name=impact" in cli("info", out).out
    machine = json.loads(cli("info", "--json").out)
    assert machine["backends"] == ["hf", "native"]
    assert machine["kernels"] == kernel_path()
    assert machine["cores"] >= 1
    assert "cache:" in cli("info").out


def test_info_on_a_cluster_store(cli: Cli, tmp_path: Path) -> None:
    store = random_store(documents=torch.tensor([7, 7, 7]))
    store.save(tmp_path / "store")
    about = json.loads(cli("info", tmp_path / "store", "--json").out)
    assert about == {"kind": "cluster store", **store.describe()}
    assert "sizes: 7, 7, 7\n" in cli("info", tmp_path / "store").out


def test_a_set_of_another_model_is_refused_by_name(
    cli: Cli, model_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_model(seed=7).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    out = tmp_path / "core.safetensors"
    cli("select", "--model", other, "--prompt", "text", "--out", out)
    line = refusal(cli("generate", "--model", model_dir, "--prompt", "x", "--core-set", out))
    assert "was made for 'other'" in line
    assert "not for 'tiny'" in line
