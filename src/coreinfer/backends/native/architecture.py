"""What the native decoder has to know of a model: its sizes and its variants."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from coreinfer.errors import UnsupportedModelError, UserError

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
MODEL_TYPES = (*LLAMA_LIKE, "opt")
ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "relu": "relu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
    }
)
_OPT_NORM_EPS = 1e-5  # torch's own, which OPT does not put into its configuration
_MOST = 2**31  # of any size; so that a damaged number cannot ask for all memory


@dataclass(frozen=True)
class Rope:
    """Rotary positions, and how they are stretched beyond the context of the training.

    Attributes:
        theta: the base of the frequencies.
        kind: "default", "linear" (positions / factor) or "llama3".
        factor, low_freq_factor, high_freq_factor, original_context: as Llama 3 names them.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """Radians a position, [head_dim / 2] float32."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        plain = 1.0 / (self.theta**exponents)
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return plain / self.factor
        # Llama 3: long waves are stretched, short ones stay, those between are blended.
        wavelength = 2 * math.pi / plain
        share = (self.original_context / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        share = share.clamp(0, 1)
        return (1 - share) * plain / self.factor + share * plain


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama family or of OPT.

    Attributes:
        model_type: as `config.model_type` of transformers spells it.
        num_layers: decoder layers.
        hidden_size: d.
        num_neurons: D, of every MLP.
        num_heads, num_kv_heads, head_dim: of the attention.
        vocab_size: V.
        context_length: most tokens of a sequence. Where the model attends through a sliding
            window, at most that window, within which it is plain causal attention.
        norm_eps: added under the root of every norm.
        activation: "silu", "relu", "gelu" or "gelu_tanh".
        gated: h = act(gate x) * up x; otherwise h = act(fc1 x).
        rope: rotary positions; None where positions are learned.
        position_offset: rows of the learned table that come before position 0.
        qkv_bias, o_bias, mlp_bias: which linears have one.
        qk_norm: queries and keys are normalised, a head each.
        tied: the output head is the input embedding.
        bos_token_id: the token a sequence may begin with.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_neurons: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    activation: str
    gated: bool
    rope: Rope | None
    position_offset: int
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    bos_token_id: int | None

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise _unsupported(f"the architecture {self.model_type!r}")
        for name in (
            "num_layers", "hidden_size", "num_neurons", "num_heads", "num_kv_heads", "head_dim",
            "vocab_size", "context_length",
        ):  # fmt: skip
            size = getattr(self, name)
            if not 0 < size < _MOST:
                raise UserError(f"the model's {name} is {size}, expected 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads evenly"
            )
        if self.rope is not None and self.head_dim % 2:
            raise UserError(f"rotary positions need an even head size, got {self.head_dim}")
        if self.activation not in ACTIVATIONS.values():
            raise _unsupported(f"the activation {self.activation!r}")

    @property
    def family(self) -> str:
        """ "llama" (RMS norms, rotary positions) or "opt" (layer norms, learned positions)."""
        return "opt" if self.model_type == "opt" else "llama"

    @property
    def norm(self) -> str:
        """ "rms" or "layer"."""
        return "layer" if self.family == "opt" else "rms"

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def require_tokens(self, token_ids: Iterable[Iterable[int]]) -> None:
        """Raises UserError if a token is not in the vocabulary."""
        for tokens in token_ids:
            for token in tokens:
                if not 0 <= token < self.vocab_size:
                    raise UserError(f"token {token} is not in the vocabulary of {self.vocab_size}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DecoderConfig:
        """Read what `to_json` wrote.

        Raises:
            UserError: if the text is damaged or describes no decoder.
        """
        try:
            values = json.loads(text)
            rope = values["rope"]
            values["rope"] = None if rope is None else Rope(**_checked(Rope, rope))
            return cls(**_checked(cls, values))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"the description of the decoder is damaged: {error}") from None

    @classmethod
    def from_hf(cls, config: PreTrainedConfig) -> DecoderConfig:
        """The decoder that a transformers configuration describes.

        Raises:
            UserError: naming what the native backend does not do; the hf backend does it.
        """
        if config.model_type not in MODEL_TYPES:
            raise _unsupported(f"the architecture {config.model_type!r}")
        return _opt(config) if config.model_type == "opt" else _llama(config)


def _llama(config: PreTrainedConfig) -> DecoderConfig:
    kind = config.model_type
    heads = config.num_attention_heads
    bias = kind != "mistral" and bool(getattr(config, "attention_bias", False))
    if kind == "llama" and config.mlp_bias:
        raise _unsupported("a gated MLP with biases")
    windows = set(getattr(config, "layer_types", None) or [])
    if windows - {"full_attention", "sliding_attention"}:
        raise _unsupported(f"the attention {', '.join(sorted(windows))}")
    window = getattr(config, "sliding_window", None)
    if windows == {"full_attention"}:
        window = None
    length = config.max_position_embeddings
    return DecoderConfig(
        model_type=kind,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_neurons=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        context_length=min(length, window or length),
        norm_eps=config.rms_norm_eps,
        activation=_activation(config.hidden_act),
        gated=True,
        rope=_rope(config),
        position_offset=0,
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias and kind != "qwen2",
        mlp_bias=False,
        qk_norm=kind == "qwen3",
        tied=bool(config.tie_word_embeddings),
        bos_token_id=_bos(config),
    )


def _opt(config: PreTrainedConfig) -> DecoderConfig:
    if not config.do_layer_norm_before:
        raise _unsupported("an OPT with norms after its layers (OPT-350m)")
    if config.word_embed_proj_dim != config.hidden_size:
        raise _unsupported("an OPT with a projected embedding")
    if config._remove_final_layer_norm or not config.layer_norm_elementwise_affine:
        raise _unsupported("an OPT without weights in its norms")
    heads = config.num_attention_heads
    return DecoderConfig(
        model_type="opt",
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_neurons=config.ffn_dim,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=config.hidden_size // heads,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        norm_eps=_OPT_NORM_EPS,
        activation=_activation(config.activation_function),
        gated=False,
        rope=None,
        position_offset=2,
        qkv_bias=config.enable_bias,
        o_bias=config.enable_bias,
        mlp_bias=config.enable_bias,
        qk_norm=False,
        tied=bool(config.tie_word_embeddings),
        bos_token_id=_bos(config),
    )


def _rope(config: PreTrainedConfig) -> Rope:
    values: Mapping[str, Any] = config.rope_parameters
    kind = values.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise _unsupported(f"the rope scaling {kind!r}")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported("rotary positions on a part of each head")
    rope = Rope(float(values["rope_theta"]))
    if kind == "default":
        return rope
    if kind == "linear":
        return Rope(rope.theta, "linear", float(values["factor"]))
    return Rope(
        rope.theta,
        "llama3",
        float(values["factor"]),
        float(values["low_freq_factor"]),
        float(values["high_freq_factor"]),
        int(values["original_max_position_embeddings"]),
    )


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise _unsupported(f"the activation {name!r}")
    return ACTIVATIONS[name]


def _bos(config: PreTrainedConfig) -> int | None:
    return config.bos_token_id if isinstance(config.bos_token_id, int) else None


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the native backend does not do {what}; use --backend hf "
        f"(native does {', '.join(MODEL_TYPES)})"
    )


_TYPES: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float), "Rope": (Rope,)}
)


def _checked(cls: type[Any], values: Any) -> dict[str, Any]:
    """The fields of a dataclass from JSON values, each of the type that the field says."""
    wanted = {field.name: str(field.type) for field in fields(cls)}
    if not isinstance(values, dict) or values.keys() != wanted.keys():
        raise ValueError(f"the fields of {cls.__name__} are not {', '.join(wanted)}")
    for name, kind in wanted.items():
        value, plain = values[name], kind.removesuffix(" | None")
        if value is None and plain != kind:
            continue
        if not isinstance(value, _TYPES[plain]) or (plain != "bool" and isinstance(value, bool)):
            raise ValueError(f"{name} is {value!r}")
    return values
