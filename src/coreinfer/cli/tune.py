"""`coreinfer tune`: a quality or a byte budget -> the settings that serve it best."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coreinfer.cli import options
from coreinfer.cli.terminal import Skipped, note, table, warn
from coreinfer.cli.values import number, whole
from coreinfer.errors import UserError, require_whole

if TYPE_CHECKING:
    from coreinfer.api import LLM
    from coreinfer.runtime.stores import Stores
    from coreinfer.tuning.pools import Pool
    from coreinfer.tuning.result import Outcome


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "tune",
        help="a quality budget -> the settings that keep it at the fewest bytes",
        description="Search rule, stand-in, their options and a budget for every layer: the fewest "
        "bytes a token that keep a quality budget, or the best quality at a share of the bytes. "
        "Some prompts are searched with, others reported on. What was found is written as a TOML "
        "file for --config of the other verbs. A search that was interrupted goes on when it is "
        "started again.",
    )
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help='a .jsonl file, {"prompt": ...} a line and "continuation" where it is not to be the '
        "model's own dense answer; or one text, of whose first half windows are searched with, "
        "and of whose second half windows are reported on",
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE.toml", help="the settings file to write"
    )
    parser.add_argument(
        "--page",
        metavar="FILE.html",
        help="the page that shows what was tried (default: beside --out, where matplotlib is "
        "installed)",
    )
    goal = parser.add_argument_group("what for (one of these)")
    one = goal.add_mutually_exclusive_group(required=True)
    one.add_argument(
        "--budget",
        metavar="TEXT",
        help="'kl<=0.05' (to dense decoding, nats a token), 'ppl<=+2%%' (over the dense "
        "perplexity) or 'agreement>=0.9' (of the likeliest token with the dense one)",
    )
    one.add_argument(
        "--bytes",
        type=number,
        metavar="SHARE",
        help="of the dense MLPs' bytes that may be read a token, stand-in included, above 0 and "
        "below 1: the least KL to dense decoding that they allow",
    )
    effort = parser.add_argument_group("how much")
    effort.add_argument(
        "--trials", type=whole, default=64, metavar="N",
        help="settings that the search measures, from 1 (default: 64)",
    )  # fmt: skip
    effort.add_argument(
        "--steps", type=whole, default=40, metavar="N",
        help="of moving bytes to the layers where they are worth most after it, from 0; the model "
        "is loaded on the hf backend for them, which cannot be a converted one (default: 40)",
    )  # fmt: skip
    effort.add_argument(
        "--search-prompts", type=whole, default=16, metavar="N",
        help="prompts to search with at most, from 1 (default: 16)",
    )  # fmt: skip
    effort.add_argument(
        "--descent-prompts", type=whole, default=160, metavar="N",
        help="prompts for those steps, at most, from 1; not among those reported on (default: 160)",
    )  # fmt: skip
    effort.add_argument(
        "--report-prompts", type=whole, default=40, metavar="N",
        help="other prompts, to report on, at most, from 1 (default: 40)",
    )  # fmt: skip
    effort.add_argument(
        "--prompt-tokens", type=whole, default=200, metavar="N",
        help="of each window of a text, from 1 (default: 200)",
    )  # fmt: skip
    effort.add_argument(
        "--continuation-tokens", type=whole, default=60, metavar="N",
        help="that quality is measured on, at most, from 2 (default: 60)",
    )  # fmt: skip
    effort.add_argument(
        "--raw", action="store_true", help="send prompts as they are, without the chat template"
    )
    effort.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="of the search, from 0 (default: 0)"
    )
    effort.add_argument(
        "--skipping", action="store_true",
        help="search --active too: core neurons that a token does not compute whole. That spares "
        "bytes, but time only in bfloat16 on wide models, and no memory",
    )  # fmt: skip
    stores = parser.add_argument_group("what rules and stand-ins may use")
    stores.add_argument(
        "--calibration", metavar="STORE",
        help="calibration store: adds the residual rule and the calibrated stand-in, and spares "
        "measuring what single layers lose",
    )  # fmt: skip
    stores.add_argument(
        "--clusters", metavar="STORE", help="cluster store: adds the rules similarity and auto"
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--jobs", type=whole, metavar="N",
        help="processes, from 1, each with a model of its own and --threads threads (default: as "
        "many as there are cores and memory for; on a Ray cluster as many as it has cores for). "
        "What is found does not depend on it",
    )  # fmt: skip
    where.add_argument(
        "--ray", metavar="ADDRESS",
        help="measure on a Ray cluster instead: HOST:PORT, ray://HOST:PORT or auto; its nodes need "
        "coreinfer, the model and the stores at the same paths",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print all that was measured as JSON")
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from coreinfer import __version__
    from coreinfer.api import require_differentiable
    from coreinfer.journal import Journal
    from coreinfer.runtime.stores import Stores
    from coreinfer.tuning.goal import Goal
    from coreinfer.tuning.objective import FINAL_WINDOWS, WINDOWS_A_STEP, WINDOWS_A_TASK, Objective
    from coreinfer.tuning.prices import Prices
    from coreinfer.tuning.prompts import Amount, read_split
    from coreinfer.tuning.ray_cluster import require_ray
    from coreinfer.tuning.run import Effort, tune
    from coreinfer.tuning.study import require_optuna

    goal = Goal.of_bytes(args.bytes) if args.budget is None else Goal.of_budget(args.budget)
    effort = Effort(args.trials, args.steps, args.seed, args.skipping)
    amount = Amount(
        search=args.search_prompts,
        report=args.report_prompts,
        descent=min(args.descent_prompts, args.steps * WINDOWS_A_STEP or 1),
        prompt_tokens=args.prompt_tokens,
        continuation_tokens=args.continuation_tokens,
        raw=args.raw,
    )
    require_optuna()
    _require_places(args)
    if args.jobs is not None:
        require_whole("jobs", args.jobs, 1)
    if args.ray is not None:
        require_ray(args.ray)
    args.threads = 1 if args.threads is None else args.threads  # the same in every process
    named = {name: path for name in ("calibration", "clusters") if (path := getattr(args, name))}
    stores = Stores.open(named)
    llm = options.load_model(args)
    for store in stores.opened.values():
        store.require_model(llm.backend.fingerprint, llm.name)
    if args.steps and llm.backend.name == "native":
        require_differentiable(args.model)
    skip = Skipped()
    split = read_split(llm.backend, args.prompts, amount, skip)
    parts = {
        "search": split.search,
        "report": split.report,
        "descent": split.descent,
        "final": split.descent[:FINAL_WINDOWS],
        "profile": split.search[:WINDOWS_A_TASK],
    }
    prices = Prices.of(llm.backend, split.search[0])
    about = {
        "version": __version__,
        "model": llm.backend.fingerprint,
        "backend": llm.backend.name,
        "dtype": llm.backend.dtype,
        "device": args.device,
        "threads": args.threads,
        "stores": {name: store.describe() for name, store in stores.opened.items()},
    }
    journal = Journal(Path(args.out).with_suffix(".trials.jsonl"))
    if len(journal):
        note(f"going on: {len(journal)} results are known from an earlier run")
    with _pool(args, llm, stores) as pool:
        objective = Objective(pool, parts, journal, stores, about=about)
        prompts = {"search": len(split.search), "report": len(split.report)}
        try:
            outcome = tune(objective, prices, stores, goal, effort, prompts, note)
        except KeyboardInterrupt:
            note("interrupted: the same command goes on from here")
            raise
    _write(args, outcome)
    if args.json:
        print(json.dumps({"model": llm.name, "out": args.out, **outcome.to_json()}))
    else:
        print(_readable(args, outcome))
    if not outcome.reached:
        warn(
            f"{goal} cannot be reached on these prompts; the closest is "
            f"{goal.describe_loss(outcome.chosen.loss)} at {outcome.chosen.share:.3f} of the MLPs' "
            f"bytes, which {args.out!r} now holds"
        )
        return 2
    return skip.exit_code


def _require_places(args: argparse.Namespace) -> None:
    """Raises UserError where what is found could not be written, before hours go into it."""
    from importlib.util import find_spec

    draws = find_spec("matplotlib") is not None
    for option, path, suffix in (("out", args.out, ".toml"), ("page", args.page, ".html")):
        if path is None:
            continue
        if Path(path).suffix.lower() != suffix:
            raise UserError(f"--{option} is a {suffix} file, got {path!r}")
        folder = Path(path).parent
        if not folder.is_dir():
            raise UserError(f"cannot write {path!r}: there is no folder {str(folder)!r}")
        if not os.access(folder, os.W_OK):
            raise UserError(f"no permission to write {path!r}; choose a path you can write to")
    if args.page is not None and not draws:
        raise UserError("--page draws with matplotlib; pip install 'coreinfer[tune]'")
    if draws:
        args.page = args.page or str(Path(args.out).with_suffix(".html"))


@contextmanager
def _pool(args: argparse.Namespace, llm: LLM, stores: Stores) -> Iterator[Pool]:
    from coreinfer.api import float32_bytes
    from coreinfer.tuning.pools import InProcess, Processes, default_jobs
    from coreinfer.tuning.ray_cluster import RayCluster
    from coreinfer.tuning.work import WorkerSpec

    spec = WorkerSpec(
        args.model, llm.backend.name, args.dtype, args.device, args.threads, dict(stores.paths)
    )
    pool: Pool
    if args.ray is not None:
        pool = RayCluster(spec, args.ray, args.jobs)
    else:
        backend = llm.backend
        size = backend.cost.dense
        if backend.name == "native" and args.steps:
            size += float32_bytes(backend)  # what descent loads
        jobs = args.jobs or default_jobs(size, args.threads)
        pool = InProcess(llm.backend, stores, spec) if jobs == 1 else Processes(spec, jobs)
    try:
        yield pool
    finally:
        pool.close()


def _write(args: argparse.Namespace, outcome: Outcome) -> None:
    from coreinfer.tuning.settings_file import write_settings

    goal, chosen = outcome.goal, outcome.chosen
    assert chosen.report is not None
    comments = [
        f"Written by: {_command()}",
        f"For {goal}" + ("" if outcome.reached else ", which was not reached: this is the closest"),
        f"reads {chosen.share:.4f} of the dense MLPs' bytes, {_of_all(outcome):.4f} of all bytes",
        f"on {outcome.prompts['search']} prompts searched with: {goal.describe_loss(chosen.loss)}",
        f"on {outcome.prompts['report']} other prompts: {goal.describe_loss(chosen.report)}",
    ]
    given = {name: getattr(args, name) for name in ("model", "backend", "dtype")}
    model = {name: value for name, value in given.items() if value is not None}
    settings = found_from(Path(args.out).parent, outcome.settings)
    write_settings(args.out, {**model, **settings}, comments)
    if args.page is not None:
        from coreinfer.analysis.tuned import write_page

        write_page(args.page, outcome, str(given["model"]), {"command": _command()})


def found_from(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """With the paths of stores as a settings file in that folder has them."""
    made = dict(settings)
    for name in ("calibration", "clusters"):
        if name in made and not Path(made[name]).is_absolute():
            made[name] = os.path.relpath(made[name], folder)
    return made


def _readable(args: argparse.Namespace, outcome: Outcome) -> str:
    prompts = outcome.prompts
    rows = [
        ["setting", "MLP bytes / dense", f"on {prompts['search']} prompts searched with",
         f"on {prompts['report']} others"]
    ]  # fmt: skip
    for name, point in {"chosen": outcome.chosen, **outcome.rivals}.items():
        assert point.report is not None
        losses = [outcome.goal.describe_loss(loss) for loss in (point.loss, point.report)]
        rows.append([f"{name}: {point.candidate.name}", f"{point.share:.3f}", *losses])
    written = args.out if args.page is None else f"{args.out}, {args.page}"
    return f"{table(rows)}\n{written}"


def _of_all(outcome: Outcome) -> float:
    return outcome.chosen.bytes_per_token / outcome.dense_bytes_per_token


def _command() -> str:
    """The command line; of paths only the last part, for where they lie is of no use to others."""
    shown = [Path(part).name if Path(part).is_absolute() else part for part in sys.argv[1:]]
    return " ".join(["coreinfer", *map(shlex.quote, shown)])
