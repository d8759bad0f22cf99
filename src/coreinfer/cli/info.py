"""`coreinfer info`: what is in a model, a store or a core set, and what this machine has."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from coreinfer.cli import options
from coreinfer.cli.terminal import megabytes, table
from coreinfer.cli.values import fractions


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "info",
        help="what is in a model / store / core set, what this machine can do",
        description="Describe a model (its family, layers and neurons, what is read to decode a "
        "token, and the ceiling of the speed-up), a converted model, a cluster store, or a "
        "core-set file. With no argument: this machine and the models in the cache.",
    )
    parser.add_argument(
        "target", nargs="?", metavar="TARGET", help="a model, a store folder or a core-set file"
    )
    parser.add_argument(
        "--keep",
        type=fractions,
        default=(0.2, 0.4, 0.6, 0.8),
        metavar="LIST",
        help="keep ratios to give the ceiling for, above 0 to 1 each (default: 0.2,0.4,0.6,0.8)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read a converted model and compare all its checksums",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options.add_model_options(parser, default=None)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    target = args.target or args.model
    if target is None:
        about = describe_machine()
    elif _is_store(target):
        about = describe_store(Path(target))
    elif Path(target).is_file() and not _is_gguf(target):
        about = describe_core_set(target)
    elif _is_converted(target):
        about = describe_converted(target, verify=args.verify)
    else:
        args.model = target
        if args.backend is None and args.dtype not in ("int8", "int4"):
            # To look at a model must not convert it; the sizes are those that native decodes with.
            args.backend, args.dtype = "hf", args.dtype or "bfloat16"
        about = describe_model(args)
    if args.json:
        print(json.dumps(about))
    else:
        print(readable(about))
    return 0


def describe_machine() -> dict[str, Any]:
    """Versions, processor, and what is in the cache."""
    import torch
    import transformers

    from coreinfer import __version__
    from coreinfer.api import BACKENDS
    from coreinfer.kernels.library import kernel_path
    from coreinfer.models.cache import cache_dir, cached_models

    return {
        "coreinfer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "backends": list(BACKENDS),
        "kernels": kernel_path(),  # "twin" is plain torch
        "cache": str(cache_dir()),
        "cached_models": [model.name for model in cached_models()],
    }


def describe_store(path: Path) -> dict[str, Any]:
    """A cluster store, a calibration store, or both in one folder."""
    from coreinfer.calibration.store import CalibrationStore
    from coreinfer.core.stores import is_there
    from coreinfer.semantics.store import ClusterStore

    clusters, calibration = is_there(path, "clusters"), is_there(path, "calibration")
    if clusters and calibration:
        return {
            "kind": "cluster and calibration store",
            "clusters": ClusterStore.load(path).describe(),
            "calibration": CalibrationStore.load(path).describe(),
        }
    if calibration:
        return {"kind": "calibration store", **CalibrationStore.load(path).describe()}
    return {"kind": "cluster store", **ClusterStore.load(path).describe()}


def describe_core_set(path: str) -> dict[str, Any]:
    from coreinfer.core.coreset import CoreSet

    core_set = CoreSet.load(path)
    return {
        "kind": "core set",
        "model": core_set.model,
        "model_fingerprint": core_set.model_fingerprint,
        "selector": dict(core_set.selector),
        "num_layers": core_set.num_layers,
        "num_neurons": list(core_set.num_neurons),
        "kept": [core_set.kept(layer) for layer in range(core_set.num_layers)],
        "density": core_set.density,
    }


def _is_store(target: str) -> bool:
    if not Path(target).is_dir():
        return False
    from coreinfer.core.stores import NAMES, is_there

    return any(is_there(Path(target), name) for name in NAMES)


def _is_gguf(target: str) -> bool:
    from coreinfer.jsonl import open_to_read
    from coreinfer.models.gguf import MAGIC

    with open_to_read(target) as file:
        return Path(target).suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC


def _is_converted(target: str) -> bool:
    if not Path(target).is_dir():
        return False
    from coreinfer.backends.native.container import is_converted

    return is_converted(target)


def describe_converted(folder: str, *, verify: bool = False) -> dict[str, Any]:
    """What a converted model says of itself; with `verify`, that every byte is as it was written.

    Raises:
        UserError: if it is damaged.
    """
    from coreinfer.backends.native.container import open_container

    container = open_container(folder)
    manifest, decoder = container.manifest, container.manifest.decoder
    if verify:
        container.verify_all()
    return {
        "kind": "converted model",
        "model": manifest.model,
        "model_fingerprint": manifest.model_fingerprint,
        "family": decoder.model_type,
        "backend": "native",
        "dtype": manifest.format.dtype,
        "group_size": manifest.format.group_size,
        "bits_per_weight": manifest.format.bits_per_weight,
        "num_layers": decoder.num_layers,
        "num_neurons": [decoder.num_neurons] * decoder.num_layers,
        "context_length": decoder.context_length,
        "tensors": len(container),
        "bytes": container.size,
        "checksums": "all right" if verify else "of the header only; --verify compares all",
    }


def describe_model(args: argparse.Namespace) -> dict[str, Any]:
    from coreinfer.errors import require_ratio

    keeps = [require_ratio("keep", keep) for keep in args.keep]
    backend = options.load_model(args).backend
    cost = backend.cost
    return {
        "kind": "model",
        "model": backend.model_name,
        "model_fingerprint": backend.fingerprint,
        "family": backend.family,
        "backend": backend.name,
        "dtype": backend.dtype,
        "num_layers": len(cost.num_neurons),
        "num_neurons": list(cost.num_neurons),
        "context_length": backend.context_length,
        "dense_bytes_per_token": cost.dense,
        "mlp_bytes_per_token": cost.mlp,
        "mlp_share": cost.mlp / cost.dense,
        "ceilings": [
            {
                "keep": keep,
                "bytes_per_token": round(cost.shared + keep * cost.mlp),
                "speed_up_at_most": cost.ceiling(keep),
            }
            for keep in keeps
        ],
    }


def readable(about: dict[str, Any]) -> str:
    """The same for a person."""
    ceilings = about.pop("ceilings", None)
    lines = [f"{key.replace('_', ' ')}: {_short(key, value)}" for key, value in about.items()]
    if ceilings is not None:
        rows = [["keep", "read a token", "speed-up at most"]] + [
            [
                f"{row['keep']:g}",
                megabytes(row["bytes_per_token"]),
                f"{row['speed_up_at_most']:.2f}x",
            ]
            for row in ceilings
        ]
        lines += ["", table(rows), "every layer sparse, every byte read once, nothing else timed"]
    return "\n".join(lines)


def _short(key: str, value: Any) -> str:
    if key == "bytes" or key.endswith("_bytes_per_token"):
        return megabytes(value)
    if key == "mlp_share":
        return f"{value:.1%} of the bytes read per token"
    if key in ("num_neurons", "kept") and len(set(value)) == 1:
        return f"{value[0]} in every layer"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items() if v not in (None, [], {}))
    return f"{value:.4f}" if isinstance(value, float) else str(value)
