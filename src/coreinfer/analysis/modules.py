"""Core neurons of any torch module: what its units do, recorded, and all but some masked.

taps = {"hidden": Tap(network.hidden)}
with recording(taps, alpha=0.4) as recorded:
    network(x)
kept = core_units(recorded.total("hidden"), keep=0.4)
with keeping(taps, {"hidden": kept}):
    network(x)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coreinfer.core.selection import neuron_budget, top_neurons
from coreinfer.core.statistics import LayerStatistics
from coreinfer.errors import UserError, require_ratio

Ranking = Literal["counts", "l2"]


@dataclass(frozen=True)
class Tap:
    """Where units are looked at: what a module gives, or what it gets.

    Attributes:
        module: any; of a tuple that it gives or gets, the first tensor is meant.
        side: "output", or "input", such as that of an MLP's down projection.
        axis: along which the units lie; None for the channels of a convolution, else the last.
            The first axis is the batch's, and all others are positions.
    """

    module: nn.Module
    side: Literal["output", "input"] = "output"
    axis: int | None = None

    @property
    def unit_axis(self) -> int:
        if self.axis is not None:
            return self.axis
        return 1 if self.side == "output" and hasattr(self.module, "out_channels") else -1


class Recorded:
    """Statistics of each tap's units, of each sample of the batch apart; passes add up."""

    def __init__(self, alpha: float) -> None:
        self.alpha = require_ratio("alpha", alpha)
        self.samples: dict[str, list[LayerStatistics]] = {}

    def total(self, name: str) -> LayerStatistics:
        """The sum over the samples at a tap.

        Raises:
            UserError: if nothing came by there.
        """
        if not self.samples.get(name):
            raise UserError(f"nothing was recorded at {name!r}: the module did not run")
        first, *others = self.samples[name]
        for one in others:
            first = first + one
        return first

    def add(self, name: str, units: Tensor) -> None:
        """Units of a pass, [batch, positions, D]."""
        rows = self.samples.setdefault(
            name, [LayerStatistics.zeros(units.shape[2], units.shape[2]) for _ in units]
        )
        if len(rows) != len(units):
            raise UserError(
                f"{name!r} was recorded for a batch of {len(rows)}, this pass has {len(units)}"
            )
        for statistics, sample in zip(rows, units, strict=True):
            # What a module gets may have any shape, so the sum of inputs is that of the units.
            statistics.update(sample, sample, self.alpha)


@contextmanager
def recording(taps: Mapping[str, Tap], alpha: float = 0.4) -> Iterator[Recorded]:
    """Record what the units at some taps do while the block runs.

    A module that runs several times (a recurrent cell) adds up. The network computes what it
    always does.

    Args:
        taps: by name.
        alpha: of the token-wise counts, in (0, 1].

    Raises:
        UserError: for what is no tensor, or a batch that changes its size.
    """
    recorded = Recorded(alpha)

    def see(name: str, tap: Tap) -> Callable[[Tensor], Tensor]:
        def seen(value: Tensor) -> Tensor:
            recorded.add(name, units_of(name, value.detach(), tap))
            return value

        return seen

    with _hooked({name: (tap, see(name, tap)) for name, tap in taps.items()}):
        yield recorded


@contextmanager
def keeping(
    taps: Mapping[str, Tap], kept: Mapping[str, Tensor | Sequence[Tensor]]
) -> Iterator[None]:
    """Set all units but the kept ones to zero while the block runs.

    Args:
        taps: by name.
        kept: for some taps the indices that stay, [K], or a list of them, one a sample.

    Raises:
        UserError: for a name that is no tap, an index that is no unit, or another batch size.
    """
    for name in kept:
        if name not in taps:
            raise UserError(f"there is no tap {name!r}; there is {', '.join(taps)}")

    def mask(name: str, tap: Tap, index: Tensor | Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        def masked(value: Tensor) -> Tensor:
            axis = _axis(name, value, tap)
            rows = [index] if isinstance(index, Tensor) else list(index)
            if len(rows) not in (1, value.shape[0]):
                raise UserError(
                    f"{name!r} has units to keep for {len(rows)} samples, the batch has "
                    f"{value.shape[0]}"
                )
            size = value.shape[axis]
            mask = torch.zeros(len(rows), size, dtype=torch.bool, device=value.device)
            for row, one in enumerate(rows):
                if one.numel() and not 0 <= int(one.min()) <= int(one.max()) < size:
                    raise UserError(f"{name!r} has units 0 to {size - 1}, got {one.tolist()}")
                mask[row, one.long().to(value.device)] = True
            shape = [1] * value.dim()
            shape[0], shape[axis] = mask.shape
            return torch.where(mask.reshape(shape), value, torch.zeros_like(value))

        return masked

    changes = {name: (taps[name], mask(name, taps[name], index)) for name, index in kept.items()}
    with _hooked(changes):
        yield


def core_units(statistics: LayerStatistics, keep: float, by: Ranking = "counts") -> Tensor:
    """The round(keep * D) units that matter most, sorted, int32.

    Args:
        statistics: of the units.
        keep: in (0, 1].
        by: "counts", the paper's rule, or "l2", the size of the activations whatever their sign.
    """
    keys = {
        "counts": (statistics.counts, statistics.positive_sum),
        "l2": (statistics.square_sum,),
    }
    return top_neurons(keys[by], neuron_budget(keep, statistics.num_neurons))


def units_of(name: str, value: Tensor, tap: Tap) -> Tensor:
    """[batch, positions, D] of what a module gives or gets."""
    axis = _axis(name, value, tap)
    moved = value.movedim(axis, -1)
    return moved.reshape(moved.shape[0], -1, moved.shape[-1])


def _axis(name: str, value: Tensor, tap: Tap) -> int:
    axis = tap.unit_axis
    if not -value.dim() <= axis < value.dim() or axis % value.dim() == 0:
        raise UserError(
            f"{name!r}: units along axis {axis} of a tensor of {value.dim()} axes, the first of "
            "which is the batch"
        )
    return axis % value.dim()


@contextmanager
def _hooked(changes: Mapping[str, tuple[Tap, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Let functions see and change what passes at some taps."""
    handles: list[RemovableHandle] = []
    try:
        for name, (tap, change) in changes.items():
            if tap.side == "output":
                handles.append(tap.module.register_forward_hook(_after(name, change)))
            else:
                handles.append(tap.module.register_forward_pre_hook(_before(name, change)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _after(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _given: Any, output: Any) -> Any:
        return _changed(name, output, change)

    return hook


def _before(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_module: nn.Module, given: tuple[Any, ...]) -> Any:
        return _changed(name, given, change)

    return hook


def _changed(name: str, value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    first, *others = value if isinstance(value, tuple) else (value,)
    if not isinstance(first, Tensor) or first.dim() < 2:
        raise UserError(f"{name!r}: expected a tensor with a batch and units, got {first!r:.60}")
    return (change(first), *others) if isinstance(value, tuple) else change(first)
