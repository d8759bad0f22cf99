"""Decode steps: a model packed for the kernels, and each sequence's plan to decode with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from coreinfer.backends.choose import SmallLayer
from coreinfer.backends.native.cache import KvCache
from coreinfer.backends.native.weights import NativeWeights
from coreinfer.kernels.arena import Arena, Mappings
from coreinfer.kernels.decode import decode_step
from coreinfer.kernels.formats import WeightFormat
from coreinfer.kernels.layout import Packed, PackedMlp
from coreinfer.kernels.linear import MAX_ROWS, linear
from coreinfer.kernels.packing import pack, pack_mlp
from coreinfer.kernels.weights import (
    DecoderWeights,
    KeyValueCache,
    LayerWeights,
    Norm,
    Plan,
    Row,
    StandInWeights,
)


@dataclass(frozen=True)
class PackedLayer:
    """The core neurons of one sequence in one layer, packed, and the stand-in for the others."""

    mlp: PackedMlp
    stand_in: StandInWeights | None


class Stepper:
    """Decodes tokens, eight rows at a time, with the kernels.

    Everything but the MLPs is packed at once; the MLP of a layer when all its neurons are first
    asked for, and once more where small ones of all are first to be skipped.
    Threads are as many as torch has; it does nothing meanwhile.
    """

    def __init__(self, weights: NativeWeights, *, skip_zeros: bool = True) -> None:
        self._weights = weights
        # What a neuron that is exactly zero would be multiplied by is not read.
        self._skip_zeros = skip_zeros and weights.config.activation == "relu"
        self._arena = Arena()
        self._mappings = Mappings()  # of core neurons: each prompt's in turn
        self._whole: dict[tuple[int, bool], PackedMlp] = {}  # by layer, and whether by neuron
        self._decoder = self._pack()

    @cached_property
    def dense_plan(self) -> Plan:
        """What a sequence decodes with that keeps all neurons."""
        return self.plan({})

    def pack_layer(self, small: SmallLayer) -> list[PackedLayer]:
        """The core neurons of each sequence; equal sets are packed once, those of all neurons once
        for all prompts, and read once where no neuron is skipped."""
        arena = Arena(mappings=self._mappings)
        packed: dict[bytes, PackedMlp] = {}
        layers = []
        for row, index in enumerate(small.kept):
            key = index.numpy().tobytes()
            by_neuron = self._skip_zeros or small.least is not None
            if index.numel() == self._weights.config.num_neurons:
                packed[key] = self._whole_mlp(small.layer, by_neuron)
            elif key not in packed:
                packed[key] = self._pack_mlp(small.layer, index, arena, by_neuron)
            mlp = packed[key] if small.least is None else packed[key].skipping(small.least[row])
            stand_in = None
            if small.terms is not None:
                term = small.terms[row]
                stand_in = StandInWeights.pack(term.offset, term.left, term.right, arena)
            layers.append(PackedLayer(mlp, stand_in))
        return layers

    def plan(self, sparse: Mapping[int, PackedLayer]) -> Plan:
        """What a sequence decodes with: its sparse layers, and the others whole."""
        mlps: list[PackedMlp] = []
        stand_ins: list[StandInWeights | None] = []
        for layer in range(self._weights.config.num_layers):
            own = sparse.get(layer)
            mlps.append(self._whole_mlp(layer, self._skip_zeros) if own is None else own.mlp)
            stand_ins.append(None if own is None else own.stand_in)
        return Plan(mlps, stand_ins)

    def decode(
        self,
        token_ids: Sequence[Sequence[int]],
        caches: Sequence[KvCache],
        plans: Sequence[Plan],
        skipped: Sequence[Tensor],
    ) -> Tensor:
        """Append tokens to sequences; logits after each, all sequences' in order, [N, V].

        The core neurons of each sequence that were skipped, over its tokens and all layers, are
        added to `skipped`, int64 [1] each.

        Raises:
            UserError: if a sequence becomes longer than the model reads, or a token is unknown.
        """
        rows: list[Row] = []
        offset = self._weights.config.position_offset
        self._weights.config.require_tokens(token_ids)
        for tokens, cache, plan, count in zip(token_ids, caches, plans, skipped, strict=True):
            cache.reserve(len(tokens))
            view = KeyValueCache(cache.data[:, 0], cache.data[:, 1])
            for length, token in enumerate(tokens, start=cache.length):
                rows.append(Row(token, length + offset, length, plan, view, count))
        found = [
            decode_step(self._decoder, rows[start : start + MAX_ROWS])
            for start in range(0, len(rows), MAX_ROWS)
        ]
        for tokens, cache in zip(token_ids, caches, strict=True):
            cache.advance(len(tokens))
        return torch.cat(found) if len(found) > 1 else found[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states behind the final norm [N, d] -> logits [N, V] float32."""
        return linear(self._decoder.head, hidden)

    def _whole_mlp(self, layer: int, by_neuron: bool) -> PackedMlp:
        key = layer, by_neuron
        if key not in self._whole:
            self._whole[key] = self._pack_mlp(layer, None, self._arena, by_neuron)
        return self._whole[key]

    def _pack_mlp(
        self, layer: int, index: Tensor | None, arena: Arena, by_neuron: bool
    ) -> PackedMlp:
        weights = self._weights
        return pack_mlp(
            weights.tensors[f"layers.{layer}.mlp"],
            weights.config.hidden_size,
            weights.format,
            gated=weights.config.gated,
            index=index,
            in_bias=weights.vector(f"layers.{layer}.mlp_in_bias"),
            skip_zeros=by_neuron,
            arena=arena,
        )

    def _pack(self) -> DecoderWeights:
        weights, config = self._weights, self._weights.config

        def packed(name: str, columns: int, form: WeightFormat = weights.format) -> Packed:
            return pack(weights.tensors[name], columns, form, arena=self._arena)

        def norm(name: str) -> Norm:
            return Norm(weights.tensors[f"{name}.weight"], weights.vector(f"{name}.bias"))

        def layer(index: int) -> LayerWeights:
            name = f"layers.{index}."
            return LayerWeights(
                norm1=norm(f"{name}norm1"),
                norm2=norm(f"{name}norm2"),
                qkv=packed(f"{name}qkv", config.hidden_size),
                o=packed(f"{name}o", config.q_size),
                qkv_bias=weights.vector(f"{name}qkv_bias"),
                o_bias=weights.vector(f"{name}o_bias"),
                mlp_out_bias=weights.vector(f"{name}mlp_out_bias"),
                q_norm=weights.vector(f"{name}q_norm"),
                k_norm=weights.vector(f"{name}k_norm"),
            )

        rope = config.rope
        embed = None if config.tied else weights.tensors["embed"].view(torch.bfloat16)
        return DecoderWeights(
            layers=[layer(index) for index in range(config.num_layers)],
            final_norm=norm("final_norm"),
            head=packed("head", config.hidden_size, weights.head_format),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            norm_eps=config.norm_eps,
            activation=config.activation,
            layer_norm=config.norm == "layer",
            embed=embed,
            position=weights.position_table() if rope is None else None,
            inverse_frequencies=None if rope is None else rope.inverse_frequencies(config.head_dim),
        )
