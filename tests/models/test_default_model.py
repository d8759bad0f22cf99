"""The default model, as it is: what a first answer rests on."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from coreinfer.models.catalog import CATALOG
from coreinfer.models.loading import LoadedModel, load
from coreinfer.models.pull import GGUF, is_pulled

NAME = "smollm2-135m-instruct"
pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def loaded(default_model_dir: Path) -> LoadedModel:
    assert default_model_dir.is_dir()
    return load(NAME)


def test_it_is_whole_and_of_the_size_that_the_catalogue_says(
    default_model_dir: Path, loaded: LoadedModel
) -> None:
    assert is_pulled(CATALOG[NAME])
    assert loaded.name == NAME
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert count == CATALOG[NAME].parameters
    # The tied head is not stored twice.
    assert (default_model_dir / "model.safetensors").stat().st_size < 4 * count + 10**5


def test_its_weights_are_those_of_the_gguf_file(
    default_model_dir: Path, loaded: LoadedModel
) -> None:
    weights = loaded.model.state_dict()
    tensors = {t.name: t for t in gguf.GGUFReader(default_model_dir / GGUF).tensors}

    def stored(name: str) -> torch.Tensor:
        tensor = tensors[name]
        return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))

    def unpaired(name: str, heads: int) -> torch.Tensor:
        rows = stored(name)
        return torch.cat([torch.cat([h[0::2], h[1::2]]) for h in rows.chunk(heads)])

    layers = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(30):
        for theirs, ours in layers.items():
            expected = stored(f"blk.{layer}.{theirs}.weight")
            assert torch.equal(weights[f"model.layers.{layer}.{ours}.weight"], expected)
        for kind, heads in (("q", 9), ("k", 3)):
            expected = unpaired(f"blk.{layer}.attn_{kind}.weight", heads)
            found = weights[f"model.layers.{layer}.self_attn.{kind}_proj.weight"]
            assert torch.equal(found, expected)
    assert torch.equal(weights["model.embed_tokens.weight"], stored("token_embd.weight"))
    assert torch.equal(weights["lm_head.weight"], stored("token_embd.weight"))
    assert torch.equal(weights["model.norm.weight"], stored("output_norm.weight"))
    assert len(tensors) == 30 * 9 + 2


def test_it_answers_in_english_and_ends_its_turn(loaded: LoadedModel) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = loaded.model.generate(**inputs, max_new_tokens=30, do_sample=False)[0]
    answer = out[inputs["input_ids"].shape[1] :]
    assert loaded.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_its_ids_and_its_chat_template(loaded: LoadedModel) -> None:
    config, tokenizer = loaded.model.generation_config, loaded.tokenizer
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    user = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}, *user]
    assert "SmolLM" not in tokenizer.apply_chat_template(own, tokenize=False)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [19556, 905]),
        ("<|im_start|>user\nHi<|im_end|>", [1, 4093, 198, 26843, 2]),
        ("12", [33, 34]),
    ],
)
def test_known_tokens(text: str, ids: list[int], loaded: LoadedModel) -> None:
    assert loaded.tokenizer.encode(text) == ids


@pytest.mark.parametrize(
    "text",
    [
        " a",
        "   a  b ",
        "\n\n\tx\r\n",
        "😀 naïve 中文",
        "<|im_end|> x",
        "x.y ,z",
        "1 234  5",
        "\u200b",
    ],
)
def test_its_tokenizer_round_trips(text: str, loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode(text)
    assert loaded.tokenizer.decode(ids) == text
    assert max(ids) < loaded.model.config.vocab_size
