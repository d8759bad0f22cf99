"""GGUF files for engines that read no other: written for a shape, or requantised from a model's.

A written file has no vocabulary, and random blocks with scales that keep activations finite. All
its matrices have the type asked for, also the output head, which llama.cpp's own converter stores
larger.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from coreinfer.benchmarks.target import Target
from coreinfer.errors import UserError
from coreinfer.models.gguf import read_gguf

_BLOCK = 32  # weights that share a scale, in both types
# type -> bytes of q in a block, and the standard deviation of a random q
_TYPES = {"Q4_0": (16, 4.61), "Q8_0": (32, 73.9)}
_POOL_BLOCKS = 2**16 + 1
_FILE_TYPES = {"Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


def gguf_of(target: Target, form: str, folder: Path) -> Path:
    """A GGUF file of that type: the model's own if it has it, else one that is written.

    Raises:
        UserError: if there is nothing to make it from, or no room for it.
    """
    if target.gguf is not None and file_type(target.gguf) == form:
        return target.gguf
    path = folder / f"{target.name.replace('/', '--')}-{form}.gguf"
    if path.exists():
        return path
    _require_room(target, form, folder)
    if target.shape is not None:
        write_synthetic(target.shape, form, path)
    elif target.gguf is not None:
        _requantise(target.gguf, form, path)
    else:
        raise UserError("no GGUF file of this model is at hand; put one into its folder")
    return path


def file_type(path: Path) -> str:
    """What a file calls its type, such as "Q4_1"; of all that it is most of."""
    value = read_gguf(path).metadata.get("general.file_type")
    try:
        return gguf.LlamaFileType(int(value or 0)).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return "gguf"


def bytes_read(path: Path) -> int:
    """Bytes of weights that decoding a token reads: all but the embedding rows not looked up."""
    tensors = read_gguf(path).tensors
    total = sum(tensor.size for tensor in tensors.values())
    if "output.weight" in tensors:  # else the embedding is the head, and read whole
        table = tensors["token_embd.weight"]
        total -= table.size - table.size // table.shape[0]
    return total


def write_synthetic(values: Mapping[str, Any], form: str, path: Path) -> None:
    """A file of random weights, one tensor in memory at a time.

    Raises:
        UserError: if llama.cpp does not do the architecture, or rows do not divide into blocks.
    """
    if values["model_type"] != "llama":
        raise UserError(f"llama.cpp does not do {values['model_type']!r}")
    tensors = _shapes(values)
    for name, shape in tensors.items():
        if len(shape) == 2 and shape[1] % _BLOCK:
            raise UserError(f"blocks of {_BLOCK} do not divide the {shape[1]} columns of {name}")
    kind = gguf.GGMLQuantizationType[form]
    row_bytes = _TYPES[form][0] + 2
    writer = gguf.GGUFWriter(path, "llama")
    _add_settings(writer, values, form)
    for name, shape in tensors.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            stored = (shape[0], shape[1] // _BLOCK * row_bytes)
            size = stored[0] * stored[1]
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape in tensors.values():
        made = np.ones(shape, np.float32) if len(shape) == 1 else _blocks(form, shape)
        writer.write_tensor_data(made)
    writer.close()


def _shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    d, neurons, vocab = (values[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    heads = values["num_attention_heads"]
    kv = d // heads * values["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, d)}
    for layer in range(values["num_hidden_layers"]):
        block = {
            "attn_norm": (d,),
            "attn_q": (d, d),
            "attn_k": (kv, d),
            "attn_v": (kv, d),
            "attn_output": (d, d),
            "ffn_norm": (d,),
            "ffn_gate": (neurons, d),
            "ffn_up": (neurons, d),
            "ffn_down": (d, neurons),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes["output_norm.weight"] = (d,)
    if not values.get("tie_word_embeddings"):
        shapes["output.weight"] = (vocab, d)
    return shapes


def _add_settings(writer: gguf.GGUFWriter, values: Mapping[str, Any], form: str) -> None:
    heads = values["num_attention_heads"]
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_rope_dimension_count(values["hidden_size"] // heads)
    writer.add_rope_freq_base(values["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    writer.add_vocab_size(values["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(_FILE_TYPES[form])


def _blocks(form: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Blocks of a random matrix with weights of variance 1/columns: a scale, then q."""
    q_bytes, spread = _TYPES[form]
    rows, columns = shape
    pool = np.random.default_rng(0).integers(
        0, 256, size=(_POOL_BLOCKS, 2 + q_bytes), dtype=np.uint8
    )
    pool[:, :2] = np.array([columns**-0.5 / spread], np.float16).view(np.uint8)
    count = rows * columns // _BLOCK
    return np.resize(pool, (count, 2 + q_bytes)).reshape(rows, -1)


def _requantise(source: Path, form: str, path: Path) -> None:
    """llama.cpp's own quantisation, from a file that is quantised already: for speed alone."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = int(_FILE_TYPES[form])
    settings.allow_requantize = True
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(path).encode(), ctypes.byref(settings)
    )
    # The function above goes with this call: later messages must not look for it.
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))
    if code:
        raise UserError(f"llama.cpp cannot make {form} of {source.name!r}")


def _require_room(target: Target, form: str, folder: Path) -> None:
    q_bytes, _ = _TYPES[form]
    needed = target.parameters * (q_bytes + 2) // _BLOCK
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"its {form} file needs {needed / 1e9:.1f} GB in {str(folder.parent)!r}, "
            f"{free / 1e9:.1f} GB are free; set TMPDIR to a larger disk"
        )
