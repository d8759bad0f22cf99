"""How a weight matrix is stored: bfloat16, or 8 or 4 bits a weight with a scale for each group.

A row of a matrix becomes one record of bytes: its numbers q first, then the scales of its groups,
then (int4) their minima, little-endian float16 both. With w a weight of a group of g neighbours:

- bfloat16: the raw bytes of the row, rounded to nearest.
- int8: w = scale * q, q in -127..127, one signed byte each; 8.5 bits a weight at g = 32.
- int4: w = scale * q + minimum, q in 0..15; 4.5 bits a weight at g = 64. Eight columns take four
  bytes, byte j holds column j in its low half and column j + 4 in its high half: what vector
  instructions unpack with one shift. Scale and minimum minimise the squared error of the group:
  from several clipped ranges, refined by least squares (Lloyd's iteration), the best is kept. On
  SmolLM2's weights that is 23.1 dB of signal to noise, 1.3 dB above plain minimum and maximum and
  2 dB above symmetric groups of 32 (llama.cpp's Q4_0), which take the same space.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.kernels.four_bits import fit_four_bits, nearest

DTYPES = ("bfloat16", "int8", "int4")
GROUP_SIZES = (16, 32, 64, 128, 256)

_LARGEST = torch.finfo(torch.float16).max
_BLOCK_ELEMENTS = 1 << 17  # weights quantised at a time: what stays in a core's cache


@dataclass(frozen=True)
class WeightFormat:
    """A storage format.

    Args:
        dtype: one of `DTYPES`.
        group_size: weights that share a scale, one of `GROUP_SIZES`; 0 for bfloat16.

    Raises:
        UserError: if there is no such format.
    """

    dtype: str
    group_size: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"no weight format {self.dtype!r}; one of {', '.join(DTYPES)} would do")
        if self.dtype == "bfloat16":
            if self.group_size != 0:
                raise UserError(
                    f"bfloat16 weights have no groups, got a group size of {self.group_size!r}; "
                    "leave it out"
                )
        elif self.group_size not in GROUP_SIZES:
            would_do = ", ".join(map(str, GROUP_SIZES))
            raise UserError(
                f"group size of {self.dtype} is {self.group_size!r}; {would_do} would do"
            )

    @classmethod
    def named(cls, dtype: str, group_size: int | None = None) -> WeightFormat:
        """The format of that dtype, in groups of 32 (int8) or 64 unless another size is asked for.

        Inputs are rounded in the same groups: on SmolLM2 groups of 32 halve the KL of int8 to
        float32 of groups of 64.
        """
        if group_size is None:
            group_size = {"bfloat16": 0, "int8": 32}.get(dtype, 64)
        return cls(dtype, group_size)

    @property
    def scales_per_group(self) -> int:
        """float16 numbers stored beside a group: its scale, and its minimum for int4."""
        return {"bfloat16": 0, "int8": 1, "int4": 2}[self.dtype]

    @cached_property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, its share of the scales included."""
        if self.dtype == "bfloat16":
            return 16.0
        return int(self.dtype.removeprefix("int")) + 16 * self.scales_per_group / self.group_size

    def row_bytes(self, columns: int) -> int:
        """Bytes of the record of a row of `columns` weights.

        Raises:
            UserError: if the group size does not divide `columns`.
        """
        self._groups(columns)
        return round(columns * self.bits_per_weight) // 8

    def quantize(self, weights: Tensor) -> Tensor:
        """Records of a matrix [R, C] of any floating dtype: uint8 [R, row_bytes(C)].

        Raises:
            UserError: if it is not a matrix of finite numbers, if the group size does not divide C,
                or if a weight is too large for the format.
        """
        if weights.dim() != 2 or not weights.dtype.is_floating_point:
            raise UserError(
                f"a matrix of floating-point weights is wanted, got {weights.dtype} of shape "
                f"{tuple(weights.shape)}"
            )
        rows, columns = weights.shape
        records = torch.empty(rows, self.row_bytes(columns), dtype=torch.uint8)
        step = max(1, _BLOCK_ELEMENTS // max(1, columns))
        for start in range(0, rows, step):
            block = weights[start : start + step].detach().to("cpu", torch.float32)
            if not block.isfinite().all():
                raise UserError("weights are not finite (NaN or infinity); the model is damaged")
            records[start : start + step] = self._encode(block)
        return records

    def dequantize(
        self, records: Tensor, columns: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The weights [R, columns] that records uint8 [R, row_bytes(columns)] stand for.

        Raises:
            UserError: if the records are not as long as rows of `columns` weights are.
        """
        wanted = self.row_bytes(columns)
        if records.dim() != 2 or records.dtype != torch.uint8 or records.shape[1] != wanted:
            raise UserError(
                f"records of {columns} {self.dtype} weights are uint8 of {wanted} bytes, got "
                f"{records.dtype} of shape {tuple(records.shape)}"
            )
        if self.dtype == "bfloat16":
            return records.contiguous().view(torch.bfloat16).to(dtype)
        q, scales, minima = self.parts(records, columns)
        grouped = q.view(len(q), self._groups(columns), self.group_size)
        # In place, and in float32 until the end: one rounding to the wanted dtype.
        weights = grouped.to(torch.float32).mul_(scales[:, :, None])
        if self.dtype == "int4":
            weights += minima[:, :, None]
        return weights.view(-1, columns).to(dtype)

    def parts(self, records: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """q [R, columns] (int8 or uint8), scales and minima [R, groups] float32 of int8 or int4.

        The minima of int8 are zero.
        """
        groups = self._groups(columns)
        q_bytes = columns if self.dtype == "int8" else columns // 2
        stored = records[:, :q_bytes].contiguous()
        numbers = records[:, q_bytes:].contiguous().view(torch.float16).to(torch.float32)
        if self.dtype == "int8":
            return stored.view(torch.int8), numbers, torch.zeros_like(numbers)
        q = torch.stack((stored.view(-1, 4) & 15, stored.view(-1, 4) >> 4), dim=1)
        return q.view(-1, columns), numbers[:, :groups], numbers[:, groups:]

    def _groups(self, columns: int) -> int:
        if self.dtype == "bfloat16":
            return 0
        if columns < 1 or columns % self.group_size:
            fitting = ", ".join(str(g) for g in GROUP_SIZES if columns > 0 and columns % g == 0)
            hint = f"group sizes that do: {fitting}" if fitting else "only bfloat16 does"
            raise UserError(
                f"groups of {self.group_size} do not divide rows of {columns} weights; {hint}"
            )
        return columns // self.group_size

    def _encode(self, weights: Tensor) -> Tensor:
        """Records of a float32 block."""
        rows = len(weights)
        if self.dtype == "bfloat16":
            rounded = weights.to(torch.bfloat16)
            if rounded.isinf().any():
                raise UserError(_too_large(weights, self.dtype))
            # Flat first: a single column counts as contiguous whatever its stride.
            return rounded.flatten().view(torch.uint8).view(rows, -1)
        grouped = weights.reshape(rows, -1, self.group_size)
        if self.dtype == "int8":
            scales = _half(grouped.abs().amax(-1, keepdim=True) / 127, weights, self.dtype)
            q = nearest(grouped / scales, -127, 127).to(torch.int8)
            return _join(q.view(rows, -1).view(torch.uint8), scales)
        low, high = grouped.amin(-1), grouped.amax(-1)
        # Outside these no scale and minimum can go.
        _half((high - low) / 15, grouped, self.dtype)
        _half(torch.maximum(low.abs(), high.abs()), grouped, self.dtype)
        scales, minima = fit_four_bits(grouped)
        q = nearest((grouped - minima) / scales, 0, 15).to(torch.uint8).view(rows, -1, 2, 4)
        return _join((q[:, :, 0] | (q[:, :, 1] << 4)).flatten(1), scales, minima)


def _half(numbers: Tensor, weights: Tensor, dtype: str) -> Tensor:
    """`numbers` as float16 holds them."""
    if (numbers > _LARGEST).any():
        raise UserError(_too_large(weights, dtype))
    return numbers.to(torch.float16).to(torch.float32)


def _too_large(weights: Tensor, dtype: str) -> str:
    return f"a weight of magnitude {weights.abs().max():.4g} is too large for {dtype}"


def _join(q: Tensor, *numbers: Tensor) -> Tensor:
    """Records: q bytes [R, n], then float16 numbers [R, groups, 1]."""
    halves = [part.flatten(1).to(torch.float16).contiguous().view(torch.uint8) for part in numbers]
    return torch.cat([q, *halves], dim=1)
