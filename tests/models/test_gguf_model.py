"""Models from GGUF files: the same model that was written, or one line why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from coreinfer.errors import UserError
from coreinfer.models.families import FAMILIES
from coreinfer.models.gguf_model import ARCHITECTURES, load_gguf
from coreinfer.models.mlp import mlp_layers
from tests.models.gguf_writer import ARCHITECTURES as WRITTEN
from tests.models.gguf_writer import (
    CHAT,
    gguf_arrays,
    gguf_metadata,
    gguf_model,
    tiny_gguf,
    write_gguf,
)
from tests.tiny import BOS, EOS, PAD

IDS = torch.tensor([[BOS, 72, 101, 108, 108, 111, 32, 5, 200, 17, 3, 90]])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS).logits
    assert isinstance(out, torch.Tensor)
    return out


def llama_parts() -> tuple[PreTrainedModel, dict[str, Any], dict[str, Any]]:
    model = gguf_model("llama")
    return model, gguf_arrays(model, "llama"), gguf_metadata(model, "llama")


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_gguf(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_every_architecture_is_written_here_and_has_a_family() -> None:
    assert set(WRITTEN) == set(ARCHITECTURES)
    assert {entry.model_type for entry in ARCHITECTURES.values()} <= set(FAMILIES)


@pytest.mark.parametrize("architecture", sorted(WRITTEN))
def test_the_model_is_the_one_that_was_written(architecture: str, tmp_path: Path) -> None:
    written = tiny_gguf(tmp_path / "m.gguf", architecture)
    model, _ = load_gguf(tmp_path / "m.gguf")
    assert model.config.model_type == written.config.model_type
    assert len(mlp_layers(model)) == 3
    expected = written.state_dict()
    assert expected.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        # Gemma's norms are stored with 1 added, which rounds them.
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-7)
    torch.testing.assert_close(logits(model), logits(written), rtol=1e-4, atol=1e-4)
    assert logits(model).std() > 0.01  # a comparison of zeros would say nothing


@pytest.mark.parametrize("groups", [1, 2])
def test_falcon_with_grouped_heads(groups: int, tmp_path: Path) -> None:
    written = gguf_model(
        "falcon", new_decoder_architecture=True, num_kv_heads=groups, multi_query=False
    )
    arrays = gguf_arrays(written, "falcon")
    write_gguf(tmp_path / "m.gguf", "falcon", arrays, gguf_metadata(written, "falcon"))
    model, _ = load_gguf(tmp_path / "m.gguf")
    torch.testing.assert_close(logits(model), logits(written), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_where_the_file_has_none(tied: bool, tmp_path: Path) -> None:
    written = gguf_model("llama", tie_word_embeddings=tied)
    arrays = gguf_arrays(written, "llama")
    assert ("output.weight" in arrays) is not tied
    write_gguf(tmp_path / "m.gguf", "llama", arrays, gguf_metadata(written, "llama"))
    model, _ = load_gguf(tmp_path / "m.gguf")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    torch.testing.assert_close(logits(model), logits(written), rtol=1e-4, atol=1e-4)


def test_biases_of_a_llama_are_kept(tmp_path: Path) -> None:
    written = gguf_model("llama", attention_bias=True, mlp_bias=True)
    arrays = gguf_arrays(written, "llama")
    for name in [name for name in arrays if name.endswith(("attn_q.bias", "attn_k.bias"))]:
        heads = 4 if "attn_q" in name else 2
        halves = arrays[name].reshape(heads, 2, -1)
        arrays[name] = np.stack([halves[:, 0], halves[:, 1]], axis=-1).reshape(-1)
    write_gguf(tmp_path / "m.gguf", "llama", arrays, gguf_metadata(written, "llama"))
    model, _ = load_gguf(tmp_path / "m.gguf")
    torch.testing.assert_close(logits(model), logits(written), rtol=1e-4, atol=1e-4)


def test_quantised_tensors_are_exactly_what_their_blocks_say(tmp_path: Path) -> None:
    _, arrays, metadata = llama_parts()
    kinds = {
        "blk.0.ffn_gate.weight": gguf.GGMLQuantizationType.Q8_0,
        "blk.1.ffn_up.weight": gguf.GGMLQuantizationType.Q4_1,
        "blk.2.attn_v.weight": gguf.GGMLQuantizationType.BF16,
    }
    path = write_gguf(tmp_path / "m.gguf", "llama", arrays, metadata, kinds=kinds)
    model, _ = load_gguf(path)
    blocks = {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}

    def of(raw: bytes) -> float:
        return float(np.frombuffer(raw, "<f2")[0])

    eight, raw = [], blocks["blk.0.ffn_gate.weight"]
    for at in range(0, len(raw), 34):
        scale = of(raw[at : at + 2])
        eight += [scale * q for q in np.frombuffer(raw[at + 2 : at + 34], np.int8).tolist()]
    four, raw = [], blocks["blk.1.ffn_up.weight"]
    for at in range(0, len(raw), 20):
        scale, low = of(raw[at : at + 2]), of(raw[at + 2 : at + 4])
        nibbles = [b & 15 for b in raw[at + 4 : at + 20]] + [b >> 4 for b in raw[at + 4 : at + 20]]
        four += [np.float32(np.float32(scale) * q + np.float32(low)) for q in nibbles]
    half = np.frombuffer(blocks["blk.2.attn_v.weight"], "<u2").astype(np.uint32) << 16

    layers = model.model.layers
    for weight, expected in (
        (layers[0].mlp.gate_proj.weight, eight),
        (layers[1].mlp.up_proj.weight, four),
        (layers[2].self_attn.v_proj.weight, half.view(np.float32)),
    ):
        values = torch.tensor(np.asarray(expected, dtype=np.float32)).reshape(weight.shape)
        assert torch.equal(weight.detach(), values)


def test_dtype(tmp_path: Path) -> None:
    written = tiny_gguf(tmp_path / "m.gguf")
    model, _ = load_gguf(tmp_path / "m.gguf", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, written.lm_head.weight.bfloat16())


def test_how_an_answer_ends(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "one.gguf")
    model, _ = load_gguf(tmp_path / "one.gguf")
    config = model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS, EOS, PAD)
    extra = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": EOS}
    tiny_gguf(tmp_path / "two.gguf", extra=extra)
    model, _ = load_gguf(tmp_path / "two.gguf")
    assert model.generation_config.eos_token_id == [EOS, 7]


def test_tokenizer_round_trips_text(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "m.gguf")
    _, tokenizer = load_gguf(tmp_path / "m.gguf")
    for text in ("the", "  two", " 😀 ok", "a\n\nb\t", "<eos>x", "123 45"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < 260
    assert tokenizer.encode("<bos><eos>") == [BOS, EOS]
    assert tokenizer.encode(" t") == [259]
    assert tokenizer.chat_template == CHAT
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<bos>",
        "<eos>",
        "<pad>",
    )


def test_a_file_can_ask_for_a_first_token(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "m.gguf", extra={"tokenizer.ggml.add_bos_token": 1})
    _, tokenizer = load_gguf(tmp_path / "m.gguf")
    assert tokenizer.encode("a")[0] == BOS
    assert tokenizer.encode("a", add_special_tokens=False)[0] != BOS


def test_smollm_cuts_digits_and_the_space_before_them(tmp_path: Path) -> None:
    for pre in ("smollm", "gpt-2"):
        tiny_gguf(tmp_path / f"{pre}.gguf", pre=pre)
    pieces = {}
    for pre in ("smollm", "gpt-2"):
        _, tokenizer = load_gguf(tmp_path / f"{pre}.gguf")
        cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  12")
        pieces[pre] = [piece for piece, _ in cut]
    assert pieces == {"smollm": ["ĠĠ", "1", "2"], "gpt-2": ["Ġ", "Ġ12"]}


def test_an_unknown_way_to_cut_text_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    tiny_gguf(tmp_path / "m.gguf", pre="tea-leaves")
    load_gguf(tmp_path / "m.gguf", on_progress=said.append)
    assert any("tea-leaves" in line for line in said)


def llama3_factors(head_dim: int, factor: float, theta: float) -> np.ndarray[Any, Any]:
    """As llama.cpp computes them for Llama 3.1."""
    out = []
    for i in range(0, head_dim, 2):
        wave = 2 * np.pi * theta ** (i / head_dim)
        if wave < 8192 / 4:
            out.append(1.0)
        elif wave > 8192:
            out.append(factor)
        else:
            smooth = (8192 / wave - 1) / 3
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(out, dtype=np.float32)


def test_llama3_positions(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    written = gguf_model("llama", head_dim=32, rope_parameters=rope)
    arrays = gguf_arrays(written, "llama")
    arrays["rope_freqs.weight"] = llama3_factors(32, 8.0, 500000.0)
    write_gguf(tmp_path / "m.gguf", "llama", arrays, gguf_metadata(written, "llama"))
    model, _ = load_gguf(tmp_path / "m.gguf")
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](written.config, torch.device("cpu"))
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    torch.testing.assert_close(logits(model), logits(written), rtol=1e-4, atol=1e-4)

    arrays["rope_freqs.weight"] = arrays["rope_freqs.weight"] * np.float32(1.5)
    write_gguf(tmp_path / "n.gguf", "llama", arrays, gguf_metadata(written, "llama"))
    assert "rope factors" in refusal(tmp_path / "n.gguf")


def test_linear_positions(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    written = gguf_model("llama", rope_parameters=rope)
    metadata = gguf_metadata(written, "llama")
    metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "m.gguf", "llama", gguf_arrays(written, "llama"), metadata)
    model, _ = load_gguf(tmp_path / "m.gguf")
    torch.testing.assert_close(logits(model), logits(written), rtol=1e-4, atol=1e-4)
    metadata["rope.scaling.type"] = "longrope"
    write_gguf(tmp_path / "n.gguf", "llama", gguf_arrays(written, "llama"), metadata)
    assert "'longrope'" in refusal(tmp_path / "n.gguf")


def test_an_unknown_architecture_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    _, arrays, metadata = llama_parts()
    write_gguf(tmp_path / "m.gguf", "mamba", arrays, metadata)
    message = refusal(tmp_path / "m.gguf")
    assert "'mamba'" in message
    assert all(name in message for name in ARCHITECTURES)


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    _, arrays, metadata = llama_parts()
    write_gguf(tmp_path / "m.gguf", "llama", arrays, {**metadata, "expert_count": 8})
    assert "mixture of experts" in refusal(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "name", ["blk.1.ffn_down.weight", "output_norm.weight", "token_embd.weight"]
)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    _, arrays, metadata = llama_parts()
    del arrays[name]
    write_gguf(tmp_path / "m.gguf", "llama", arrays, metadata)
    part = {"blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight"}.get(name, "norm.weight")
    message = refusal(tmp_path / "m.gguf")
    assert "missing" in message
    assert (part if name != "token_embd.weight" else name) in message


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    _, arrays, metadata = llama_parts()
    arrays["blk.0.attn_sinks.weight"] = np.zeros(4, np.float32)
    write_gguf(tmp_path / "m.gguf", "llama", arrays, metadata)
    assert "'blk.0.attn_sinks.weight'" in refusal(tmp_path / "m.gguf")


def test_a_layer_that_the_metadata_leaves_out_is_named(tmp_path: Path) -> None:
    _, arrays, metadata = llama_parts()
    write_gguf(tmp_path / "m.gguf", "llama", arrays, {**metadata, "block_count": 2})
    assert "'blk.2." in refusal(tmp_path / "m.gguf")


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    _, arrays, metadata = llama_parts()
    arrays["blk.1.ffn_down.weight"] = arrays["blk.1.ffn_down.weight"][:, :-1].copy()
    write_gguf(tmp_path / "m.gguf", "llama", arrays, metadata)
    message = refusal(tmp_path / "m.gguf")
    assert "model.layers.1.mlp.down_proj.weight" in message
    assert "(32, 47)" in message
    assert "(32, 48)" in message


@pytest.mark.parametrize(
    "change",
    [
        {"block_count": 10**9},
        {"embedding_length": 10**9},
        {"feed_forward_length": 2**31},
        {"attention.head_count": 0},
        {"attention.head_count": 7},
        {"attention.head_count": "four"},
        {"attention.key_length": 10**9},
        {"block_count": "three"},
        {"rope.freq_base": "high"},
    ],
)
def test_metadata_that_fits_no_model_takes_no_memory(
    change: dict[str, Any], tmp_path: Path
) -> None:
    _, arrays, metadata = llama_parts()
    write_gguf(tmp_path / "m.gguf", "llama", arrays, {**metadata, **change})
    refusal(tmp_path / "m.gguf")


def test_a_file_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "m.gguf", tokenizer=False)
    assert "vocabulary" in refusal(tmp_path / "m.gguf")


def test_an_unknown_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.model": "oracle", "tokenizer.ggml.tokens": ["a", "b"]}
    tiny_gguf(tmp_path / "m.gguf", tokenizer=False, extra=extra)
    assert "oracle" in refusal(tmp_path / "m.gguf")


def test_special_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    extra = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
    }
    tiny_gguf(tmp_path / "m.gguf", tokenizer=False, extra=extra)
    assert "tokenizer" in refusal(tmp_path / "m.gguf")
