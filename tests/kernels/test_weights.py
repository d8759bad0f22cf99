"""The maps of a stand-in, as decoding stores them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreinfer.kernels.decode_twin import stand_in_twin
from coreinfer.kernels.formats import WeightFormat
from coreinfer.kernels.weights import StandInWeights

BFLOAT16 = WeightFormat("bfloat16", 0)


@settings(max_examples=30, deadline=None)
@given(
    size=st.sampled_from([16, 48, 64, 96]),
    rank=st.integers(1, 40),
    scale=st.floats(1e-7, 1e3),
    seed=st.integers(0, 1000),
)
def test_a_stand_ins_maps_are_stored_in_eight_bits(
    size: int, rank: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    offset, x = (torch.randn(size, generator=generator) for _ in range(2))
    left = torch.randn(size, rank, generator=generator)
    right = torch.randn(rank, size, generator=generator) * scale
    packed = StandInWeights.pack(offset, left, right)
    assert packed.left is not None
    assert packed.left.format.dtype == "int8"
    found = stand_in_twin(packed, x[None])[0] - offset
    wanted = left @ (right @ x)
    # Two factors of 127ths, and the sum with an offset of size 1 in float32.
    assert float((found - wanted).norm()) < 0.03 * float(
        left.norm() * right.norm() * x.norm() / size**0.5
    ) + 1e-5 * float(offset.norm())


def test_a_map_that_no_group_divides_stays_in_bfloat16() -> None:
    packed = StandInWeights.pack(torch.zeros(40), torch.ones(40, 3), torch.ones(3, 40))
    assert packed.left is not None
    assert packed.left.format == BFLOAT16
    assert torch.equal(stand_in_twin(packed, torch.ones(1, 40)), torch.full((1, 40), 120.0))


def test_a_map_of_zeros_adds_nothing() -> None:
    packed = StandInWeights.pack(torch.ones(32), torch.zeros(32, 2), torch.ones(2, 32))
    assert torch.equal(stand_in_twin(packed, torch.ones(1, 32)), torch.ones(1, 32))
