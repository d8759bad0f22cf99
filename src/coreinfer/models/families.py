"""What an architecture's MLP is. A new model family is one entry of `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from coreinfer.errors import UserError


@dataclass(frozen=True)
class MlpFamily:
    """Where the MLP of an architecture lives and which linears it is made of.

    Attributes:
        layers: dotted path from the causal model to its list of decoder layers.
        inputs: dotted paths, inside a layer, of the linears that read the MLP's input x. Two for a
            gated MLP (gate, up), one for a plain or a fused one.
        output: the linear that reads h, the down projection.
        fused: the single input linear stacks gate and up, [2 D, d].
        activation: of a gated MLP, the module that its gate goes through.
    """

    layers: str
    inputs: tuple[str, ...]
    output: str
    fused: bool = False
    activation: str | None = None


_GATED = MlpFamily(
    "model.layers",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
    activation="mlp.act_fn",
)

# Keyed by `config.model_type`, as transformers spells it.
FAMILIES: Mapping[str, MlpFamily] = MappingProxyType(
    {
        "llama": _GATED,
        "mistral": _GATED,
        "qwen2": _GATED,
        "qwen3": _GATED,
        "smollm3": _GATED,
        "gemma": _GATED,
        "gemma2": _GATED,
        "gemma3_text": _GATED,
        "phi3": MlpFamily(
            "model.layers",
            ("mlp.gate_up_proj",),
            "mlp.down_proj",
            fused=True,
            activation="mlp.activation_fn",
        ),
        "opt": MlpFamily("model.decoder.layers", ("fc1",), "fc2"),
        "gpt2": MlpFamily("transformer.h", ("mlp.c_fc",), "mlp.c_proj"),
        "gpt_neox": MlpFamily("gpt_neox.layers", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        "falcon": MlpFamily("transformer.h", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    }
)


def family_of(model_type: str) -> MlpFamily:
    """The MLP family of an architecture.

    Raises:
        UserError: naming the architecture and the ones that are known.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise UserError(
            f"architecture {model_type!r} is not known; known are {', '.join(sorted(FAMILIES))}"
        ) from None
