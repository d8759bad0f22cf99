"""The options of a stand-in, and what is made of them."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from coreinfer.cli.options import STAND_IN_NAMES, calibration_from, point_out
from coreinfer.cli.values import number, whole

if TYPE_CHECKING:  # torch takes seconds to import; --help must not
    from coreinfer.standins import StandIn

FIT = ("rank", "ridge", "fit_skipped")  # what is given but not used is pointed out


def add_stand_in_options(parser: argparse.ArgumentParser, *, one_rule: bool = True) -> None:
    group = parser.add_argument_group("what takes the place of the dropped neurons")
    if one_rule:
        group.add_argument(
            "--stand-in",
            default="linear",
            choices=STAND_IN_NAMES,
            help="linear: a low-rank linear map of the MLP's input, fitted on the prompt "
            "(default); calibrated: what the calibration predicts of them, corrected on the "
            "prompt; mean: their mean over the prompt; none: they are dropped, as in the paper",
        )
    group.add_argument(
        "--rank",
        type=whole,
        metavar="R",
        help="rank of the linear map, from 1 (default: 32; calibrated: 64)",
    )
    group.add_argument(
        "--ridge",
        type=number,
        metavar="C",
        help="its penalty, relative to the size of the inputs, above 0 (default: 0.3; "
        "calibrated: 3)",
    )
    group.add_argument(
        "--fit-skipped",
        action="store_true",
        default=None,
        help="fit it to what --active leaves out as well: better, and one more product a layer "
        "after the prompt",
    )


def stand_in_from(args: argparse.Namespace, *, quiet: bool = False) -> StandIn | None:
    """The stand-in that the options describe, None to drop; `quiet` about what it does not use.

    Raises:
        UserError: if a value is out of range.
    """
    from coreinfer.standins import STAND_INS

    given: dict[str, Any] = {
        name: value for name in FIT if (value := getattr(args, name)) is not None
    }
    if args.stand_in == "none":
        if not quiet:
            point_out(set(given), "--stand-in none")
        return None
    made = STAND_INS[args.stand_in]
    takes = {field.name for field in fields(made)}
    if "calibration" in takes:
        given["calibration"] = calibration_from(args, f"--stand-in {args.stand_in}")
    if not quiet:
        point_out(given.keys() - takes, f"--stand-in {args.stand_in}")
        if "fit_skipped" in given and args.active is None and args.active_budgets is None:
            point_out({"fit_skipped"} & takes, "no --active")
    return made(**{name: value for name, value in given.items() if name in takes})
