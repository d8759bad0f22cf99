"""Products: the twins against naive loops, the native code against the twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from coreinfer.errors import UserError
from coreinfer.kernels.formats import WeightFormat
from coreinfer.kernels.layout import PackedMlp
from coreinfer.kernels.library import VARIABLE, kernel_path, supported_paths
from coreinfer.kernels.linear import dequantize, linear, mlp
from coreinfer.kernels.linear_twin import (
    ACTIVATIONS,
    NEURON_BLOCK,
    activate,
    linear_twin,
    mlp_twin,
    round_groups,
)
from coreinfer.kernels.packing import pack, pack_mlp
from coreinfer.kernels.packing_twin import unpack_records
from tests.kernels.paths import NATIVE, PATHS, using
from tests.kernels.test_packing import CHOICE, FORMATS, records_of, width


def far(found: Tensor, wanted: Tensor) -> float:
    """Relative distance."""
    return float((found.double() - wanted).norm() / wanted.double().norm().clamp_min(1e-99))


def inputs(rows: int, columns: int, seed: int = 9) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded_by_hand(x: Tensor, size: int, dtype: str = "int4") -> Tensor:
    """A vector, group after group, in Python's own arithmetic; for int8 weights in two digits."""
    out = []
    for start in range(0, len(x), size):
        group = x[start : start + size].tolist()
        step = max(abs(value) for value in group) / 127
        for value in group:
            in_steps = value / step if step else 0.0
            digit = round(in_steps)
            rest = round((in_steps - digit) * 254) / 254 if dtype == "int8" else 0.0
            out.append((digit + rest) * step)
    return torch.tensor(out)


def random_mlp(
    form: WeightFormat,
    *,
    gated: bool,
    skip_zeros: bool = False,
    rows: int = 150,
    least: Tensor | None = None,
) -> PackedMlp:
    columns = width(form)
    parts = [records_of(form, rows, columns, seed) for seed in range(3 if gated else 2)]
    bias = None if gated else torch.randn(rows, generator=torch.Generator().manual_seed(4))
    packed = pack_mlp(
        torch.cat(parts, dim=1), columns, form, gated=gated, in_bias=bias, skip_zeros=skip_zeros
    )
    return packed if least is None else packed.skipping(least)


def thresholds(rows: int = 150) -> Tensor:
    """Of each neuron; about half of the activations are smaller."""
    return torch.rand(rows, generator=torch.Generator().manual_seed(5)) * 2


def test_activations_are_rounded_group_by_group() -> None:
    x = inputs(1, 80)[0] * torch.logspace(-3, 3, 80)
    x[32:48] = 0
    torch.testing.assert_close(round_groups(x, 16), rounded_by_hand(x, 16))
    torch.testing.assert_close(round_groups(x, 32), rounded_by_hand(x, 32))  # the last is shorter
    twice = round_groups(x, 16, digits=2)
    torch.testing.assert_close(twice, rounded_by_hand(x, 16, "int8"))
    largest = x.abs().unflatten(0, (-1, 16)).amax(1).repeat_interleave(16)
    assert ((twice - x).abs() <= largest / 127 / 254 / 2 * 1.001).all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_twin_is_the_product_of_what_is_stored(form: WeightFormat) -> None:
    columns = width(form)
    records, x = records_of(form, 20, columns), inputs(2, columns)
    seen = x
    if form.group_size:
        seen = torch.stack([rounded_by_hand(row, form.group_size, form.dtype) for row in x])
    wanted = seen.double() @ form.dequantize(records, columns).double().t()
    found = linear_twin(pack(records, columns, form), x)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip_zeros", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_twin_of_an_mlp_does_what_its_text_says(
    form: WeightFormat, gated: bool, skip_zeros: bool
) -> None:
    rows, columns = 150, width(form)
    parts = [records_of(form, rows, columns, seed) for seed in range(3 if gated else 2)]
    packed = random_mlp(form, gated=gated, skip_zeros=skip_zeros)
    x = inputs(1, columns)
    y, h, _ = mlp_twin(packed, x, "silu")
    z = [linear_twin(pack(part, columns, form), x) for part in parts[:-1]]
    if gated and skip_zeros:  # read row by row, up meets the inputs as they are
        z[1] = x @ form.dequantize(parts[1], columns).t()
    wanted_h = (
        functional.silu(z[0]) * z[1] if gated else functional.silu(z[0] + packed.in_bias[:rows])
    )
    torch.testing.assert_close(h, wanted_h, rtol=1e-4, atol=1e-4)
    down = form.dequantize(parts[-1], columns)
    if not form.group_size or skip_zeros:
        torch.testing.assert_close(y, h @ down, rtol=1e-3, atol=1e-3)
        return
    q, scales, minima = form.parts(parts[-1], columns)
    wanted = torch.zeros(columns)
    for group in range(columns // form.group_size):
        here = slice(group * form.group_size, (group + 1) * form.group_size)
        folded = rounded_by_hand(h[0] * scales[:, group], NEURON_BLOCK, form.dtype)
        middle = 8 if form.dtype == "int4" else 0
        wanted[here] = folded @ (q[:, here].float() - middle)
        wanted[here] += h[0] @ (minima[:, group] + middle * scales[:, group])
    assert far(y[0], wanted) < 1e-3  # a number at the middle may be rounded either way
    assert far(y, h @ down) < 0.02  # and rounding at all costs little


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_native_products_equal_the_twins(form: WeightFormat, path: str) -> None:
    columns = width(form)
    for index in (None, CHOICE):
        packed = pack(records_of(form, 53, columns), columns, form, index=index)
        for rows in range(1, 10):
            x = inputs(rows, columns)
            with using(path):
                found = linear(packed, x, threads=2)
            assert far(found, linear_twin(packed, x)) < 1e-5


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("skip_zeros", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_native_mlps_equal_the_twins(
    form: WeightFormat, gated: bool, skip_zeros: bool, path: str
) -> None:
    packed = random_mlp(form, gated=gated, skip_zeros=skip_zeros)
    for rows in range(1, 10):
        x = inputs(rows, packed.into.columns, rows)
        with using(path):
            found = mlp(packed, x, "relu", threads=2)
        # h differs in its last bits, so a few of its numbers may be rounded the other way.
        assert far(found, mlp_twin(packed, x, "relu")[0]) < (5e-3 if form.group_size else 1e-5)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_what_a_zero_makes_needless_is_not_read(form: WeightFormat, gated: bool, path: str) -> None:
    packed = random_mlp(form, gated=gated, skip_zeros=True)
    x = inputs(3, packed.into.columns)
    with using(path):
        wanted = mlp(packed, x, "relu", threads=2)
    _, h, _ = mlp_twin(packed, x, "relu")
    idle = (h == 0).all(dim=0)
    assert idle.any()
    for part in (packed.down, packed.up):
        if part is not None:
            part.data.view(packed.num_neurons, -1)[idle] = 255  # not a number, in every format
    with using(path):
        assert torch.equal(mlp(packed, x, "relu", threads=2), wanted)
    assert wanted.isfinite().all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_small_activations_count_as_zero(form: WeightFormat, gated: bool) -> None:
    least, x = thresholds(), inputs(3, width(form))
    packed = random_mlp(form, gated=gated, skip_zeros=True, least=least)
    every = random_mlp(form, gated=gated, skip_zeros=True)
    _, whole, none = mlp_twin(every, x, "silu")
    y, h, skipped = mlp_twin(packed, x, "silu")
    gates = linear_twin(packed.into, x)[:, :150]
    if packed.in_bias is not None:
        gates = gates + packed.in_bias[:150]
    small = functional.silu(gates).abs() < least
    assert 0.2 < float(small.float().mean()) < 0.9
    torch.testing.assert_close(h, whole.masked_fill(small, 0.0))
    assert skipped.tolist() == small.sum(dim=1).tolist()
    assert none.tolist() == [0, 0, 0]
    wanted = h @ unpack_records(every.down)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_what_a_small_activation_makes_needless_is_not_read(
    form: WeightFormat, gated: bool, path: str
) -> None:
    packed = random_mlp(form, gated=gated, skip_zeros=True, least=thresholds())
    for row in inputs(4, packed.into.columns).split(1):
        wanted, h, _ = mlp_twin(packed, row, "silu")
        idle = h[0] == 0
        parts = [part for part in (packed.down, packed.up) if part is not None]
        before = [part.data.clone() for part in parts]
        for part in parts:
            part.data.view(packed.num_neurons, -1)[idle] = 255  # not a number, in every format
        with using(path):
            found = mlp(packed, row, "silu", threads=2)
        for part, data in zip(parts, before, strict=True):
            part.data.copy_(data)
        assert far(found, wanted) < (5e-3 if form.group_size else 1e-5)


def test_small_activations_are_skipped_where_neurons_are_stored_one_by_one() -> None:
    with pytest.raises(UserError, match="stored by neuron"):
        random_mlp(FORMATS[0], gated=True, least=thresholds())


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("active", [0, 1, 2, 3, 4, 5, 7, 300])
def test_any_number_of_neurons_may_be_active(active: int, dtype: str, path: str) -> None:
    """Several are added at a time, of some hundred neurons, in outputs of more groups than 16."""
    form = WeightFormat(dtype, 0 if dtype == "bfloat16" else 16)
    neurons, size = 600, 16 * 21
    generator = torch.Generator().manual_seed(active)
    bias = torch.full((neurons,), -1e3)
    bias[torch.randperm(neurons, generator=generator)[:active]] = 10.0
    records = torch.cat([records_of(form, neurons, size, seed) for seed in (0, 1)], dim=1)
    packed = pack_mlp(records, size, form, gated=False, in_bias=bias, skip_zeros=True)
    x = inputs(2, size) / 100
    wanted, h, _ = mlp_twin(packed, x, "relu")
    assert int((h != 0).sum(dim=1).max()) == active
    with using(path):
        found = mlp(packed, x, "relu", threads=2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_native_activations_equal_the_twins(activation: str, path: str) -> None:
    form = WeightFormat("bfloat16", 0)
    eye = torch.eye(32)
    packed = pack_mlp(
        torch.cat([form.quantize(eye), form.quantize(eye)], dim=1), 32, form, gated=False
    )
    x = torch.linspace(-12, 12, 320).view(10, 32)
    x = torch.cat([x, torch.tensor([[-1e4, 1e4, -100.0, 100.0] * 8, [0.0, 1e-20, -1e-6, 3.0] * 8])])
    with using(path):
        found = mlp(packed, x, activation)
    torch.testing.assert_close(found, activate(x, activation), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[3], FORMATS[8]], ids=str)
def test_a_row_does_not_depend_on_its_company_nor_on_threads(form: WeightFormat, path: str) -> None:
    packed = random_mlp(form, gated=True)
    x = inputs(8, packed.into.columns)
    with using(path):
        together = mlp(packed, x, "silu", threads=1)
        for threads in (1, 2, 3, 5):
            for rows in range(1, 9):
                found = mlp(packed, x[8 - rows :], "silu", threads=threads)
                assert torch.equal(found, together[8 - rows :])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[3], FORMATS[8]], ids=str)
def test_extreme_inputs(form: WeightFormat, path: str) -> None:
    columns = width(form)
    packed = pack(records_of(form, 20, columns), columns, form)
    x = inputs(5, columns) * torch.tensor([[0.0], [1e-38], [1e-20], [1e20], [1e30]])
    with using(path):
        found = linear(packed, x)
    assert not found[0].any()
    assert found.isfinite().all()
    for row in (2, 3, 4):
        assert far(found[row], linear_twin(packed, x[row : row + 1])[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_dequantised_records_are_the_formats_own(
    form: WeightFormat, path: str, dtype: torch.dtype
) -> None:
    columns = width(form)
    wide = torch.cat([records_of(form, 41, columns, seed) for seed in range(2)], dim=1)
    records = wide[:, form.row_bytes(columns) :]
    with using(path):
        everything = dequantize(records, columns, form, dtype=dtype, threads=2)
        chosen = dequantize(records, columns, form, dtype=dtype, index=CHOICE)
    wanted = form.dequantize(records, columns, dtype)
    assert torch.equal(everything, wanted)
    assert torch.equal(chosen, wanted[CHOICE])


@pytest.mark.parametrize("path", PATHS)
def test_no_neurons_no_contribution(path: str) -> None:
    form = WeightFormat("int8", 16)
    records = torch.cat([records_of(form, 5, 32, seed) for seed in range(3)], dim=1)
    with using(path):
        packed = pack_mlp(records, 32, form, gated=True, index=CHOICE[:0])
        assert not mlp(packed, inputs(2, 32), "silu").any()


def test_what_does_not_fit_is_refused() -> None:
    form = WeightFormat("int8", 16)
    packed = pack(records_of(form, 5, 32), 32, form)
    with pytest.raises(UserError, match="rows of 32 numbers"):
        linear(packed, torch.zeros(1, 16))
    for path in PATHS:
        with using(path), pytest.raises(UserError, match="no activation 'tanh'"):
            mlp(random_mlp(form, gated=True), torch.zeros(1, 48), "tanh")


def test_a_path_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert kernel_path() == supported_paths()[0]
    for path in PATHS:
        monkeypatch.setenv(VARIABLE, path)
        assert kernel_path() == path
    monkeypatch.setenv(VARIABLE, "sse9")
    with pytest.raises(UserError, match=r"COREINFER_KERNELS=sse9.*twin would do"):
        kernel_path()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_dequantising_into_memory_that_is_there(
    form: WeightFormat, path: str, dtype: torch.dtype
) -> None:
    columns = width(form)
    wide = torch.cat([records_of(form, 50, columns, seed) for seed in range(3)], dim=1)
    part = wide.chunk(3, dim=1)[1]
    memory = torch.full((50, columns), 7.0, dtype=dtype)
    with using(path):
        found = dequantize(part, columns, form, dtype=dtype, out=memory)
    assert found.data_ptr() == memory.data_ptr()
    assert torch.equal(memory, form.dequantize(part.contiguous(), columns, dtype))
