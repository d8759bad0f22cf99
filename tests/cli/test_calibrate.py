"""`coreinfer calibrate`, and the verbs that use what it makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coreinfer.calibration.store import CalibrationStore
from tests.building.corpora import documents, write_corpus
from tests.cli.conftest import Cli
from tests.semantics.stores import random_store as random_clusters


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl", documents(12))


@pytest.fixture
def store(cli: Cli, model_dir: Path, corpus: Path, tmp_path: Path) -> Path:
    out = tmp_path / "store"
    done = cli(
        "calibrate", "--model", model_dir, "--backend", "hf", "--corpus", corpus, "--out", out,
        "--rank", 6, "--error-documents", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    about = json.loads(done.out)
    assert (about["rank"], about["skipped"], about["num_layers"]) == (6, 0, 3)
    return out


def test_a_line_that_is_skipped_is_told_and_counted_once(
    cli: Cli, model_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("{broken\n" + corpus.read_text())
    done = cli(
        "calibrate", "--model", model_dir, "--backend", "hf", "--corpus", path, "--out",
        tmp_path / "s", "--rank", 6, "--error-documents", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["skipped"] == 1
    assert done.err.count("line 1 is not JSON") == 1


@pytest.mark.parametrize("backend", ["hf", "native"])
def test_generate_uses_it(cli: Cli, model_dir: Path, store: Path, backend: str) -> None:
    done = cli(
        "generate", "--model", model_dir, "--backend", backend, "--raw", "--prompt", "abc cab bb",
        "--selector", "residual", "--stand-in", "calibrated", "--rank", 4, "--calibration", store,
        "--beta", 0.5, "--max-new-tokens", 4, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert (record["selector"], record["stand_in"]) == ("residual", "calibrated")
    assert record["density"] == pytest.approx(0.5)
    assert "no effect" not in done.err


def test_select_and_score_use_it(cli: Cli, model_dir: Path, store: Path, tmp_path: Path) -> None:
    shared = ("--model", model_dir, "--backend", "hf", "--calibration", store)
    done = cli(
        "select", *shared, "--selector", "residual", "--prompt", "abc", "--out", tmp_path / "c"
    )
    assert done.code == 0, done.err
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"context": "abc cab", "continuation": " bb"}\n')
    done = cli("score", *shared, "--stand-in", "calibrated", "--pairs", pairs, "--json")
    assert done.code == 0, done.err
    assert "no effect" not in done.err


def test_static_is_content_with_it(cli: Cli, model_dir: Path, store: Path, tmp_path: Path) -> None:
    done = cli(
        "select", "--model", model_dir, "--backend", "hf", "--selector", "static", "--calibration",
        store, "--prompt", "abc", "--out", tmp_path / "c",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "no effect" not in done.err


def test_where_it_is_of_no_use_that_is_said(
    cli: Cli, model_dir: Path, store: Path, tmp_path: Path
) -> None:
    done = cli(
        "select", "--model", model_dir, "--backend", "hf", "--calibration", store, "--prompt",
        "abc", "--out", tmp_path / "c",
    )  # fmt: skip
    assert done.code == 0
    assert "--calibration has no effect with --selector impact" in done.err


def test_info_describes_it_alone_and_beside_clusters(cli: Cli, store: Path) -> None:
    about = json.loads(cli("info", store, "--json").out)
    assert (about["kind"], about["rank"]) == ("calibration store", 6)
    assert "rank: 6" in cli("info", store).out
    random_clusters().save(store.parent / "both")
    CalibrationStore.load(store).save(store.parent / "both")
    random_clusters().save(store)
    for folder in (store.parent / "both", store):
        both = json.loads(cli("info", folder, "--json").out)
        assert (both["clusters"]["hidden_size"], both["calibration"]["rank"]) == (4, 6)


@pytest.mark.parametrize("option", [("--selector", "residual"), ("--stand-in", "calibrated")])
def test_what_needs_it_says_so(cli: Cli, option: tuple[str, str]) -> None:
    done = cli("generate", "--prompt", "abc", *option)
    assert done.code == 2
    assert f"{option[0]} {option[1]} needs --calibration STORE" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rank", 0), "rank"),
        (("--alpha", 2), "alpha"),
        (("--corpus", "no-such-file.jsonl"), "no file at"),
    ],
)
def test_mistakes_are_one_line(
    cli: Cli, model_dir: Path, tmp_path: Path, arguments: tuple[str, object], message: str
) -> None:
    done = cli(
        "calibrate", "--model", model_dir, "--backend", "hf", "--out", tmp_path / "s", *arguments
    )
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_another_model_is_refused(
    cli: Cli, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.tiny import tiny_model, tiny_tokenizer

    other = tmp_path_factory.mktemp("other") / "m"
    tiny_model(seed=5).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    for option in (("--selector", "residual"), ("--stand-in", "calibrated")):
        done = cli(
            "generate", "--model", other, "--backend", "hf", "--raw", "--prompt", "abc",
            "--calibration", store, *option,
        )  # fmt: skip
        assert done.code == 2
        assert "this calibration store was made for" in done.err


def test_training_on_native_loads_the_model_on_hf(
    cli: Cli, model_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    asked = ("calibrate", "--model", model_dir, "--backend", "native", "--corpus", corpus, "--rank",
             6, "--error-documents", 1)  # fmt: skip
    stores = {}
    for steps in (0, 2):
        done = cli(*asked, "--train-steps", steps, "--out", tmp_path / str(steps))
        assert done.code == 0, done.err
        stores[steps] = CalibrationStore.load(tmp_path / str(steps))
    plain, trained = (stores[steps].predictions[0].coefficients for steps in (0, 2))
    assert not plain.equal(trained)
    assert (plain - trained).norm() < 0.1 * plain.norm()


def test_no_backward_pass_goes_through_a_converted_model(
    cli: Cli, model_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    assert cli("convert", "--model", model_dir, "--dtype", "int8", "--out", made).code == 0
    done = cli("calibrate", "--model", made, "--corpus", corpus, "--train-steps", 1, "--rank", 6,
               "--out", tmp_path / "s")  # fmt: skip
    assert done.code == 2
    assert "name the model that it was made from" in done.err
    text = tmp_path / "t.txt"
    text.write_text("The cat sat on the mat, and it was warm there. " * 20)
    done = cli("tune", "--model", made, "--prompts", text, "--bytes", 0.7, "--jobs", 1,
               "--out", tmp_path / "t.toml")  # fmt: skip
    assert done.code == 2
    assert "name the model that it was made from" in done.err
