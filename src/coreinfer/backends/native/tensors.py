"""The tensors of a native model, and which tensors of a Hugging Face model they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from coreinfer.backends.native.architecture import DecoderConfig
from coreinfer.errors import UserError
from coreinfer.kernels.formats import WeightFormat


class Role(Enum):
    """How a tensor is stored."""

    LINEAR = "linear"  # records of the chosen format, a row each; its sources lie below each other
    HEAD = "head"  # as LINEAR, in eight bits at least: tied, it is the embedding too
    MLP = "mlp"  # records of the chosen format, neuron-major: a row of each input, a down column
    TABLE = "table"  # bfloat16 records, whatever the format: rows that are looked up
    VECTOR = "vector"  # float32, its sources one after the other


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of a native model, and what it is made of.

    Attributes:
        name: its name in the native model.
        role: how it is stored.
        sources: the tensors of transformers' state dict it is made of, in order. Of an MLP:
            gate [D, d], up [D, d], down [d, D], or fc1, fc2.
        shape: of the numbers it holds: (rows, columns); (D, d) for an MLP, a part; (size,) for a
            vector.
    """

    name: str
    role: Role
    sources: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Names:
    """How transformers names the tensors of a family."""

    root: str
    embed: str
    final_norm: str
    attention: str
    output: str
    norm1: str
    norm2: str
    mlp: tuple[str, ...]


_LLAMA_NAMES = _Names(
    "model.", "embed_tokens", "norm", "self_attn", "o_proj", "input_layernorm",
    "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)  # fmt: skip
_OPT_NAMES = _Names(
    "model.decoder.", "embed_tokens", "final_layer_norm", "self_attn", "out_proj",
    "self_attn_layer_norm", "final_layer_norm", ("fc1", "fc2"),
)  # fmt: skip


def tensor_plans(config: DecoderConfig) -> list[TensorPlan]:
    """Every tensor of a native model, in the order of a forward pass."""
    return list(_plans(config))


def _plans(config: DecoderConfig) -> Iterator[TensorPlan]:
    names = _OPT_NAMES if config.family == "opt" else _LLAMA_NAMES
    d, neurons = config.hidden_size, config.num_neurons
    embed = f"{names.root}{names.embed}.weight"
    if not config.tied:
        yield TensorPlan("embed", Role.TABLE, (embed,), (config.vocab_size, d))
    if config.rope is None:
        rows = config.context_length + config.position_offset
        source = f"{names.root}embed_positions.weight"
        yield TensorPlan("position", Role.TABLE, (source,), (rows, d))
    for layer in range(config.num_layers):
        here, there = f"layers.{layer}.", f"{names.root}layers.{layer}."
        qkv = [f"{there}{names.attention}.{part}_proj" for part in "qkv"]
        out = f"{there}{names.attention}.{names.output}"
        mlp = [there + part for part in names.mlp]
        qkv_size = config.q_size + 2 * config.kv_size
        yield from _norm(config, f"{here}norm1", f"{there}{names.norm1}", d)
        yield TensorPlan(f"{here}qkv", Role.LINEAR, _weights(qkv), (qkv_size, d))
        if config.qkv_bias:
            yield TensorPlan(f"{here}qkv_bias", Role.VECTOR, _biases(qkv), (qkv_size,))
        if config.qk_norm:
            for part in ("q_norm", "k_norm"):
                source = f"{there}{names.attention}.{part}.weight"
                yield TensorPlan(here + part, Role.VECTOR, (source,), (config.head_dim,))
        yield TensorPlan(f"{here}o", Role.LINEAR, _weights([out]), (d, config.q_size))
        if config.o_bias:
            yield TensorPlan(f"{here}o_bias", Role.VECTOR, _biases([out]), (d,))
        yield from _norm(config, f"{here}norm2", f"{there}{names.norm2}", d)
        yield TensorPlan(f"{here}mlp", Role.MLP, _weights(mlp), (neurons, d))
        if config.mlp_bias:
            yield TensorPlan(f"{here}mlp_in_bias", Role.VECTOR, _biases(mlp[:-1]), (neurons,))
            yield TensorPlan(f"{here}mlp_out_bias", Role.VECTOR, _biases(mlp[-1:]), (d,))
    yield from _norm(config, "final_norm", f"{names.root}{names.final_norm}", d)
    head = embed if config.tied else "lm_head.weight"
    yield TensorPlan("head", Role.HEAD, (head,), (config.vocab_size, d))


def _norm(config: DecoderConfig, name: str, source: str, size: int) -> Iterator[TensorPlan]:
    yield TensorPlan(f"{name}.weight", Role.VECTOR, (f"{source}.weight",), (size,))
    if config.norm == "layer":
        yield TensorPlan(f"{name}.bias", Role.VECTOR, (f"{source}.bias",), (size,))


def _weights(modules: list[str]) -> tuple[str, ...]:
    return tuple(f"{module}.weight" for module in modules)


def _biases(modules: list[str]) -> tuple[str, ...]:
    return tuple(f"{module}.bias" for module in modules)


def format_of(plan: TensorPlan, chosen: WeightFormat) -> WeightFormat:
    """The format of a tensor's records, where `chosen` is that of the linears."""
    if plan.role is Role.TABLE:
        return WeightFormat.named("bfloat16")
    return head_format(chosen) if plan.role is Role.HEAD else chosen


def head_format(chosen: WeightFormat) -> WeightFormat:
    """The head's format, where `chosen` is that of the other linears: int8 beside int4.

    Four bits there would be much of what int4 loses, for 2 % of the bytes of a 7B model.
    """
    if chosen.dtype != "int4":
        return chosen
    return WeightFormat("int8", min(chosen.group_size, WeightFormat.named("int8").group_size))


def encode(plan: TensorPlan, sources: Sequence[Tensor], weight_format: WeightFormat) -> Tensor:
    """A tensor of a native model from the tensors it is made of.

    Args:
        plan: which tensor.
        sources: the floating-point tensors that `plan.sources` names.
        weight_format: of the linears.

    Returns:
        uint8 records, or float32 for a vector.

    Raises:
        UserError: naming the tensor, if its shape is another than the configuration's, its rows
            do not divide into groups, or a number is not finite.
    """
    parts = list(sources)
    if plan.role is Role.MLP:
        parts[-1] = parts[-1].t()  # a neuron's down column as a row
    shapes = [tuple(part.shape) for part in parts]
    if plan.role is Role.MLP:
        fits = all(shape == plan.shape for shape in shapes)
    else:
        tails = {shape[1:] for shape in shapes}
        fits = tails == {plan.shape[1:]} and sum(shape[0] for shape in shapes) == plan.shape[0]
    names = ", ".join(plan.sources)
    form = format_of(plan, weight_format)
    if not fits:
        raise UserError(f"{names}: the shapes are not those that the configuration asks for")
    try:
        match plan.role:
            case Role.VECTOR:
                vector = torch.cat([part.detach().float() for part in parts])
                if not bool(vector.isfinite().all()):
                    raise UserError("numbers are not finite (NaN or infinity)")
                return vector
            case Role.MLP:
                return torch.cat([form.quantize(part) for part in parts], dim=1)
            case Role.LINEAR | Role.HEAD | Role.TABLE:
                return torch.cat([form.quantize(part) for part in parts])
    except UserError as error:
        raise UserError(f"{names}: {error}") from None
