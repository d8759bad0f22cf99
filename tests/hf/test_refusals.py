"""What the hf backend cannot do right, it refuses by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from coreinfer.backends.hf.session import HfBackend
from coreinfer.backends.hf.sparse import sparse
from coreinfer.errors import UserError
from coreinfer.models.families import FAMILIES, family_of
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Stability
from tests.tiny import tiny_model, tiny_tokenizer


def refused(model: Any, match: str) -> None:
    """By both ways in, without a change to the model."""
    with pytest.raises(UserError, match=match), sparse(model, Stability()):
        pass
    with pytest.raises(UserError, match=match):
        HfBackend(model, tiny_tokenizer(), "m")


def test_unknown_architecture_and_what_is_known() -> None:
    with pytest.raises(UserError, match="'mamba' is not known") as caught:
        family_of("mamba")
    assert all(name in str(caught.value) for name in FAMILIES)
    assert "\n" not in str(caught.value)


def test_mixtral() -> None:
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=30,
        num_local_experts=2,
    )
    refused(MixtralForCausalLM(config).eval(), "'mixtral' is not known")


class LoraLinear(nn.Module):
    """As adapters wrap a linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 1


class Int8Linear(nn.Linear):
    """As quantisers subclass one: not even the dtype need tell."""


def swap(model: PreTrainedModel, name: str, module: nn.Module) -> PreTrainedModel:
    setattr(model.model.layers[1].mlp, name, module)
    return model


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_adapters(name: str) -> None:
    model = tiny_model()
    base = getattr(model.model.layers[1].mlp, name)
    refused(swap(model, name, LoraLinear(base)), rf"mlp.{name} is a LoraLinear .*merge adapters")


def test_an_adapter_on_attention_alone_is_fine() -> None:
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.q_proj = LoraLinear(attention.q_proj)
    with sparse(model, Stability()):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


def test_quantised_linears() -> None:
    model = tiny_model()
    old = model.model.layers[1].mlp.up_proj
    refused(swap(model, "up_proj", Int8Linear(32, 48, bias=False)), "is a Int8Linear")
    packed = copy.deepcopy(old)
    packed.weight = nn.Parameter(old.weight.to(torch.int8), requires_grad=False)
    refused(swap(model, "up_proj", packed), "Linear of torch.int8, .*without quantisation")
    packed.weight = nn.Parameter(old.weight.to(torch.float8_e4m3fn), requires_grad=False)
    refused(model, "float8")


def test_parametrised_linears() -> None:
    model = tiny_model()
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.gate_proj)
    refused(model, "ParametrizedLinear")


def test_offloaded_weights() -> None:
    refused(tiny_model().to("meta"), "not in memory")


def test_compiled_models() -> None:
    model = tiny_model()
    refused(torch.compile(model), "torch.compile")
    model.model.layers[0].mlp.compile()
    refused(model, "torch.compile")


def test_a_model_without_its_head() -> None:
    refused(AutoModel.from_config(tiny_model().config).eval(), r"LlamaModel has no 'model.layers'")


def test_training_mode() -> None:
    model = tiny_model().train()
    with (
        pytest.raises(UserError, match=r"training mode.*model.eval\(\)"),
        sparse(model, Stability()),
    ):
        pass
    assert model.training


def test_a_transformers_that_prefills_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.delattr(transformers.GenerationMixin, "_prefill")
    match = rf"transformers {transformers.__version__} prefills"
    with pytest.raises(UserError, match=match), sparse(model, Stability()):
        pass
    changed = lambda self, batch: (self, batch)  # noqa: E731
    monkeypatch.setattr(transformers.GenerationMixin, "_prefill", changed, raising=False)
    with pytest.raises(UserError, match="prefills in a way"), sparse(model, Stability()):
        pass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_overflow_is_refused_with_the_layers_number(dtype: torch.dtype, layer: int) -> None:
    model = tiny_model(dtype=dtype)
    model.model.layers[layer].mlp.up_proj.weight.data.sign_().mul_(torch.finfo(dtype).max / 2)
    prompt = [[5, 77, 200, 13]]
    match = f"^layer {layer} has activations that are not finite"
    with pytest.raises(UserError, match=match), sparse(model, Stability()):
        model.generate(torch.tensor(prompt), max_new_tokens=2)
    session = HfBackend(model, tiny_tokenizer(), "m").start(RecordingPlan.of(Stability()))
    session.prefill(prompt)
    with pytest.raises(UserError, match=match):
        session.select(Stability())
