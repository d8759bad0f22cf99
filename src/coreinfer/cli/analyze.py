"""`coreinfer analyze`: questions about core neurons -> numbers, figures and a report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coreinfer.cli import options
from coreinfer.cli.terminal import note
from coreinfer.cli.values import fractions, layer_list, names, number, whole, whole_numbers

if TYPE_CHECKING:
    from coreinfer.backends.base import Backend


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "analyze",
        help="stability, similarity, layers -> plots and a report",
        description="Ask questions about core neurons and write what was measured as one HTML page "
        "that needs nothing but itself, with the data of every figure as CSV. Answers are kept in "
        "a folder beside the page, so a run that was interrupted goes on.",
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--questions",
        type=names,
        default=("all",),
        metavar="LIST",
        help="grid: quality over alpha, beta and gamma; prompt-length: stability, similarity or "
        "auto; layers: stability and budgets by layer; semantics: similarity against overlap; "
        "robustness; beyond: other networks than language models; all (default: all)",
    )
    what.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a long text of one kind; may be given several times",
    )
    what.add_argument(
        "--prompts",
        action="append",
        default=[],
        metavar="[NAME=]FILE[:FIELD]",
        help="a JSONL file of texts of one kind, a line each: of a field, of several joined as in "
        "FILE:question+answer, or of 'text' or 'prompt'; may be given several times",
    )
    what.add_argument(
        "--clusters",
        action="append",
        default=[],
        metavar="STORE",
        help="cluster store of a model, made by 'coreinfer cluster'; may be given several times "
        "(default: one is made of the second half of the texts)",
    )
    what.add_argument(
        "--calibration",
        action="append",
        default=[],
        metavar="STORE",
        help="calibration store of a model, made by 'coreinfer calibrate': prompt-length and "
        "robustness then ask of its rule and stand-in too; may be given several times",
    )
    what.add_argument(
        "--out",
        required=True,
        metavar="PLACE",
        help="a .html file, or a folder, where the page is called report.html",
    )
    sizes = parser.add_argument_group("how much")
    sizes.add_argument(
        "--windows",
        type=whole,
        metavar="N",
        help="pieces of text a measurement, from 2 (default: 8)",
    )
    sizes.add_argument(
        "--prompt-tokens", type=whole, metavar="N", help="of each, from 8 (default: 128)"
    )
    sizes.add_argument(
        "--continuation-tokens", type=whole, metavar="N", help="of each, from 2 (default: 32)"
    )
    sizes.add_argument(
        "--keep",
        type=number,
        metavar="B",
        help="fraction of the neurons kept where that is not varied, above 0 to 1 (default: 0.4)",
    )
    sizes.add_argument(
        "--alphas",
        type=fractions,
        metavar="LIST",
        help="alpha in the grid, ascending (default: 0.1,0.2,0.4,0.8)",
    )
    sizes.add_argument(
        "--keeps",
        type=fractions,
        metavar="LIST",
        help="beta and gamma in the grid, ascending (default: 0.2,0.4,0.6,0.8)",
    )
    sizes.add_argument(
        "--lengths",
        type=whole_numbers,
        metavar="LIST",
        help="prompt lengths in tokens, ascending (default: 1,4,16,64,128,256)",
    )
    sizes.add_argument(
        "--long-tokens", type=whole, metavar="N", help="of a long continuation (default: 320)"
    )
    sizes.add_argument(
        "--period",
        type=whole,
        metavar="N",
        help="tokens after which a long continuation selects anew, from 2 (default: 64)",
    )
    sizes.add_argument(
        "--corpus-documents",
        type=whole,
        metavar="N",
        help="documents of a cluster store that is made on the way, from 2 (default: 48)",
    )
    sizes.add_argument(
        "--dense-layers",
        type=layer_list,
        metavar="LIST",
        help="layers that keep all their neurons, from 0, as in 0-2,28,29 (default: none)",
    )
    sizes.add_argument(
        "--batch-size", type=whole, metavar="N", help="windows at a time, from 1 (default: 8)"
    )
    sizes.add_argument("--seed", type=whole, metavar="N", help="of all that is drawn (default: 0)")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON objects")
    options.add_model_options(parser, many=True)
    parser.set_defaults(run=run)


SIZES = (
    "windows", "prompt_tokens", "continuation_tokens", "keep", "alphas", "keeps", "lengths",
    "long_tokens", "period", "corpus_documents", "dense_layers", "batch_size", "seed",
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from coreinfer.analysis.page import heading
    from coreinfer.analysis.run import Place, analyze, questions_named
    from coreinfer.analysis.settings import Settings
    from coreinfer.analysis.texts import prompts_source, text_source
    from coreinfer.calibration.store import CalibrationStore
    from coreinfer.semantics.store import ClusterStore

    questions = questions_named(args.questions)
    given = {name: value for name in SIZES if (value := getattr(args, name)) is not None}
    settings = Settings(**given)
    sources = [text_source(spec) for spec in args.text]
    sources += [prompts_source(spec) for spec in args.prompts]
    stores = [ClusterStore.load(path) for path in args.clusters]
    calibrations = [CalibrationStore.load(path) for path in args.calibration]
    asks_models = any(question.needs_model for question in questions)
    models = (args.model or [options.DEFAULT_MODEL]) if asks_models else []
    sections = analyze(
        {name: _loader(args, name) for name in models},
        questions,
        sources,
        settings,
        args.out,
        stores=stores,
        calibrations=calibrations,
        about={"command": " ".join(["coreinfer", *map(shlex.quote, sys.argv[1:])])},
        on_progress=note,
    )
    for section in sections:
        if args.json:
            print(section.to_json())
        else:
            print(heading(section))
            print("".join(f"- {line}\n" for line in section.findings))
    if not args.json:
        print(Place.of(args.out).report)
    return 0


def _loader(args: argparse.Namespace, name: str) -> Callable[[], Backend]:
    def load() -> Backend:
        return options.load_model(argparse.Namespace(**{**vars(args), "model": name})).backend

    return load
