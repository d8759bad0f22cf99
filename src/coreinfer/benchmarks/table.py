"""The result for a person."""

from __future__ import annotations

from coreinfer.benchmarks.measure import Row
from coreinfer.benchmarks.run import Report

HEAD = [
    "engine", "dtype", "neurons", "keep", "prefill s", "select s", "tokens/s", "min", "max",
    "MB/token", "GB/s", "of limit", "peak MB",
]  # fmt: skip


def cells(report: Report) -> list[list[str]]:
    """Head and rows of the table."""
    return [HEAD, *(_cells(row, report.read_gb_per_s) for row in report.rows)]


def heading(report: Report) -> list[str]:
    """What stands above the table."""
    row, machine = report.rows[0], report.machine
    synthetic = " (synthetic weights, speed only)" if row.synthetic else ""
    return [
        f"{row.model}{synthetic}, {row.prompt_tokens} prompt tokens, {_threads(row)}",
        f"{machine['processor']}, {machine['cores']} cores, kernels: {machine['kernels']}; "
        f"read bandwidth with {_threads(row)}: {report.read_gb_per_s:.1f} GB/s",
    ]


def _cells(row: Row, limit: float) -> list[str]:
    speed = row.decode_tokens_per_s
    return [
        row.engine,
        row.dtype,
        neurons(row),
        f"{row.density:.2f}",
        f"{row.prefill_s:.3f}",
        f"{row.select_s:.3f}",
        f"{speed.median:.2f}",
        f"{speed.min:.2f}",
        f"{speed.max:.2f}",
        "-" if row.bytes_per_token is None else f"{row.bytes_per_token / 1e6:.1f}",
        "-" if row.gb_per_s is None else f"{row.gb_per_s:.2f}",
        "-" if row.gb_per_s is None else f"{row.gb_per_s / limit:.0%}",
        f"{row.peak_memory_bytes / 1e6:.0f}",
    ]


def _threads(row: Row) -> str:
    return f"{row.threads} thread" + ("" if row.threads == 1 else "s")


def neurons(row: Row) -> str:
    """The rule, and what else decides how many neurons are read."""
    zeros = "" if row.zero_activations is None else f" ({row.zero_activations:.0%} zero)"
    active = "" if row.active == 1 else f", {row.active:g} active"
    return row.selector + zeros + active
