"""A uniform view of the MLP layers of a live Hugging Face model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coreinfer.core.measures import ReadCost
from coreinfer.errors import UserError
from coreinfer.models.families import family_of

SAMPLED_ROWS, SAMPLED_COLUMNS = 4, 64  # of each corner that a fingerprint looks at
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Where torch and transformers' own models define their linears.
_OWN = ("torch.nn.modules.linear", "transformers.pytorch_utils", "transformers.models.")


@dataclass(frozen=True)
class Linear:
    """A linear layer of either storage order, seen as weight [out, in]."""

    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight as [out, in]; a view, never a copy."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.t() if isinstance(self.module, Conv1D) else weight  # Conv1D is [in, out]

    @property
    def bias(self) -> Tensor | None:
        bias = self.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias


@dataclass(frozen=True)
class MlpLayer:
    """One MLP layer: `h = act(inputs(x))` [.., D], `y = output(h)` [.., d]."""

    index: int
    inputs: tuple[Linear, ...]
    output: Linear
    fused: bool
    activation: Callable[[Tensor], Tensor] | None = None  # of the gate; None where there is none

    def gates(self, first: Tensor, h: Tensor) -> Tensor:
        """What is known of the neurons before the rest is read: act(gate x), or h, [.., K].

        Args:
            first: output of the first input linear, [.., K], fused [.., 2 K].
            h: what it became.
        """
        if self.activation is None:
            return h
        return self.activation(first[..., : h.shape[-1]])

    def bytes_behind_gate(self) -> int:
        """Bytes of one neuron's weights that are read once its gate is known."""
        size = self.output.weight.element_size()
        gated = self.activation is not None
        bias = gated and any(linear.bias is not None for linear in self.inputs)
        return (self.hidden_size * (2 if gated else 1) + bias) * size

    @property
    def num_neurons(self) -> int:
        """D."""
        return self.output.weight.shape[1]

    @property
    def hidden_size(self) -> int:
        """d."""
        return self.output.weight.shape[0]

    def column_norms(self) -> Tensor:
        """|W_down[:, n]|_2 of every neuron, shape [D], float64."""
        norms: Tensor = torch.linalg.vector_norm(self.output.weight.detach().float(), dim=0)
        return norms.double().cpu()

    def neuron_bytes(self) -> int:
        """Bytes of one neuron's weights: its input rows (and biases) and its output column."""
        rows = 2 if self.fused else len(self.inputs)
        biases = sum(linear.bias is not None for linear in self.inputs) * (2 if self.fused else 1)
        return (rows * self.hidden_size + biases + self.hidden_size) * (
            self.output.weight.element_size()
        )


def mlp_layers(model: PreTrainedModel) -> tuple[MlpLayer, ...]:
    """The MLP layers of a causal language model.

    Raises:
        UserError: if the architecture is unknown, the model is compiled, or its linears are
            wrapped, quantised or offloaded, so that computing with some of their rows alone would
            not mean the same.
    """
    family = family_of(model.config.model_type)
    if any(_is_compiled(module) for module in model.modules()):
        raise UserError(
            "the model is compiled with torch.compile, which would not notice that its linears "
            "change; use the model it was made from"
        )

    def linear(layer: nn.Module, path: str) -> Linear:
        module = layer.get_submodule(path)
        weight = getattr(module, "weight", None)
        # Subclasses made elsewhere, of the module or of the weight, are how quantisers and
        # adapters hide what the numbers mean.
        own = isinstance(module, (nn.Linear, Conv1D)) and type(module).__module__.startswith(_OWN)
        plain = own and type(weight) in (Tensor, nn.Parameter)
        if not plain or weight is None or weight.dtype not in _DTYPES:
            kind = f"{type(module).__name__} of {getattr(weight, 'dtype', 'no dtype')}"
            raise UserError(
                f"{path} is a {kind}, not a plain floating-point linear; "
                "merge adapters and load without quantisation"
            )
        if weight.is_meta:
            raise UserError(f"the weights of {path} are not in memory; load without offloading")
        return Linear(module)

    try:
        layers = model.get_submodule(family.layers)
    except AttributeError:
        raise UserError(
            f"{type(model).__name__} has no {family.layers!r}; give the causal language model "
            "itself, without a wrapper (AutoModelForCausalLM)"
        ) from None
    assert isinstance(layers, nn.ModuleList)

    def activation(layer: nn.Module) -> nn.Module | None:
        return None if family.activation is None else layer.get_submodule(family.activation)

    return tuple(
        MlpLayer(
            index=i,
            inputs=tuple(linear(layer, path) for path in family.inputs),
            output=linear(layer, family.output),
            fused=family.fused,
            activation=activation(layer),
        )
        for i, layer in enumerate(layers)
    )


def _is_compiled(module: nn.Module) -> bool:
    """By torch.compile(module), which wraps it, or by module.compile(), which does not."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def read_cost(model: PreTrainedModel, layers: tuple[MlpLayer, ...]) -> ReadCost:
    """Bytes read to decode one token, split into what a core set changes and what it does not.

    Of an embedding table one row is read; the output head is read whole, also where it is tied
    to the input embedding.
    """
    head = model.get_output_embeddings()
    head_weight = head.weight if head is not None else None
    tables = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight is not head_weight
    }
    total = sum(p.numel() * p.element_size() for p in model.parameters())  # tied ones come once
    for table in tables.values():
        total -= (table.shape[0] - 1) * table.shape[1] * table.element_size()
    per_neuron = tuple(layer.neuron_bytes() for layer in layers)
    num_neurons = tuple(layer.num_neurons for layer in layers)
    mlp = sum(a * b for a, b in zip(per_neuron, num_neurons, strict=True))
    return ReadCost(
        shared=total - mlp,
        per_neuron=per_neuron,
        num_neurons=num_neurons,
        behind_gate=tuple(layer.bytes_behind_gate() for layer in layers),
    )


def fingerprint(model: PreTrainedModel, layers: tuple[MlpLayer, ...]) -> str:
    """A hash that tells models apart, cheaply, whatever dtype they were loaded in.

    It covers the architecture, the shapes, and a sample of every down projection rounded to
    bfloat16, so the same weights in float32 and bfloat16 have the same fingerprint.
    """
    return fingerprint_of(
        model.config,
        [(layer.hidden_size, layer.num_neurons) for layer in layers],
        (layer.output.weight.detach() for layer in layers),
    )


def fingerprint_of(
    config: PreTrainedConfig, shapes: list[tuple[int, int]], downs: Iterable[Tensor]
) -> str:
    """The same of a model that is not loaded.

    Args:
        config: its configuration.
        shapes: (d, D) of every MLP layer.
        downs: of every layer, the down projection [d, D], or only its first and last
            `SAMPLED_ROWS` rows.
    """
    digest = hashlib.sha256()
    digest.update(repr((config.model_type, shapes, config.vocab_size)).encode())
    rows, columns = SAMPLED_ROWS, SAMPLED_COLUMNS
    for down in downs:
        first, last = down[:rows, :columns], down[-rows:, -columns:]
        sample = torch.cat([first.reshape(-1), last.reshape(-1)])
        rounded = sample.to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(rounded.numpy().tobytes())
    return digest.hexdigest()
