"""A Hugging Face model from a configuration and its tensors: complete, or refused by name.

Files, GGUF or safetensors, meet here, so that the checks are made once. transformers fills what a
checkpoint lacks with random numbers and allocates whatever a configuration asks for; both are
ruled out before and after it does its work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from coreinfer.errors import UserError
from coreinfer.models.families import family_of

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
# Fields that would fetch or run code, choose files, or make long lists; none says what a model is.
_DROPPED = re.compile(
    r"auto_map|.*_implementation(_internal)?|kernel_config|fusion_config|transformers_weights"
    r"|num_labels|id2label|label2id|_?name_or_path|_commit_hash|custom_generate"
)
_MAX_BUFFER_ELEMENTS = 2**28  # masks and rotary tables; real ones stay far below


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings: what matters of them is raised as an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The first line of another library's error, for a message of ours.

    A line that ends in a colon says nothing without the next one.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.endswith(":"):
        text = " ".join(lines[:2])
    return text if len(text) <= 200 else text[:200] + "..."


def make_config(values: Mapping[str, Any], tensor_count: int, source: str) -> PreTrainedConfig:
    """The configuration that `config.json`, or a GGUF file's metadata, describes.

    Nothing that the values name is fetched or run.

    Args:
        values: as in `config.json`.
        tensor_count: how many tensors the weights have; each layer has one at least.
        source: the file, for messages.

    Raises:
        UserError: if the architecture is unknown, the weights are quantised, or the values do
            not describe a model.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{source} names no model_type; it is not the config.json of a model")
    family_of(model_type)
    if quantised := values.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{source}: the weights are quantised ({method}); use the unquantised model or a GGUF"
        )
    for key in _DEPTHS:
        depth = values.get(key)
        if isinstance(depth, (int, float)) and depth > tensor_count:
            raise UserError(f"{source}: {key} is {depth}, the weights have {tensor_count} tensors")
    kept = {key: value for key, value in values.items() if not _DROPPED.fullmatch(key)}
    try:
        with quiet_transformers():
            config = CONFIG_MAPPING[model_type].from_dict(kept)
    except Exception as error:
        raise UserError(
            f"{source} does not describe a {model_type} model: {one_line(error)}"
        ) from error
    assert isinstance(config, PreTrainedConfig)
    return config


def _class_of(config: PreTrainedConfig) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def skeleton(config: PreTrainedConfig, source: str) -> PreTrainedModel:
    """The model without memory: its modules and shapes, on the meta device.

    Raises:
        UserError: if the configuration cannot be built.
    """
    try:
        with quiet_transformers(), torch.device("meta"):
            model = _class_of(config)(config)
    except Exception as error:
        raise UserError(
            f"{source} does not describe a {config.model_type} model: {one_line(error)}"
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model


def assemble(
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    dtype: torch.dtype,
    generation: GenerationConfig | None = None,
) -> PreTrainedModel:
    """The model of `config` with the weights `tensors`, named as transformers names them.

    Raises:
        UserError: naming a tensor that is missing, has another shape than the configuration
            says, holds no floating-point numbers, or belongs to a layer that the model has not.
    """
    frame = skeleton(config, source)
    _check_fit(frame, tensors, source)
    try:
        with quiet_transformers():
            model, report = _class_of(config).from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=dtype,
                generation_config=generation or GenerationConfig.from_model_config(config),
                ignore_mismatched_sizes=True,  # they are in the report, and refused below
                output_loading_info=True,
            )
    except Exception as error:
        raise UserError(f"{source}: the weights do not load: {one_line(error)}") from error
    assert isinstance(model, PreTrainedModel)
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise UserError(
            f"{source}: tensor {name!r} has shape {tuple(found)}, the configuration asks for "
            f"{tuple(expected)}; config.json and weights are of different models"
        )
    if missing := sorted(report["missing_keys"]):
        raise _missing(source, missing)
    _check_layers(model, report["unexpected_keys"], source)
    return model


def _missing(source: str, names: list[str]) -> UserError:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return UserError(
        f"{source}: tensor {names[0]!r} is missing{more}; the checkpoint is incomplete"
    )


def _check_fit(frame: PreTrainedModel, tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse a model that would hold more numbers than its weights do, before it takes memory."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(
                f"{source}: tensor {name!r} holds {str(tensor.dtype).removeprefix('torch.')}, "
                "not floating-point numbers; use the unquantised model"
            )
    wanted = dict(frame.named_parameters())  # tied ones come once
    needs = sum(parameter.numel() for parameter in wanted.values())
    has = sum(tensor.numel() for tensor in tensors.values())
    if needs > has:
        for name, parameter in wanted.items():
            if name in tensors and tensors[name].shape != parameter.shape:
                raise UserError(
                    f"{source}: tensor {name!r} has shape {tuple(tensors[name].shape)}, the "
                    f"configuration asks for {tuple(parameter.shape)}; config.json and weights "
                    "are of different models"
                )
        absent = sorted(wanted.keys() - tensors.keys())
        raise _missing(source, absent or sorted(wanted))
    if sum(buffer.numel() for buffer in frame.buffers()) > _MAX_BUFFER_ELEMENTS:
        raise UserError(f"{source}: the configuration asks for tables that fit no machine")


def _check_layers(model: PreTrainedModel, unexpected: set[str], source: str) -> None:
    """A layer that is in the weights alone would be left out of the model without a word."""
    stack = family_of(model.config.model_type).layers
    count = len(model.get_submodule(stack))  # type: ignore[arg-type]
    for name in sorted(unexpected):
        found = re.match(rf"(?:.*\.)?{re.escape(stack.rsplit('.', 1)[-1])}\.(\d+)\.", name)
        if found and int(found[1]) >= count:
            raise UserError(
                f"{source}: the configuration has {count} layers, but the weights hold {name!r}"
            )
