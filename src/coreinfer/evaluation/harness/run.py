"""A task under several rules: lm-eval's evaluator, once a rule, on answers computed together."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from statistics import fmean
from typing import Any

from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from coreinfer.errors import UserError
from coreinfer.evaluation.bootstrap import FEW_RESAMPLES, RESAMPLES
from coreinfer.evaluation.harness.model import HarnessModel
from coreinfer.evaluation.section import Cost, Metric, Section, section

SLOW_METRICS = frozenset({"bleu", "chrf", "chrf++", "ter"})


def set_few_shot(task: ConfigurableTask, num_fewshot: int | None) -> int:
    """Settle how many examples a prompt has, as lm-eval does; a task that says 0 stays at 0.

    Returns:
        The number.

    Raises:
        UserError: if there are not as many rows to take them from.
    """
    own = task.get_config("num_fewshot")
    number = int(own or 0) if num_fewshot is None or own == 0 else num_fewshot
    task.set_config(key="num_fewshot", value=number)
    rows = len(task.eval_docs)
    if task.get_config("custom_dataset") is not None and number >= rows:
        raise UserError(
            f"{task.task_name} takes {number} examples from its own file, which has {rows} "
            f"{'row' if rows == 1 else 'rows'}; give --num-fewshot {rows - 1} or less, or more rows"
        )
    return number


def run_task(
    task: ConfigurableTask,
    model: HarnessModel,
    *,
    baseline: str,
    limit: int | None = None,
    seed: int = 0,
    chat: bool = False,
) -> Section:
    """Score a task under every setting of the model.

    Args:
        task: with its number of few-shot examples set.
        model: its settings are the rules.
        baseline: the setting that the others are compared with.
        limit: items at most; None takes all.
        seed: of the choice of few-shot examples and of the bootstrap.
        chat: put every prompt through the model's chat template.
    """
    name = task.task_name
    cost = Cost()
    items: dict[str, dict[str, list[Any]]] = {}
    for rule in model.settings:
        model.answering = rule
        model.given.clear()
        task.set_fewshot_seed(seed=seed)
        with _silence():
            found = evaluate(
                model,
                {"tasks": {name: task}},
                limit=limit,
                bootstrap_iters=0,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        cost.add(rule, model.given)
        for sample in found["samples"][name]:
            suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
            for metric in sample["metrics"]:
                row = items.setdefault(metric + suffix, {}).setdefault(rule, [])
                row.append(_plain(sample[metric]))
    metrics = [
        Metric(
            metric,
            by_rule,
            _aggregate(task, metric.partition(",")[0]),
            task.higher_is_better().get(metric.partition(",")[0]),
            FEW_RESAMPLES if metric.partition(",")[0] in SLOW_METRICS else RESAMPLES,
        )
        for metric, by_rule in items.items()
    ]
    return section(
        name,
        metrics,
        cost,
        baseline=baseline,
        seed=seed,
        version=task.VERSION,
        num_fewshot=task.get_config("num_fewshot"),
    )


def _aggregate(task: ConfigurableTask, metric: str) -> Any:
    found = task.aggregation().get(metric, mean)
    return fmean if found is mean else found


def _plain(value: Any) -> Any:
    """numpy's and torch's scalars as Python's."""
    return value.item() if hasattr(value, "item") else value


@contextmanager
def _silence() -> Iterator[None]:
    """Keep lm-eval's bars and advice to itself; ours are written to the stream we had before."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
