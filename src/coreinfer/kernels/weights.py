"""What a decode step works on: a decoder's weights, a sequence's neurons, its cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from coreinfer.errors import UserError
from coreinfer.kernels import abi
from coreinfer.kernels.arena import Arena
from coreinfer.kernels.formats import WeightFormat
from coreinfer.kernels.layout import Packed, PackedMlp, padded_vector
from coreinfer.kernels.linear import abi_matrix, abi_mlp
from coreinfer.kernels.linear_twin import ACTIVATIONS
from coreinfer.kernels.packing import pack


@dataclass(frozen=True, eq=False)
class Norm:
    """float32 [d] each; a bias makes it a LayerNorm's, and is None for an RMSNorm."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """A decoder layer but for its MLP, which belongs to the sequence.

    Attributes:
        norm1, norm2: before attention and before the MLP.
        qkv: [(num_heads + 2 num_kv_heads) * head_dim, d], q, k and v below each other.
        o: [d, num_heads * head_dim].
        qkv_bias, o_bias, mlp_out_bias: float32 [rows], or None.
        q_norm, k_norm: float32 [head_dim], an RMSNorm of each head before RoPE (Qwen3), or None.
        rope: whether q and k are rotated (not in every layer of SmolLM3).
        window: keys that a token sees, itself included; 0 for all.
    """

    norm1: Norm
    norm2: Norm
    qkv: Packed
    o: Packed
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    mlp_out_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    rope: bool = True
    window: int = 0


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """A pre-norm decoder of the Llama family or OPT.

    Attributes:
        head: [vocab, d].
        embed: bfloat16 [vocab, d]; None where the head's rows are the embeddings (tied).
        position: float32 [positions, d], added to the embedding at `Row.position`; None with RoPE.
        inverse_frequencies: float32 [head_dim / 2] of RoPE, scaled already (linear, llama3); None
            without. The halves of a head are rotated against each other, as Hugging Face does.
        layer_norm: whether norms subtract the mean (LayerNorm) or not (RMSNorm).
        activation: of the MLP, one of `linear_twin.ACTIVATIONS`.
        rope_factor: cosines and sines are multiplied by it.
    """

    layers: Sequence[LayerWeights]
    final_norm: Norm
    head: Packed
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    layer_norm: bool = False
    embed: Tensor | None = None
    position: Tensor | None = None
    inverse_frequencies: Tensor | None = None
    rope_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            would_do = ", ".join(ACTIVATIONS)
            raise UserError(f"no activation {self.activation!r}; one of {would_do} would do")

    @property
    def hidden_size(self) -> int:
        """d."""
        return self.head.columns

    @cached_property
    def structure(self) -> tuple[abi.Model, Any]:
        """What the native code takes, and what that points to; made once."""
        keep = _Vectors()
        layers = (abi.Layer * len(self.layers))(*(keep.layer(layer) for layer in self.layers))
        model = abi.Model(
            layers=layers,
            head=abi_matrix(self.head),
            embed=None if self.embed is None else keep.address(self.embed, torch.bfloat16),
            position=None if self.position is None else keep.address(self.position),
            inverse_frequencies=keep.padded(self.inverse_frequencies),
            final_weight=keep.padded(self.final_norm.weight),
            final_bias=keep.padded(self.final_norm.bias),
            hidden_size=self.hidden_size,
            num_layers=len(self.layers),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            activation=ACTIVATIONS.index(self.activation),
            layer_norm=int(self.layer_norm),
            norm_eps=self.norm_eps,
            rope_factor=self.rope_factor,
        )
        return model, keep


class _Vectors:
    """Tensors as the native code wants them, kept alive."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def address(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Of the numbers of a tensor."""
        self._tensors.append(tensor.detach().to("cpu", dtype).contiguous())
        return self._tensors[-1].data_ptr()

    def padded(self, vector: Tensor | None) -> int | None:
        """Of a vector with zeros behind it up to a multiple of 16."""
        return None if vector is None else self.address(padded_vector(vector.detach()))

    def layer(self, layer: LayerWeights) -> abi.Layer:
        """A layer's structure."""
        return abi.Layer(
            qkv=abi_matrix(layer.qkv),
            o=abi_matrix(layer.o),
            norm1_weight=self.padded(layer.norm1.weight),
            norm1_bias=self.padded(layer.norm1.bias),
            norm2_weight=self.padded(layer.norm2.weight),
            norm2_bias=self.padded(layer.norm2.bias),
            qkv_bias=self.padded(layer.qkv_bias),
            o_bias=self.padded(layer.o_bias),
            mlp_out_bias=self.padded(layer.mlp_out_bias),
            q_norm=self.padded(layer.q_norm),
            k_norm=self.padded(layer.k_norm),
            rope=int(layer.rope),
            window=layer.window,
        )


def map_format(hidden_size: int) -> WeightFormat:
    """How the maps of a stand-in are stored, whatever the model's own format.

    Eight bits, for their rounding is nothing beside what a map of low rank leaves: for the bytes of
    one in bfloat16, one of almost twice the rank. bfloat16 where groups do not fit.
    """
    size = next((size for size in (32, 16) if hidden_size % size == 0), None)
    return WeightFormat.named("bfloat16") if size is None else WeightFormat("int8", size)


def _balance(left: Tensor, right: Tensor) -> float:
    """The power of two for which left / it and right * it are of like size."""
    sizes = float(left.abs().max()), float(right.abs().max())
    return 1.0 if min(sizes) == 0 else 2.0 ** round(math.log2(sizes[0] / sizes[1]) / 2)


@dataclass(frozen=True, eq=False)
class StandInWeights:
    """y += offset + left (right x), x the MLP's input.

    Attributes:
        offset: float32 [d].
        left, right: [d, r] and [r, d], packed in `map_format`, r filled up with zeros to whole
            groups; None where the stand-in is constant.
    """

    offset: Tensor
    left: Packed | None = None
    right: Packed | None = None

    @classmethod
    def pack(
        cls,
        offset: Tensor,
        left: Tensor | None = None,
        right: Tensor | None = None,
        arena: Arena | None = None,
    ) -> StandInWeights:
        """From tensors of any floating dtype: offset [d], left [d, r], right [r, d]."""
        offset = offset.detach().to("cpu", torch.float32).contiguous()
        if left is None or right is None:
            return cls(offset)
        form = map_format(len(offset))
        missing = -left.shape[1] % max(1, form.group_size)
        # Scales are float16, and a factor's numbers may be small where the other's are not.
        balance = _balance(left, right)
        factors = pad(left / balance, (0, missing)), pad(right * balance, (0, 0, 0, missing))
        return cls(
            offset,
            *(pack(form.quantize(part), part.shape[1], form, arena=arena) for part in factors),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes that a step reads."""
        factors = (self.left, self.right)
        return 4 * self.offset.numel() + sum(p.num_bytes for p in factors if p is not None)


@dataclass(frozen=True, eq=False)
class Plan:
    """What a sequence decodes with: the chosen neurons of each layer and their stand-ins.

    Sequences that share a PackedMlp object of a layer (dense ones do) read it once a step.
    """

    mlps: Sequence[PackedMlp]
    stand_ins: Sequence[StandInWeights | None]

    @cached_property
    def structures(self) -> tuple[Any, Any, Any]:
        """Arrays of `abi.Mlp` and `abi.StandIn`, and what they point to; made once."""
        keep = _Vectors()
        mlps = (abi.Mlp * len(self.mlps))(*(abi_mlp(mlp) for mlp in self.mlps))
        parts = (abi.StandIn * len(self.mlps))(*(_stand_in(part, keep) for part in self.stand_ins))
        return mlps, parts, keep


def _stand_in(part: StandInWeights | None, keep: _Vectors) -> abi.StandIn:
    if part is None:
        return abi.StandIn()
    found = abi.StandIn(offset=keep.padded(part.offset))
    if part.left is not None and part.right is not None:
        found.left, found.right = abi_matrix(part.left), abi_matrix(part.right)
    return found


@dataclass(frozen=True, eq=False)
class KeyValueCache:
    """Keys (rotated) and values of a sequence: [layers, num_kv_heads, capacity, head_dim] each.

    float32 or bfloat16, of any strides but that of the last dimension, which is 1; both alike.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(
        cls, layers: int, num_kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype
    ) -> KeyValueCache:
        """Memory for `capacity` tokens."""
        shape = (layers, num_kv_heads, capacity, head_dim)
        return cls(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.keys.shape[2]


@dataclass(frozen=True, eq=False)
class Row:
    """One token of one sequence.

    Attributes:
        token: its id.
        position: for RoPE or the learned positions (offset included).
        length: tokens in the cache before it; its key and value are written there. Rows of the same
            sequence with length, length + 1, ... in one step see each other causally.
        skipped: int64 [1] or None; a step adds the neurons that it skipped for being small.
    """

    token: int
    position: int
    length: int
    plan: Plan
    cache: KeyValueCache
    skipped: Tensor | None = None
