"""An independent account of the method on a live transformers model: hooks, loops, no shortcuts.

Nothing here is shared with the package: paths are written out, h is masked after the full product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from inspect import signature
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_GATED = ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.down_proj")
# model_type -> (a linear that reads the MLP's input, the linear that reads its activations)
PATHS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"), _GATED
    ),
    "phi3": ("model.layers.{}.mlp.gate_up_proj", "model.layers.{}.mlp.down_proj"),
    "opt": ("model.decoder.layers.{}.fc1", "model.decoder.layers.{}.fc2"),
    "gpt2": ("transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers.{}.mlp.dense_h_to_4h", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "falcon": ("transformer.h.{}.mlp.dense_h_to_4h", "transformer.h.{}.mlp.dense_4h_to_h"),
}


def down(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    return model.get_submodule(PATHS[model.config.model_type][1].format(layer))


def down_weight(model: PreTrainedModel, layer: int) -> Tensor:
    """W_down, [d, D], of a layer."""
    weight = down(model, layer).weight.detach()
    return weight.t() if model.config.model_type == "gpt2" else weight


@contextmanager
def hooked(model: PreTrainedModel, edit: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """`edit(layer, h)` sees, and may replace, what each down projection reads."""
    handles = []
    for layer in range(model.config.num_hidden_layers):

        def hook(_m: Any, args: Any, layer: int = layer) -> Any:
            changed = edit(layer, args[0])
            return None if changed is None else (changed,)

        handles.append(down(model, layer).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activations(model: PreTrainedModel, ids: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """(x [T, d], h [T, D]) of every layer, for one unpadded sequence."""
    xs: dict[int, Tensor] = {}
    hs: dict[int, Tensor] = {}
    handles = []
    for layer in range(model.config.num_hidden_layers):
        first = model.get_submodule(PATHS[model.config.model_type][0].format(layer))

        def see(_m: Any, args: Any, layer: int = layer) -> None:
            xs[layer] = args[0].reshape(len(ids), -1).clone()

        handles.append(first.register_forward_pre_hook(see))

    def keep(layer: int, h: Tensor) -> None:
        hs[layer] = h.reshape(len(ids), -1).clone()

    try:
        with hooked(model, keep):
            model(torch.tensor([list(ids)]))
    finally:
        for handle in handles:
            handle.remove()
    return [(xs[layer], hs[layer]) for layer in sorted(hs)]


def counts(h: Tensor, alpha: float) -> tuple[list[int], list[float]]:
    """f(n) and the sums of positive activations over the rows of h [T, D]."""
    found, sums = [0] * h.shape[1], [0.0] * h.shape[1]
    for row in h.float().tolist():
        order = sorted((n for n, v in enumerate(row) if v > 0), key=lambda n: (-row[n], n))
        for n in order:
            sums[n] += row[n]
        for n in order[: max(1, ceil(Fraction(str(alpha)) * len(order)))]:
            found[n] += 1
    return found, sums


def core_set(h: Tensor, alpha: float, beta: float) -> list[int]:
    """The stability-guided core neurons of a prompt without beginning-of-sequence token."""
    found, sums = counts(h, alpha)
    order = sorted(range(len(found)), key=lambda n: (-found[n], -sums[n], n))
    return sorted(order[: round(beta * len(found))])


def cache_of(model: PreTrainedModel, out: Any) -> dict[str, Any]:
    """The arguments that go on with the cache of `out`, as this transformers names them."""
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    return {name: out[name], "use_cache": True}


@contextmanager
def masked(model: PreTrainedModel, kept: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """All passes compute with the kept neurons alone: the others' activations become zero."""

    def edit(layer: int, h: Tensor) -> Tensor | None:
        if layer not in kept:
            return None
        mask = torch.zeros(h.shape[-1], dtype=h.dtype)
        mask[list(kept[layer])] = 1
        return h * mask

    with hooked(model, edit):
        yield


@torch.no_grad()
def sparse_greedy(
    model: PreTrainedModel,
    prompt: Sequence[int],
    kept: Mapping[int, Sequence[int]],
    steps: int,
    draw: Callable[[Tensor], int] = lambda logits: int(logits.argmax()),
) -> tuple[list[int], Tensor]:
    """Dense prefill, then `steps` tokens with masked activations: tokens, logits [steps, V]."""
    out = model(torch.tensor([list(prompt)]), use_cache=True)
    tokens, logits = [], [out.logits[0, -1]]
    with masked(model, kept):
        while True:
            tokens.append(draw(logits[-1].float()))
            if len(tokens) == steps:
                return tokens, torch.stack(logits)
            out = model(torch.tensor([tokens[-1:]]), **cache_of(model, out))
            logits.append(out.logits[0, -1])
