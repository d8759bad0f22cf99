"""Training the predictions on what decoding loses, which least squares, layer by layer, cannot see.

Least squares makes each neuron's prediction as near as can be, all directions alike, as if the
layers before it were dense. What counts is the next-token distribution with all layers sparse: that
is differentiated, on documents of the corpus, and the coefficients follow (Adam, Kingma and Ba
2015). Decode pays nothing for it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

import torch
from torch import Tensor
from tqdm import tqdm

from coreinfer.backends.hf.loss import output_slopes
from coreinfer.backends.hf.session import HfBackend, HfSession
from coreinfer.calibration.prediction import LayerPrediction
from coreinfer.calibration.store import CalibrationStore
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Residual
from coreinfer.standins import Calibrated
from coreinfer.standins.dual import Dual

BATCH = 4  # documents a step
LEAST_TOKENS = 8  # of a document
CONTINUATION = 96  # tokens of a document that follow its prompt, at most
KEEPS = (0.35, 0.75)  # drawn anew at each step, so that the store serves them all
RATE = 2e-3  # of the first step, of the coefficients' own size; it falls to nothing

# Step, and the tensors to go on from.
Keep = Callable[[int, Mapping[str, Tensor]], None]


@dataclass
class Trainer:
    """The coefficients of a store, on their way.

    Attributes:
        store: whose coefficients change in place; its statistics stay those of the start.
        optimizer: of them.
    """

    store: CalibrationStore
    optimizer: torch.optim.Adam

    @classmethod
    def of(cls, store: CalibrationStore) -> Trainer:
        """On a copy of a store's coefficients."""
        made = [replace(one, coefficients=one.coefficients.clone()) for one in store.predictions]
        sizes = [one.coefficients[1:].square().mean().sqrt() for one in made]
        groups = [
            {"params": [one.coefficients], "size": float(size)}
            for one, size in zip(made, sizes, strict=True)
        ]
        return cls(
            replace(store, predictions=made), torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99))
        )

    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Follow the gradients [1 + r, D] of all layers."""
        for group, gradient in zip(self.optimizer.param_groups, gradients, strict=True):
            group["lr"] = rate * group["size"]
            group["params"][0].grad = gradient
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """What to go on from."""
        named = {f"coefficients.{n}": one.coefficients for n, one in enumerate(self._predictions)}
        for layer, one in enumerate(self._predictions):
            state = self.optimizer.state[one.coefficients]
            named |= {f"{name}.{layer}": state[name] for name in ("exp_avg", "exp_avg_sq")}
        return named

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        for layer, one in enumerate(self._predictions):
            one.coefficients.copy_(tensors[f"coefficients.{layer}"])
            self.optimizer.state[one.coefficients] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"exp_avg.{layer}"].clone(),
                "exp_avg_sq": tensors[f"exp_avg_sq.{layer}"].clone(),
            }

    @property
    def _predictions(self) -> Sequence[LayerPrediction]:
        return self.store.predictions


def train(
    backend: HfBackend,
    store: CalibrationStore,
    documents: Callable[[], Iterator[Sequence[int]]],
    steps: int,
    seed: int,
    *,
    done: int = 0,
    tensors: Mapping[str, Tensor] | None = None,
    keep: Keep = lambda _step, _tensors: None,
    progress: bool = True,
) -> CalibrationStore:
    """The store with predictions that decoding loses less with; all else stays as it was.

    So does the `residual_sum` of its statistics, which `PredictionSums.residual_sum` makes anew.

    The first half of a document is the prompt, what follows is decoded with the `residual` rule
    and the `calibrated` stand-in of full rank, all layers sparse.

    Args:
        backend: the model, where a backward pass can go through it.
        store: where to begin; it stays as it is.
        documents: a new pass over the corpus' documents, as token ids.
        steps: how many, `BATCH` documents each; they go round and round.
        seed: of the keeps.
        done: steps that were done earlier, with the `tensors` they left.
        keep: told of the tensors after each step.
        progress: draw a progress bar on stderr, where that is a terminal.

    Raises:
        UserError: if no document is long enough, or what is decoded is no longer a number.
    """
    trainer = Trainer.of(store)
    if tensors is not None:
        trainer.restore(tensors, done)
    full = backend.anatomy.layers[0].hidden_size  # rank: a cut would take long to find
    draw = random.Random(seed)
    keeps = [draw.uniform(*KEEPS) for _ in range(steps)]
    batches = islice(_batches(documents), done, None)
    bar = tqdm(
        desc="training", unit="step", total=steps, initial=done,
        disable=None if progress else True,
    )  # fmt: skip
    with bar:
        for number in range(done, steps):
            rule = Residual(calibration=trainer.store, beta=keeps[number])
            stand_in = Calibrated(calibration=trainer.store, rank=full)
            loss, found = gradients(backend, rule, stand_in, next(batches))
            if not math.isfinite(loss) or not all(one.isfinite().all() for one in found):
                raise UserError(
                    f"training ran away: KL {loss:g} at step {number + 1} of {steps}; "
                    "ask for fewer --train-steps, or none"
                )
            trainer.step(found, RATE * (1 - number / steps))
            keep(number + 1, trainer.tensors())
            bar.set_postfix(kl=f"{loss:.3f}", refresh=False)
            bar.update()
    return trainer.store


def require_length(longest: int) -> None:
    """Raises UserError if the longest document of a corpus is too short to train on."""
    if longest < LEAST_TOKENS:
        raise UserError(f"no document has the {LEAST_TOKENS} tokens that training needs")


def _batches(documents: Callable[[], Iterator[Sequence[int]]]) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    for turn in count():
        found = 0
        for ids in documents():
            if len(ids) < LEAST_TOKENS:
                continue
            found += 1
            batch.append(ids)
            if len(batch) == BATCH:
                yield batch
                batch = []
        if not found and not turn:
            require_length(0)


def gradients(
    backend: HfBackend, rule: Residual, stand_in: Calibrated, batch: Sequence[Sequence[int]]
) -> tuple[float, list[Tensor]]:
    """The loss on some documents, and its gradient by the coefficients of each layer.

    The directions that the stand-in is cut to and the neurons that are kept are taken as they are.

    Args:
        rule, stand_in: of one calibration store.
        batch: token ids; the first half of each is the prompt.
    """
    middles = [(len(ids) + 1) // 2 for ids in batch]
    read = backend.start(RecordingPlan.of(rule, stand_in))
    read.prefill([ids[:middle] for ids, middle in zip(batch, middles, strict=True)])
    kept = [choice.core_set.layers for choice in read.select(rule, stand_in)]
    after = [
        ids[middle : middle + CONTINUATION] for ids, middle in zip(batch, middles, strict=True)
    ]
    found = output_slopes(read, after)
    made = [torch.zeros_like(one.coefficients) for one in rule.calibration.predictions]
    for layer, slopes in found.slopes.items():
        down = backend.anatomy.layers[layer].output.weight.detach().float()
        left = read.compact[layer].left
        assert left is not None  # the calibrated stand-in always has one
        for row, ids in enumerate(after):
            directions = left.weight_of(row).float()
            slope = slopes[row, : len(ids)].float()
            by_neuron = ((slope @ directions) @ directions.t()) @ down  # [T, D]
            by_neuron[:, kept[row][layer].long().to(down.device)] = (
                0.0  # kept neurons are not predicted
            )
            x = found.inputs[layer][row, : len(ids)].float()
            made[layer][1:] += (_features(read, stand_in, layer, row, x).t() @ by_neuron).cpu()
    return found.loss, made


def _features(read: HfSession, stand_in: Calibrated, layer: int, row: int, x: Tensor) -> Tensor:
    """z of inputs x [T, d], less what the prompt's own ridge regression makes of them, [T, r].

    For what a prediction is changed by, that regression takes back, as far as the prompt shows it.
    """
    dual = Dual.of(read.sample(row, layer).inputs, stand_in.ridge)
    own, centred = dual.centred.float(), x - dual.mean.float()
    left = centred - ((centred @ own.t()) @ dual.inverse.float()) @ own
    return left @ stand_in.calibration.predictions[layer].basis.to(left.device)
