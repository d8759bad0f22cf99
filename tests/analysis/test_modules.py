"""Recording any module: equal to a plain hook; masking keeps exactly what was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coreinfer.analysis.modules import Tap, core_units, keeping, recording
from coreinfer.core.statistics import LayerStatistics, token_core_mask
from coreinfer.errors import UserError

ALPHA = 0.3


class Three(nn.Module):
    """A convolution, a recurrence over its rows and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.gru = nn.GRU(6 * 5, 7, batch_first=True)
        self.linear = nn.Linear(7, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x).relu()  # [B, 6, rows, 5]
        rows, _ = self.gru(maps.movedim(1, 2).flatten(2))
        logits: Tensor = self.head(self.linear(rows[:, -1]).tanh())
        return logits


@pytest.fixture
def network() -> Three:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Three().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 1, 8, 5, generator=torch.Generator().manual_seed(1))


def taps_of(network: Three) -> dict[str, Tap]:
    return {
        "conv": Tap(network.conv),
        "gru": Tap(network.gru),
        "linear": Tap(network.linear),
        "input": Tap(network.head, side="input"),
    }


def plainly(network: Three, x: Tensor) -> dict[str, Tensor]:
    """What passes each tap, [batch, positions, units], by hooks written out one by one."""
    seen: dict[str, Tensor] = {}
    handles = [
        network.conv.register_forward_hook(
            lambda _m, _i, out: seen.update(conv=out.permute(0, 2, 3, 1).flatten(1, 2))
        ),
        network.gru.register_forward_hook(lambda _m, _i, out: seen.update(gru=out[0])),
        network.linear.register_forward_hook(
            lambda _m, _i, out: seen.update(linear=out.unsqueeze(1))
        ),
        network.head.register_forward_hook(
            lambda _m, given, _o: seen.update(input=given[0].unsqueeze(1))
        ),
    ]
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return seen


def test_the_statistics_are_those_of_a_plain_hook(network: Three, x: Tensor) -> None:
    seen = plainly(network, x)
    assert {name: tuple(units.shape) for name, units in seen.items()} == {
        "conv": (4, 40, 6), "gru": (4, 8, 7), "linear": (4, 1, 9), "input": (4, 1, 9),
    }  # fmt: skip
    with recording(taps_of(network), ALPHA) as recorded, torch.no_grad():
        network(x)
    for name, units in seen.items():
        for sample, statistics in zip(units, recorded.samples[name], strict=True):
            assert statistics.tokens == sample.shape[0]
            assert torch.equal(statistics.counts, token_core_mask(sample, ALPHA).sum(dim=0))
            assert torch.allclose(statistics.square_sum, sample.double().square().sum(dim=0))
            assert torch.allclose(statistics.positive_sum, sample.double().clamp(min=0).sum(dim=0))
        total = recorded.total(name)
        assert total.tokens == units.shape[0] * units.shape[1]
        assert torch.equal(total.counts, token_core_mask(units.flatten(0, 1), ALPHA).sum(dim=0))


def test_recording_changes_nothing_and_leaves_no_hook(network: Three, x: Tensor) -> None:
    with torch.no_grad():
        before = network(x)
        with recording(taps_of(network)):
            assert torch.equal(network(x), before)
        with pytest.raises(RuntimeError), recording(taps_of(network)):
            raise RuntimeError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_passes_add_up(network: Three, x: Tensor) -> None:
    taps = {"gru": Tap(network.gru)}
    with recording(taps) as twice, torch.no_grad():
        network(x)
        network(x + 1)
    parts: list[LayerStatistics] = []
    for given in (x, x + 1):
        with recording(taps) as once, torch.no_grad():
            network(given)
        parts.append(once.total("gru"))
    both = parts[0] + parts[1]
    assert torch.equal(twice.total("gru").counts, both.counts)
    assert twice.total("gru").tokens == both.tokens == 64


@pytest.mark.parametrize("name", ["conv", "gru", "linear", "input"])
def test_a_mask_keeps_exactly_k_units(network: Three, x: Tensor, name: str) -> None:
    taps = taps_of(network)
    whole = plainly(network, x)[name]
    with recording(taps) as recorded, torch.no_grad():
        network(x)
    kept = core_units(recorded.total(name), 0.5)
    size = whole.shape[-1]
    assert kept.numel() == round(0.5 * size)
    # The recorder is hooked after the mask, so it sees what the mask lets through.
    with keeping(taps, {name: kept}), recording({name: taps[name]}) as after, torch.no_grad():
        network(x)
    left = after.total(name).square_sum > 0
    dropped = torch.ones(size, dtype=torch.bool)
    dropped[kept.long()] = False
    assert not left[dropped].any()
    assert torch.allclose(
        after.total(name).square_sum[~dropped], recorded.total(name).square_sum[~dropped]
    )


@pytest.mark.parametrize("name", ["conv", "gru", "linear", "input"])
def test_keeping_all_units_changes_no_bit(network: Three, x: Tensor, name: str) -> None:
    taps = taps_of(network)
    with torch.no_grad():
        before = network(x)
        size = plainly(network, x)[name].shape[-1]
        with keeping(taps, {name: torch.arange(size)}):
            assert torch.equal(network(x), before)
        with keeping(taps, {name: torch.arange(1)}):
            assert not torch.equal(network(x), before)
        assert torch.equal(network(x), before)


def test_each_sample_may_have_its_own_units(network: Three, x: Tensor) -> None:
    taps = {"linear": Tap(network.linear)}
    own = [torch.tensor([i, i + 1]) for i in range(4)]
    with torch.no_grad():
        with keeping(taps, {"linear": own}):
            together = network(x)
        for i in range(4):
            with keeping(taps, {"linear": own[i]}):
                assert torch.allclose(together[i], network(x[i : i + 1])[0], atol=1e-6)


def test_l2_ranks_without_sign_and_counts_with_it() -> None:
    statistics = LayerStatistics.zeros(4, 4)
    h = torch.tensor([[0.1, -9.0, 0.2, 0.0], [0.1, -9.0, 0.3, 0.0]])
    statistics.update(h, h, 1.0)
    assert core_units(statistics, 0.25, "l2").tolist() == [1]
    assert core_units(statistics, 0.25, "counts").tolist() == [2]


def test_what_cannot_be_recorded_or_masked_is_said(network: Three, x: Tensor) -> None:
    taps = taps_of(network)
    with torch.no_grad():
        with recording(taps) as recorded:
            network(x)
            with pytest.raises(UserError, match="'conv' was recorded for a batch of 4"):
                network(x[:2])
        with pytest.raises(UserError, match="nothing was recorded at 'other'"):
            recorded.total("other")
        with pytest.raises(UserError, match="alpha must be above 0"), recording(taps, 0.0):
            pass
        with pytest.raises(UserError, match="no tap 'nose'; there is conv, gru"):  # noqa: SIM117
            with keeping(taps, {"nose": torch.arange(2)}):
                pass
        for index in (torch.tensor([9]), torch.tensor([-1])):
            with keeping(taps, {"linear": index}), pytest.raises(UserError, match="units 0 to 8"):
                network(x)
        with (
            keeping(taps, {"linear": [torch.arange(2)] * 3}),
            pytest.raises(UserError, match="for 3 samples, the batch has 4"),
        ):
            network(x)
        with recording({"c": Tap(network.conv, axis=4)}), pytest.raises(UserError, match="axis 4"):
            network(x)
        with recording({"c": Tap(network.conv, axis=0)}), pytest.raises(UserError, match="axis 0"):
            network(x)
        with recording({"d": Tap(nn.Identity())}) as unused:
            network(x)
        with pytest.raises(UserError, match="did not run"):
            unused.total("d")
        silent = nn.Identity()
        with recording({"d": Tap(silent)}), pytest.raises(UserError, match="expected a tensor"):
            silent("text")
