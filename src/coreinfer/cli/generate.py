"""`coreinfer generate`: answer a prompt, or a file of prompts."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from coreinfer.cli import options, sampling
from coreinfer.cli.stand_in import add_stand_in_options, stand_in_from
from coreinfer.cli.terminal import Skipped, megabytes, note, progress
from coreinfer.cli.values import whole
from coreinfer.errors import UserError, require_whole

if TYPE_CHECKING:
    from coreinfer.api import LLM, Comparison
    from coreinfer.runtime.records import GenerationRecord, Piece


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "generate",
        help="one prompt (or a JSONL of prompts) -> text, streamed",
        description="Answer a prompt with its core neurons. The answer is streamed to stdout; one "
        "line of what it cost follows on stderr.",
    )
    options.add_prompt_options(parser, many=True)
    parser.add_argument(
        "--raw",
        action="store_true",
        help="send the text as it is (default: through the model's chat template, if it has one)",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also decode densely; show both answers, the first differing token and both speeds",
    )
    parser.add_argument(
        "--batch-size",
        type=whole,
        default=1,
        metavar="N",
        help="prompts of a --prompts file answered together, from 1 (default: 1)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a prompt instead of the text"
    )
    sampling.add_sampling_options(parser)
    options.add_selection_options(parser)
    add_stand_in_options(parser)
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from coreinfer.runtime.sampling import SamplingParams

    require_whole("the batch size", args.batch_size, 1)
    selection = {"selector": options.selector_from(args), "stand_in": stand_in_from(args)}
    answer = sampling.sampling_from(args)
    SamplingParams(**answer)  # refuses what is out of range before the model is loaded
    shared = {"raw": args.raw, **selection, **answer}
    if args.prompts is not None:
        return _answer_file(args, shared)
    prompt = options.prompt_from(args)
    llm = options.load_model(args)
    if args.compare:
        _compare(llm, prompt, shared, as_json=args.json)
    else:
        _answer(llm, prompt, shared, as_json=args.json)
    return 0


def _answer(llm: LLM, prompt: str, shared: dict[str, Any], *, as_json: bool) -> None:
    for piece in llm.stream(prompt, **shared):
        if piece.record is None:
            if not as_json:
                print(piece.text, end="", flush=True)
        elif as_json:
            print(json.dumps(piece.record.to_json()), flush=True)
        else:
            print(flush=True)
            note(summary(piece.record))


def _compare(llm: LLM, prompt: str, shared: dict[str, Any], *, as_json: bool) -> None:
    sparse: list[str] = []  # held back, since the two answers come in turns

    def show(engine: str, piece: Piece) -> None:
        if engine == "sparse":
            sparse.append(piece.text)
        elif not as_json:
            print(piece.text, end="", flush=True)

    if not as_json:
        print("--- dense ---")
    comparison = llm.compare(prompt, on_piece=show, **shared)
    if as_json:
        print(json.dumps(comparison.to_json()), flush=True)
        return
    print(f"\n--- sparse ---\n{''.join(sparse)}\n--- {difference(comparison, llm)}")
    note("dense:  " + summary(comparison.dense))
    note("sparse: " + summary(comparison.sparse))


def _answer_file(args: argparse.Namespace, shared: dict[str, Any]) -> int:
    """Answer the usable lines of a file; exit code 2 if a line was not."""
    from coreinfer.api import in_batches
    from coreinfer.jsonl import read_jsonl

    if args.compare and args.batch_size != 1:
        raise UserError(
            f"--compare answers one prompt at a time, got --batch-size {args.batch_size}"
        )
    llm: LLM | None = None
    skip = Skipped()
    for batch in in_batches(read_jsonl(args.prompts, ["prompt"], skip), args.batch_size):
        llm = llm or options.load_model(args)
        prompts = []
        for line, row in batch:
            try:
                llm.check_prompt(row["prompt"], raw=args.raw)
                prompts.append(row["prompt"])
            except UserError as error:
                skip(f"{args.prompts!r}: line {line}: {error}")
        if args.compare:
            for prompt in prompts:
                _compare(llm, prompt, shared, as_json=args.json)
        elif args.batch_size == 1:
            for prompt in prompts:
                _answer(llm, prompt, shared, as_json=args.json)
        elif prompts:
            progress(f"answering {len(prompts)} prompts, up to line {batch[-1][0]}")
            for record in llm.generate(prompts, batch_size=args.batch_size, **shared):
                if args.json:
                    print(json.dumps(record.to_json()), flush=True)
                else:
                    print(record.text, flush=True)
                    note(summary(record))
    return skip.exit_code


def summary(record: GenerationRecord) -> str:
    """One line of what an answer took."""
    speed = record.decode_tokens_per_s
    return (
        f"[{record.selector}: density {record.density:.2f}, "
        f"{megabytes(record.bytes_per_token)} a token (dense "
        f"{megabytes(record.dense_bytes_per_token)}) | "
        f"{record.prompt_tokens} prompt tokens, {record.generated_tokens} generated, "
        f"{record.finish_reason} | prefill {record.prefill_s:.2f} s, "
        f"select {record.select_s:.2f} s, decode {record.decode_s:.2f} s"
        + ("" if speed is None else f", {speed:.1f} tokens/s")
        + "]"
    )


def difference(comparison: Comparison, llm: LLM) -> str:
    """Where the two answers part, and how their speeds compare."""
    at, ratio = comparison.first_difference, comparison.speed_ratio
    speed = "" if ratio is None else f"; sparse decodes at {ratio:.2f} times the dense speed"
    if at is None:
        return f"the same {comparison.sparse.generated_tokens} tokens{speed}"
    said = [
        repr(llm.backend.tokenizer.decode(ids[at : at + 1])) if at < len(ids) else "nothing more"
        for ids in (comparison.dense.token_ids, comparison.sparse.token_ids)
    ]
    return f"first differing token: number {at + 1}, dense {said[0]}, sparse {said[1]}{speed}"
