"""`coreinfer bench`: speed, dense and sparse, beside other engines."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from coreinfer.cli import options
from coreinfer.cli.stand_in import FIT, add_stand_in_options, stand_in_from
from coreinfer.cli.terminal import progress, table
from coreinfer.cli.values import fractions, names, whole

if TYPE_CHECKING:
    from coreinfer.benchmarks.decoding import Decoding


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "bench",
        help="speed: prefill, decode, memory; against dense and against other engines",
        description="Measure prefill and decode apart, after a warm-up, and how near decode comes "
        "to this machine's read bandwidth, which is measured in the same run. Every row runs in a "
        "process of its own; the runs of rows that fit into memory together take turns.",
    )
    what = parser.add_argument_group("what (one of these)").add_mutually_exclusive_group()
    what.add_argument(
        "--model",
        metavar="M",
        help="a known name, a Hugging Face id, a folder with safetensors, or a .gguf file "
        f"(default: {options.DEFAULT_MODEL}, pulled when it is first used)",
    )
    what.add_argument(
        "--shape",
        metavar="NAME",
        help="an architecture with synthetic weights, for its speed alone: llama2-7b, "
        "llama3.1-8b, opt-6.7b, opt-13b, opt-30b or smollm2-135m",
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--dtypes",
        type=names,
        default=("bfloat16", "int8", "int4"),
        metavar="LIST",
        help="of the weights: bfloat16, int8 and int4 on native, float32 and bfloat16 on hf and "
        "transformers; llama.cpp has Q8_0 beside int8 and Q4_0 beside int4 (default: "
        "bfloat16,int8,int4)",
    )
    rows.add_argument(
        "--keeps",
        type=fractions,
        default=(1.0, 0.4),
        metavar="LIST",
        help="fractions of the neurons to decode with, above 0 to 1; 1 is dense (default: 1.0,0.4)",
    )
    rows.add_argument(
        "--actives",
        type=fractions,
        default=(1.0,),
        metavar="LIST",
        help="fractions of the core neurons that a token computes whole, above 0 to 1, for each "
        "keep (default: 1.0)",
    )
    rows.add_argument(
        "--engines",
        type=names,
        default=("native", "hf"),
        metavar="LIST",
        help="which backends: native, hf, or none (default: native,hf)",
    )
    rows.add_argument(
        "--peers",
        type=names,
        default=("transformers", "llama.cpp"),
        metavar="LIST",
        help="other engines: transformers, llama.cpp, openvino, or none; one that is not installed "
        "is a note (default: transformers,llama.cpp)",
    )
    options.add_given_rule_options(rows, "one more row for each dtype")
    options.add_selection_options(parser, one_rule=False)
    add_stand_in_options(parser, one_rule=False)
    run_group = parser.add_argument_group("runs")
    run_group.add_argument(
        "--prompt-tokens",
        type=whole,
        default=128,
        metavar="N",
        help="tokens to prefill, from 1; decode is timed at this depth (default: 128)",
    )
    run_group.add_argument(
        "--decode-tokens",
        type=whole,
        default=16,
        metavar="N",
        help="tokens to decode a run, from 1 (default: 16)",
    )
    run_group.add_argument(
        "--threads",
        type=whole,
        metavar="N",
        help="CPU threads, 1 to the number of cores (default: all cores)",
    )
    run_group.add_argument(
        "--repeats",
        type=whole,
        default=3,
        metavar="N",
        help="timed runs a row, from 1, after one that is not timed (default: 3)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw it too: a .png, .svg or .pdf (needs matplotlib)"
    )
    options.add_config_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from coreinfer.benchmarks.plan import Settings
    from coreinfer.benchmarks.plot import plot, require_plot
    from coreinfer.benchmarks.run import bench
    from coreinfer.benchmarks.table import cells, heading
    from coreinfer.benchmarks.target import Target

    options.quiet_libraries()
    settings = Settings(
        dtypes=args.dtypes,
        keeps=args.keeps,
        actives=args.actives,
        engines=args.engines,
        peers=args.peers,
        prompt_tokens=args.prompt_tokens,
        decode_tokens=args.decode_tokens,
        threads=args.threads,
        repeats=args.repeats,
        given=_given(args),
    )
    if args.plot is not None:
        require_plot(args.plot)
    if args.shape is not None:
        target = Target.of_shape(args.shape)
    else:
        target = Target.of_model(args.model or options.DEFAULT_MODEL, progress)
    report = bench(target, settings, on_progress=progress)
    if args.plot is not None:
        plot(report, args.plot)
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        lines = [*heading(report), "", table(cells(report)), ""]
        print("\n".join(lines + [f"- {note}" for note in report.notes]))
    return 0


def _given(args: argparse.Namespace) -> Decoding | None:
    """What the row of a given rule decodes with; None where no rule is given."""
    from coreinfer.benchmarks.decoding import Decoding

    if args.selector is None:
        others = (*options.SELECTION, "stand_in", *FIT)
        unused = {name for name in others if getattr(args, name) is not None} - {"seed"}
        options.point_out(unused, "no --selector")
        return None
    args.core_set, args.stand_in = None, args.stand_in or "none"
    names = ("clusters", "calibration")
    stores = {name: path for name in names if (path := getattr(args, name)) is not None}
    return Decoding.of(options.selector_from(args), stand_in_from(args), stores)
