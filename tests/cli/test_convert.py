"""`coreinfer convert`, and `coreinfer info` on what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coreinfer.backends.native.container import WEIGHTS, open_container
from coreinfer.cli import convert as verb
from coreinfer.cli.main import main
from coreinfer.kernels.formats import WeightFormat
from tests.cli.conftest import Cli, refusal
from tests.tiny import tiny_model, tiny_tokenizer


def test_convert_writes_a_model_and_describes_it(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = cli(
        "convert", "--model", model_dir, "--dtype", "int4", "--group-size", 32, "--out", out,
        "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    about = json.loads(run.out)
    assert about["out"] == str(out)
    assert (about["model"], about["dtype"], about["group_size"]) == ("tiny", "int4", 32)
    assert (about["family"], about["num_layers"], about["num_neurons"]) == ("llama", 3, [48] * 3)
    assert about["bits_per_weight"] == 5
    assert about["bytes"] == (out / WEIGHTS).stat().st_size
    assert about["model_fingerprint"] == open_container(out).manifest.model_fingerprint
    described = json.loads(cli("info", out, "--json").out)
    assert {**described, "out": str(out)} == about
    plain = cli("info", model_dir, "--json")
    assert json.loads(plain.out)["model_fingerprint"] == about["model_fingerprint"]


def test_the_help_names_the_group_sizes_that_the_code_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    named = " ".join(capsys.readouterr().out.split()).split("(default: ")
    sizes = [f"{WeightFormat.named(dtype).group_size} of {dtype}" for dtype in ("int8", "int4")]
    assert any(text.startswith(f"{', '.join(sizes)})") for text in named)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_convert_for_a_person(cli: Cli, tmp_path: Path, dtype: str) -> None:
    model = tmp_path / "model"
    tiny_model(hidden_size=64).save_pretrained(model)  # groups are of 64 by default
    tiny_tokenizer().save_pretrained(model)
    run = cli("convert", "--model", model, "--dtype", dtype, "--out", tmp_path / "out")
    assert run.code == 0, run.err
    bits = {"bfloat16": "16", "int8": "8.5", "int4": "4.5"}[dtype]
    assert f"out: model in {dtype}, {bits} bits a weight, 0." in run.out
    text = cli("info", tmp_path / "out").out
    for part in ("kind: converted model", "48 in every layer", f"dtype: {dtype}", "bytes: 0."):
        assert part in text


def test_info_verifies_every_checksum_if_asked(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli(
        "convert", "--model", model_dir, "--dtype", "int8", "--group-size", 16, "--out", out
    ).code == 0  # fmt: skip
    assert "checksums: all right" in cli("info", out, "--verify").out
    data = bytearray((out / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (out / WEIGHTS).write_bytes(bytes(data))
    assert "checksums: of the header only" in cli("info", out).out
    assert "tensor 'head' has the checksum" in refusal(cli("info", out, "--verify"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "x"], "the following arguments are required: --dtype"),
        (["--dtype", "int8"], "the following arguments are required: --out"),
        (["--dtype", "int3", "--out", "x"], "invalid choice: 'int3'"),
        (["--dtype", "int8", "--group-size", "x", "--out", "x"], "'x' is not a whole number"),
        (["--dtype", "int8", "--group-size", "48", "--out", "x"], "group size of int8 is 48"),
        (["--dtype", "int4", "--out", "x"], "--group-size 16 or 32"),
        (["--dtype", "bfloat16", "--out", "no/such/x"], "no/such"),
    ],
)
def test_a_mistake_is_one_line(cli: Cli, model_dir: Path, options: list[str], message: str) -> None:
    assert message in refusal(cli("convert", "--model", model_dir, *options))


def test_an_interruption_says_how_to_go_on(
    cli: Cli, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        "convert", "--model", model_dir, "--dtype", "bfloat16", "--out", tmp_path / "out",
    )  # fmt: skip

    @contextmanager
    def stop(_what: str) -> Iterator[Callable[[int, int], None]]:
        def on_bytes(done: int, total: int) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

        yield on_bytes

    with monkeypatch.context() as patch:
        patch.setattr(verb, "bytes_bar", stop)
        run = cli(*command)
    assert run.code == 130
    assert "the same command goes on from here" in run.err
    assert not (tmp_path / "out").exists()
    assert cli(*command).code == 0
    assert cli("info", tmp_path / "out", "--verify").code == 0


def test_nothing_but_the_result_is_printed_where_nobody_watches(
    cli: Cli, model_dir: Path, tmp_path: Path
) -> None:
    run = cli("convert", "--model", model_dir, "--dtype", "bfloat16", "--out", tmp_path / "out")
    assert run.err == ""
    assert len(run.out.splitlines()) == 1


def test_the_bar_counts_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    with verb.bytes_bar("converting") as on_bytes:
        for done in (300, 700, 1000):  # an earlier run had written 300
            on_bytes(done, 1000)
    assert capsys.readouterr().out == ""
