"""`coreinfer score`: log-likelihoods of continuations, decoded sparsely."""

from __future__ import annotations

import argparse
import json
from typing import Any

from coreinfer.cli import options
from coreinfer.cli.stand_in import add_stand_in_options, stand_in_from
from coreinfer.cli.terminal import Skipped
from coreinfer.cli.values import whole


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "score",
        help="context + continuation -> log-likelihood of the continuation, decoded sparsely",
        description="Score continuations: each context goes through a dense prefill, its core set "
        "is chosen from the context alone, and the continuation is teacher-forced through the "
        "sparse layers. Texts are taken as they are (no chat template).",
    )
    parser.add_argument(
        "--pairs",
        required=True,
        metavar="FILE",
        help='JSONL file, {"context": ..., "continuation": ...} a line',
    )
    parser.add_argument(
        "--batch-size",
        type=whole,
        default=8,
        metavar="N",
        help="pairs computed together, from 1 (default: 8)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print logprob, num_tokens, greedy and density of each pair as a JSON object",
    )
    options.add_selection_options(parser)
    add_stand_in_options(parser)
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from coreinfer.api import in_batches
    from coreinfer.errors import UserError
    from coreinfer.jsonl import read_jsonl
    from coreinfer.runtime.scoring import Pair, score

    selector, stand_in = options.selector_from(args), stand_in_from(args)
    llm = None
    skip = Skipped()
    rows = read_jsonl(args.pairs, ["context", "continuation"], skip)
    for batch in in_batches(rows, args.batch_size):
        llm = llm or options.load_model(args)
        pairs = []
        for line, row in batch:
            try:
                pairs.append(Pair.of(llm.backend, row["context"], row["continuation"]))
            except UserError as error:
                skip(f"{args.pairs!r}: line {line}: {error}")
        for result in score(llm.backend, pairs, selector, stand_in):
            if args.json:
                print(json.dumps(result.to_json()), flush=True)
            else:
                print(
                    f"{result.logprob:.4f}  {result.num_tokens} tokens  "
                    f"{'greedy' if result.greedy else 'not greedy'}  density {result.density:.2f}",
                    flush=True,
                )
    return skip.exit_code
