"""A task under several rules: lm-eval's evaluator, once a rule, on answers computed together."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import Any

from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from coreinfer.errors import UserError
from coreinfer.evaluation.bootstrap import FEW_RESAMPLES, RESAMPLES
from coreinfer.evaluation.harness.model import HarnessModel
from coreinfer.evaluation.harness.quiet import quiet
from coreinfer.evaluation.rules import BASELINE
from coreinfer.evaluation.section import Metric, Section, cost_of, section

SLOW_METRICS = frozenset({"bleu", "chrf", "chrf++", "ter"})


def set_few_shot(task: ConfigurableTask, number: int | None) -> None:
    """Settle how many examples a prompt has, as lm-eval does; a task that says 0 stays at 0.

    Args:
        task: the task.
        number: None for what the task says.

    Raises:
        UserError: if there are not as many rows to take them from.
    """
    own = task.get_config("num_fewshot")
    number = int(own or 0) if number is None or own == 0 else number
    task.set_config(key="num_fewshot", value=number)
    with quiet():  # they are read now
        rows = len(task.eval_docs)
    if task.get_config("custom_dataset") is not None and number >= rows:
        fewer = "--few-shot 0" if rows == 1 else f"--few-shot {rows - 1} or less"
        raise UserError(
            f"{task.task_name} takes {number} examples from its own file, which has {rows} "
            f"{'row' if rows == 1 else 'rows'}; give {fewer}, or more rows"
        )


def run_task(
    task: ConfigurableTask,
    model: HarnessModel,
    *,
    limit: int | None = None,
    seed: int = 0,
    chat: bool = False,
    **about: Any,
) -> Section:
    """Score a task under every rule of the model.

    Args:
        task: with its number of few-shot examples set.
        model: its rules; the baseline is among them.
        limit: items at most; None takes all.
        seed: of the choice of few-shot examples and of the bootstrap.
        chat: put every prompt through the model's chat template.
        about: what else the section is to say.
    """
    name = task.task_name
    costs = {}
    items: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    model.cut.clear()
    for rule in model.rules:
        model.answering = rule
        model.given.clear()
        task.set_fewshot_seed(seed=seed)
        with quiet():
            found = evaluate(
                model,
                {"tasks": {name: task}},
                limit=limit,
                bootstrap_iters=0,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        costs[rule] = cost_of(model.given)
        for sample in found["samples"][name]:
            suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
            for metric in sample["metrics"]:
                items[metric + suffix][rule].append(_plain(sample[metric]))
    return section(
        name,
        [_metric(task, metric, by_rule) for metric, by_rule in items.items()],
        costs,
        baseline=BASELINE,
        seed=seed,
        version=task.VERSION,
        num_fewshot=task.get_config("num_fewshot"),
        contexts_cut=len(model.cut),
        **about,
    )


def _metric(task: ConfigurableTask, name: str, items: dict[str, list[Any]]) -> Metric:
    bare = name.partition(",")[0]
    aggregate = task.aggregation().get(bare, mean)
    return Metric(
        name,
        items,
        fmean if aggregate is mean else aggregate,
        task.higher_is_better().get(bare),
        FEW_RESAMPLES if bare in SLOW_METRICS else RESAMPLES,
    )


def _plain(value: Any) -> Any:
    """numpy's and torch's scalars as Python's."""
    return value.item() if hasattr(value, "item") else value
