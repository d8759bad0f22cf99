"""Storage formats: what a record means, how near it comes, and what is refused."""

from __future__ import annotations

import struct

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.kernels.formats import GROUP_SIZES, WeightFormat

QUANTISED = [WeightFormat(dtype, g) for dtype in ("int8", "int4") for g in GROUP_SIZES]
ALL = [WeightFormat("bfloat16", 0), *QUANTISED]


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def read_record(form: WeightFormat, record: bytes, columns: int) -> list[float]:
    """A record decoded byte by byte, as the module's text describes it."""
    if form.dtype == "bfloat16":
        return [struct.unpack("<f", b"\0\0" + record[2 * i : 2 * i + 2])[0] for i in range(columns)]
    groups = columns // form.group_size
    if form.dtype == "int8":
        q = list(struct.unpack(f"<{columns}b", record[:columns]))
        scales = struct.unpack(f"<{groups}e", record[columns:])
        return [q[i] * scales[i // form.group_size] for i in range(columns)]
    q = [record[i // 8 * 4 + i % 4] >> (i % 8 // 4 * 4) & 15 for i in range(columns)]
    numbers = struct.unpack(f"<{2 * groups}e", record[columns // 2 :])
    group = [i // form.group_size for i in range(columns)]
    return [q[i] * numbers[group[i]] + numbers[groups + group[i]] for i in range(columns)]


@pytest.mark.parametrize("form", ALL, ids=str)
def test_a_record_means_what_its_description_says(form: WeightFormat) -> None:
    columns = max(form.group_size, 3) * 2
    records = form.quantize(matrix(4, columns))
    assert records.dtype == torch.uint8
    assert records.shape == (4, form.row_bytes(columns))
    wanted = [read_record(form, bytes(record.tolist()), columns) for record in records]
    torch.testing.assert_close(
        form.dequantize(records, columns), torch.tensor(wanted), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("form", QUANTISED, ids=str)
def test_the_error_is_within_half_a_step(form: WeightFormat) -> None:
    w = matrix(8, 2 * form.group_size)
    grouped = w.view(8, 2, -1)
    back = form.dequantize(form.quantize(w), w.shape[1]).view_as(grouped)
    if form.dtype == "int8":
        step = grouped.abs().amax(-1, keepdim=True) / 127
        assert bool(((back - grouped).abs() <= step * (0.5 + 127 * 2**-11)).all())
    else:  # a clipped weight may be farther off: the squared error is what is minimised
        step = (grouped.amax(-1) - grouped.amin(-1)) / 15
        plain = naive_min_max(grouped)
        ours, theirs = ((x - grouped).square().sum(-1) for x in (back, plain))
        assert bool((ours <= theirs * 1.001 + (step * 1e-2) ** 2).all())
        assert ours.sum() < 0.95 * theirs.sum()


def naive_min_max(grouped: Tensor) -> Tensor:
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low) / 15
    return ((grouped - low) / scale).round() * scale + low


def test_bfloat16_is_rounded_to_nearest() -> None:
    form, w = WeightFormat("bfloat16", 0), matrix(3, 7)
    assert torch.equal(form.dequantize(form.quantize(w), 7), w.bfloat16().float())


@pytest.mark.parametrize("form", ALL, ids=str)
def test_what_a_format_holds_exactly_comes_back(form: WeightFormat) -> None:
    columns = max(form.group_size, 4)
    whole = torch.arange(columns) % 16
    w = torch.stack([torch.zeros(columns), torch.full((columns,), 0.5), whole * 0.25])
    if form.dtype == "int8":  # the largest weight is 127 steps
        w[2] = (whole - 8) * 0.25
        w[2, 0] = 127 * 0.25
    assert torch.equal(form.dequantize(form.quantize(w), columns)[[0, 2]], w[[0, 2]])
    torch.testing.assert_close(
        form.dequantize(form.quantize(w), columns)[1], w[1], rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("form", ALL, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(form: WeightFormat) -> None:
    w = matrix(600, max(form.group_size, 256))
    records = form.quantize(w)
    assert torch.equal(form.quantize(w[500:501])[0], records[500])
    assert form.quantize(w[:0]).shape == (0, records.shape[1])


@pytest.mark.parametrize("form", QUANTISED, ids=str)
@given(exponent=st.integers(-40, 17), seed=st.integers(0, 999), spike=st.floats(0, 100))
def test_any_finite_weights_give_finite_ones(
    form: WeightFormat, exponent: int, seed: int, spike: float
) -> None:
    w = matrix(2, form.group_size, seed) * 2.0**exponent
    w[0, 0] *= spike
    if w.abs().max() > 30000:
        return
    back = form.dequantize(form.quantize(w), form.group_size)
    limit = w.abs().amax(-1, keepdim=True)
    assert bool(((back - w).abs() <= 0.6 * limit + 2e-5).all())


def test_one_column_may_be_a_row_turned_round() -> None:
    row = torch.randn(1, 9)
    form = WeightFormat("bfloat16", 0)
    assert torch.equal(form.dequantize(form.quantize(row.t()), 1), row.t().bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantised_weights_are_rounded_once(dtype: torch.dtype) -> None:
    form, w = WeightFormat("int4", 16), matrix(3, 32)
    records = form.quantize(w)
    assert torch.equal(form.dequantize(records, 32, dtype), form.dequantize(records, 32).to(dtype))


def test_bytes_of_a_row() -> None:
    assert WeightFormat.named("bfloat16").row_bytes(10) == 20
    assert WeightFormat.named("int8").row_bytes(128) == 128 + 8
    assert WeightFormat.named("int4").row_bytes(128) == 64 + 8
    assert WeightFormat.named("int4").bits_per_weight == 4.5
    assert WeightFormat.named("int8", 32) == WeightFormat("int8", 32)


def test_columns_that_do_not_divide_name_what_would_do() -> None:
    with pytest.raises(UserError, match=r"64 do not divide rows of 96 weights; .*: 16, 32"):
        WeightFormat("int8", 64).row_bytes(96)
    with pytest.raises(UserError, match="only bfloat16"):
        WeightFormat("int4", 64).quantize(matrix(1, 10))


@pytest.mark.parametrize(("dtype", "size"), [("float8", 0), ("int8", 0), ("int4", 48)])
def test_no_such_format(dtype: str, size: int) -> None:
    with pytest.raises(UserError, match="would do"):
        WeightFormat(dtype, size)


def test_bfloat16_has_no_groups() -> None:
    with pytest.raises(UserError, match="no groups, got a group size of 16; leave it out"):
        WeightFormat("bfloat16", 16)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", ALL, ids=str)
def test_weights_that_are_not_finite_are_refused(form: WeightFormat, bad: float) -> None:
    w = matrix(3, max(form.group_size, 1))
    w[1, 0] = bad
    with pytest.raises(UserError, match="not finite"):
        form.quantize(w)


@pytest.mark.parametrize("form", [WeightFormat("int8", 16), WeightFormat("int4", 16)], ids=str)
def test_weights_too_large_for_the_scales_are_refused(form: WeightFormat) -> None:
    with pytest.raises(UserError, match="too large"):
        form.quantize(torch.full((1, 16), 1e8))


def test_what_is_no_matrix_of_weights_is_refused() -> None:
    form = WeightFormat("int8", 16)
    for wrong in (torch.zeros(16), torch.zeros(2, 16, dtype=torch.int32)):
        with pytest.raises(UserError, match="matrix"):
            form.quantize(wrong)
    with pytest.raises(UserError, match="18 bytes"):
        form.dequantize(torch.zeros(2, 16, dtype=torch.uint8), 16)
