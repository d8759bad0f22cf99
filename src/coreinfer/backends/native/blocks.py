"""The tensors of a native model from those of a checkpoint, some rows at a time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from coreinfer.backends.native.tensors import Role, TensorPlan, encode
from coreinfer.errors import UserError
from coreinfer.kernels.formats import WeightFormat
from coreinfer.models.stream import Checkpoint

_BLOCK_ELEMENTS = 2**20  # weights of a part converted at a time

T = TypeVar("T")


def stored_blocks(
    checkpoint: Checkpoint, plan: TensorPlan, weight_format: WeightFormat
) -> Generator[Tensor, None, None]:
    """A tensor of the native model as it is stored, some rows at a time.

    Raises:
        UserError: if a weight is not finite, naming its tensor.
    """
    if plan.role is Role.MLP:
        parts = _mlp_blocks(checkpoint, plan)
    else:
        parts = _row_blocks(checkpoint, plan)
    yield from _in_parallel(partial(_encoded, checkpoint, weight_format), parts)


def _encoded(
    checkpoint: Checkpoint, weight_format: WeightFormat, part: tuple[list[Tensor], TensorPlan]
) -> Tensor:
    sources, block = part
    try:
        return encode(block, sources, weight_format)
    except UserError:
        for name, source in zip(block.sources, sources, strict=True):
            if not bool(source.isfinite().all()):
                raise UserError(
                    f"{checkpoint.where}: tensor {name!r} has weights that are not finite "
                    "(NaN or infinity); the model is damaged"
                ) from None
        raise


def _in_parallel(make: Callable[[T], Tensor], items: Iterator[T]) -> Generator[Tensor, None, None]:
    """What `make` makes of the items, in order, with as many in work as torch has threads.

    Each works with one thread: quantising is many small steps, and threads that meet after each
    of them wait more than they work where the machine has anything else to do.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    ahead: deque[Future[Tensor]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(make, item))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _row_blocks(
    checkpoint: Checkpoint, plan: TensorPlan
) -> Iterator[tuple[list[Tensor], TensorPlan]]:
    """The sources one after the other."""
    for name in plan.sources:
        shape = checkpoint.shapes[name]
        for start, stop in _spans(shape):
            rows = checkpoint.rows(name, start, stop)
            yield [rows], replace(plan, sources=(name,), shape=tuple(rows.shape))


def _mlp_blocks(
    checkpoint: Checkpoint, plan: TensorPlan
) -> Iterator[tuple[list[Tensor], TensorPlan]]:
    """Neurons with all their parts. Of the down projection they are columns: it is read whole."""
    *inputs, output = plan.sources
    down = checkpoint.rows(output, 0, plan.shape[1])
    for start, stop in _spans(plan.shape):
        parts = [checkpoint.rows(name, start, stop) for name in inputs]
        columns = down[:, start:stop].contiguous()
        yield [*parts, columns], replace(plan, shape=(stop - start, plan.shape[1]))


def _spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First and last row of blocks of few enough elements."""
    step = max(1, _BLOCK_ELEMENTS // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
