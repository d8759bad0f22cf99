"""`coreinfer pull`: a model into the local cache."""

from __future__ import annotations

import argparse
import json
from typing import Any

from coreinfer.cli import options
from coreinfer.cli.terminal import note


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "pull",
        help="a model into the local cache",
        description="Put a model into the local cache (COREINFER_CACHE, by default the user's "
        "cache folder), so that it loads in seconds. A model that is there is left alone.",
    )
    parser.add_argument(
        "name",
        nargs="?",
        metavar="MODEL",
        help="a known name or a Hugging Face id (default: the value of --model)",
    )
    parser.add_argument(
        "--model",
        default=options.DEFAULT_MODEL,
        metavar="M",
        help="the same, as the other verbs spell it (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options.add_config_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from coreinfer.models.pull import pull

    options.quiet_libraries()
    model = args.model if args.name is None else args.name
    folder = pull(model, on_progress=note)
    print(json.dumps({"model": model, "path": str(folder)}) if args.json else folder)
    return 0
