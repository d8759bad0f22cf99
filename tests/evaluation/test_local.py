"""Local data: every task's documents, prompts and targets, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.task import ConfigurableTask

from coreinfer.errors import UserError
from coreinfer.evaluation.harness.loading import load_local
from coreinfer.evaluation.harness.run import set_few_shot
from coreinfer.evaluation.local import LOCAL_TASKS, digest_of, read_rows
from tests.evaluation.rows import ROWS, write_all, write_rows

# Of the third row (number 2, blue): what the model reads, what would be right, what is scored.
PROMPTS = {
    "triviaqa": "Question: Which colour 2??\nAnswer:",
    "coqa": "Ann 2 has a blue hat.\n\nQ: Who has a hat?\n\nA: Ann\n\nQ: Which colour?\n\nA:",
    "squad": "Title: Hats 2\n\nBackground: The hat is blue.\n\nQuestion: Which colour?\n\nAnswer:",
    "xsum": "Article: Hat 2 was seen. It is blue.\n\n"
    "Summarize the above article in 1 sentence.\nSummary:",
    "wmt16-de-en": "German phrase: Ein Hut 2.\nEnglish phrase:",
    "wmt16-ro-en": "Romanian phrase: O pălărie 2.\nEnglish phrase:",
    "piqa": "Question: Dye 2\nAnswer:",
    "gsm8k": "Question: 2 and 2?\nAnswer:",
    "lambada_openai": "In year 2 the hat was",
    "arc_easy": "Question: Which is colour 2?\nAnswer:",
    "hellaswag": "Dyeing hats: Ann 2 dyes",
    "boolq": "Hat 2 is blue.\nQuestion: is hat 2 blue?\nAnswer:",
}
CHOICES = {
    "piqa": [" blue", " wood"],
    "arc_easy": [" blue", " wood", " iron"],
    "hellaswag": [" it red.", " it green.", " it blue.", " it grey."],
    "boolq": [" no", " yes"],
    "lambada_openai": [" blue"],
    "winogrande": [" is big.", " is big."],
}
# What an answer scores that is right, and one that is not.
RIGHT = {
    "truthfulqa_gen": ("it is very blue up there.", "loud", {"bleu_acc": 1, "rouge1_acc": 1}),
    "triviaqa": ("Blue", "red", {"exact_match": 1}),
    "coqa": (" a blue one", "red", {"em": 1 / 2}),
    "squad": (" Blue.", "red", {"exact_match": 1, "f1": 1}),
    "xsum": ("blue hat", "sea", {"rouge1": 1, "rouge2": 1, "rougeL": 1}),
    "gsm8k": ("2+2=4\n#### 4", "5", {"exact_match": 1}),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ConfigurableTask]:
    folder = write_all(tmp_path_factory.mktemp("data"))
    loaded = load_local(list(LOCAL_TASKS), folder)
    for task in loaded.values():
        set_few_shot(task, 0)
    return loaded


def requests(task: ConfigurableTask, row: int) -> list[Any]:
    task.build_all_requests(rank=0, world_size=1)
    return [one for one in task.instances if one.doc_id == row]


def test_every_task_has_a_definition_and_rows(tasks: dict[str, ConfigurableTask]) -> None:
    assert list(tasks) == list(LOCAL_TASKS)
    assert all(len(task.eval_docs) == 4 for task in tasks.values())


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(tasks: dict[str, ConfigurableTask], name: str) -> None:
    assert {one.args[0] for one in requests(tasks[name], 2)} == {PROMPTS[name]}


def test_truthfulqas_prompt_has_examples_of_its_own(tasks: dict[str, ConfigurableTask]) -> None:
    ((prompt, options),) = (one.args for one in requests(tasks["truthfulqa_gen"], 2))
    assert prompt.startswith("Q: What is human life expectancy in the United States?\nA: Human")
    assert prompt.endswith("\n\nQ: What is sky 2?")
    assert options["until"] == ["\n\n"]


@pytest.mark.parametrize("name", CHOICES)
def test_continuations(tasks: dict[str, ConfigurableTask], name: str) -> None:
    assert [one.args[1] for one in requests(tasks[name], 2)] == CHOICES[name]


def test_winogrande_asks_which_beginning_fits(tasks: dict[str, ConfigurableTask]) -> None:
    found = [one.args[0] for one in requests(tasks["winogrande"], 2)]
    assert found == [f"Hat 2 is not in the box, for {one}" for one in ("the hat", "the box")]


@pytest.mark.parametrize("name", sorted(CHOICES.keys() - {"lambada_openai"}))
@pytest.mark.parametrize("row", range(4))
def test_the_right_choice_is_the_files(
    tasks: dict[str, ConfigurableTask], name: str, row: int
) -> None:
    task = tasks[name]
    task.build_all_requests(rank=0, world_size=1)
    label = {
        "piqa": row % 2,
        "arc_easy": row % 3,
        "hellaswag": row,
        "boolq": int(row % 2 == 0),
        "winogrande": row % 2,
    }[name]
    for choice in range(len(CHOICES[name])):
        results = [(-1.0 if i == choice else -9.0, False) for i in range(len(CHOICES[name]))]
        scored = task.process_results(task.eval_docs[row], results)
        assert scored["acc"] == (choice == label)


def test_lambada_is_right_where_the_word_is_the_likeliest(
    tasks: dict[str, ConfigurableTask],
) -> None:
    task = tasks["lambada_openai"]
    scored = task.process_results(task.eval_docs[2], [(-0.5, True)])
    assert scored == {"perplexity": -0.5, "acc": 1}


@pytest.mark.parametrize("name", RIGHT)
def test_generated_answers(tasks: dict[str, ConfigurableTask], name: str) -> None:
    right, wrong, wanted = RIGHT[name]
    task = tasks[name]
    document = task.eval_docs[2]
    for answer, score in ((right, wanted), (wrong, dict.fromkeys(wanted, 0))):
        found = task.process_results(document, [answer])
        assert {metric: found[metric] for metric in wanted} == pytest.approx(score)


def test_what_truthfulqa_shows_tells_noise_from_an_answer(
    tasks: dict[str, ConfigurableTask],
) -> None:
    task, shown = tasks["truthfulqa_gen"], LOCAL_TASKS["truthfulqa_gen"].headline
    right, _, _ = RIGHT["truthfulqa_gen"]
    answer, noise = (
        task.process_results(task.eval_docs[2], [text]) for text in (right, "it is" + " very" * 200)
    )
    assert noise["rouge1_acc"] == answer["rouge1_acc"] == 1
    assert any(noise[metric] < answer[metric] / 10 for metric in shown)


@pytest.mark.parametrize("name", ["wmt16-de-en", "wmt16-ro-en"])
def test_translations(tasks: dict[str, ConfigurableTask], name: str) -> None:
    task = tasks[name]
    found = task.process_results(task.eval_docs[2], [" A blue hat."])
    assert task.aggregation()["bleu"]([found["bleu"]]) == pytest.approx(100)
    assert task.aggregation()["chrf"]([found["chrf"]]) == pytest.approx(100)


@pytest.mark.parametrize("name", [name for name in LOCAL_TASKS if name != "truthfulqa_gen"])
def test_a_row_is_never_its_own_example(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    folder = write_all(tmp_path_factory.mktemp("data"))
    (task,) = load_local([name], folder).values()
    set_few_shot(task, 3)
    task.set_fewshot_seed(seed=0)
    task.build_all_requests(rank=0, world_size=1)
    by_row: dict[int, str] = {}
    for one in task.instances:
        by_row.setdefault(one.doc_id, one.args[0])
    assert len(by_row) == 4
    marks = {
        "hellaswag": "Ann {}", "winogrande": "Hat {} is not", "xsum": "Article: Hat {}",
        "boolq": "is hat {}", "gsm8k": "Question: {}",
    }  # fmt: skip
    for row, prompt in by_row.items():  # three examples and the question: each row once
        times = [prompt.count(marks.get(name, " {}").format(other)) for other in range(4)]
        assert times == [1, 1, 1, 1]
        assert prompt.rindex(marks.get(name, " {}").format(row)) == max(
            prompt.rindex(marks.get(name, " {}").format(other)) for other in range(4)
        )


@pytest.mark.parametrize("number", [4, 100])
def test_more_examples_than_rows_are_refused(tmp_path: Path, number: int) -> None:
    (task,) = load_local(["piqa"], write_all(tmp_path)).values()
    with pytest.raises(UserError, match=rf"piqa takes {number} examples .* has 4 rows; .* 3 or"):
        set_few_shot(task, number)


@pytest.mark.parametrize(
    ("name", "given", "used"),
    [("piqa", None, 0), ("piqa", 2, 2), ("gsm8k", 1, 1), ("gsm8k", 0, 0), ("truthfulqa_gen", 3, 0)],
)
def test_the_number_of_examples(tmp_path: Path, name: str, given: int | None, used: int) -> None:
    """As lm-eval has it: a task that says it takes none takes none."""
    (task,) = load_local([name], write_all(tmp_path)).values()
    set_few_shot(task, given)
    assert task.get_config("num_fewshot") == used


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", lambda row: row.pop("sol2"), "line 3 has no 'sol2'"),
        ("piqa", lambda row: row.update(label=2), "line 3 has label 2, expected 0 to 1"),
        ("piqa", lambda row: row.update(label="1"), "has a 'label' that is not a whole number"),
        ("piqa", lambda row: row.update(label=True), "has a 'label' that is not a whole number"),
        ("piqa", lambda row: row.update(goal=None), "has a 'goal' that is not text"),
        ("boolq", lambda row: row.update(answer=1), "has a 'answer' that is not true or false"),
        ("arc_easy", lambda row: row.update(choices=[]), "'choices' that is not a list of texts"),
        ("arc_easy", lambda row: row.update(label=3), "has label 3, expected 0 to 2"),
        ("hellaswag", lambda row: row.update(ctx="no colon"), "without an activity"),
        ("winogrande", lambda row: row.update(answer=3), "has answer 3, expected 1 or 2"),
        ("winogrande", lambda row: row.update(sentence="x"), "without a blank '_'"),
        ("coqa", lambda row: row.update(answers=["one"]), "has not as many answers as questions"),
        ("coqa", lambda row: row.update(all_answers=[[], []]), "is not a list of lists of texts"),
        ("squad", lambda row: row.update(answers="blue"), "'answers' that is not a list of texts"),
    ],
)
def test_a_row_of_another_shape_is_refused(
    tmp_path: Path, name: str, change: Change, message: str
) -> None:
    rows = [dict(row) for row in ROWS[name]]
    change(rows[2])
    file = LOCAL_TASKS[name].file
    write_rows(tmp_path / file, rows)
    with pytest.raises(UserError, match=message) as refused:
        read_rows(name, tmp_path)
    assert file in str(refused.value)
    assert f"{name} needs " in str(refused.value)


def test_a_file_that_is_missing_empty_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file 'piqa_valid.jsonl' in .* 'goal' \(text\)"):
        read_rows("piqa", tmp_path)
    (tmp_path / "piqa_valid.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no row; piqa needs"):
        read_rows("piqa", tmp_path)
    (tmp_path / "piqa_valid.jsonl").write_text('[1]\n{"goal"\n')
    with pytest.raises(UserError, match="line 1 is not a JSON object"):
        read_rows("piqa", tmp_path)
    (tmp_path / "piqa_valid.jsonl").write_text('{"goal"\n')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_rows("piqa", tmp_path)


@given(data=st.binary(max_size=80), name=st.sampled_from(sorted(LOCAL_TASKS)))
def test_damaged_bytes_are_a_users_mistake(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    folder = tmp_path_factory.mktemp("data")
    (folder / LOCAL_TASKS[name].file).write_bytes(data)
    with pytest.raises(UserError):
        read_rows(name, folder)


def test_a_digest_tells_files_apart(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
    digests = {digest_of([tmp_path / name]) for name in "abc"} | {digest_of([tmp_path])}
    assert len(digests) == 4
    before = digest_of([tmp_path])
    (tmp_path / "b").write_text("3")
    assert digest_of([tmp_path]) != before
    with pytest.raises(UserError, match="no file at"):
        digest_of([tmp_path / "none"])


@pytest.mark.shared
@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_the_real_files_are_of_this_shape(shared: Path, name: str) -> None:
    assert len(read_rows(name, shared / "data")) > 300
