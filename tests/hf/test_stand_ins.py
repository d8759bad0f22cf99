"""Stand-ins through sessions, against the formula written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Stability
from coreinfer.standins import Linear, Mean
from tests.hf.reference import activations, cache_of, down, down_weight, masked
from tests.tiny import CONFIGS, tiny_backend

A = [5, 77, 200, 13, 13, 8, 250, 99, 41, 5, 77]
RULE = Stability(alpha=0.3, beta=0.4)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", ["none", "mean", "linear"])
def test_stand_ins_are_the_written_formula(family: str, name: str) -> None:
    """y = W_core h_core + bias + offset + left right x, layer by layer, in one decode pass."""
    stand_in = {"none": None, "mean": Mean(), "linear": Linear(rank=3)}[name]
    session = tiny_backend(family).start(RecordingPlan.of(RULE, stand_in))
    model = session._backend.model
    session.prefill([A])
    (choice,) = session.select(RULE, stand_in)
    kept = {i: index.tolist() for i, index in choice.core_set.layers.items()}
    rests: list[Tensor] = []
    for layer, (x, h) in enumerate(activations(model, A)):
        rest = [n for n in range(h.shape[1]) if n not in kept[layer]]
        r = h[1:, rest].double() @ down_weight(model, layer)[:, rest].double().t()
        x = x[1:].double()  # the first token, a sink, is left out of the fit
        mean, x_mean = r.mean(dim=0), x.mean(dim=0)
        slope = torch.zeros(len(mean), len(x_mean), dtype=torch.float64)
        if name == "linear":
            slope = _ridge(x - x_mean, r - mean, 0.3, 3)
        rests.append((mean, x_mean, slope))
    with torch.no_grad():
        out = model(torch.tensor([A]), use_cache=True)
    handles = []
    for layer, (mean, x_mean, slope) in enumerate(rests if stand_in else []):
        inputs: list[Tensor] = []
        first = session._backend.anatomy.layers[layer].inputs[0].module

        def see(_m: Any, args: Any, inputs: list[Tensor] = inputs) -> None:
            inputs.append(args[0])

        def add(
            _m: Any, _a: Any, y: Tensor, inputs: Any = inputs, terms: Any = (mean, x_mean, slope)
        ) -> Tensor:
            offset, centre, matrix = terms
            return y + (offset + (inputs[-1].double() - centre) @ matrix.t()).to(y.dtype)

        handles.append(first.register_forward_pre_hook(see))
        handles.append(down(model, layer).register_forward_hook(add))
    with masked(model, kept), torch.no_grad():
        want = model(torch.tensor([[17]]), **cache_of(model, out)).logits[0, -1]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(session.decode([[17]])[0, -1], want, rtol=1e-3, atol=1e-3)


def _ridge(x: Tensor, r: Tensor, ridge: float, rank: int) -> Tensor:
    """The reduced-rank ridge regression in its primal form: [d_r, d_x]."""
    penalty = ridge * x.square().sum(dim=1).mean()
    tall = torch.cat([x, penalty.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    target = torch.cat([r, torch.zeros(x.shape[1], r.shape[1], dtype=x.dtype)])
    full = torch.linalg.lstsq(tall, target).solution  # [d_x, d_r]
    basis = torch.linalg.svd(tall @ full, full_matrices=False).Vh[:rank]
    return (full @ basis.t() @ basis).t()
