"""What `lm_eval --model coreinfer --model_args ...` makes, from the options of the command line.

Not part of `coreinfer`'s own command line: lm-eval imports this module when it is asked for the
model type (see plugins/lm_eval).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from coreinfer.cli import options
from coreinfer.cli.stand_in import add_stand_in_options, stand_in_from
from coreinfer.cli.terminal import Bar
from coreinfer.cli.values import layer_budgets, layer_list, whole
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Setting
from coreinfer.evaluation.harness.model import HarnessModel
from coreinfer.evaluation.rules import Rule


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"--model_args: {message}")


class CoreInfer(HarnessModel):
    """A model from lm-eval's arguments: `pretrained=MODEL`, and any option of `coreinfer score`
    by its name with _ for -, such as `selector=impact,beta=0.5,stand_in=none,dense_layers=0-2+28`
    (in lists a + stands for a comma, which separates arguments there), and `scoring=dense`.
    """

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> CoreInfer:
        pairs = (pair.partition("=") for pair in arg_string.split(",") if pair.strip())
        given = {name.strip(): value.strip() for name, _, value in pairs}
        return cls.create_from_arg_obj(given, additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> CoreInfer:
        parser = _Parser("coreinfer", add_help=False, allow_abbrev=False)
        options.add_model_options(parser)
        options.add_selection_options(parser)
        add_stand_in_options(parser)
        parser.add_argument("--scoring", choices=("sparse", "dense"), default="sparse")
        parser.add_argument("--batch-size", type=whole, default=8)
        given = _beside(additional_config or {}) | dict(arg_dict)
        args = parser.parse_args(_as_arguments(parser, given))
        setting = Setting(options.selector_from(args), stand_in_from(args))
        bar = Bar()
        return cls(
            options.load_model(args).backend,
            {"coreinfer": Rule(setting)},
            dense_scoring=args.scoring == "dense",
            batch_size=args.batch_size,
            seed=args.seed,
            on_progress=lambda done, total: bar.show("coreinfer", done, total),
        )


def _beside(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of lm-eval's own options those that mean something here."""
    import torch

    batch_size, device = str(given.get("batch_size")), str(given.get("device"))
    found: dict[str, Any] = {}
    if batch_size.isdigit():  # else it is "auto"
        found["batch_size"] = batch_size
    # cuda:0 is its default, whatever the machine has.
    if given.get("device") and (not device.startswith("cuda") or torch.cuda.is_available()):
        found["device"] = device
    return found


def _as_arguments(parser: argparse.ArgumentParser, given: Mapping[str, Any]) -> list[str]:
    lists = {
        option
        for action in parser._actions
        if action.type in (layer_list, layer_budgets)
        for option in action.option_strings
    }
    arguments = []
    for name, value in given.items():
        option = "--model" if name == "pretrained" else f"--{name.replace('_', '-')}"
        if str(value) in ("True", "true"):
            arguments.append(option)
        elif str(value) in ("False", "false") or (value is None and name != "stand_in"):
            continue
        else:
            text = "none" if value is None else str(value)
            arguments.append(f"{option}={text.replace('+', ',') if option in lists else text}")
    return arguments
