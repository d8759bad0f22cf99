"""Rerouting the linears of a live model's MLPs, and putting them back.

Replacing the linears' `forward`, not the MLP, leaves activation functions, dropout and residuals
to the model's own code, so one mechanism serves every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from coreinfer.models.mlp import MlpLayer

# (layer index, x, h, gates): the MLP's input, its activations and, where they were asked for, those
# of its gate (h itself where it has none), [B, T, .] or flattened to [B * T, .]
Observer = Callable[[int, Tensor, Tensor, Tensor | None], None]


class SmallMlp(Protocol):
    """What computes in the place of a layer's MLP: its linears, the model's own activations."""

    @property
    def inputs(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """x [..., d] -> [..., K], one for each of the MLP's input linears."""
        ...

    def project(self, h: Tensor, x: Tensor, first: Tensor) -> Tensor:
        """h [..., K], the MLP's input x [..., d] and what the first of `inputs` made of it -> the
        MLP's output [..., d]."""
        ...


class Override:
    """An attribute that shadows the class's on one object, while it is installed."""

    def __init__(self, owner: object, name: str, value: Any) -> None:
        self._attributes = owner.__dict__
        self._name = name
        self._value = value
        self._own: list[Any] = []  # what the object had there itself, where another tool set it

    def install(self) -> None:
        self._own = [self._attributes[self._name]] if self._name in self._attributes else []
        self._attributes[self._name] = self._value

    def remove(self) -> None:
        """Put back what was there; nothing happens where it is not installed."""
        if self._attributes.get(self._name) is self._value:
            if self._own:
                self._attributes[self._name] = self._own.pop()
            else:
                del self._attributes[self._name]


class Route(Override):
    """Takes the place of one linear's `forward`."""

    def __init__(
        self, module: nn.Module, handler: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
    ) -> None:
        super().__init__(module, "forward", self)
        self._module = module
        self._handler = handler
        self._dense: Callable[[Tensor], Tensor] = module.forward

    def __call__(self, x: Tensor) -> Tensor:
        return self._handler(self._dense, x)

    def install(self) -> None:
        """Raises RuntimeError if another route is there."""
        dense = self._module.forward
        if isinstance(dense, Route):
            raise RuntimeError(
                "the model is already inside coreinfer.sparse(), or a session is computing with it"
            )
        self._dense = dense
        super().install()


class MlpSwitch:
    """One MLP layer: dense, dense and observed, or computed by a smaller one."""

    def __init__(self, layer: MlpLayer) -> None:
        self.layer = layer
        self.observer: Observer | None = None
        self.gates = False  # whether the observer asks for them
        self.compact: SmallMlp | None = None
        self._x: Tensor | None = None
        self._first: Tensor | None = None
        self.routes = [
            Route(linear.module, partial(self._input, position))
            for position, linear in enumerate(layer.inputs)
        ]
        self.routes.append(Route(layer.output.module, self._output))

    def clear(self) -> None:
        """Let go of all tensors."""
        self.observer = self.compact = self._x = self._first = None

    def _input(self, position: int, dense: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self._x = x
        y = dense(x) if self.compact is None else self.compact.inputs[position](x)
        if position == 0 and (self.compact is not None or self.gates):
            self._first = y  # else the memory is free before h is projected
        return y

    def _output(self, dense: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        x, self._x = self._x, None
        first, self._first = self._first, None
        assert x is not None  # every family reads x before it makes h
        if self.compact is not None:
            assert first is not None
            return self.compact.project(h, x, first)
        if self.observer is not None:
            self.observer(
                self.layer.index, x, h, None if first is None else self.layer.gates(first, h)
            )
        return dense(h)


class Switchboard:
    """The switches of all MLP layers of a model."""

    def __init__(self, layers: Sequence[MlpLayer]) -> None:
        self._switches = [MlpSwitch(layer) for layer in layers]
        self._routes = [route for switch in self._switches for route in switch.routes]

    @contextmanager
    def installed(self) -> Iterator[Switchboard]:
        """Reroute the model; on leaving it is what it was, whatever happened inside.

        Raises:
            RuntimeError: if it is rerouted already; that stays as it is.
        """
        with installed(self._routes):
            try:
                yield self
            finally:
                for switch in self._switches:
                    switch.clear()

    def observe(self, observer: Observer | None, *, gates: bool = False) -> None:
        """Dense passes, each layer shown to `observer`, with its gates if it asks for them."""
        for switch in self._switches:
            switch.observer, switch.compact, switch.gates = observer, None, gates

    def compute_with(self, compact: Mapping[int, SmallMlp]) -> None:
        """Sparse passes: the layers in `compact` with their core neurons, the others dense."""
        for switch in self._switches:
            switch.observer, switch.gates = None, False
            switch.compact = compact.get(switch.layer.index)


@contextmanager
def installed(parts: Sequence[Override]) -> Iterator[None]:
    """Install all of them; on leaving, or if one refuses, those that are in are removed again."""
    try:
        for part in parts:
            part.install()
        yield
    finally:
        for part in reversed(parts):
            part.remove()
