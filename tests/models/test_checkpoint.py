"""Model folders: the same model that was saved, or one line why not; and nothing in them runs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.models.checkpoint import load_folder
from coreinfer.models.families import FAMILIES
from tests.models.damage import model_or_one_line
from tests.models.folders import edit_json, edit_tensors, tiny_folder
from tests.tiny import BOS, CONFIGS, EOS, PAD

IDS = torch.tensor([[BOS, 72, 101, 108, 108, 111]])
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-llama"
    tiny_folder(path)
    return path


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_a_value_of_the_wrong_type_in_the_configuration_is_named(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size="wide")
    message = refusal(folder)
    assert "does not describe a llama model" in message
    assert "'hidden_size'" in message
    assert "'wide'" in message


def test_every_family_is_tried() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_the_model_is_the_one_that_was_saved(model_type: str, tmp_path: Path) -> None:
    saved = tiny_folder(tmp_path, model_type)
    model, tokenizer = load_folder(tmp_path)
    assert type(model) is type(saved)
    assert not model.training
    assert model.state_dict().keys() == saved.state_dict().keys()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, saved(IDS).logits)
    assert tokenizer.decode(tokenizer.encode(" hé\n")) == " hé\n"
    assert tokenizer.chat_template is not None


def test_shards(tmp_path: Path) -> None:
    saved = tiny_folder(tmp_path, shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, _ = load_folder(tmp_path)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    assert gone.name in refusal(tmp_path)


def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "other")
    tiny_folder(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../other/model.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "../other/model.safetensors" in refusal(tmp_path / "m")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": 3}', "[", '{"weight_map": {"a": 1}}'])
def test_a_useless_index(index: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    assert "index" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype, folder: Path) -> None:
    full, _ = load_folder(folder)
    model, _ = load_folder(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.lm_head.weight, full.lm_head.weight.to(dtype))


def test_how_an_answer_ends(folder: Path) -> None:
    config = load_folder(folder)[0].generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS, EOS, PAD)
    edit_json(folder / "generation_config.json", eos_token_id=[3, 4])
    assert load_folder(folder)[0].generation_config.eos_token_id == [3, 4]
    (folder / "generation_config.json").unlink()
    assert load_folder(folder)[0].generation_config.eos_token_id == EOS
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no weights"),
    ],
)
def test_a_part_that_is_not_there(gone: str, expected: str, folder: Path) -> None:
    (folder / gone).unlink()
    message = refusal(folder)
    assert expected in message
    assert "tiny-llama" in message


def test_an_empty_folder_and_an_adapter(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(tmp_path)


def test_a_folder_with_a_gguf_file_alone_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "x.gguf" in refusal(tmp_path)


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_pickled_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "ran"))
    (folder / "pytorch_model.bin").write_bytes(trap)
    load_folder(folder)
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "safetensors" in message
    assert not (tmp_path / "ran").exists()
    pickle.loads(trap)
    assert (tmp_path / "ran").exists()  # it was a trap


@pytest.mark.parametrize("known", [True, False])
def test_code_that_comes_with_a_model_never_runs(known: bool, folder: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n"
    for name in ("modeling_mine.py", "configuration_mine.py", "tokenization_mine.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    auto = {
        "AutoConfig": "configuration_mine.Mine",
        "AutoModelForCausalLM": "modeling_mine.Mine",
        "AutoTokenizer": ["tokenization_mine.Mine", "tokenization_mine.Mine"],
    }
    edit_json(folder / "config.json", auto_map=auto)
    edit_json(folder / "tokenizer_config.json", auto_map=auto)
    if known:
        model, _ = load_folder(folder)
        assert model.config.model_type == "llama"
    else:
        edit_json(folder / "config.json", model_type="mine")
        assert "'mine'" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_an_attention_that_would_be_fetched_is_not(folder: Path) -> None:
    edit_json(
        folder / "config.json",
        _attn_implementation="someone/kernel",
        attn_implementation="someone/kernel",
        _attn_implementation_internal="someone/kernel",
    )
    model, _ = load_folder(folder)
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_an_unknown_architecture_is_named_with_those_that_are_known(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="mamba")
    message = refusal(folder)
    assert "'mamba'" in message
    assert all(name in message for name in FAMILIES)
    edit_json(folder / "config.json", model_type=None)
    assert "model_type" in refusal(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "gptq" in refusal(folder)


@pytest.mark.parametrize("name", [DOWN, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(name: str, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.__delitem__(name))
    message = refusal(folder)
    assert name in message
    assert "missing" in message


def test_a_missing_tensor_is_named_also_where_others_make_up_for_its_size(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[DOWN]
        tensors["extra"] = torch.zeros(10**5)

    edit_tensors(folder, edit)
    assert DOWN in refusal(folder)


@pytest.mark.parametrize("size", [40, 56])
def test_a_wrong_shape_is_named(size: int, folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN] = torch.zeros(32, size)

    edit_tensors(folder, edit)
    message = refusal(folder)
    assert DOWN in message
    assert f"(32, {size})" in message
    assert "(32, 48)" in message


def test_tensors_of_integers_are_refused(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN] = tensors[DOWN].to(torch.int8)

    edit_tensors(folder, edit)
    assert DOWN in refusal(folder)


def test_a_layer_that_the_configuration_leaves_out_is_named(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=2)
    message = refusal(folder)
    assert "2 layers" in message
    assert "model.layers.2." in message


def test_other_tensors_are_passed_over(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    edit_tensors(folder, edit)
    load_folder(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10**9},
        {"hidden_size": 10**30},
        {"hidden_size": -1},
        {"hidden_size": "many"},
        {"intermediate_size": 10**12},
        {"vocab_size": 10**12},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1e300},
        {"num_hidden_layers": -3},
        {"num_attention_heads": 0},
        {"num_attention_heads": 10**9},
        {"num_key_value_heads": 3},
        {"head_dim": 10**9},
        {"pad_token_id": 10**6},
        {"hidden_act": "unheard-of"},
        {"rope_parameters": {"rope_type": "unheard-of", "rope_theta": 1.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1e9}},
        {"layer_types": ["full_attention"] * 7},
    ],
    ids=str,
)
def test_a_configuration_that_fits_no_model_takes_no_memory(
    change: dict[str, Any], folder: Path
) -> None:
    edit_json(folder / "config.json", **change)
    model_or_one_line(lambda: load_folder(folder))
    if change.keys() & {"hidden_size", "vocab_size", "num_hidden_layers", "head_dim"}:
        refusal(folder)


def test_labels_do_not_make_long_lists(folder: Path) -> None:
    edit_json(folder / "config.json", num_labels=10**9)
    load_folder(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"llama"', "\ufeff{}", "[" * 100_000])
def test_a_configuration_that_is_no_json_object(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": {"type": "BPE"}}', '{"version": 9}'])
def test_a_damaged_tokenizer(text: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert "tokenizer" in refusal(folder)


def test_truncated_weights_are_never_a_model(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in [*range(0, 2000, 97), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        message = refusal(folder)
        assert "model.safetensors" in message
        assert "damaged" in message


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_bytes_give_a_model_or_one_line(data: st.DataObject, folder: Path) -> None:
    names = ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json"]
    names.append("tokenizer_config.json")
    path = folder / data.draw(st.sampled_from(names))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for at in data.draw(st.lists(st.integers(0, min(len(whole), 4000) - 1), max_size=4)):
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, min(len(whole), 4000)))
        damaged[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    try:
        path.write_bytes(damaged)
        model_or_one_line(lambda: load_folder(folder))
    finally:
        path.write_bytes(whole)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_in_the_configuration_gives_a_model_or_one_line(
    data: st.DataObject, folder: Path
) -> None:
    path = folder / "config.json"
    whole = path.read_text()
    odd = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.just([])
    )
    try:
        values = json.loads(whole)
        key = data.draw(st.sampled_from(sorted(values.keys() - {"model_type"})))
        path.write_text(json.dumps(values | {key: data.draw(odd)}))
        model_or_one_line(lambda: load_folder(folder))
    finally:
        path.write_text(whole)
