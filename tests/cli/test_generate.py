"""`coreinfer generate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from coreinfer.kernels.library import kernel_path
from tests.cli.conftest import Cli, refusal
from tests.tiny import tiny_model, tiny_tokenizer

KEYS = {
    "prompt_tokens", "generated_tokens", "text", "token_ids", "finish_reason", "selector", "alpha",
    "beta", "dense_layers", "density", "bytes_per_token", "dense_bytes_per_token", "prefill_s",
    "select_s", "decode_s", "decode_tokens_per_s", "peak_memory_bytes", "backend", "dtype", "model",
}  # fmt: skip


def test_the_answer_goes_to_stdout_and_its_cost_to_stderr(cli: Cli, model_dir: Path) -> None:
    run = cli("generate", "--model", model_dir, "--prompt", "hi", "--max-new-tokens", 5)
    record = json.loads(
        cli("generate", "--model", model_dir, "--prompt", "hi", "--max-new-tokens", 5, "--json").out
    )
    assert run.code == 0
    assert run.out == record["text"] + "\n"
    (line,) = run.err.splitlines()
    for part in ("impact: density 0.40", "a token (dense", "prefill", "select", "decode"):
        assert part in line


def test_json_is_one_object_with_the_documented_keys(cli: Cli, model_dir: Path) -> None:
    run = cli("generate", "--model", model_dir, "--prompt", "hi", "--max-new-tokens", 5, "--json")
    record = json.loads(run.out)
    assert record.keys() >= KEYS
    assert run.err == ""
    assert record["model"] == "tiny"
    assert record["generated_tokens"] == len(record["token_ids"]) == 5


def test_keeping_everything_is_transformers_own_answer(cli: Cli, model_dir: Path) -> None:
    run = cli(
        "generate", "--model", model_dir, "--raw", "--prompt", "hello", "--max-new-tokens", 8,
        "--beta", 1, "--json",
    )  # fmt: skip
    ids = torch.tensor([tiny_tokenizer()("hello").input_ids])
    expected = tiny_model().generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert json.loads(run.out)["token_ids"] == expected.tolist()


def test_a_prompt_file_is_one_prompt_byte_for_byte(
    cli: Cli, model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b" two\r\nlines\n\n")
    run = cli(
        "generate", "--model", model_dir, "--raw", "--prompt-file", path, "--max-new-tokens", 1,
        "--json",
    )  # fmt: skip
    assert json.loads(run.out)["prompt_tokens"] == len(b" two\r\nlines\n\n")


@pytest.mark.parametrize("backend", ["hf", "native"])
def test_fewer_bytes_are_read_where_neurons_are_skipped(
    cli: Cli, model_dir: Path, tmp_path: Path, backend: str
) -> None:
    def record(*options: object) -> dict[str, object]:
        run = cli(
            "generate", "--model", model_dir, "--backend", backend, "--prompt", "hi",
            "--max-new-tokens", 6, "--json", *options,
        )  # fmt: skip
        found: dict[str, object] = json.loads(run.out)
        return found

    whole, some, fewer = record(), record("--active", 0.7), record("--active", 0.3)
    assert [r["active"] for r in (whole, some, fewer)] == [1.0, 0.7, 0.3]
    assert whole["density"] == some["density"] == fewer["density"]
    assert whole["bytes_per_token"] > some["bytes_per_token"] > fewer["bytes_per_token"]  # type: ignore[operator]
    config = tmp_path / "settings.toml"
    config.write_text("active = 0.3\n")
    again = record("--config", config)
    assert (again["token_ids"], again["active"]) == (fewer["token_ids"], 0.3)
    path = tmp_path / "set.safetensors"
    assert cli("select", "--model", model_dir, "--prompt", "hi", "--out", path).code == 0
    fixed = record("--core-set", path, "--active", 0.3)
    assert fixed["active"] == 0.3
    assert fixed["bytes_per_token"] < record("--core-set", path)["bytes_per_token"]  # type: ignore[operator]
    config.write_text('[active-budgets]\n"0-1" = 0.3\n"2" = 0.7\n')
    by_layer = record("--config", config)
    same = record("--active", 0.7, "--active-budgets", "0-1=0.3")
    for key in ("token_ids", "active", "bytes_per_token"):
        assert by_layer[key] == same[key]
    assert by_layer["active"] == pytest.approx((0.3 + 0.3 + 0.7) / 3)
    assert fewer["bytes_per_token"] < by_layer["bytes_per_token"] < some["bytes_per_token"]  # type: ignore[operator]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_file_of_prompts_gives_an_object_each_whatever_the_batch(
    cli: Cli, model_dir: Path, tmp_path: Path, batch_size: int
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("one", "three four", "5")))
    common = ("--model", model_dir, "--max-new-tokens", 4, "--json")
    run = cli("generate", "--prompts", path, "--batch-size", batch_size, *common)
    records = [json.loads(line) for line in run.out.splitlines()]
    alone = [
        json.loads(cli("generate", "--prompt", p, *common).out) for p in ("one", "three four", "5")
    ]
    assert [r["token_ids"] for r in records] == [r["token_ids"] for r in alone]


def test_bad_lines_are_named_and_the_others_answered(
    cli: Cli, model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\nnot json\n{"text": "b"}\n{"prompt": ""}\n{"prompt": "c"}\n')
    run = cli("generate", "--model", model_dir, "--prompts", path, "--max-new-tokens", 2, "--json")
    assert run.code == 2
    assert len(run.out.splitlines()) == 2
    first, second, third = run.err.splitlines()
    assert "line 2 is not JSON" in first
    assert "line 3 has no 'prompt'" in second
    assert "line 4: the prompt is empty" in third


def test_compare_shows_both_answers_the_difference_and_both_speeds(
    cli: Cli, model_dir: Path
) -> None:
    common = ("generate", "--model", model_dir, "--prompt", "hi", "--max-new-tokens", 8, "--beta",
              0.1, "--compare")  # fmt: skip
    both = json.loads(cli(*common, "--json").out)
    assert both["density"] < 0.2
    assert both["dense"]["density"] == 1.0
    assert both["dense"]["selector"] == "dense"
    tokens = list(zip(both["dense"]["token_ids"], both["token_ids"], strict=True))
    expected = next((i for i, (a, b) in enumerate(tokens) if a != b), None)
    assert both["first_difference"] == expected is not None
    assert both["speed_ratio"] > 0
    run = cli(*common)
    assert run.out.startswith("--- dense ---\n" + both["dense"]["text"] + "\n--- sparse ---\n")
    assert f"first differing token: number {expected + 1}" in run.out
    assert "times the dense speed" in run.out
    assert [line.split(":")[0] for line in run.err.splitlines()] == ["dense", "sparse"]


def test_compare_says_when_the_answers_are_the_same(cli: Cli, model_dir: Path) -> None:
    run = cli(
        "generate", "--model", model_dir, "--prompt", "hi", "--max-new-tokens", 4, "--beta", 1,
        "--compare",
    )  # fmt: skip
    assert "the same 4 tokens" in run.out


def test_a_saved_core_set_decodes_as_the_rule_that_chose_it(
    cli: Cli, model_dir: Path, tmp_path: Path
) -> None:
    common = ("--model", model_dir, "--prompt", "some prompt")
    rule = ("--selector", "impact", "--beta", 0.3, "--dense-layers", "1")
    assert cli("select", *common, *rule, "--out", tmp_path / "set").code == 0
    answer = ("generate", *common, "--raw", "--max-new-tokens", 6, "--json")
    by_rule = json.loads(cli(*answer, *rule).out)
    by_file = json.loads(cli(*answer, "--core-set", tmp_path / "set").out)
    assert by_file["token_ids"] == by_rule["token_ids"]
    assert by_file["density"] == by_rule["density"]
    assert by_file["dense_layers"] == [1]
    assert by_file["selector"] == "fixed"
    assert (by_rule["beta"], by_file["beta"]) == (0.3, None)
    told = cli(*answer, *rule, "--core-set", tmp_path / "set")
    assert json.loads(told.out)["token_ids"] == by_rule["token_ids"]
    for option in ("selector", "beta", "dense-layers"):
        assert f"note: --{option} has no effect with --core-set" in told.err


@pytest.mark.parametrize(
    "selector", ["dense", "stability", "impact", "griffin", "random", "oracle"]
)
@pytest.mark.parametrize("stand_in", ["none", "mean", "linear"])
def test_every_rule_runs_with_every_stand_in(
    cli: Cli, model_dir: Path, selector: str, stand_in: str
) -> None:
    run = cli(
        "generate", "--model", model_dir, "--prompt", "hi", "--max-new-tokens", 2, "--json",
        "--selector", selector, "--stand-in", stand_in, "--budgets", "0=0.5", "--dense-layers", "2",
    )  # fmt: skip
    assert run.code == 0, run.err
    record = json.loads(run.out)
    kept = 3 * 48 if selector == "dense" else 24 + 19 + 48
    assert record["density"] == pytest.approx(kept / (3 * 48))
    assert record["stand_in"] == stand_in


def test_settings_without_effect_are_pointed_out(cli: Cli, model_dir: Path) -> None:
    run = cli(
        "generate", "--model", model_dir, "--prompt", "hi", "--max-new-tokens", 1, "--stand-in",
        "mean", "--alpha", 0.3, "--gamma", 0.2, "--rank", 4,
    )  # fmt: skip
    assert run.code == 0
    for name in ("alpha", "gamma", "rank"):
        assert f"note: --{name} has no effect with" in run.err
    common = ("generate", "--model", model_dir, "--prompt", "hi", "--max-new-tokens", 1)
    run = cli(*common, "--fit-skipped")
    assert "note: --fit-skipped has no effect with no --active" in run.err
    run = cli(*common, "--fit-skipped", "--active", 0.5)
    assert (run.code, "has no effect" in run.err) == (0, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "the prompt is empty; give at least one character"),
        (["--prompt", "a" * 600], "reads 512 at most and needs room for an answer"),
        ([], "one of the arguments --prompt --prompt-file --prompts is required"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed with"),
        (["--prompt-file", "absent.txt"], "no file at 'absent.txt'"),
        (["--prompts", "absent.jsonl"], "no file at 'absent.jsonl'"),
        (["--prompt", "a", "--alpha", "0"], "alpha must be above 0 and at most 1, got 0.0"),
        (["--prompt", "a", "--alpha", "nan"], "alpha must be above 0 and at most 1, got nan"),
        (["--prompt", "a", "--alpha", "much"], "argument --alpha: 'much' is not a number"),
        (["--prompt", "a", "--gamma", "1.01"], "gamma must be above 0 and at most 1, got 1.01"),
        (["--prompt", "a", "--beta", "1.2"], "beta must be above 0 and at most 1, got 1.2"),
        (["--prompt", "a", "--beta", "-1"], "beta must be above 0 and at most 1, got -1.0"),
        (["--prompt", "a", "--beta", "0.001"], "rounds to none; keep at least"),
        (["--prompt", "a", "--dense-layers", "0-5"], "dense layer 3 is outside the model"),
        (["--prompt", "a", "--dense-layers", "x"], "'x' is no layer"),
        (["--prompt", "a", "--dense-layers", "2-0"], "'2-0' is no range"),
        (["--prompt", "a", "--budgets", "0=2"], "the budget of layer 0 must be"),
        (["--prompt", "a", "--budgets", "9=0.5"], "budget layer 9 is outside the model"),
        (["--prompt", "a", "--active-budgets", "9=0.5"], "active budget layer 9 is outside"),
        (["--prompt", "a", "--budgets", "0"], "'0' is no budget"),
        (["--prompt", "a", "--budgets", "=0.5"], "'=0.5' is no budget"),
        (["--prompt", "a", "--seed", "-1"], "the seed must be 0 to 9223372036854775807, got -1"),
        (["--prompt", "a", "--seed", str(2**63)], "the seed must be 0 to 9223372036854775807"),
        (["--prompt", "a", "--batch-size", "0"], "the batch size must be at least 1, got 0"),
        (["--prompt", "a", "--selector", "similarity"], "needs --clusters STORE"),
        (["--prompt", "a", "--selector", "auto", "--clusters", "nowhere"], "no cluster store"),
        (["--prompt", "a", "--selector", "best"], "invalid choice: 'best'"),
        (["--prompt", "a", "--core-set", "absent"], "no core set at 'absent'"),
        (["--prompt", "a", "--active", "0"], "active must be above 0 and at most 1, got 0.0"),
        (["--prompt", "a", "--active", "1.5"], "active must be above 0 and at most 1, got 1.5"),
        (["--prompt", "a", "--active", "some"], "'some' is not a number"),
        (["--prompt", "a", "--stand-in", "linear", "--rank", "0"], "rank must be"),
        (["--prompt", "a", "--stand-in", "linear", "--ridge", "-1"], "ridge must be"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--prompt", "a", "--max-new-tokens", "many"], "'many' is not a whole number"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be 0 or more, got -1.0"),
        (["--prompt", "a", "--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["--prompt", "a", "--threads", "0"], "threads must be at least 1, got 0"),
        (["--prompt", "a", "--min-p", "2"], "min_p must be 0 (all) to 1, got 2.0"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty must be above 0"),
        (["--prompt", "a", "--threads", "9999"], "this machine's cores, got 9999"),
        (["--prompt", "a", "--backend", "native", "--dtype", "float32"], "use --backend hf"),
        (["--prompt", "a", "--backend", "native", "--device", "cuda"], "use --backend hf"),
        (["--prompt", "a", "--backend", "hf", "--dtype", "int4"], "use --backend native"),
        (["--prompt", "a", "--device", "abacus"], "abacus"),
        (["--prompt", "a", "--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(cli: Cli, model_dir: Path, options: list[str], message: str) -> None:
    assert message in refusal(cli("generate", "--model", model_dir, *options))


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", [], ("native", "bfloat16")),
        ("llama", ["--dtype", "float32"], ("hf", "float32")),
        ("opt", ["--dtype", "bfloat16"], ("native", "bfloat16")),
        ("gpt2", [], ("hf", "float32")),
        ("gpt2", ["--dtype", "bfloat16"], ("hf", "bfloat16")),
    ],
)
def test_the_backend_is_the_fastest_that_knows_the_model(
    cli: Cli, tmp_path: Path, family: str, options: list[str], expected: tuple[str, str]
) -> None:
    if kernel_path() == "twin":
        expected = ("hf", "bfloat16" if "bfloat16" in options else "float32")
    tiny_model(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    run = cli(
        "generate", "--model", tmp_path, *options, "--prompt", "hi", "--max-new-tokens", 2, "--json"
    )
    record = json.loads(run.out)
    assert (record["backend"], record["dtype"]) == expected


def test_a_dtype_of_native_alone_is_not_answered_by_another_backend(
    cli: Cli, tmp_path: Path
) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    run = cli("generate", "--model", tmp_path, "--dtype", "int4", "--prompt", "hi")
    assert "native backend does not do the architecture 'gpt2'" in refusal(run)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_the_native_backend_answers(
    cli: Cli, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path))
    run = cli(
        "generate", "--model", model_dir, "--backend", "native", "--dtype", dtype, "--prompt", "hi",
        "--max-new-tokens", 5, "--ignore-eos", "--repetition-penalty", 1.1, "--json",
    )  # fmt: skip
    if dtype == "int4":  # 32 columns are no group of 64
        assert "group" in refusal(run)
        return
    record = json.loads(run.out)
    assert (record["backend"], record["dtype"]) == ("native", dtype)
    assert record["generated_tokens"] == 5
    assert record["bytes_per_token"] < record["dense_bytes_per_token"]


def test_a_file_in_another_encoding_is_refused(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\xe9".encode("latin-1"))
    line = refusal(cli("generate", "--model", model_dir, "--prompt-file", path))
    assert "is not UTF-8 (byte 3)" in line


def test_the_summary_has_no_speed_for_a_single_token(cli: Cli, model_dir: Path) -> None:
    run = cli("generate", "--model", model_dir, "--prompt", "hi", "--max-new-tokens", 1)
    assert "tokens/s" not in run.err
    assert run.err.rstrip().endswith(" s]")
