"""What each layer loses at each keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from coreinfer.backends.base import Backend, Phase
from coreinfer.calibration.store import CalibrationStore
from coreinfer.core.layer_errors import LayerErrors
from coreinfer.core.measures import kl_by_token
from coreinfer.core.selection import neuron_budget, top_neurons
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.generation import Prefilled, prefill
from coreinfer.selectors import Residual
from coreinfer.selectors.evidence import Evidence
from coreinfer.standins import Calibrated

SCALE_KEEP = 0.5  # at which the KL of every layer is measured
CONTINUATION = 64  # tokens on which it is
LEAST_TOKENS = 4  # of a document, half of them the prompt


def measure_errors(
    backend: Backend,
    store: CalibrationStore,
    documents: Sequence[Sequence[int]],
    keeps: Sequence[float],
    progress: bool = True,
) -> CalibrationStore:
    """The store with `layer_errors`: KL to dense, nats a token, of each layer alone at each keep.

    The first half of a document is the prompt. How a layer's error falls with keep is what the
    prompt's core neurons leave of the second half: the sum over the dropped neurons of
    |residual|^2 |W_down column|^2. How large it is in nats is measured at keep 0.5, with the
    residual rule and the calibrated stand-in in that layer alone; the error of one layer is small,
    and KL then is about proportional to its square.

    Args:
        backend: the model.
        store: its predictions and priors.
        documents: token ids of at least one, `LEAST_TOKENS` or more each; the fewer and shorter,
            the rougher the measure.
        keeps: fractions, ascending.
    """
    shapes = torch.zeros(store.num_layers, len(keeps) + 1, dtype=torch.float64)
    scales = torch.zeros(store.num_layers, dtype=torch.float64)
    rule = Residual(calibration=store)
    plan = RecordingPlan.of(rule, Calibrated(calibration=store))
    in_halves = replace(RecordingPlan.of(rule), halves=True)
    bar = tqdm(
        desc="errors", unit="layer", total=len(documents) * store.num_layers,
        disable=None if progress else True,
    )  # fmt: skip
    with bar:
        for ids in documents:
            middle = (len(ids) + 1) // 2
            whole = prefill(backend, [ids], in_halves).session.evidence()[0]
            shapes += _left(rule, whole, [*keeps, SCALE_KEEP])
            read = prefill(backend, [ids[:middle]], plan)
            after = list(ids[middle : middle + CONTINUATION])
            dense = _distributions(read.fork(), after)
            for layer in range(store.num_layers):
                scales[layer] += _kl(read, after, dense, layer, store)
                bar.update()
    per_unit = scales / shapes[:, -1].clamp(min=1e-300) / len(documents)
    errors = shapes[:, :-1] * per_unit.clamp(min=0).unsqueeze(1)
    return replace(store, layer_errors=LayerErrors(tuple(keeps), errors))


def _left(rule: Residual, evidence: Evidence, keeps: Sequence[float]) -> Tensor:
    """Of each layer and keep, what the first half's core neurons leave of the second, [L, k]."""
    assert evidence.halves is not None
    first, second = evidence.halves
    ranked, _ = rule.source(replace(evidence, layers=first))
    rows = []
    for layer, (stats, later) in enumerate(zip(ranked, second, strict=True)):
        norms = evidence.column_norms(layer)
        assert later.residual_sum is not None
        energy = (later.residual_sum * norms.square()).cpu()
        keys = rule.keys(stats, norms)
        row = []
        for keep in keeps:
            kept = torch.zeros(energy.numel(), dtype=torch.bool)
            kept[top_neurons(keys, neuron_budget(keep, energy.numel())).long()] = True
            row.append(energy.masked_fill(kept, 0.0).sum() / later.tokens)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def _kl(
    read: Prefilled, after: Sequence[int], dense: Tensor, layer: int, store: CalibrationStore
) -> float:
    """KL(dense || sparse), mean over the tokens, with one sparse layer."""
    others = tuple(one for one in range(store.num_layers) if one != layer)
    fork = read.fork()
    rule = Residual(calibration=store, beta=SCALE_KEEP, dense_layers=others)
    fork.session.select(rule, Calibrated(calibration=store))
    sparse = _distributions(fork, after)
    return float(kl_by_token(dense, sparse).double().mean())


def _distributions(read: Prefilled, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities after each token, [T, V]."""
    return read.session.decode([tokens], Phase.SCORE)[0].float().log_softmax(dim=-1)
