"""`coreinfer cluster`: a corpus -> a cluster store."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from coreinfer.cli import options
from coreinfer.cli.reading import CORPUS_FILE, add_reading_options
from coreinfer.cli.terminal import Skipped, note
from coreinfer.cli.values import whole


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "cluster",
        help="a corpus -> a cluster store",
        description="Embed the documents of a corpus, cluster them by meaning, and sum the "
        "core-neuron counts of each cluster: what the selectors similarity, auto and static use. "
        "The corpus is streamed; a run that was interrupted goes on when it is started again.",
    )
    parser.add_argument(
        "--corpus",
        required=True,
        metavar="FILE",
        help=CORPUS_FILE,
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="STORE",
        help="the folder to write; a calibration store's is welcome",
    )
    parser.add_argument(
        "--encoder",
        choices=("sentence", "hidden", "core"),
        help="what documents are embedded by. sentence: all-MiniLM-L6-v2 through "
        "sentence-transformers (default where installed); hidden: the model's own mean hidden "
        "state at a probe layer (default elsewhere); core: its core neurons there",
    )
    parser.add_argument(
        "--probe-layer",
        type=whole,
        metavar="L",
        help="layer that hidden and core look at, from 0 (default: the middle)",
    )
    parser.add_argument(
        "--k",
        type=whole,
        metavar="K",
        help="number of clusters, from 1 (default: where more explain little more, at most 16)",
    )
    add_reading_options(parser, least_tokens=2)
    parser.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="N",
        help="seed of the k-means, from 0 (default: 0)",
    )
    parser.add_argument("--json", action="store_true", help="describe the store as a JSON object")
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from coreinfer.building.clusters import build_clusters
    from coreinfer.semantics.encoders import default_encoder, encoder_named

    llm = options.load_model(args)
    num_layers = len(llm.backend.cost.num_neurons)
    name = args.encoder or default_encoder()
    skip = Skipped()
    store = build_clusters(
        llm.backend,
        Path(args.corpus),
        Path(args.out),
        encoder=encoder_named(name, num_layers, args.probe_layer),
        alpha=args.alpha,
        k=args.k,
        seed=args.seed,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        on_skip=skip,
        on_note=note,
    )
    if args.json:
        print(json.dumps({"out": args.out, "skipped": skip.count, **store.describe()}))
    else:
        sizes = ", ".join(str(size) for size in store.documents.tolist())
        print(
            f"{args.out}: {store.num_clusters} clusters of {sizes} documents "
            f"({int(store.tokens.sum()):,} tokens), encoder {name}"
        )
    return 0
