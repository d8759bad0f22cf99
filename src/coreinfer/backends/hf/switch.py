"""Rerouting the linears of a live model's MLPs, and putting them back.

Replacing the linears' `forward`, not the MLP, leaves activation functions, dropout and residuals
to the model's own code, so one mechanism serves every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from coreinfer.backends.hf.compact import CompactMlp
from coreinfer.models.mlp import MlpLayer

# (layer index, x, h): the MLP's input and activations, [B, T, .] or flattened to [B * T, .]
Observer = Callable[[int, Tensor, Tensor], None]


class Route:
    """Takes the place of one linear's `forward` until it is removed."""

    def __init__(
        self, module: nn.Module, handler: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
    ) -> None:
        self._own = module.__dict__.get("forward")  # where another tool has rerouted it already
        if isinstance(self._own, Route):
            raise RuntimeError("the model is already inside coreinfer.sparse()")
        self._module = module
        self._dense = module.forward
        self._handler = handler
        module.__dict__["forward"] = self

    def __call__(self, x: Tensor) -> Tensor:
        return self._handler(self._dense, x)

    def remove(self) -> None:
        del self._module.__dict__["forward"]
        if self._own is not None:
            self._module.__dict__["forward"] = self._own


class MlpSwitch:
    """One MLP layer: dense, dense and observed, or computed by a `CompactMlp`."""

    def __init__(self, layer: MlpLayer) -> None:
        self.layer = layer
        self.observer: Observer | None = None
        self.compact: CompactMlp | None = None
        self._x: Tensor | None = None
        self._routes: list[Route] = []

    def install(self) -> None:
        for position, linear in enumerate(self.layer.inputs):
            self._routes.append(Route(linear.module, partial(self._input, position)))
        self._routes.append(Route(self.layer.output.module, self._output))

    def remove(self) -> None:
        while self._routes:
            self._routes.pop().remove()
        self._x = None

    def _input(self, position: int, dense: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self._x = x
        return dense(x) if self.compact is None else self.compact.inputs[position](x)

    def _output(self, dense: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        x, self._x = self._x, None
        assert x is not None  # every family reads x before it makes h
        if self.compact is not None:
            return self.compact.project(h, x)
        if self.observer is not None:
            self.observer(self.layer.index, x, h)
        return dense(h)


class Switchboard:
    """The switches of all MLP layers of a model."""

    def __init__(self, layers: Sequence[MlpLayer]) -> None:
        self._switches = [MlpSwitch(layer) for layer in layers]

    @contextmanager
    def installed(self) -> Iterator[Switchboard]:
        """Reroute the model; on leaving it is what it was, whatever happened inside."""
        try:
            for switch in self._switches:
                switch.install()
            yield self
        finally:
            for switch in self._switches:
                switch.remove()

    def observe(self, observer: Observer | None) -> None:
        """Dense passes, each layer shown to `observer`."""
        for switch in self._switches:
            switch.observer, switch.compact = observer, None

    def compute_with(self, compact: Mapping[int, CompactMlp]) -> None:
        """Sparse passes: the layers in `compact` with their core neurons, the others dense."""
        for switch in self._switches:
            switch.observer, switch.compact = None, compact.get(switch.layer.index)
