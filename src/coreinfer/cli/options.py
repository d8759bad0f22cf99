"""Options that several verbs share, and what is made of them."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from coreinfer.cli.terminal import progress, warn
from coreinfer.cli.values import layer_budgets, layer_list, number, whole
from coreinfer.errors import UserError, require_ratio

if TYPE_CHECKING:  # torch and transformers take seconds to import; --help must not
    from coreinfer.api import LLM
    from coreinfer.calibration.store import CalibrationStore
    from coreinfer.selectors import Selector

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_SELECTOR = "impact"
SELECTOR_NAMES = (
    "dense", "stability", "similarity", "auto", "impact", "griffin", "residual", "static",
    "random", "oracle",
)  # fmt: skip
STAND_IN_NAMES = ("none", "mean", "linear", "calibrated")

# Options of the selection, by the field they set: what is given but not used is pointed out.
SELECTION = (
    "alpha", "beta", "gamma", "dense_layers", "budgets", "active", "active_budgets", "count_bos",
    "clusters", "calibration", "mode", "prior_tokens", "min_stability", "min_similarity", "seed",
)  # fmt: skip
SKIPPING = frozenset({"active", "active_budgets"})  # how many core neurons are skipped


def add_model_options(
    parser: argparse.ArgumentParser, *, default: str | None = DEFAULT_MODEL, many: bool = False
) -> None:
    group = parser.add_argument_group("model")
    add_model_option(group, default, many=many)
    group.add_argument(
        "--backend",
        choices=("hf", "native"),
        help="what runs the model: native, the decoder for CPUs, which converts a model when it is "
        "first used, or hf, transformers with its MLPs rerouted (default: native where it knows "
        "the architecture and the dtype, else hf)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "int8", "int4"),
        help="number format of the weights: bfloat16 (default), int8 or int4 on native; float32 "
        "(default on a CPU), bfloat16 or float16 on hf",
    )
    group.add_argument(
        "--device", metavar="DEV", help="torch device, such as cpu or cuda:0 (default: cpu)"
    )
    group.add_argument(
        "--threads",
        type=whole,
        metavar="N",
        help="CPU threads, 1 to the number of cores (default: torch's choice)",
    )
    add_config_option(group)


def add_model_option(
    parser: argparse._ActionsContainer,
    default: str | None = DEFAULT_MODEL,
    *,
    many: bool = False,
) -> None:
    """`many` lets it be given several times; args.model is then a list, or None."""
    used = "none" if default is None else f"{default}, pulled when it is first used"
    several = "; may be given several times" if many else ""
    parser.add_argument(
        "--model",
        action="append" if many else "store",
        # A list as default would stay among what is given.
        default=None if many else default,
        metavar="M",
        help="a known name, a Hugging Face id, a folder with safetensors, or a .gguf file"
        f"{several} (default: {used})",
    )


def add_config_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file with any of these options as key = value; what is typed wins",
    )


def add_selection_options(parser: argparse.ArgumentParser, *, one_rule: bool = True) -> None:
    """Without `one_rule`, the verb has rules of its own and these are the options of them all."""
    group = parser.add_argument_group("which neurons are kept")
    if one_rule:
        _add_one_rule(group)
    group.add_argument(
        "--alpha",
        type=number,
        metavar="A",
        help="fraction of a token's positive activations that count, above 0 to 1 (default: 0.4; "
        "similarity and auto use their store's)",
    )
    group.add_argument(
        "--beta",
        type=number,
        metavar="B",
        help="fraction of the neurons of each sparse layer to keep, above 0 to 1 (default: 0.4)",
    )
    group.add_argument(
        "--gamma",
        type=number,
        metavar="G",
        help="the same for --selector similarity, above 0 to 1 (default: 0.4)",
    )
    group.add_argument(
        "--dense-layers",
        type=layer_list,
        metavar="LIST",
        help="layers that keep all their neurons, from 0, as in 0-2,28,29 (default: none)",
    )
    group.add_argument(
        "--budgets",
        type=layer_budgets,
        metavar="LIST",
        help="fraction to keep of single layers, above 0 to 1 each, as in 0-5=0.8,6=0.3 "
        "(default: none)",
    )
    group.add_argument(
        "--active",
        type=number,
        metavar="F",
        help="fraction of a sparse layer's core neurons that a token computes whole, above 0 to 1; "
        "of the others, whose activation turns out small, the gate alone is read (default: 1)",
    )
    group.add_argument(
        "--active-budgets",
        type=layer_budgets,
        metavar="LIST",
        help="the same of single layers, as in 0-5=0.8,6=0.3 (default: none)",
    )
    group.add_argument(
        "--clusters",
        metavar="STORE",
        help="cluster store, made by 'coreinfer cluster'; needed by similarity, auto and static",
    )
    group.add_argument(
        "--calibration",
        metavar="STORE",
        help="calibration store, made by 'coreinfer calibrate'; needed by residual and by "
        "--stand-in calibrated, and enough for static",
    )
    group.add_argument(
        "--count-bos",
        action="store_true",
        default=None,
        help="let the beginning-of-sequence token count (default: it does not, unless alone)",
    )
    group.add_argument(
        "--mode", choices=("blend", "choice"), help="how auto combines (default: blend)"
    )
    group.add_argument(
        "--prior-tokens",
        type=whole,
        metavar="N",
        help="tokens of prompt that outweigh the corpus, for auto from 1 (default: 64), for "
        "residual from 0 (default: 200)",
    )
    group.add_argument(
        "--min-stability",
        type=number,
        metavar="S",
        help="auto, mode choice: stability from which the prompt is trusted, 0 to 1 (default: 0.4)",
    )
    group.add_argument(
        "--min-similarity",
        type=number,
        metavar="S",
        help="auto: cosine below which no cluster is near, -1 to 1 (default: the encoder's own)",
    )
    group.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="N",
        help="seed of the random selector and of sampling, from 0 (default: 0)",
    )


def _add_one_rule(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--selector",
        choices=SELECTOR_NAMES,
        help="the rule. impact: largest contribution |h| * |W_down column| (default); stability: "
        "the prompt's most counted neurons (the paper's rule); similarity: those of the nearest "
        "cluster of a corpus; auto: a blend of these two; griffin: normalised |h|; residual: "
        "what a calibration cannot predict of a neuron; controls: static (one set for all), "
        "random, oracle (from the answer itself); dense: all neurons",
    )
    group.add_argument(
        "--core-set",
        metavar="FILE",
        help="decode with this core set, made by 'coreinfer select', instead of a rule",
    )


def add_given_rule_options(group: argparse._ActionsContainer, what: str) -> None:
    """For verbs that have rows of their own, beside which one rule may be given, as `what`."""
    group.add_argument(
        "--selector",
        choices=SELECTOR_NAMES,
        help=f"of {what}, as a settings file of tune has it (default: none is given)",
    )
    group.add_argument("--stand-in", choices=STAND_IN_NAMES, help=f"of {what} (default: none)")


def add_prompt_options(parser: argparse.ArgumentParser, *, many: bool) -> None:
    group = parser.add_argument_group("prompt (one of these)").add_mutually_exclusive_group(
        required=True
    )
    group.add_argument("--prompt", metavar="TEXT", help="the prompt")
    group.add_argument(
        "--prompt-file", metavar="FILE", help="a file that is one prompt, byte for byte"
    )
    if many:
        group.add_argument(
            "--prompts", metavar="FILE", help='JSONL file of prompts, {"prompt": ...} a line'
        )


def load_model(args: argparse.Namespace) -> LLM:
    """The model that the options name."""
    from coreinfer.api import load

    quiet_libraries()
    return load(
        args.model,
        backend=args.backend,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        on_progress=progress,
    )


def quiet_libraries() -> None:
    """Keep progress bars and advice of the libraries out of our output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def selector_from(args: argparse.Namespace, *, quiet: bool = False) -> Selector:
    """The selector that the options describe; `quiet` about those it has no use for.

    Raises:
        UserError: if a value is out of range, or a store or core set is missing or damaged.
    """
    from coreinfer.core.coreset import CoreSet
    from coreinfer.selectors import SELECTORS, Fixed
    from coreinfer.semantics.store import ClusterStore

    given = {name: value for name in SELECTION if (value := getattr(args, name)) is not None}
    for ratio in ("alpha", "beta", "gamma"):  # also where the rule has no use for it
        if ratio in given:
            require_ratio(ratio, given[ratio])
    if args.core_set is not None:
        skipping = {name: given.pop(name) for name in SKIPPING & given.keys()}
        unused = given.keys() - {"seed"}
        point_out(unused if args.selector is None else unused | {"selector"}, "--core-set")
        return Fixed(core_set=CoreSet.load(args.core_set), **skipping)
    name = args.selector or DEFAULT_SELECTOR
    rule = SELECTORS[name]
    takes: dict[str, Any] = {field.name: field for field in fields(rule)}
    if rule.keep_name != "beta":
        del takes["beta"]  # a rule with a name of its own for the fraction it keeps
    if name == "dense":
        takes = {name: value for name, value in takes.items() if name not in SKIPPING}
    if "calibration" in takes:
        given["calibration"] = calibration_from(args, f"--selector {name}")
    if "clusters" in takes:
        if "clusters" in given:
            given["clusters"] = ClusterStore.load(given["clusters"])
        elif name == "static" and "calibration" in given:  # it too has the corpus' counts
            given["clusters"] = calibration_from(args, "--selector static")
        else:
            raise UserError(
                f"--selector {name} needs --clusters STORE, made by 'coreinfer cluster'"
            )
    if getattr(args, "stand_in", None) == "calibrated" or name == "static":
        takes.setdefault("calibration", None)  # it is of use, though not to the rule
    if not quiet:
        point_out(given.keys() - takes.keys() - {"seed"}, f"--selector {name}")
    known = rule.__dataclass_fields__
    return rule(**{key: value for key, value in given.items() if key in takes and key in known})


def calibration_from(args: argparse.Namespace, why: str) -> CalibrationStore:
    """The store of --calibration, which `why` needs; opened once.

    Raises:
        UserError: if it is not given, missing or damaged.
    """
    from coreinfer.calibration.store import CalibrationStore

    if args.calibration is None:
        raise UserError(f"{why} needs --calibration STORE, made by 'coreinfer calibrate'")
    if not isinstance(args.calibration, CalibrationStore):
        args.calibration = CalibrationStore.load(args.calibration)
    store: CalibrationStore = args.calibration
    return store


def prompt_from(args: argparse.Namespace) -> str:
    """The text of --prompt or --prompt-file.

    Raises:
        UserError: if the file is missing or not UTF-8.
    """
    from coreinfer.jsonl import open_to_read

    if args.prompt is not None:
        return str(args.prompt)
    with open_to_read(args.prompt_file) as file:
        raw = file.read()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{args.prompt_file!r} is not UTF-8 (byte {error.start}); convert it to UTF-8"
        ) from None


def point_out(unused: set[str], why: str) -> None:
    """A line for each option that was given in vain."""
    for name in sorted(unused):
        warn(f"note: --{name.replace('_', '-')} has no effect with {why}")
