"""The search: Optuna is asked for designs in batches of a fixed size, and told what they cost."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence

from coreinfer.errors import UserError
from coreinfer.tuning.design import Design
from coreinfer.tuning.space import Space

BATCH = 8  # designs asked for at a time: the same whatever the workers, so that the search is

# Designs with the share of bytes of each -> (loss, share that is read), or None where the bytes do
# not pay for the design.
Evaluate = Callable[[Sequence[tuple[Design, float]]], Sequence[tuple[float, float] | None]]


def require_optuna() -> None:
    """Raises UserError where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("tune searches with Optuna; pip install 'coreinfer[tune]'")


def search(space: Space, evaluate: Evaluate, trials: int, seed: int) -> None:
    """Try `trials` designs: first every rule with every stand-in, then what the results suggest.

    The loss is made small; where the share of bytes is free, that too (a Pareto front, by
    multi-objective TPE). The same seed and the same results give the same designs, so a search
    whose results were kept goes on where it was cut off.

    Args:
        space: what may be tried.
        evaluate: measures a batch.
        trials: how many, those that `evaluate` refuses among them.
        seed: of the sampler.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    objectives = 1 if space.share is not None else 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True
        )
    study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
    level = list(space.level())
    for parameters in level:
        study.enqueue_trial(parameters)
    best: dict[tuple[str, str], float] = {}
    done = 0
    while done < trials:
        asked = [study.ask() for _ in range(min(BATCH, trials - done))]
        designs = [space.suggest(trial) for trial in asked]
        for trial, (design, _), result in zip(asked, designs, evaluate(designs), strict=True):
            if result is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            study.tell(trial, list(result)[:objectives])
            if trial.number < len(level):
                best[design.selector, design.stand_in] = result[0]
        if done < len(level) <= done + len(asked):  # the last of them is known
            for names in sorted(best, key=lambda names: best[names])[:2]:
                for parameters in space.around(*names):
                    study.enqueue_trial(parameters)
        done += len(asked)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points that no other is as good as in both, the cheapest first.

    Args:
        points: (loss, bytes); of equal points the first is taken.
    """
    kept: list[int] = []
    for position in sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0], i)):
        if not kept or points[position][0] < points[kept[-1]][0]:
            kept.append(position)
    return kept
