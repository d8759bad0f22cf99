"""Synthetic weights: the right sizes, sane numbers, and the share of zeros that they state."""

from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from coreinfer.backends.native.architecture import DecoderConfig
from coreinfer.backends.native.tensors import tensor_plans
from coreinfer.backends.native.weights import weights_from
from coreinfer.benchmarks.gguf_files import bytes_read, file_type, write_synthetic
from coreinfer.benchmarks.shapes import SHAPES, config_of, shape_named
from coreinfer.benchmarks.synthetic import (
    ACTIVE,
    random_records,
    synthetic_hf,
    synthetic_native,
)
from coreinfer.benchmarks.target import Target
from coreinfer.errors import UserError
from coreinfer.kernels.formats import DTYPES, WeightFormat
from coreinfer.models.gguf import read_gguf
from tests.benchmarks.fakes import TINY, TINY_OPT

# Published sizes, in billions of parameters.
BILLIONS = {
    "llama2-7b": 6.738,
    "llama3.1-8b": 8.030,
    "opt-6.7b": 6.658,
    "opt-13b": 12.853,
    "opt-30b": 29.975,
    "smollm2-135m": 0.1345,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_size_and_a_native_decoder(name: str) -> None:
    target = Target.of_shape(name)
    assert target.parameters / 1e9 == pytest.approx(BILLIONS[name], rel=2e-3)
    decoder = DecoderConfig.from_hf(config_of(shape_named(name)))
    assert target.relu == (decoder.activation == "relu") == name.startswith("opt")
    assert target.synthetic


def test_an_unknown_shape_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UserError, match=r"no shape 'llama2-7'; did you mean 'llama2-7b'"):
        shape_named("llama2-7")
    with pytest.raises(UserError, match=r"no shape 'x{9}'; known are llama2-7b, "):
        shape_named("x" * 9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_records_stand_for_weights_of_mean_0_and_variance_1_over_d(dtype: str) -> None:
    form = WeightFormat.named(dtype)
    weights = form.dequantize(random_records(form, 500, 128), 128)
    assert weights.isfinite().all()
    assert float(weights.mean()) == pytest.approx(0, abs=1e-3)
    assert float(weights.std()) * math.sqrt(128) == pytest.approx(1, rel=0.02)
    assert len(weights.unique(dim=0)) == 500  # rows differ, or neurons would


@pytest.mark.parametrize("values", [TINY, TINY_OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_tensors_are_those_of_a_converted_model(values: dict, dtype: str) -> None:  # type: ignore[type-arg]
    form = WeightFormat.named(dtype)
    made = synthetic_native(values, "tiny", form)
    real = weights_from(synthetic_hf(values, torch.float32), form)
    assert list(made.tensors) == [plan.name for plan in tensor_plans(made.config)]
    for name, tensor in real.tensors.items():
        assert made.tensors[name].shape == tensor.shape
        assert made.tensors[name].dtype == tensor.dtype
    assert made.read_cost() == real.read_cost()


def test_layers_share_their_records() -> None:
    tensors = synthetic_native(TINY, "tiny", WeightFormat.named("int4")).tensors
    assert tensors["layers.0.mlp"].data_ptr() == tensors["layers.1.mlp"].data_ptr()
    assert tensors["layers.0.mlp"].data_ptr() == tensors["layers.0.mlp"].data_ptr()


def test_relu_layers_have_the_stated_share_of_active_neurons() -> None:
    weights = synthetic_native(TINY_OPT, "tiny", WeightFormat.named("bfloat16"))
    x = torch.nn.functional.layer_norm(torch.randn(400, 64), (64,))
    fc1 = weights.format.dequantize(weights.mlp_part(0, 0).contiguous(), 64)
    bias = weights.vector("layers.0.mlp_in_bias")
    active = (x @ fc1.t() + bias > 0).float().mean()
    assert float(active) == pytest.approx(ACTIVE, abs=0.02)


def test_hf_weights_are_the_layers_own() -> None:
    model = synthetic_hf(TINY, torch.bfloat16)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize(("form", "size"), [("Q4_0", 18), ("Q8_0", 34)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_synthetic_gguf_holds_the_shape(tmp_path: Path, form: str, size: int, tied: bool) -> None:
    path = tmp_path / "tiny.gguf"
    values = {**TINY, "tie_word_embeddings": tied}
    write_synthetic(values, form, path)
    file = read_gguf(path)
    assert file_type(path) == form
    numbers = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    assert numbers == sum(p.numel() for p in synthetic_hf(values, torch.float32).parameters())
    down = torch.from_numpy(file.values("blk.1.ffn_down.weight"))
    assert down.shape == (64, 128)
    assert float(down.std()) * math.sqrt(128) == pytest.approx(1, rel=0.05)
    matrices = numbers - 5 * 64 - (0 if tied else 320 * 64)
    row = 0 if tied else 64
    assert bytes_read(path) == (matrices + row) // 32 * size + 5 * 64 * 4


def test_a_gguf_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llama\.cpp does not do 'opt'"):
        write_synthetic(TINY_OPT, "Q4_0", tmp_path / "x.gguf")
    odd = {**TINY, "hidden_size": 40}
    with pytest.raises(UserError, match="blocks of 32 do not divide the 40 columns"):
        write_synthetic(odd, "Q4_0", tmp_path / "x.gguf")


def test_shapes_cannot_be_changed() -> None:
    assert isinstance(SHAPES, MappingProxyType)
