"""`coreinfer convert`: a model -> the native backend's file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coreinfer.cli import options
from coreinfer.cli.terminal import megabytes, note, progress
from coreinfer.cli.values import whole


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "convert",
        help="a model -> the native backend's file",
        description="Store a model as the native backend reads it: weights in bfloat16, int8 or "
        "int4, opened by memory map. It is read a few rows at a time, so a model larger than the "
        "memory converts too. A run that was interrupted goes on when it is started again.",
    )
    options.add_model_option(parser)
    parser.add_argument(
        "--dtype",
        required=True,
        choices=("bfloat16", "int8", "int4"),
        help="how the weights are stored; norms and biases stay float32",
    )
    parser.add_argument(
        "--group-size",
        type=whole,
        metavar="G",
        help="int8, int4: weights that share a scale, 16, 32, 64, 128 or 256 "
        "(default: 32 of int8, 64 of int4)",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument("--json", action="store_true", help="describe the result as a JSON object")
    options.add_config_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from coreinfer.backends.native.convert import convert
    from coreinfer.cli.info import describe_converted
    from coreinfer.kernels.formats import WeightFormat

    options.quiet_libraries()
    weight_format = WeightFormat.named(args.dtype, args.group_size)
    try:
        with bytes_bar("converting") as on_bytes:
            convert(args.model, weight_format, args.out, on_progress=progress, on_bytes=on_bytes)
    except KeyboardInterrupt:
        note("interrupted; the same command goes on from here")
        raise
    about = describe_converted(args.out)
    if args.json:
        print(json.dumps({"out": args.out, **about}))
    else:
        print(
            f"{Path(args.out)}: {about['model']} in {about['dtype']}, "
            f"{about['bits_per_weight']:g} bits a weight, {megabytes(about['bytes'])}"
        )
    return 0


@contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of bytes on stderr, where a person watches; gives what moves it."""
    from tqdm import tqdm

    with tqdm(
        desc=what, total=0, unit="B", unit_scale=True, leave=False, file=sys.stderr, disable=None
    ) as bar:

        def on_bytes(done: int, total: int) -> None:
            if bar.total != total:
                bar.reset(total)
                bar.initial = bar.n = done  # of an earlier run: no part of this one's speed
            bar.update(done - bar.n)

        yield on_bytes
