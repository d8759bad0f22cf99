"""Layouts: what a packed matrix holds, and that native code and twin agree to the byte."""

from __future__ import annotations

import errno
import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.kernels.arena import Arena, Mappings
from coreinfer.kernels.formats import GROUP_SIZES, WeightFormat
from coreinfer.kernels.layout import PackedMlp
from coreinfer.kernels.packing import pack, pack_mlp
from coreinfer.kernels.packing_twin import (
    unpack_down,
    unpack_records,
    unpack_row,
    unpack_rows,
)
from tests.kernels.paths import NATIVE, PATHS, using

FORMATS = [WeightFormat("bfloat16", 0)]
FORMATS += [WeightFormat(dtype, g) for dtype in ("int8", "int4") for g in GROUP_SIZES]
CHOICE = torch.tensor([40, 3, 7, 7, 0, 21], dtype=torch.int32)


def width(form: WeightFormat, groups: int = 3) -> int:
    """An awkward number of columns."""
    return form.group_size * groups or 37


def records_of(form: WeightFormat, rows: int, columns: int, seed: int = 0) -> Tensor:
    return form.quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("index", [None, CHOICE, CHOICE[:0]], ids=["all", "chosen", "none"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_packed_matrix_holds_the_weights(
    form: WeightFormat, path: str, index: Tensor | None
) -> None:
    columns = width(form)
    records = records_of(form, 41, columns)
    with using(path):
        packed = pack(records, columns, form, index=index, threads=2)
    wanted = form.dequantize(records if index is None else records[index], columns)
    assert torch.equal(unpack_rows(packed), wanted)
    for row in range(0, len(wanted), 5):
        assert torch.equal(unpack_row(packed, row), wanted[row])


@pytest.mark.parametrize("by_neuron", [False, True], ids=["streamed", "by neuron"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_packed_mlp_holds_its_chosen_neurons(
    form: WeightFormat, gated: bool, by_neuron: bool
) -> None:
    columns = width(form)
    parts = [records_of(form, 41, columns, seed) for seed in range(3 if gated else 2)]
    bias = None if gated else torch.randn(41)
    for index in (None, CHOICE):
        rows = torch.arange(41) if index is None else index.long()
        kept = []
        for path in PATHS:
            with using(path):
                mlp = pack_mlp(
                    torch.cat(parts, dim=1),
                    columns,
                    form,
                    gated=gated,
                    index=index,
                    in_bias=bias,
                    skip_zeros=by_neuron,
                    threads=2,
                )
            kept.append(mlp)
        for mlp in kept:
            assert torch.equal(mlp.into.data, kept[0].into.data)
            assert torch.equal(mlp.down.data, kept[0].down.data)
            assert mlp.num_neurons == len(rows)
        in_tiles = 1 if by_neuron else len(parts) - 1
        into = unpack_rows(kept[0].into).unflatten(0, (-1, in_tiles, 16))
        for part in range(in_tiles):
            weights = into[:, part].flatten(0, 1)
            assert torch.equal(weights[: len(rows)], form.dequantize(parts[part][rows], columns))
            assert not weights[len(rows) :].any()  # neurons that pad a tile do nothing
        assert all((mlp.up is not None) == (gated and by_neuron) for mlp in kept)
        if kept[0].up is not None:
            assert all(torch.equal(mlp.up.data, kept[0].up.data) for mlp in kept)
            assert torch.equal(unpack_records(kept[0].up), form.dequantize(parts[1][rows], columns))
        q, scales, minima = unpack_down(kept[0].down)
        if form.group_size:
            grouped = q.unflatten(1, (-1, form.group_size))
            q = (grouped * scales[..., None] + minima[..., None]).flatten(1)
        assert torch.equal(q, form.dequantize(parts[-1][rows], columns))
        if bias is not None:
            assert kept[0].in_bias is not None
            assert torch.equal(kept[0].in_bias[: len(rows)], bias[rows])
            assert not kept[0].in_bias[len(rows) :].any()


class Marked(Arena):
    """Memory that shows what was written: all of it has another value before."""

    MARK, EDGE = 0xA5, 64

    def __init__(self) -> None:
        super().__init__(chunk_bytes=0)
        self.edges: list[Tensor] = []

    def take(self, num_bytes: int) -> Tensor:
        whole = super().take(num_bytes + 2 * self.EDGE).fill_(self.MARK)
        self.edges += [whole[: self.EDGE], whole[self.EDGE + num_bytes :]]
        return whole[self.EDGE : self.EDGE + num_bytes]


def raw_records(form: WeightFormat, rows: int, columns: int, parts: int, offset: int) -> Tensor:
    """Records of any q and any finite scales and minima, `offset` bytes into longer rows."""
    groups = columns // form.group_size if form.group_size else 0
    numbers = 2 * form.scales_per_group * groups
    q = form.row_bytes(columns) - numbers
    kinds = [(256, q), (124, numbers)] * parts
    pieces = [torch.randint(high, (rows, size), dtype=torch.uint8) for high, size in kinds]
    return torch.cat([torch.zeros(rows, offset, dtype=torch.uint8), *pieces], dim=1)[:, offset:]


@pytest.mark.parametrize("path", NATIVE)
@given(
    form=st.sampled_from(FORMATS),
    groups=st.integers(1, 9),
    narrow=st.integers(0, 47),
    rows=st.integers(1, 70),
    kept=st.integers(0, 70),
    offset=st.sampled_from((0, 2, 4, 6, 32)),
    gated=st.booleans(),
    skip_zeros=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_native_code_writes_the_bytes_of_the_twin_and_no_others(
    path: str,
    form: WeightFormat,
    groups: int,
    narrow: int,
    rows: int,
    kept: int,
    offset: int,
    gated: bool,
    skip_zeros: bool,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    columns = form.group_size * groups or 16 * groups + narrow
    records = raw_records(form, rows, columns, 3 if gated else 2, offset)
    index = torch.randint(rows, (kept,), dtype=torch.int32) if kept else None
    memory = Marked()

    def packed(way: str) -> PackedMlp:
        with using(way):
            return pack_mlp(
                records,
                columns,
                form,
                gated=gated,
                index=index,
                skip_zeros=skip_zeros,
                arena=memory,
                threads=threads,
            )

    got, wanted = packed(path), packed("twin")
    assert torch.equal(got.into.data, wanted.into.data)
    assert torch.equal(got.down.data, wanted.down.data)
    assert (got.up is None) == (wanted.up is None) == (not gated or not skip_zeros)
    if got.up is not None and wanted.up is not None:
        assert torch.equal(got.up.data, wanted.up.data)
    assert memory.edges
    assert all(bool((edge == Marked.MARK).all()) for edge in memory.edges)


@pytest.mark.parametrize("path", PATHS)
def test_records_may_be_a_view_of_wider_ones(path: str) -> None:
    form = WeightFormat("int8", 16)
    wide = torch.cat([records_of(form, 20, 32, seed) for seed in range(2)], dim=1)
    size = form.row_bytes(32)
    with using(path):
        packed = pack(wide[:, size:], 32, form)
    assert torch.equal(unpack_rows(packed), form.dequantize(wide[:, size:], 32))


def test_pieces_of_an_arena_are_aligned_and_apart() -> None:
    arena = Arena(chunk_bytes=1 << 16)
    pieces = [arena.take(size) for size in (1, 0, 100, 1 << 17, 64, 65)]
    assert [len(piece) for piece in pieces] == [1, 0, 100, 1 << 17, 64, 65]
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    for number, piece in enumerate(pieces):
        assert bool((piece == number).all())


def test_a_mapping_is_used_again_only_when_nothing_of_it_is_left() -> None:
    mappings = Mappings()

    def taken() -> Tensor:
        return Arena(chunk_bytes=1 << 22, mappings=mappings).take(1 << 22)

    first = taken()
    place, part = first.data_ptr(), first[100:200].view(torch.int16)
    part.fill_(7)
    del first
    other = taken()
    other.zero_()
    assert other.data_ptr() != place
    assert bool((part == 7).all())
    del part
    assert taken().data_ptr() == place


def test_a_kernel_without_huge_pages_serves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(mmap.mmap):
        def madvise(self, *_args: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Plain)
    assert len(Mappings().take(1 << 22)) == 1 << 22


def test_mappings_that_do_not_fit_are_given_back() -> None:
    mappings = Mappings()
    small = mappings.take(1 << 22)
    del small
    assert len(mappings._free) == 1
    large = mappings.take(1 << 24)
    assert not mappings._free
    del large
    small = mappings.take(1 << 22)  # a quarter of what is free: that would be waste
    assert not mappings._free
    assert len(small) == 1 << 22


@pytest.mark.parametrize("wrong", [torch.tensor([0, 41]), torch.tensor([-1])])
def test_neurons_that_are_not_there_are_refused(wrong: Tensor) -> None:
    form = WeightFormat("int8", 16)
    with pytest.raises(UserError, match="do not fit a layer of 41"):
        pack(records_of(form, 41, 32), 32, form, index=wrong.to(torch.int32))
    with pytest.raises(UserError, match="int32"):
        pack(records_of(form, 41, 32), 32, form, index=wrong)


def test_records_of_another_length_are_refused() -> None:
    form = WeightFormat("int4", 16)
    with pytest.raises(UserError, match="records are uint8 of 36 bytes"):
        pack(records_of(form, 4, 32), 48, form)
    with pytest.raises(UserError, match="records are uint8 of 72 bytes"):
        pack_mlp(records_of(form, 4, 32), 32, form, gated=True)
    with pytest.raises(UserError, match="gated"):
        pack_mlp(
            torch.zeros(4, 72, dtype=torch.uint8), 32, form, gated=True, in_bias=torch.zeros(4)
        )
