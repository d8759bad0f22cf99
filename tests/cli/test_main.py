"""The command line as a whole: help, settings files, exit codes, signals, pipes."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest

import coreinfer
from coreinfer.cli.config import expand_config
from coreinfer.cli.main import VERBS, build_parser, main
from coreinfer.cli.options import SELECTOR_NAMES, STAND_IN_NAMES
from coreinfer.selectors import SELECTORS, Auto, Impact, Similarity, Stability
from coreinfer.standins import STAND_INS, Linear
from tests.cli.conftest import Cli, refusal

COMMAND = [sys.executable, "-c", "from coreinfer.cli.main import main; raise SystemExit(main())"]


def default_of(rule: type, name: str) -> float:
    (found,) = (field.default for field in fields(rule) if field.name == name)
    assert isinstance(found, (int, float))
    return found


def generate_action(option: str) -> argparse.Action:
    (verbs,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    action: argparse.Action = verbs.choices["generate"]._option_string_actions[option]
    return action


def test_the_options_name_every_rule_and_stand_in() -> None:
    assert set(SELECTOR_NAMES) == set(SELECTORS)
    assert set(STAND_IN_NAMES) == {"none", *STAND_INS}


def test_every_option_has_a_help_text() -> None:
    (verbs,) = (a for a in build_parser()._actions if a.dest == "==SUPPRESS==" or a.choices)
    assert verbs.choices is not None
    assert len(verbs.choices) == len(VERBS)
    for verb, parser in verbs.choices.items():  # type: ignore[attr-defined]
        for action in parser._actions:
            assert action.help, f"{verb} {action.dest}"
        assert "None" not in parser.format_help(), verb


@pytest.mark.parametrize(
    ("option", "default"),
    [
        ("--alpha", Stability().alpha),
        ("--beta", Impact().beta),
        ("--gamma", default_of(Similarity, "gamma")),
        ("--prior-tokens", default_of(Auto, "prior_tokens")),
        ("--min-stability", default_of(Auto, "min_stability")),
        ("--rank", Linear().rank),
        ("--ridge", Linear().ridge),
    ],
)
def test_the_help_names_the_default_that_the_code_has(option: str, default: float) -> None:
    # These options are None where they are not given: the code's own default then counts.
    text = generate_action(option).help
    assert text is not None
    (named, *_) = re.findall(r"\(default: ([0-9.]*[0-9])", text)
    assert float(named) == default


def test_help_needs_no_heavy_import() -> None:
    script = (
        "import sys; from coreinfer.cli.main import build_parser; build_parser();"
        "heavy = {'torch', 'transformers', 'sklearn', 'numpy'} & set(sys.modules);"
        "raise SystemExit(f'imports {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([v, "--help"] for v in (
    "generate", "chat", "select", "cluster", "score", "analyze", "info", "pull", "convert",
))])  # fmt: skip
def test_help_is_printed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 0
    assert "coreinfer" in capsys.readouterr().out


def test_what_the_package_exports_is_there() -> None:
    for name in coreinfer.__all__:
        assert getattr(coreinfer, name) is not None
    assert set(coreinfer.__all__) == set(coreinfer._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = coreinfer.nonsense


def test_no_verb_and_an_unknown_verb_are_refused(cli: Cli) -> None:
    assert "required: VERB" in refusal(cli())
    assert "invalid choice: 'fly'" in refusal(cli("fly"))


def test_settings_come_from_a_file_and_what_is_typed_wins(
    cli: Cli, model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(
        f'model = "{model_dir}"\nselector = "impact"\nbeta = 0.25\ndense-layers = [0]\n'
        'max_new_tokens = 3\nstop = "zz"\nraw = true\nk = 3\n[budgets]\n"2" = 0.5\n'
    )
    run = cli("generate", "--config", path, "--prompt", "hi", "--json")
    assert run.code == 0, run.err
    record = json.loads(run.out)
    assert (record["selector"], record["beta"], record["generated_tokens"]) == ("impact", 0.25, 3)
    assert record["dense_layers"] == [0]
    assert record["density"] == pytest.approx((48 + 12 + 24) / 144)
    assert record["prompt_tokens"] == 2
    typed = cli("generate", f"--config={path}", "--prompt", "hi", "--json", "--beta", 0.5)
    assert json.loads(typed.out)["beta"] == 0.5


def test_a_list_of_stop_texts_is_several_stop_texts(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('stop = ["one", "two, three"]\n')
    parser = build_parser()
    argv = expand_config(parser, ["generate", "--config", str(path), "--prompt", "x"])
    assert parser.parse_args(argv).stop == ["one", "two, three"]


@pytest.mark.parametrize(
    ("settings", "argv", "expected"),
    [
        ("bytes = 0.5", ["tune", "--budget", "kl<=1"], {"budget": "kl<=1", "bytes": None}),
        ("bytes = 0.5", ["tune"], {"budget": None, "bytes": 0.5}),
        ("bytes = 0.5", ["tune", "--bytes", "0.7"], {"budget": None, "bytes": 0.7}),
        ('prompt = "x"', ["generate", "--prompt-file=f"], {"prompt": None, "prompt_file": "f"}),
        ('stop = ["a", "c"]', ["generate", "--prompt=x", "--stop", "b"], {"stop": ["b"]}),
        ('stop = ["a", "c"]', ["generate", "--prompt=x"], {"stop": ["a", "c"]}),
        ('model = ["a", "b"]', ["analyze", "--out=o", "--model", "c"], {"model": ["c"]}),
        ('core-set = "s"', ["generate", "--prompt=x", "--selector=impact"], {"core_set": None}),
        ('core-set = "/s"', ["generate", "--prompt=x"], {"core_set": "/s"}),
    ],
)
def test_what_is_typed_wins_over_what_it_takes_the_place_of(
    tmp_path: Path, settings: str, argv: list[str], expected: dict[str, object]
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(settings)
    parser = build_parser()
    if argv[0] == "tune":
        argv = [*argv, "--prompts", "p", "--out", "o"]
    args = vars(parser.parse_args(expand_config(parser, [*argv, "--config", str(path)])))
    assert {name: args[name] for name in expected} == expected


def test_stores_are_found_from_the_folder_of_the_settings_file(tmp_path: Path) -> None:
    config = tmp_path / "far" / "tuned.toml"
    config.parent.mkdir()
    config.write_text('calibration = "store"\nclusters = "/abs"\ncore-set = "../set"\n')
    found = expand_config(build_parser(), ["generate", "--config", str(config)])
    assert f"--calibration={tmp_path / 'far' / 'store'}" in found
    assert "--clusters=/abs" in found
    assert f"--core-set={tmp_path / 'far' / '..' / 'set'}" in found
    config.write_text('calibration = ["a", "b"]\n')
    found = expand_config(build_parser(), ["analyze", "--config", str(config)])
    assert [one for one in found if one.startswith("--calibration")] == [
        f"--calibration={tmp_path / 'far' / name}" for name in "ab"
    ]


def test_options_are_typed_in_full(cli: Cli) -> None:
    line = refusal(cli("generate", "--prompt", "hi", "--conf", "settings.toml"))
    assert "unrecognized arguments: --conf" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta = 0.5", "'betta' is no setting; did you mean 'beta'?"),
        ('configs = "a.toml"', "'configs' is no setting"),
        ('config = "a.toml"', "'config' is no setting"),
        ("beta = ", "is not TOML"),
        ('beta = "much"', "argument --beta: 'much' is not a number"),
        ('raw = "yes"', "the setting 'raw' is true or false, got 'yes'"),
        ('selector = "best"', "invalid choice: 'best'"),
        ("\xff", "is not TOML"),
    ],
)
def test_a_bad_settings_file_is_refused(cli: Cli, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(text.encode("latin-1"))
    line = refusal(cli("generate", "--config", path, "--prompt", "hi"))
    assert message in line
    assert "did you mean 'config'" not in line


def test_a_missing_settings_file_is_refused(cli: Cli) -> None:
    line = refusal(cli("generate", "--config", "absent.toml", "--prompt", "hi"))
    assert "no settings file at 'absent.toml'" in line


def test_the_exit_code_reaches_the_shell_without_a_traceback(model_dir: Path) -> None:
    argv = ["generate", "--model", str(model_dir), "--prompt", "x", "--beta", "9"]
    run = subprocess.run([*COMMAND, *argv], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "coreinfer: beta must be above 0 and at most 1, got 9.0\n"


def test_an_answer_is_shown_in_any_encoding(model_dir: Path) -> None:
    argv = ["generate", "--model", str(model_dir), "--prompt", "hello", "--max-new-tokens", "30"]
    run = subprocess.run(
        [*COMMAND, *argv, "--ignore-eos"], capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert b"?" in run.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_output_to_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [*COMMAND, "info"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("coreinfer: no space left while writing")


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_ctrl_c_ends_cleanly(model_dir: Path) -> None:
    argv = [
        "generate", "--model", str(model_dir), "--prompt", "x", "--max-new-tokens", "400",
        "--ignore-eos", "--temperature", "1",
    ]  # fmt: skip
    process = subprocess.Popen(
        [*COMMAND, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so does all that it starts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    process.stdout.read(1)  # it is decoding
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_a_closed_pipe_ends_quietly(model_dir: Path) -> None:
    argv = [
        "generate", "--model", str(model_dir), "--prompt", "x", "--max-new-tokens", "400",
        "--ignore-eos", "--temperature", "1",
    ]  # fmt: skip
    process = subprocess.Popen([*COMMAND, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.returncode == 0
    assert b"Traceback" not in process.stderr.read()
