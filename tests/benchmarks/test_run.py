"""The rows there are, the turns they take, and what becomes of those that fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coreinfer.backends.native.convert import convert
from coreinfer.benchmarks import run as run_module
from coreinfer.benchmarks.job import Job
from coreinfer.benchmarks.plan import Settings, in_groups, own_jobs
from coreinfer.benchmarks.process import RowError, RowProcess
from coreinfer.benchmarks.run import Report, bench
from coreinfer.benchmarks.table import HEAD, cells, heading
from coreinfer.benchmarks.target import Target
from coreinfer.benchmarks.worker import serve
from coreinfer.errors import UserError
from coreinfer.kernels.formats import WeightFormat
from tests.benchmarks.fakes import TINY, TINY_OPT, fake_start, small_meter
from tests.tiny import tiny_model, tiny_tokenizer

KEYS = {
    "engine", "model", "dtype", "selector", "density", "threads", "prompt_tokens", "prefill_s",
    "select_s", "decode_tokens_per_s", "bytes_per_token", "gb_per_s", "peak_memory_bytes",
    "synthetic",
}  # fmt: skip
SMALL = Settings(
    dtypes=("bfloat16",), keeps=(1.0, 0.5), peers=(), prompt_tokens=6, decode_tokens=2, threads=1
)
JOB = Job("native", "tiny", "bfloat16", threads=1, prompt_tokens=6, decode_tokens=2, shape=TINY)


def tiny(values: dict[str, Any] = TINY) -> Target:
    return Target.of_shape("tiny", {"tiny": values})


def measure(settings: Settings = SMALL, **options: Any) -> tuple[Report, list[str]]:
    log: list[str] = []
    start = fake_start(log, **options)
    return bench(tiny(), settings, start=start, meter=small_meter()), log


def test_the_report_has_the_keys_of_the_contract() -> None:
    report = json.loads(json.dumps(measure()[0].to_json()))
    assert report.keys() == {"machine", "read_gb_per_s", "rows", "notes"}
    assert report["read_gb_per_s"] > 0
    assert len(report["rows"]) == 4
    for row in report["rows"]:
        assert row.keys() == KEYS | {"zero_activations", "active"}
        assert row["decode_tokens_per_s"] == {"median": 20.0, "min": 10.0, "max": 30.0}
        assert row["gb_per_s"] == pytest.approx(1000 * 20 / 1e9)
        assert row["synthetic"] is True


def test_runs_take_turns() -> None:
    _, log = measure(replace(SMALL, repeats=2, engines=("native",)))
    rows = ["native bfloat16 keep 0.5", "native bfloat16"]
    steps = ["start", "repeat", "repeat", "finish"]
    assert log == [f"{row}: {step}" for step in steps for row in rows]


def test_rows_that_do_not_fit_together_are_measured_group_by_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_module, "available_memory", lambda: int(1e9))  # one row, not two
    report, log = measure(replace(SMALL, repeats=1, engines=("native",)))
    rows = ["native bfloat16 keep 0.5", "native bfloat16"]
    assert log == [f"{row}: {step}" for row in rows for step in ("start", "repeat", "finish")]
    assert any("within these groups" in note for note in report.notes)


def test_rows_that_do_not_fit_at_all_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"no row could be measured: native bfloat16: needs about"):
        measure()


@pytest.mark.parametrize("step", ["start", "repeat", "finish"])
def test_a_row_that_fails_is_a_note_and_the_others_go_on(step: str) -> None:
    report, log = measure(hf=step)
    assert [row.engine for row in report.rows] == ["native", "native"]
    assert f"hf bfloat16: no {step}" in report.notes
    assert "hf bfloat16: kill" in log


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(UserError, match=r"no row could be measured: .* no start"):
        measure(native="start", hf="start")


def test_processes_are_ended_when_the_run_is_interrupted() -> None:
    log: list[str] = []

    def start(job: Job) -> RowProcess:
        if log:
            raise KeyboardInterrupt
        return fake_start(log)(job)

    with pytest.raises(KeyboardInterrupt):
        bench(tiny(), SMALL, start=start, meter=small_meter())
    assert log == ["native bfloat16 keep 0.5: start", "native bfloat16 keep 0.5: kill"]


def test_rows_are_native_and_hf_in_the_dtypes_that_they_have() -> None:
    settings = Settings(dtypes=("float32", "bfloat16", "int8"), keeps=(1.0, 0.4, 1.0))
    rows = [(job.engine, job.dtype, job.keep) for job in own_jobs(tiny(), settings)]
    wanted = [("native", "bfloat16"), ("native", "int8"), ("hf", "float32"), ("hf", "bfloat16")]
    assert rows == [(*one, keep) for one in wanted for keep in (1.0, 0.4)]


def test_sparse_rows_come_with_each_share_of_active_neurons() -> None:
    settings = Settings(dtypes=("int8",), keeps=(1.0, 0.4), actives=(1.0, 0.5))
    for target in (tiny(), tiny(TINY_OPT)):
        jobs = [job for job in own_jobs(target, settings) if job.skip_zeros]
        assert [(job.keep, job.active) for job in jobs] == [(1, 1), (1, 0.5), (0.4, 1), (0.4, 0.5)]
    with pytest.raises(UserError, match="actives must be above 0"):
        Settings(actives=(0.0,))


# Of a ReLU model that keeps all, rows without skipping already leave zeros out, and count that.
@pytest.mark.parametrize(("shape", "keep"), [(TINY, 0.5), (TINY, 1.0), (TINY_OPT, 0.5)])
def test_skipped_neurons_are_fewer_bytes(shape: dict[str, Any], keep: float) -> None:
    job = replace(JOB, engine="native", dtype="bfloat16", shape=shape, keep=keep)
    whole, some = (answers_to(replace(job, active=active))[2]["about"] for active in (1.0, 0.4))
    assert (whole["active"], some["active"]) == (1.0, 0.4)
    assert some["bytes_per_token"] < whole["bytes_per_token"]


def test_a_relu_model_has_a_row_with_and_without_skipped_zeros() -> None:
    settings = Settings(dtypes=("int8",), keeps=(1.0, 0.4))
    jobs = list(own_jobs(tiny(TINY_OPT), settings))
    assert [(job.keep, job.skip_zeros) for job in jobs] == [(1, False), (1, True), (0.4, True)]


def test_rows_that_read_about_as_much_are_in_one_group() -> None:
    jobs = [replace(JOB, model=str(number)) for number in range(5)]
    groups = in_groups(jobs, [3, 3, 9, 2, 5], 6)
    assert [[job.model for job in group] for group in groups] == [["3", "0"], ["1"], ["4"], ["2"]]


def test_rows_come_in_their_own_order_whatever_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SMALL, dtypes=("bfloat16", "int4"), engines=("native",))
    monkeypatch.setattr(run_module, "available_memory", lambda: int(1e9))
    report, log = measure(settings)
    assert [(row.dtype, row.density) for row in report.rows] == [
        ("bfloat16", 1.0),
        ("bfloat16", 0.5),
        ("int4", 1.0),
        ("int4", 0.5),
    ]
    assert log[0] == "native int4 keep 0.5: start"  # the smallest is measured first


def test_prompt_and_answer_must_fit_the_model() -> None:
    with pytest.raises(UserError, match="have 302 tokens, tiny reads 256 at most"):
        measure(replace(SMALL, prompt_tokens=300))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtypes": ("int3",)}, r"no dtype 'int3'; there is float32, bfloat16, int8, int4"),
        ({"dtypes": ()}, "no dtype to bench"),
        ({"keeps": (0.4, 0.0)}, "keeps must be above 0 and at most 1, got 0.0"),
        ({"keeps": (1.1,)}, "keeps must be above 0 and at most 1, got 1.1"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"prompt_tokens": 0}, "prompt tokens must be at least 1, got 0"),
        ({"decode_tokens": -1}, "decode tokens must be at least 1, got -1"),
        ({"threads": 0}, "threads must be 1 to"),
        ({"threads": 100_000}, "this machine's cores, got 100000"),
        ({"peers": ("vllm",)}, "no peer 'vllm'; there is transformers, llama.cpp, openvino"),
        ({"engines": ("cuda",)}, "no engine 'cuda'; there is native, hf"),
        ({"engines": (), "peers": ()}, "nothing to bench"),
        ({"keeps": (), "peers": ()}, "nothing to bench"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**changes)


def test_a_converted_model_is_for_native_alone(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    out = convert(str(folder), WeightFormat.named("int4"), tmp_path / "int4")
    target = Target.of_model(str(out))
    assert (target.name, target.synthetic, target.context_length) == ("tiny", False, 512)
    job = Job("native", "tiny", "int4", 1, prompt_tokens=6, decode_tokens=2, source=str(out))
    assert answers_to(job)[0] == {"ready": True}
    (answer,) = answers_to(replace(job, engine="hf", dtype="bfloat16"))
    assert "a converted model is for native alone" in answer["error"]


class Answers:
    """What a worker writes, a line each."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def write(self, text: str) -> int:
        self.said.append(json.loads(text))
        return len(text)

    def flush(self) -> None: ...


def answers_to(job: Job) -> list[dict[str, Any]]:
    """What the worker says to a job, one run and the end, in this process."""
    commands: Iterator[str] = iter([job.to_json(), "repeat\n", "finish\n"])
    answers = Answers()
    serve(commands, answers)  # type: ignore[arg-type]
    return answers.said


@pytest.mark.parametrize("engine", ["native", "hf", "transformers"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_worker_warms_up_runs_and_says_what_it_decoded_with(engine: str, keep: float) -> None:
    if engine == "transformers" and keep < 1:
        pytest.skip("transformers is dense")
    ready, repeat, end = answers_to(replace(JOB, engine=engine, keep=keep))
    assert ready == {"ready": True}
    assert repeat["repeat"]["decode_tokens"] == 2
    assert repeat["repeat"]["decode_s"] > 0
    about = end["about"]
    assert about["density"] == pytest.approx(keep)
    assert about["selector"] == ("dense" if keep == 1 else "impact")
    assert about["zero_activations"] is None
    assert end["peak_memory_bytes"] > 10**6
    dense = answers_to(replace(JOB, engine=engine))[2]["about"]["bytes_per_token"]
    assert about["bytes_per_token"] == dense if keep == 1 else about["bytes_per_token"] < dense


@pytest.mark.parametrize(
    ("shape", "least", "parts"),
    [(TINY_OPT, 0.75, 1), ({**TINY, "hidden_act": "relu"}, 0.3, 2)],
    ids=["plain", "gated"],
)
def test_skipped_zeros_are_counted_and_not_counted_as_read(
    shape: dict[str, Any], least: float, parts: int
) -> None:
    """fc1 or the gate is read whole; of fc2, or of up and down, what is not multiplied by zero."""
    job = replace(JOB, shape=shape, dtype="int8")
    plain = answers_to(replace(job, skip_zeros=False))[2]["about"]
    skipping = answers_to(job)[2]["about"]
    assert (plain["selector"], plain["zero_activations"]) == ("dense", None)
    assert skipping["selector"] == "skip-zeros"
    assert least < skipping["zero_activations"] < 0.97
    neurons = shape["num_hidden_layers"] * shape.get("ffn_dim", shape.get("intermediate_size"))
    saved = neurons * parts * (64 + 4) * skipping["zero_activations"]
    assert plain["bytes_per_token"] - skipping["bytes_per_token"] == pytest.approx(saved, abs=1)


def test_a_worker_reports_a_users_mistake() -> None:
    (answer,) = answers_to(replace(JOB, shape=None, source="no-such-model"))
    assert "no model 'no-such-model'" in answer["error"]


def test_a_process_that_dies_is_reported_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from coreinfer.benchmarks import process

    command = (process.sys.executable, "-c", "raise SystemExit('out of order')")
    monkeypatch.setattr(process, "_COMMAND", command)
    row = RowProcess(JOB)
    with pytest.raises(RowError, match="its process ended with 1: out of order"):
        row.start()
    row.kill()


def test_the_table_says_what_the_rows_say() -> None:
    report, _ = measure()
    report = replace(report, read_gb_per_s=4e-5)
    head, *rows = cells(report)
    assert head == HEAD
    first = dict(zip(head, rows[0], strict=True))
    assert first["of limit"] == "50%"
    assert (first["tokens/s"], first["min"], first["max"]) == ("20.00", "10.00", "30.00")
    assert "(synthetic weights, speed only)" in heading(report)[0]
    assert any("synthetic weights, speed only" in note for note in report.notes)
