"""The options of an answer: how it is drawn and when it ends."""

from __future__ import annotations

import argparse
from typing import Any

from coreinfer.cli.values import number, whole


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--max-new-tokens",
        type=whole,
        default=128,
        metavar="N",
        help="tokens to generate at most, from 1 (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=number,
        default=0.0,
        metavar="T",
        help="0 is greedy (default); above 0 samples",
    )
    group.add_argument(
        "--top-k",
        type=whole,
        default=0,
        metavar="K",
        help="sample among the K likeliest tokens; 0 is all (default)",
    )
    group.add_argument(
        "--top-p",
        type=number,
        default=1.0,
        metavar="P",
        help="sample among the likeliest tokens that hold P of the probability, above 0 to 1 "
        "(default: 1)",
    )
    group.add_argument(
        "--min-p",
        type=number,
        default=0.0,
        metavar="P",
        help="sample among the tokens at least P times as likely as the likeliest, 0 (all, the "
        "default) to 1",
    )
    group.add_argument(
        "--repetition-penalty",
        type=number,
        default=1.0,
        metavar="R",
        help="above 1 makes tokens that are in the prompt or the answer already less likely, below "
        "1 (and above 0) likelier; counts in greedy decoding too (default: 1, none)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="go on after an end-of-sequence token"
    )


def sampling_from(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options, as fields of `SamplingParams`."""
    return {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
        "stop": tuple(args.stop),
        "ignore_eos": args.ignore_eos,
    }
