"""What quantised weights cost: KL to float32 dense decoding, beside llama.cpp on the same weights.

    python -m benchmarks.quantization --model smollm2-135m-instruct --text wikitext2_raw_test.txt \\
        --out benchmarks/results/quantization-smollm2

All neurons are kept. Each continuation is decoded token by token, by the kernels that are timed;
llama.cpp's files are requantised from the model's own by llama.cpp itself.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from benchmarks.report import markdown, provenance, write_json, write_text
from benchmarks.texts import add_window_options, read_windows
from coreinfer.api import load
from coreinfer.backends.base import Backend
from coreinfer.benchmarks.gguf_files import bytes_read, gguf_of
from coreinfer.benchmarks.job import Job
from coreinfer.benchmarks.peers import LlamaCppEngine
from coreinfer.benchmarks.target import Target
from coreinfer.core.measures import kl_by_token
from coreinfer.evaluation.continuations import Window, standard_error
from coreinfer.recording import RecordingPlan

PEER_FORMS = ("Q8_0", "Q4_0")

# The continuation's logits after each of its tokens but the last, [T - 1, V]
Decode = Callable[[Window], Tensor]


def by_backend(backend: Backend) -> Decode:
    def decode(window: Window) -> Tensor:
        session = backend.start(RecordingPlan())
        session.prefill([window.prompt])
        steps = [session.decode([[token]])[0, -1] for token in window.continuation[:-1]]
        return torch.stack(steps)

    return decode


def by_llama_cpp(path: Path, form: str, threads: int, window: Window) -> Decode:
    engine = LlamaCppEngine(
        Job(
            engine="llama.cpp",
            model=path.stem,
            dtype=form,
            threads=threads,
            prompt_tokens=len(window.prompt),
            decode_tokens=len(window.continuation),
            gguf=str(path),
        )
    )

    def decode(window: Window) -> Tensor:
        engine.prefill(window.prompt)
        steps = []
        for token in window.continuation[:-1]:
            engine.decode(token)
            steps.append(engine.logits())
        return torch.stack(steps)

    return decode


def row(
    name: str, bytes_per_token: int, decode: Decode, texts: Sequence[Window], dense: list[Tensor]
) -> dict[str, float | str]:
    kl, nll, agreement = [], [], []
    for window, reference in zip(texts, dense, strict=True):
        found = decode(window).log_softmax(dim=-1)
        tokens = torch.tensor(window.continuation[1:]).unsqueeze(-1)
        nll.append(-float(found.gather(-1, tokens).double().mean()))
        kl.append(float(kl_by_token(reference, found).double().mean()))
        same = found.argmax(dim=-1) == reference.argmax(dim=-1)
        agreement.append(float(same.double().mean()))
    return {
        "name": name,
        "bytes_per_token": bytes_per_token,
        "kl": fmean(kl),
        "kl_se": standard_error(kl),
        "perplexity": math.exp(fmean(nll)),
        "agreement": fmean(agreement),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    add_window_options(parser)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    args = parser.parse_args()

    reference = load(args.model, backend="hf", dtype="float32", threads=args.threads).backend
    texts = read_windows(reference, args)
    decode = by_backend(reference)
    dense = [decode(window).log_softmax(dim=-1) for window in texts]
    rows = [row("hf float32", reference.cost.dense, decode, texts, dense)]
    for dtype in ("bfloat16", "int8", "int4"):
        backend = load(args.model, backend="native", dtype=dtype, on_progress=print).backend
        rows.append(row(f"native {dtype}", backend.cost.dense, by_backend(backend), texts, dense))
        print(rows[-1])
    target = Target.of_model(args.model)
    with tempfile.TemporaryDirectory() as folder:
        own = [] if target.gguf is None else [target.gguf]
        for path in [*own, *(gguf_of(target, form, Path(folder)) for form in PEER_FORMS)]:
            name = f"llama.cpp {'own file' if path in own else path.stem.rsplit('-', 1)[-1]}"
            peer = by_llama_cpp(path, name, torch.get_num_threads(), texts[0])
            rows.append(row(name, bytes_read(path), peer, texts, dense))
            print(rows[-1])
    head = ["weights", "MB a token", "KL to float32", "perplexity", "top-1 agreement"]
    table = [
        [
            str(r["name"]),
            f"{float(r['bytes_per_token']) / 1e6:.1f}",
            f"{r['kl']:.4f} ± {r['kl_se']:.4f}",
            f"{r['perplexity']:.2f}",
            f"{r['agreement']:.3f}",
        ]
        for r in rows
    ]
    write_json(
        args.out.with_suffix(".json"), {**provenance("benchmarks.quantization"), "rows": rows}
    )
    write_text(args.out.with_suffix(".md"), markdown([head, *table]))


if __name__ == "__main__":
    main()
