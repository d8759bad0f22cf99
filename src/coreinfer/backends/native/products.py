"""Products with stored weights in torch: dequantised to a compute dtype, added up in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coreinfer.kernels.formats import WeightFormat
from coreinfer.kernels.linear import dequantize

_BLOCK = 256  # neurons


def compute_dtype() -> torch.dtype:
    """The dtype that this processor multiplies fastest in, of those that are precise enough.

    float16 has eight times the precision of bfloat16, and sums are float32 in both.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    able = {} if capabilities is None else capabilities()
    if able.get("avx512_fp16") or able.get("amx_fp16"):
        return torch.float16
    if able.get("avx512_bf16") or able.get("amx_bf16"):
        return torch.bfloat16
    return torch.float32


class Products:
    """Multiplies float32 activations by stored weights, dequantised into memory that is kept.

    Args:
        weight_format: of the weights.
        dtype: that weights and activations are multiplied in. In float16 a product that overflows
            is computed again in float32.
    """

    def __init__(self, weight_format: WeightFormat, dtype: torch.dtype) -> None:
        self._format = weight_format
        self._dtype = dtype
        self._memory = torch.empty(0, dtype=dtype)

    def linear(self, x: Tensor, records: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [N, C], records of W [R, C], bias [R] -> x W^T + bias, [N, R] float32."""
        return _plus(self._product(x, records, x.shape[1], transposed=True), bias)

    def down(
        self,
        h: Tensor,
        records: Tensor,
        size: int,
        bias: Tensor | None = None,
        *,
        index: Tensor | None = None,
    ) -> Tensor:
        """h [N, K], records of columns [K, d = size], bias [d] -> [N, d] float32.

        Args:
            index: int32 [K], the records that are meant, where there are more; they are taken some
                at a time, so that what is dequantised is still in the cache when it is multiplied.
        """
        if index is None:
            return _plus(self._product(h, records, size, transposed=False), bias)
        y = torch.zeros(len(h), size)
        step = max(_BLOCK, 8 * len(h))  # adding a block's products must cost less than making them
        for part, chosen in zip(h.split(step, dim=1), index.split(step), strict=True):
            y += self._product(part, records, size, transposed=False, index=chosen)
        return _plus(y, bias)

    def down_in_parts(
        self, h: Tensor, records: Tensor, size: int, parts: Sequence[Tensor]
    ) -> list[Tensor]:
        """The product `down` in parts that add up to it: of some neurons each, [N, d] float32.

        Args:
            h: [N, D]; records: of all columns, [D, d = size].
            parts: int64, the neurons of each; together every one, once. It takes no more
                multiplications than the whole.
        """
        index, sizes = torch.cat(list(parts)), [len(part) for part in parts]
        moved = h.index_select(1, index)

        def multiply(dtype: torch.dtype) -> list[Tensor]:
            weights = self._weights(records, size, dtype, index.int()).split(sizes)
            pieces = moved.to(dtype).split(sizes, dim=1)
            return [(a @ w).float() for a, w in zip(pieces, weights, strict=True)]

        return self._finite(multiply)

    def _product(
        self,
        x: Tensor,
        records: Tensor,
        columns: int,
        *,
        transposed: bool,
        index: Tensor | None = None,
    ) -> Tensor:
        def multiply(dtype: torch.dtype) -> list[Tensor]:
            weights = self._weights(records, columns, dtype, index)
            return [(x.to(dtype) @ (weights.t() if transposed else weights)).float()]

        (y,) = self._finite(multiply)
        return y

    def _finite(self, multiply: Callable[[torch.dtype], list[Tensor]]) -> list[Tensor]:
        """The products in this dtype, or in float32 where float16 overflows."""
        found = multiply(self._dtype)
        # A sum is cheaper to look at than every number, and as infinite as any of them.
        if self._dtype is torch.float16 and not all(bool(y.sum().isfinite()) for y in found):
            return multiply(torch.float32)
        return found

    def _weights(
        self, records: Tensor, columns: int, dtype: torch.dtype, index: Tensor | None
    ) -> Tensor:
        """[R or K, columns]; gone with the next product."""
        if self._format.dtype == "bfloat16" and dtype is torch.bfloat16 and index is None:
            return records.view(torch.bfloat16)
        if dtype is not self._dtype:
            return dequantize(records, columns, self._format, dtype=dtype, index=index)
        rows = len(records) if index is None else len(index)
        size = rows * columns
        if size > self._memory.numel():
            self._memory = torch.empty(size, dtype=dtype)
        out = self._memory[:size].view(rows, columns)
        return dequantize(records, columns, self._format, dtype=dtype, index=index, out=out)


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias)
