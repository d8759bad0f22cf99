"""`coreinfer select`: the core set of a prompt, as a file."""

from __future__ import annotations

import argparse
import json
from typing import Any

from coreinfer.cli import options


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "select",
        help="a prompt -> its core set, as a file",
        description="Prefill a prompt as it is (no chat template), choose its core neurons and "
        "write them as safetensors, for 'generate --core-set'.",
    )
    options.add_prompt_options(parser, many=False)
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--json", action="store_true", help="describe the set as a JSON object")
    options.add_selection_options(parser)
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    selector, prompt = options.selector_from(args), options.prompt_from(args)
    llm = options.load_model(args)
    core_set = llm.select(prompt, selector)
    core_set.save(args.out)
    about = {
        "out": args.out,
        "model": core_set.model,
        "model_fingerprint": core_set.model_fingerprint,
        "num_layers": core_set.num_layers,
        "sparse_layers": sorted(core_set.layers),
        "density": core_set.density,
        "selector": dict(core_set.selector),
    }
    if args.json:
        print(json.dumps(about))
    else:
        print(
            f"{args.out}: {selector.name}, {len(core_set.layers)} of {core_set.num_layers} layers "
            f"sparse, density {core_set.density:.3f}"
        )
    return 0
