"""Times, medians, bandwidth and tokens: what the numbers of a row mean."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.benchmarks import machine
from coreinfer.benchmarks.machine import ReadMeter, describe_machine
from coreinfer.benchmarks.measure import About, Repeat, Spread, random_tokens, row_of, timed
from tests.benchmarks.fakes import FakeClock, FakeSteps

ROW = {
    "engine": "native",
    "model": "m",
    "threads": 2,
    "prompt_tokens": 9,
    "peak_memory_bytes": 5,
    "synthetic": False,
}


def test_prefill_selection_and_decode_are_counted_apart() -> None:
    clock = FakeClock()
    steps = FakeSteps(clock)
    repeat = timed(steps, [7, 8], [1, 2, 3], clock)
    assert repeat == Repeat(prefill_s=20, select_s=3, decode_s=1 + 2 + 3, decode_tokens=3)
    assert steps.calls == ["prefill [7, 8]", "select", "decode 1", "decode 2", "decode 3"]


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=9))
def test_spread_is_the_middle_and_the_ends(values: list[float]) -> None:
    spread = Spread.of(values)
    ordered = sorted(values)
    assert (spread.min, spread.max) == (ordered[0], ordered[-1])
    half = len(ordered) // 2
    assert spread.median == (ordered[half] + ordered[-half - 1]) / 2


@given(
    st.lists(st.tuples(st.floats(0.1, 9), st.floats(0, 9), st.floats(0.1, 9)), min_size=1),
    st.integers(1, 10**12),
)
def test_a_row_is_made_of_the_medians(times: list[tuple[float, float, float]], size: int) -> None:
    repeats = [Repeat(*one, decode_tokens=16) for one in times]
    row = row_of(repeats, About("int4", "impact", 0.4, size), **ROW)
    assert row.prefill_s == statistics.median(one[0] for one in times)
    assert row.select_s == statistics.median(one[1] for one in times)
    speeds = sorted(16 / one[2] for one in times)
    speed = row.decode_tokens_per_s
    assert (speed.min, speed.max) == (speeds[0], speeds[-1])
    assert speed.min <= speed.median <= speed.max
    assert row.gb_per_s == pytest.approx(size * speed.median / 1e9)
    assert (row.dtype, row.selector, row.density) == ("int4", "impact", 0.4)


def test_an_engine_that_does_not_say_what_it_reads_has_no_bandwidth() -> None:
    row = row_of([Repeat(1, 0, 1, 4)], About("int4"), **ROW)
    assert row.bytes_per_token is None
    assert row.gb_per_s is None


def test_every_engine_is_given_the_same_tokens() -> None:
    tokens = random_tokens(50, 200)
    assert tokens == random_tokens(50, 200)
    assert len(tokens) == 200
    assert min(tokens) >= 0
    assert 40 < max(tokens) < 50
    assert tokens[:9] == random_tokens(50, 9)


def test_read_bandwidth_is_the_buffer_over_the_fastest_sweep() -> None:
    ticks = iter([0.0, 2.0, 10.0, 10.5, 20.0, 21.0])
    meter = ReadMeter(1, size=1 << 20, clock=lambda: next(ticks))
    assert [meter.sweep() for _ in range(3)] == [(1 << 20) / s / 1e9 for s in (2.0, 0.5, 1.0)]
    assert meter.best == (1 << 20) / 0.5 / 1e9


def test_read_bandwidth_is_positive_and_leaves_the_threads_alone() -> None:
    before = torch.get_num_threads()
    meter = ReadMeter(before % 2 + 1, size=1 << 20)
    assert meter.best > 0
    assert torch.get_num_threads() == before


def test_the_buffer_is_much_larger_than_the_caches() -> None:
    largest = machine.last_cache_bytes() or 0
    assert machine._TIMES_THE_CACHE >= 4
    assert machine._LEAST_BUFFER >= 1 << 30 or largest == 0


def test_the_machine_is_described_also_where_the_system_says_nothing(tmp_path: Path) -> None:
    about = describe_machine()
    assert about["cores"] >= 1
    assert about["processor"]
    assert machine.processor_name(tmp_path / "none")
    assert machine.last_cache_bytes(tmp_path) is None


def test_cache_sizes_are_read_with_their_units(tmp_path: Path) -> None:
    for index, text in enumerate(["48K\n", "2M\n", "broken", "512\n"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(text)
    assert machine.last_cache_bytes(tmp_path) == 2 << 20
