"""The weights of a native model, and what can be asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coreinfer.backends.native.architecture import DecoderConfig
from coreinfer.backends.native.container import stored_bytes
from coreinfer.backends.native.tensors import encode, head_format, tensor_plans
from coreinfer.core.measures import ReadCost
from coreinfer.kernels.formats import WeightFormat
from coreinfer.models.mlp import fingerprint, mlp_layers

_TABLE = WeightFormat.named("bfloat16")


@dataclass(frozen=True)
class NativeWeights:
    """A model for the native backend.

    Attributes:
        config: its architecture.
        format: how its linears are stored.
        tensors: by the names of `tensor_plans(config)`; records are uint8, vectors float32.
        name: what records and core sets call the model.
        fingerprint: of the model it was made from, so that core sets serve both backends.
    """

    config: DecoderConfig
    format: WeightFormat
    tensors: Mapping[str, Tensor]
    name: str
    fingerprint: str

    @property
    def num_neurons(self) -> tuple[int, ...]:
        """D of every layer."""
        return (self.config.num_neurons,) * self.config.num_layers

    @property
    def head_format(self) -> WeightFormat:
        """How the head is stored, and the embedding where it is tied to it."""
        return head_format(self.format)

    @property
    def mlp_parts(self) -> int:
        """Records that make up a neuron: gate row, up row, down column; or fc1 row, fc2 column."""
        return 3 if self.config.gated else 2

    def vector(self, name: str) -> Tensor | None:
        """A norm or bias, float32; None where the model has none of that name."""
        return self.tensors.get(name)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [N] -> [N, d] float32."""
        d = self.config.hidden_size
        if self.config.tied:
            return self.head_format.dequantize(self.tensors["head"][token_ids], d)
        return _TABLE.dequantize(self.tensors["embed"][token_ids], d)

    def position(self, positions: Tensor) -> Tensor:
        """Learned vectors of positions [N] -> [N, d] float32."""
        rows = self.tensors["position"][positions + self.config.position_offset]
        return _TABLE.dequantize(rows, self.config.hidden_size)

    def position_table(self) -> Tensor:
        """The learned vectors of all positions, those before position 0 included, float32."""
        return _TABLE.dequantize(self.tensors["position"], self.config.hidden_size)

    def mlp_part(self, layer: int, part: int) -> Tensor:
        """Records of one part of all neurons: [D, row_bytes(d)], a view; -1 is the down columns."""
        size = self.format.row_bytes(self.config.hidden_size)
        parts = self.tensors[f"layers.{layer}.mlp"].view(-1, self.mlp_parts, size)
        return parts[:, part]

    def read_cost(self) -> ReadCost:
        """Bytes that decoding a token reads: records with their scales, float32 norms and biases.

        Of a table one row is read; the head is read whole, also where it is tied to the embedding.
        """
        config = self.config
        # From the plans: asking a mapped file for its tensors would read all of it.
        sizes = {plan.name: stored_bytes(plan, self.format) for plan in tensor_plans(config)}
        for name in ("embed", "position"):
            if name in sizes:
                sizes[name] = _TABLE.row_bytes(config.hidden_size)
        layers = range(config.num_layers)
        mlp = [
            sizes.pop(f"layers.{i}.mlp") + sizes.pop(f"layers.{i}.mlp_in_bias", 0) for i in layers
        ]
        behind = 2 if config.gated else 1  # rows and columns
        return ReadCost(
            shared=sum(sizes.values()),
            per_neuron=tuple(size // config.num_neurons for size in mlp),
            num_neurons=self.num_neurons,
            behind_gate=(behind * self.format.row_bytes(config.hidden_size),) * config.num_layers,
        )


def weights_from(
    model: PreTrainedModel, weight_format: WeightFormat, name: str | None = None
) -> NativeWeights:
    """A native model from a Hugging Face model in memory.

    Raises:
        UserError: if the architecture is not one of the native backend's, a weight is not finite,
            or the group size does not divide a row.
    """
    config = DecoderConfig.from_hf(model.config)
    state = model.state_dict()
    with torch.no_grad():
        tensors = {
            plan.name: encode(plan, [state[source] for source in plan.sources], weight_format)
            for plan in tensor_plans(config)
        }
    return NativeWeights(
        config,
        weight_format,
        tensors,
        name or model.config.name_or_path or config.model_type,
        fingerprint(model, mlp_layers(model)),
    )
