"""`coreinfer eval`: tasks -> quality, dense and sparse side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coreinfer.cli import options
from coreinfer.cli.stand_in import add_stand_in_options, stand_in_from
from coreinfer.cli.terminal import Bar, note
from coreinfer.cli.values import names, whole
from coreinfer.errors import UserError

if TYPE_CHECKING:
    from coreinfer.evaluation.rules import Rule


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "eval",
        help="tasks -> quality, dense and sparse side by side",
        description="Score tasks under several rules, each request from one dense prefill, with "
        "95 % intervals over the items (bootstrap) and the difference to dense decoding, paired. "
        "Tasks and metrics are those of lm-evaluation-harness. Answers are kept, so a run that was "
        "interrupted goes on, and one with more tasks or rules computes these alone.",
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--tasks",
        type=names,
        required=True,
        metavar="LIST",
        help="perplexity, kl, and tasks of lm-eval, such as lambada_openai,arc_easy,gsm8k",
    )
    what.add_argument(
        "--data-dir",
        metavar="DIR",
        help="a folder with the tasks' data as JSONL (default: the hub's data)",
    )
    what.add_argument(
        "--text",
        metavar="FILE",
        help="what perplexity and kl read (default: wikitext2_raw_test.txt of --data-dir)",
    )
    what.add_argument(
        "--rules",
        type=names,
        metavar="LIST",
        help="paper (stability, the others dropped), best (residual+calibrated with --calibration, "
        "else impact+linear), given (see --selector), SELECTOR or SELECTOR+STAND_IN; dense is "
        "always there (default: dense,paper,best,random,static; where a rule is given, that one)",
    )
    what.add_argument(
        "--limit",
        type=whole,
        metavar="N",
        help="items of each task, windows of a text, from 1 (default: all; 40 windows)",
    )
    what.add_argument(
        "--few-shot",
        type=whole,
        metavar="N",
        help="examples in each prompt, from 0 (default: what the task says)",
    )
    what.add_argument(
        "--chat", action="store_true", help="put prompts through the model's chat template"
    )
    what.add_argument(
        "--dense-scoring",
        action="store_true",
        help="score continuations with all neurons whatever the rule, as the paper's code did; "
        "generation stays sparse",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--batch-size",
        type=whole,
        default=8,
        metavar="N",
        help="contexts computed together, from 1 (default: 8)",
    )
    how.add_argument(
        "--cache",
        metavar="DIR",
        help="where answers are kept (default: 'eval' in the cache of models)",
    )
    how.add_argument(
        "--out",
        metavar="PLACE",
        help="a .json file, with the table beside it as .md, or a folder for both",
    )
    how.add_argument("--json", action="store_true", help="print the record, not the table")
    options.add_given_rule_options(what, "the rule 'given'")
    options.add_selection_options(parser, one_rule=False)
    add_stand_in_options(parser, one_rule=False)
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from coreinfer.evaluation.run import (
        EvalSettings,
        Place,
        describe_run,
        open_answers,
        plan,
        run_plan,
        table,
    )
    from coreinfer.models.cache import cache_dir

    settings = EvalSettings(
        limit=args.limit,
        few_shot=args.few_shot,
        dense_scoring=args.dense_scoring,
        batch_size=args.batch_size,
        seed=args.seed,
        chat=args.chat,
    )
    place = None if args.out is None else Place.of(args.out)
    options.quiet_libraries()
    planned = plan(
        args.tasks,
        settings,
        data_dir=None if args.data_dir is None else Path(args.data_dir),
        text=None if args.text is None else Path(args.text),
    )
    rules, left_out = _rules(args)
    backend = options.load_model(args).backend
    for rule in rules.values():
        backend.check(rule.setting.selector, rule.setting.stand_in)
    answers = open_answers(backend, Path(args.cache) if args.cache else cache_dir() / "eval")
    for name, lack in left_out.items():
        note(f"note: the rule {name} is left out, for it needs {lack}")
    record = {**describe_run(backend, rules, settings), "left_out": left_out, "tasks": []}
    with Bar() as bar:
        for section in run_plan(planned, backend, rules, settings, answers, bar.show):
            if section.get("contexts_cut"):
                bar.close()
                note(
                    f"note: {section['contexts_cut']} contexts of {section['task']} are longer "
                    "than the model reads; they are cut on the left"
                )
            record["tasks"].append(section)
            if place is not None:
                place.write(record)
    print(json.dumps(record) if args.json else table(record["tasks"]).rstrip())
    return 0


def _rules(args: argparse.Namespace) -> tuple[dict[str, Rule], dict[str, str]]:
    """The rules by name, and those that are left out with what they lack."""
    from coreinfer.evaluation.continuations import Setting
    from coreinfer.evaluation.local import digest_of
    from coreinfer.evaluation.rules import (
        BASELINE,
        DEFAULT_RULES,
        GIVEN,
        Rule,
        RuleName,
        rule_names,
    )

    has = {name: getattr(args, name) is not None for name in ("clusters", "calibration")}
    given = None if args.selector is None else RuleName(args.selector, args.stand_in or "none")
    wanted = rule_names(
        args.rules or (DEFAULT_RULES if given is None else (GIVEN,)),
        calibration=has["calibration"],
        given=given,
    )
    left_out = {str(rule): lack for rule in wanted if (lack := rule.lacks(**has)) is not None}
    ready = [rule for rule in wanted if str(rule) not in left_out]
    if [str(rule) for rule in ready] == [BASELINE] and left_out:
        name, lack = next(iter(left_out.items()))
        raise UserError(f"the rule {name} needs {lack}, and there is no other one")
    # What a rule's answers depend on beside its parameters: the stores, byte by byte.
    stores = [Path(getattr(args, name)) for name, given in has.items() if given]
    digests = tuple(digest_of([store]) for store in stores)
    args.core_set = None
    args.gamma = args.beta if args.gamma is None else args.gamma  # all keep equally much
    rules = {}
    for rule in ready:
        args.selector, args.stand_in = rule.selector, rule.stand_in
        setting = Setting(options.selector_from(args, quiet=True), stand_in_from(args, quiet=True))
        rules[str(rule)] = Rule(setting, digests if setting.uses_a_store else ())
    return rules, left_out
