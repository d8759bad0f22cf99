"""Tasks under rules: sections, records, resuming, and what a user can get wrong."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from coreinfer.backends.hf.session import HfBackend
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Setting, measure, windows
from coreinfer.evaluation.local import LOCAL_TASKS
from coreinfer.evaluation.rules import Rule
from coreinfer.evaluation.run import (
    EvalSettings,
    Place,
    describe_run,
    open_answers,
    plan,
    run_plan,
    table,
)
from coreinfer.evaluation.section import HEAD, Metric, cost_of, markdown, section, table_rows
from coreinfer.evaluation.texts import TEXT_TASKS
from coreinfer.journal import Journal
from coreinfer.selectors import Dense, Impact, Random, Stability
from coreinfer.standins import Linear
from tests.evaluation.rows import write_all
from tests.interrupting import interrupt
from tests.tiny import EOS, tiny_backend, tiny_model, tiny_tokenizer

RULES = {
    "dense": Rule(Setting(Dense())),
    "stability": Rule(Setting(Stability(beta=0.3))),
    "impact+linear": Rule(Setting(Impact(beta=0.3), Linear(rank=2))),
    "random": Rule(Setting(Random(beta=0.3))),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


def backend(**options: Any) -> HfBackend:
    """A tiny model whose answers are short: every other token ends them."""
    model = tiny_model(eos_token_id=[*range(0, 256, 2), EOS])
    return HfBackend(model, tiny_tokenizer(**options), "tiny")


def run(
    data: Path, tasks: list[str], answers: Journal | None = None, **settings: Any
) -> list[dict[str, Any]]:
    made = EvalSettings(**{"limit": 3, "few_shot": 0, **settings})
    planned = plan(tasks, made, data_dir=data, text=None)
    return list(
        run_plan(planned, backend(), RULES, made, Journal() if answers is None else answers)
    )


@pytest.fixture(scope="module")
def everything(data: Path) -> list[dict[str, Any]]:
    return run(data, [*LOCAL_TASKS, *TEXT_TASKS])


def test_every_task_runs_under_every_rule(everything: list[dict[str, Any]]) -> None:
    assert [one["task"] for one in everything] == [*LOCAL_TASKS, *TEXT_TASKS]
    for one in everything:
        assert one["items"] == 3
        assert list(one["rules"]) == list(RULES)
        assert one["metrics"]
        assert one["data"]["sha256"]
        for metric in one["metrics"]:
            for rule, measured in metric["rules"].items():
                low, high = measured["interval"]
                assert low <= high
                assert math.isfinite(measured["value"])
                assert ("difference" in measured) == (rule != "dense")
    json.dumps(everything, allow_nan=False)


def test_density_and_bytes_are_the_rules(everything: list[dict[str, Any]]) -> None:
    for one in everything:
        cost = one["rules"]
        assert cost["dense"]["density"] == 1
        assert cost["dense"]["bytes_of_dense"] == 1
        assert {cost[name]["density"] for name in RULES if name != "dense"} == {14 / 48}
        assert cost["stability"]["bytes_per_token"] == cost["random"]["bytes_per_token"]
        assert cost["stability"]["bytes_of_dense"] < 1
        assert cost["impact+linear"]["bytes_per_token"] > cost["random"]["bytes_per_token"]


def test_what_has_headline_metrics_has_them(everything: list[dict[str, Any]]) -> None:
    by_task = {one["task"]: {metric["metric"] for metric in one["metrics"]} for one in everything}
    for name, task in LOCAL_TASKS.items():
        assert set(task.headline) <= by_task[name]


def test_perplexity_and_kl_are_those_of_the_continuations(data: Path) -> None:
    perplexity, kl = run(data, ["perplexity", "kl"], few_shot=None)
    text = (data / "wikitext2_raw_test.txt").read_text()
    pieces = windows(backend(), text, count=3, prompt_tokens=200, continuation_tokens=60)
    settings = {name: rule.setting for name, rule in RULES.items() if name != "dense"}
    *_, wanted = measure(backend(), pieces, settings)
    (measured,) = perplexity["metrics"]
    divergence, agreement = kl["metrics"]
    for name, quality in wanted.items():
        assert measured["rules"][name]["value"] == pytest.approx(quality.perplexity)
        assert divergence["rules"][name]["value"] == pytest.approx(fmean(quality.kl), abs=1e-9)
        assert agreement["rules"][name]["value"] == pytest.approx(fmean(quality.agreement))
        assert perplexity["rules"][name]["bytes_per_token"] == quality.bytes_per_token[0]
    assert divergence["rules"]["random"]["value"] > 0.001


def test_a_difference_is_that_of_the_values(everything: list[dict[str, Any]]) -> None:
    for one in everything:
        for metric in one["metrics"]:
            dense = metric["rules"]["dense"]["value"]
            for name in ("stability", "random"):
                measured = metric["rules"][name]
                assert measured["difference"] == measured["value"] - dense


def test_an_interrupted_run_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["piqa", "triviaqa", "kl"]
    wanted = run(data, tasks, batch_size=1)
    with monkeypatch.context() as patch:
        interrupt(patch, Journal, "add", after=25)
        with pytest.raises(KeyboardInterrupt):
            run(data, tasks, Journal.for_settings(tmp_path, {}), batch_size=1)
    known = Journal.for_settings(tmp_path, {})
    assert len(known) > 0
    before = len(known)
    assert run(data, tasks, known, batch_size=1) == wanted
    complete = Journal.for_settings(tmp_path, {})
    assert len(complete) > before
    with monkeypatch.context() as patch:  # a finished one computes nothing
        interrupt(patch, HfBackend, "start", after=0)
        assert run(data, tasks, complete, batch_size=1) == wanted


def test_another_rule_is_all_that_is_computed(data: Path) -> None:
    answers = Journal()
    settings = EvalSettings(limit=2)
    planned = plan(["piqa"], settings, data_dir=data, text=None)
    (first,) = run_plan(planned, tiny_backend(), {"dense": RULES["dense"]}, settings, answers)
    known = len(answers)
    (both,) = run_plan(
        planned, tiny_backend(), {k: RULES[k] for k in ("dense", "random")}, settings, answers
    )
    assert len(answers) == 2 * known
    dense = [one["metrics"][0]["rules"]["dense"] for one in (first, both)]
    assert dense[0] == dense[1]


def test_answers_are_kept_apart_by_model(tmp_path: Path) -> None:
    open_answers(tiny_backend(), tmp_path).add({"a": {"logprob": 1.0}})
    assert "a" in open_answers(tiny_backend(), tmp_path)
    assert "a" not in open_answers(tiny_backend(seed=1), tmp_path)


def test_a_record_says_how_it_was_made(data: Path, tmp_path: Path) -> None:
    settings = EvalSettings(limit=3, dense_scoring=True, seed=7)
    record = describe_run(tiny_backend(), RULES, settings)
    assert record["format"] == "coreinfer.eval/1"
    assert record["scoring"] == "dense"
    assert (record["limit"], record["few_shot"], record["seed"]) == (3, None, 7)
    assert {"coreinfer", "torch", "transformers", "lm_eval", "sacrebleu"} <= set(record["versions"])
    assert record["rules"]["impact+linear"]["stand_in"]["rank"] == 2
    record["tasks"] = run(data, ["piqa"])
    for out, name in ((tmp_path / "new", "eval"), (tmp_path / "x.json", "x")):
        place = Place.of(out)
        place.write(record)
        assert json.loads(place.json.read_text()) == record
        assert place.json.name == f"{name}.json"
        assert place.json.with_suffix(".md").read_text() == table(record["tasks"])
    assert str(tmp_path) not in json.dumps(record)
    assert str(data) not in json.dumps(record)


def test_a_place_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        Place.of(tmp_path / "none" / "x.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        Place.of(tmp_path / "file" / "folder")


def answers_of(*tokens: int) -> list[dict[str, Any]]:
    return [{"tokens": n, "density": 0.5, "bytes_per_token": 100} for n in tokens]


@pytest.mark.parametrize(
    ("tokens", "share"),
    [((1, 1), 0.0), ((4, 2), (3 / 4 + 1 / 2) / 2), ((0,), 0.0), ((1, 1, 1, 256), 255 / 256 / 4)],
)
def test_all_but_the_first_token_of_each_answer_is_sparse(
    tokens: tuple[int, ...], share: float
) -> None:
    answers = answers_of(*tokens)
    assert cost_of(answers)["sparse_tokens"] == share
    assert cost_of(answers)["tokens_per_answer"] == sum(tokens) / len(tokens)
    assert cost_of([{**one, "density": 1.0} for one in answers])["sparse_tokens"] == 0


def test_a_table_says_what_was_measured() -> None:
    cost = {name: cost_of(answers_of(3, 3)) for name in ("dense", "random")}
    cost["random"]["bytes_per_token"] = 50.0
    metrics = [
        Metric("acc", {"dense": [1, 1, 0, 0], "random": [1, 0, 0, 0]}),
        Metric("perplexity", {"dense": [9.0] * 4, "random": [2e9] * 4}, higher_is_better=False),
        Metric("bleu", {"dense": [0.0] * 4, "random": [0.0] * 4}),
    ]
    made = section("made_up", metrics, cost, baseline="dense", seed=0, num_fewshot=2)
    rows = table_rows([made], {"made_up": ("acc", "perplexity")})
    assert rows[0] == list(HEAD)
    assert [row[:3] for row in rows[1:]] == [
        ["made_up (4, 2-shot)", "acc", "dense"],
        ["made_up (4, 2-shot)", "acc", "random"],
        ["made_up (4, 2-shot)", "perplexity \u2193", "dense"],
        ["made_up (4, 2-shot)", "perplexity \u2193", "random"],
    ]
    assert rows[2][3:] == [
        "0.250 [0.000, 0.750]", "-0.250 [-0.750, +0.000]", "0.500", "0.0 MB", "0.500", "3.0", "67%",
    ]  # fmt: skip
    assert rows[4][3] == "2.00e+09 [2.00e+09, 2.00e+09]"
    text = markdown(rows)
    assert len(text.splitlines()) == len(rows) + 1
    assert {line.count("|") for line in text.splitlines()} == {len(HEAD) + 1}


def test_the_paired_interval_is_the_bootstrap_of_the_differences() -> None:
    dense, sparse = [1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 0, 0]
    cost = {name: cost_of(answers_of(2)) for name in ("dense", "sparse")}
    metric = Metric("acc", {"dense": dense, "sparse": sparse})
    made = section("t", [metric], cost, baseline="dense", seed=3)
    draws = np.random.default_rng(3).integers(0, 6, size=(1000, 6))
    differences = sorted(sum(sparse[i] - dense[i] for i in draw) / 6 for draw in draws)
    low, high = made["metrics"][0]["rules"]["sparse"]["difference_interval"]
    assert (low, high) == pytest.approx(np.percentile(differences, [2.5, 97.5]).tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "the limit of items must be at least 1, got 0"),
        ({"few_shot": -1}, "the number of few-shot examples must be at least 0, got -1"),
        ({"batch_size": 0}, "the batch size must be at least 1"),
        ({"seed": -1}, "the seed must be at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvalSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "no task is named; there is perplexity, kl, truthfulqa_gen"),
        (["hellaswg"], "no task 'hellaswg' on local files; did you mean 'hellaswag'"),
        (["piqa", "mmlu_anatomy"], "no task 'mmlu_anatomy' on local files; .*on the hub's data"),
        (["gsm8k"], "gsm8k takes 5 examples .* has 4 rows; give --few-shot 3 or less"),
    ],
)
def test_tasks_that_cannot_run_are_refused(data: Path, tasks: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(tasks, EvalSettings(), data_dir=data, text=None)


@pytest.mark.parametrize("kind", ["UNSAFE_CODE", "MULTIMODAL"])
def test_tasks_of_another_kind_are_refused(
    data: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(f"lm_eval.api.task.ConfigurableTask.{kind}", True, raising=False)
    with pytest.raises(UserError, match=r"piqa (runs code|needs a model)"):
        plan(["piqa"], EvalSettings(), data_dir=data, text=None)


def test_without_a_folder_the_hubs_names_count(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["arc_challenge", "mmlu"]
    monkeypatch.setattr("coreinfer.evaluation.harness.loading.hub_task_names", lambda: names)
    with pytest.raises(UserError, match=r"no task 'arc_challeng'; did you mean 'arc_challenge'"):
        plan(["arc_challeng"], EvalSettings(), data_dir=None, text=None)
    with pytest.raises(UserError, match="perplexity and kl read a text; name it by --text FILE"):
        plan(["kl"], EvalSettings(), data_dir=None, text=None)
    with pytest.raises(UserError, match=r"cannot load the data of piqa from the hub .* --data-dir"):
        plan(["piqa"], EvalSettings(), data_dir=None, text=None)  # HF_HUB_OFFLINE


def test_a_text_that_is_missing_too_short_or_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    with pytest.raises(UserError, match=re.escape(f"no file at {str(path)!r}")):
        plan(["kl"], EvalSettings(), data_dir=None, text=path)
    path.write_bytes(b"one\ntwo \xff")
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        plan(["kl"], EvalSettings(), data_dir=None, text=path)
    path.write_text("short")
    planned = plan(["kl"], EvalSettings(), data_dir=None, text=path)
    with pytest.raises(UserError, match="the text has 5 tokens, 40 windows of 200"):
        list(run_plan(planned, tiny_backend(), RULES, EvalSettings(), Journal()))


def test_without_the_extra_perplexity_runs_and_tasks_say_what_to_install(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else find(name)
    )
    with pytest.raises(UserError, match=r"sacrebleu is not installed; pip install 'coreinfer\[ev"):
        plan(["piqa"], EvalSettings(), data_dir=data, text=None)
    assert plan(["kl"], EvalSettings(), data_dir=data, text=None).text


def test_names_that_people_use(data: Path) -> None:
    settings = EvalSettings(limit=1)
    planned = plan(["lambada", "arc-easy", "lambada_openai"], settings, data_dir=data, text=None)
    assert planned.names == ["lambada_openai", "arc_easy"]


def test_prompts_through_the_chat_template(data: Path) -> None:
    settings = EvalSettings(limit=2, few_shot=1, chat=True)
    planned = plan(["piqa"], settings, data_dir=data, text=None)
    made = list(run_plan(planned, backend(chat=True), RULES, settings, Journal()))
    assert made[0]["items"] == 2
    with pytest.raises(UserError, match="has no chat template"):
        list(run_plan(planned, tiny_backend(), RULES, settings, Journal()))


def test_progress_is_told_by_task(data: Path) -> None:
    told: list[tuple[str, int, int]] = []
    settings = EvalSettings(limit=2, batch_size=1)
    planned = plan(["piqa", "kl"], settings, data_dir=data, text=None)
    dense = {"dense": RULES["dense"]}
    run = run_plan(
        planned, tiny_backend(), dense, settings, Journal(), lambda *step: told.append(step)
    )
    assert len(list(run)) == 2
    assert told == [("piqa", 1, 2), ("piqa", 2, 2), ("kl", 1, 2), ("kl", 2, 2)]


@pytest.mark.shared
def test_two_rows_of_every_real_file_run(shared: Path) -> None:
    settings = EvalSettings(limit=2, few_shot=0)
    names = [*LOCAL_TASKS, *TEXT_TASKS]
    planned = plan(names, settings, data_dir=shared / "data", text=None)
    rules = {name: RULES[name] for name in ("dense", "random")}
    made = list(run_plan(planned, backend(), rules, settings, Journal()))
    assert [one["items"] for one in made] == [2] * len(names)
    cut = {one["task"] for one in made if one.get("contexts_cut")}
    assert "xsum" in cut  # 512 tokens of a byte each are not much
