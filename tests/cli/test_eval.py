"""`coreinfer eval`, and `lm_eval --model coreinfer`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from coreinfer.cli.lm_eval_model import CoreInfer
from coreinfer.errors import UserError
from coreinfer.journal import Journal
from tests.calibration.stores import build
from tests.cli.conftest import Cli, refusal
from tests.evaluation.rows import write_all
from tests.interrupting import interrupt

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def store(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from coreinfer.api import load

    folder = tmp_path_factory.mktemp("store")
    (folder / "corpus.txt").write_text("a hat is blue, \n\nthe box is not\n\nAnn dyes hats")
    backend = load(str(model_dir), backend="hf").backend
    build(backend, folder / "corpus.txt", folder / "made", rank=4)
    return folder / "made"


@pytest.fixture
def usual(model_dir: Path, data: Path, tmp_path: Path) -> list[Any]:
    return ["--model", model_dir, "--backend", "hf", "--data-dir", data, "--cache", tmp_path / "c"]


def test_rules_stand_side_by_side(cli: Cli, usual: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli("eval", *usual, "--tasks", "piqa,kl", "--limit", 2, "--beta", 0.5, "--out", out)
    assert done.code == 0
    assert done.err == (
        "note: the rule static is left out, for it needs --calibration STORE or --clusters STORE\n"
    )
    lines = done.out.splitlines()
    assert lines[0].startswith("| task (items) | metric | rule | value [95 %] | against dense")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    rules = ["dense", "stability", "impact+linear", "random"]
    assert [row[2] for row in rows if row[0] == "kl (2)"] == rules * 2
    assert {row[5] for row in rows if row[2] != "dense"} == {"0.500"}
    assert (out / "eval.md").read_text() == done.out
    record = json.loads((out / "eval.json").read_text())
    assert list(record["left_out"]) == ["static"]
    assert [section["task"] for section in record["tasks"]] == ["piqa", "kl"]


def test_json_is_the_record(cli: Cli, usual: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    shared = ("--tasks", "boolq", "--limit", 2, "--rules", "paper", "--json", "--out", out)
    done = cli("eval", *usual, *shared)
    record = json.loads(done.out)
    assert record == json.loads(out.read_text())
    assert list(record["rules"]) == ["dense", "stability"]
    (section,) = record["tasks"]
    sparse = section["rules"]["stability"]["sparse_tokens"]
    assert 0 < sparse < 1
    assert record["scoring"] == "sparse"
    dense = json.loads(cli("eval", *usual, *shared, "--dense-scoring").out)
    assert dense["scoring"] == "dense"
    measured = dense["tasks"][0]["metrics"][0]["rules"]
    assert measured["dense"]["value"] == measured["stability"]["value"]
    assert dense["tasks"][0]["rules"]["stability"]["density"] == 1
    assert dense["tasks"][0]["rules"]["stability"]["sparse_tokens"] == 0


def test_a_calibration_brings_the_best_rule_and_static(
    cli: Cli, usual: list[Any], store: Path
) -> None:
    done = cli(
        "eval", *usual, "--tasks", "arc_easy", "--limit", 2, "--calibration", store, "--rank", 4,
        "--json",
    )  # fmt: skip
    assert done.err == ""
    rules = json.loads(done.out)["rules"]
    assert list(rules) == ["dense", "stability", "residual+calibrated", "random", "static"]
    assert all(rules[name]["stores"] for name in ("residual+calibrated", "static"))
    assert not any(rules[name]["stores"] for name in ("dense", "stability", "random"))


def test_an_interrupted_run_is_130_and_goes_on(
    cli: Cli, usual: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["eval", *usual, "--tasks", "piqa,kl", "--limit", 3, "--batch-size", 1, "--json"]
    wanted = json.loads(cli(*argv, "--cache", tmp_path / "other").out)
    with monkeypatch.context() as patch:
        interrupt(patch, Journal, "add", after=5)
        assert cli(*argv).code == 130
    (file,) = (tmp_path / "c").glob("*.jsonl")
    before = file.read_bytes()
    assert before
    done = cli(*argv)
    assert file.read_bytes().startswith(before)  # nothing was thrown away
    assert len(file.read_bytes()) > len(before)
    assert json.loads(done.out) == wanted


def test_contexts_that_are_cut_are_pointed_out(cli: Cli, usual: list[Any]) -> None:
    done = cli(
        "eval", *usual, "--tasks", "gsm8k", "--few-shot", 3, "--limit", 2, "--rules", "dense"
    )
    assert done.code == 0
    long = cli("eval", *usual, "--tasks", "xsum", "--few-shot", 3, "--limit", 2, "--rules", "dense")
    assert "note:" not in done.err
    assert long.err == ""
    cut = cli(
        "eval", *usual, "--tasks", "truthfulqa", "--limit", 2, "--rules", "dense"
    )  # its own examples have more bytes than 512 - 256
    assert "note: 2 contexts of truthfulqa_gen are longer than the model reads" in cut.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", ""], "no task is named; there is perplexity, kl, truthfulqa_gen"),
        (["--tasks", "piqqa"], "no task 'piqqa' on local files; did you mean 'piqa'"),
        (["--tasks", "piqa", "--limit", "0"], "the limit of items must be at least 1, got 0"),
        (["--tasks", "piqa", "--few-shot", "-2"], "few-shot examples must be at least 0, got -2"),
        (["--tasks", "piqa", "--few-shot", "4"], "piqa takes 4 examples from its own file"),
        (["--tasks", "piqa", "--few-shot", "two"], "'two' is not a whole number"),
        (["--tasks", "piqa", "--rules", "papr"], "no rule 'papr'; did you mean 'paper'"),
        (["--tasks", "piqa", "--rules", "given"], "no rule is given; --selector or a settings"),
        (["--tasks", "piqa", "--rules", "static"], "the rule static needs --calibration STORE or"),
        (["--tasks", "piqa", "--beta", "2"], "beta must be above 0 and at most 1"),
        (["--tasks", "piqa", "--dense-layers", "7"], "dense layer 7 is outside the model"),
        (["--tasks", "piqa", "--calibration", "none"], "no file at 'none'"),
        (["--tasks", "piqa", "--out", "none/x.json"], "there is no such folder"),
        (["--tasks", "piqa", "--data-dir", "none"], "no folder 'none', in which piqa needs a file"),
        (["--tasks", "kl", "--text", "none.txt"], "no file at 'none.txt'"),
        ([], "the following arguments are required: --tasks"),
    ],
)
def test_mistakes_are_one_line(cli: Cli, usual: list[Any], argv: list[str], message: str) -> None:
    assert message in refusal(cli("eval", *usual, *argv))


def test_a_row_of_another_shape_is_named(cli: Cli, usual: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "boolq_val.jsonl").write_text('{"question": "q", "passage": "p", "answer": "yes"}\n')
    done = cli("eval", *usual, "--tasks", "boolq", "--data-dir", folder)
    assert "line 1 has a 'answer' that is not true or false" in refusal(done)


def test_settings_come_from_a_file(cli: Cli, usual: list[Any], tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text('beta = 0.25\nselector = "griffin"\nrules = ["griffin"]\n')
    done = cli("eval", *usual, "--tasks", "piqa", "--limit", 1, "--config", config, "--json")
    assert json.loads(done.out)["rules"]["griffin"]["selector"]["beta"] == 0.25


def test_a_settings_file_that_names_a_rule_is_what_is_evaluated(
    cli: Cli, usual: list[Any], tmp_path: Path
) -> None:
    """With all that it says: what `tune` found is what is scored."""
    config = tmp_path / "tuned.toml"
    config.write_text(
        'selector = "griffin"\nstand-in = "linear"\nrank = 3\nridge = 2.0\ndense-layers = [0]\n'
        '[budgets]\n"1" = 0.25\n"2" = 0.75\n[active-budgets]\n"1" = 0.5\n'
    )
    shared = ("eval", *usual, "--tasks", "kl", "--limit", 2, "--config", config, "--json")
    rules = json.loads(cli(*shared).out)["rules"]
    assert list(rules) == ["dense", "griffin+linear"]
    rule = rules["griffin+linear"]
    assert rule["stand_in"]["rank"] == 3
    assert rule["stand_in"]["ridge"] == 2.0
    assert rule["selector"]["dense_layers"] == [0]
    assert rule["selector"]["budgets"] == {"1": 0.25, "2": 0.75}
    assert rule["selector"]["active_budgets"] == {"1": 0.5}
    both = json.loads(cli(*shared, "--rules", "paper,given").out)["rules"]
    assert list(both) == ["dense", "stability", "griffin+linear"]
    assert both["griffin+linear"] == rule


@pytest.mark.parametrize("given", ["selector=impact,beta=0.5,stand_in=none,dense_layers=0+2", {}])
def test_model_args_are_the_options_of_the_command_line(model_dir: Path, given: Any) -> None:
    if isinstance(given, str):
        model = CoreInfer.create_from_arg_string(
            f"pretrained={model_dir},backend=hf,{given}", {"batch_size": 3, "device": None}
        )
    else:
        model = CoreInfer.create_from_arg_obj(
            {"pretrained": str(model_dir), "backend": "hf", "selector": "impact", "beta": 0.5,
             "stand_in": None, "dense_layers": "0+2"},
            {"batch_size": "auto", "max_batch_size": None, "device": "cpu"},
        )  # fmt: skip
    (rule,) = model.rules.values()
    assert rule.setting.describe() == {
        "selector": {
            "name": "impact", "beta": 0.5, "dense_layers": [0, 2], "budgets": {},
            "active": 1.0, "active_budgets": {}, "count_bos": False,
        },
        "stand_in": None,
    }  # fmt: skip


def test_a_plus_is_a_comma_in_lists_alone(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c++"
    folder.symlink_to(model_dir)
    model = CoreInfer.create_from_arg_string(
        f"pretrained={folder},backend=hf,budgets=0=0.5+1=0.25,active_budgets=0-1=0.5+2=0.75"
    )
    (rule,) = model.rules.values()
    selector = rule.setting.describe()["selector"]
    assert selector["budgets"] == {"0": 0.5, "1": 0.25}
    assert selector["active_budgets"] == {"0": 0.5, "1": 0.5, "2": 0.75}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("selector=impct", "--model_args: argument --selector: invalid choice: 'impct'"),
        ("betta=0.5", "--model_args: unrecognized arguments: --betta=0.5"),
        ("beta=7", "beta must be above 0 and at most 1"),
    ],
)
def test_model_args_that_are_none_are_refused(model_dir: Path, given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CoreInfer.create_from_arg_string(f"pretrained={model_dir},backend=hf,{given}")


def python(code: str, *, path: list[Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Another interpreter, with the plug-in as it is installed, or else as it would be."""
    files = metadata.files("coreinfer") or []
    installed = any(file.name == "coreinfer-lm-eval.pth" for file in files)
    plugin = ROOT / "plugins" / "lm_eval"
    start = "" if installed else f"import site; site.addsitedir({str(plugin)!r})\n"
    paths = os.pathsep.join(map(str, path))
    return subprocess.run(
        [sys.executable, "-c", start + code],
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_lm_evals_command_line_knows_the_model(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """`lm_eval --model coreinfer`, on a task of a file: no hub is needed."""
    task = tmp_path / "hats.yaml"
    task.write_text(
        "task: hats\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data / 'piqa_valid.jsonl'}\n"
        'doc_to_text: "{{goal}}"\ndoc_to_target: label\ndoc_to_choice: "{{[sol1, sol2]}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    argv = [
        "lm_eval", "--model", "coreinfer", "--model_args",
        f"pretrained={model_dir},backend=hf,selector=stability,stand_in=none,beta=0.5",
        "--tasks", str(task), "--batch_size", "2",
    ]  # fmt: skip
    code = (
        f"import sys; sys.argv = {argv!r}\n"
        "assert 'lm_eval' not in sys.modules and 'coreinfer' not in sys.modules\n"
        # Its index of all tasks takes half a minute; this one is given by its path.
        "from lm_eval.tasks import TaskManager; init = TaskManager.__init__\n"
        "TaskManager.__init__ = lambda self, *a, **k: init(self, *a, include_defaults=False, **k)\n"
        "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    )
    done = python(code, path=[], HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    assert "coreinfer ({'pretrained'" in done.stdout
    assert "|hats|" in done.stdout.replace(" ", "")


def test_the_plug_in_does_no_harm_without_lm_eval(tmp_path: Path) -> None:
    """Neither where lm-eval is absent, nor where it is another one."""
    code = "import sys\nassert 'lm_eval' not in sys.modules and 'torch' not in sys.modules\n"
    assert python(code + "import json, email.mime", path=[]).returncode == 0
    package = tmp_path / "lm_eval"
    (package / "models").mkdir(parents=True)
    for init in (package / "__init__.py", package / "models" / "__init__.py"):
        init.write_text("")
    code += "import lm_eval.models; assert 'coreinfer' not in sys.modules"
    done = python(code, path=[tmp_path])
    assert (done.returncode, done.stderr) == (0, "")
