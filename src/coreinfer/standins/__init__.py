"""Stand-ins for the dropped neurons. Adding one is a file and an entry of `STAND_INS`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from coreinfer.standins.base import StandIn, StandInTerms
from coreinfer.standins.calibrated import Calibrated
from coreinfer.standins.down import DenseDown, DownProjection
from coreinfer.standins.linear import Linear
from coreinfer.standins.mean import Mean
from coreinfer.standins.sample import LayerSample

# "none", plain dropping, has no class: it is the absence of a stand-in.
STAND_INS: Mapping[str, type[StandIn]] = MappingProxyType(
    {stand_in.name: stand_in for stand_in in (Mean, Linear, Calibrated)}
)

__all__ = [
    "STAND_INS",
    "Calibrated",
    "DenseDown",
    "DownProjection",
    "LayerSample",
    "Linear",
    "Mean",
    "StandIn",
    "StandInTerms",
]
