"""`coreinfer calibrate`: a corpus -> a calibration store."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coreinfer.cli import options
from coreinfer.cli.reading import CORPUS_FILE, add_reading_options
from coreinfer.cli.terminal import Skipped, note
from coreinfer.cli.values import whole

if TYPE_CHECKING:
    from coreinfer.api import LLM
    from coreinfer.backends.hf.session import HfBackend


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "calibrate",
        help="a corpus -> a calibration store",
        description="Learn from a corpus how well each neuron follows from the input of its MLP: "
        "what the residual rule and the calibrated stand-in use, with the corpus' counts and what "
        "each layer loses at each keep. The corpus is streamed; a run that was interrupted goes on "
        "when it is started again.",
    )
    parser.add_argument(
        "--corpus",
        metavar="FILE",
        help=f"{CORPUS_FILE} (default: what the model writes by itself)",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="STORE",
        help="the folder to write; a cluster store's is welcome",
    )
    parser.add_argument(
        "--rank",
        type=whole,
        default=256,
        metavar="R",
        help="rank of the predictions, from 1: what selection pays for; what decode pays for is "
        "the --rank of the stand-in (default: 256)",
    )
    add_reading_options(parser, least_tokens=4)
    parser.add_argument(
        "--basis",
        choices=("regression", "inputs"),
        default="regression",
        help="directions of the MLP's input that predictions are made from: regression, those that "
        "say most of the neurons (default), or inputs, the principal components",
    )
    parser.add_argument(
        "--basis-tokens",
        type=whole,
        default=32768,
        metavar="N",
        help="tokens that the basis is chosen from, about, from all over the corpus; from 1 "
        "(default: 32768)",
    )
    parser.add_argument(
        "--error-documents",
        type=whole,
        default=8,
        metavar="N",
        help="documents on which the layers' errors are measured, from 1 (default: 8)",
    )
    parser.add_argument(
        "--own-tokens",
        type=whole,
        default=32768,
        metavar="N",
        help="tokens that the model writes without --corpus, from 1 (default: 32768)",
    )
    parser.add_argument(
        "--train-steps",
        type=whole,
        default=0,
        metavar="N",
        help="then train the predictions on what decoding loses, by backward passes, 4 documents a "
        "step; the model is loaded on the hf backend for them (default: 0, no training)",
    )
    parser.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="N",
        help="seed of what the model writes, of the basis and of training, from 0 (default: 0)",
    )
    parser.add_argument("--json", action="store_true", help="describe the store as a JSON object")
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def _on_hf(args: argparse.Namespace, llm: LLM) -> HfBackend:
    from coreinfer.api import differentiable

    given = {"device": args.device, "threads": args.threads}
    return differentiable(llm.backend, args.model, on_progress=note, **given)


def run(args: argparse.Namespace) -> int:
    from coreinfer.building.calibration import calibrate
    from coreinfer.building.settings import CalibrationSettings

    settings = CalibrationSettings(
        rank=args.rank,
        alpha=args.alpha,
        seed=args.seed,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        basis=args.basis,
        basis_tokens=args.basis_tokens,
        error_documents=args.error_documents,
        own_tokens=args.own_tokens,
        train_steps=args.train_steps,
    )
    llm = options.load_model(args)
    skip = Skipped()
    store = calibrate(
        llm.backend,
        None if args.corpus is None else Path(args.corpus),
        Path(args.out),
        settings,
        differentiable=_on_hf(args, llm) if settings.train_steps else None,
        on_skip=skip,
        on_note=note,
    )
    if args.json:
        print(json.dumps({"out": args.out, "skipped": skip.count, **store.describe()}))
    else:
        print(
            f"{args.out}: predictions of rank {store.rank} for {store.num_layers} layers, "
            f"from {store.tokens:,} tokens of {store.corpus['name']}"
        )
    return 0
