"""What `lm_eval --model coreinfer --model_args ...` makes: the options of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from lm_eval.utils import simple_parse_args_string

from coreinfer.cli import options
from coreinfer.cli.values import whole
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Setting
from coreinfer.evaluation.harness.model import HarnessModel

BATCH_SIZE = 8


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"model_args: {message}")


class CoreInferLM(HarnessModel):
    """A model from lm-eval's arguments: `pretrained=MODEL`, and any option of `coreinfer score`
    by its name with _ for -, such as `selector=impact,beta=0.5,stand_in=none,dense_layers=0-2+28`
    (a + stands for a comma, which separates arguments there), and `scoring=dense`.
    """

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> CoreInferLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> CoreInferLM:
        parser = _Parser("coreinfer", add_help=False, allow_abbrev=False)
        options.add_model_options(parser)
        options.add_selection_options(parser)
        options.add_stand_in_options(parser)
        parser.add_argument("--scoring", choices=("sparse", "dense"), default="sparse")
        parser.add_argument("--batch-size", type=whole, default=BATCH_SIZE)
        # lm-eval always gives a batch size and knows devices by other names; ours go first.
        given = {
            k: v for k, v in (additional_config or {}).items() if k in ("batch_size", "device")
        }
        if not str(given.get("batch_size", "")).isdigit():  # "auto"
            given.pop("batch_size", None)
        args = parser.parse_args(_as_arguments(given | dict(arg_dict)))
        setting = Setting(options.selector_from(args), options.stand_in_from(args))
        return cls(
            options.load_model(args).backend,
            {"coreinfer": setting},
            dense_scoring=args.scoring == "dense",
            batch_size=args.batch_size,
            seed=args.seed,
        )


def _as_arguments(given: Mapping[str, Any]) -> list[str]:
    arguments = []
    for name, value in given.items():
        option = "--model" if name == "pretrained" else f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(option)
        elif value is not False and value is not None or name == "stand_in":
            text = "none" if value is None else str(value)
            arguments.append(f"{option}={text.replace('+', ',')}")
    return arguments
