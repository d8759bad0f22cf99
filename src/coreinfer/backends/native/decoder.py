"""The decoder in torch: the dense prefill, and the definition of what a decode step computes.

The tokens of all sequences lie one after the other in one matrix, without padding; attention
alone looks at them sequence by sequence. The residual stream, norms, rotary positions and
attention are float32, whatever the products are computed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from coreinfer.backends.native.architecture import DecoderConfig
from coreinfer.backends.native.cache import KvCache
from coreinfer.backends.native.products import Products
from coreinfer.backends.native.weights import NativeWeights


class Mlp(Protocol):
    """The MLPs of a pass."""

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """The MLP's input [N, d] of all tokens of the pass -> its output [N, d]."""
        ...


class Decoder:
    """A model that reads tokens.

    Args:
        weights: the model.
        products: how linears are computed.
    """

    def __init__(self, weights: NativeWeights, products: Products) -> None:
        self.weights = weights
        self.config: DecoderConfig = weights.config
        self.products = products
        rope = self.config.rope
        self._frequencies = None if rope is None else rope.inverse_frequencies(self.config.head_dim)

    def read(
        self, token_ids: Sequence[Sequence[int]], caches: Sequence[KvCache], mlp: Mlp
    ) -> Tensor:
        """Append tokens to sequences.

        Args:
            token_ids: new tokens, none or more a sequence.
            caches: of each sequence; they hold the new tokens afterwards.
            mlp: computes the MLPs.

        Returns:
            The hidden states behind the final norm, of all sequences' tokens in order, [N, d].

        Raises:
            UserError: if a sequence becomes longer than the model reads, or a token is unknown.
        """
        lengths = [len(row) for row in token_ids]
        self.config.require_tokens(token_ids)
        ids = torch.tensor([token for row in token_ids for token in row], dtype=torch.long)
        for cache, length in zip(caches, lengths, strict=True):
            cache.reserve(length)
        positions = torch.cat(
            [torch.arange(c.length, c.length + n) for c, n in zip(caches, lengths, strict=True)]
        )
        x = self.weights.embed(ids)
        if self._frequencies is None:
            x = x + self.weights.position(positions)
        turn = self._rotation(positions)
        for layer in range(self.config.num_layers):
            name = f"layers.{layer}."
            x = x + self._attention(layer, self._norm(f"{name}norm1", x), turn, lengths, caches)
            x = x + mlp(layer, self._norm(f"{name}norm2", x))
        for cache, length in zip(caches, lengths, strict=True):
            cache.advance(length)
        return self._norm("final_norm", x)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, eps = self.weights.tensors[f"{name}.weight"], self.config.norm_eps
        if self.config.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], weight, self.weights.tensors[f"{name}.bias"], eps)
        return _rms_norm(x, weight, eps)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [N, 1, head_dim]."""
        if self._frequencies is None:
            return None
        angles = positions[:, None].float() * self._frequencies
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return angles.cos(), angles.sin()

    def _attention(
        self,
        layer: int,
        x: Tensor,
        turn: tuple[Tensor, Tensor] | None,
        lengths: Sequence[int],
        caches: Sequence[KvCache],
    ) -> Tensor:
        config, weights, name = self.config, self.weights, f"layers.{layer}."
        qkv = self.products.linear(
            x, weights.tensors[f"{name}qkv"], weights.vector(f"{name}qkv_bias")
        )
        q, k, v = (
            part.unflatten(-1, (-1, config.head_dim))
            for part in qkv.split([config.q_size, config.kv_size, config.kv_size], dim=-1)
        )
        if config.qk_norm:
            q = _rms_norm(q, weights.tensors[f"{name}q_norm"], config.norm_eps)
            k = _rms_norm(k, weights.tensors[f"{name}k_norm"], config.norm_eps)
        if turn is not None:
            q, k = _rotate(q, *turn), _rotate(k, *turn)
        found = []
        for cache, *new in zip(
            caches, q.split(lengths), k.split(lengths), v.split(lengths), strict=True
        ):
            queries, keys, values = (part.transpose(0, 1) for part in new)  # [heads, n, head_dim]
            cache.write(layer, keys, values)
            past = cache.length
            keys, values = cache.read(layer, past + keys.shape[1])
            found.append(_attend(queries, keys, values, past))
        y = torch.cat(found)
        return self.products.linear(y, weights.tensors[f"{name}o"], weights.vector(f"{name}o_bias"))


def _attend(queries: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
    """Causal attention of n tokens that follow `past` others, [n, heads * head_dim].

    Args:
        queries: [heads, n, head_dim].
        keys, values: [kv heads, past + n, head_dim].
        past: how many tokens came before.
    """
    tokens = queries.shape[1]
    mask = None
    if past and tokens > 1:
        mask = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(diagonal=past)
    y = F.scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=not past and tokens > 1,
        enable_gqa=queries.shape[0] != keys.shape[0],
    )
    return y[0].transpose(0, 1).flatten(1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, heads, head_dim] turned by the angle of its position; the halves are the pairs."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin
