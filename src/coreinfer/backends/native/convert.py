"""A model into the native backend's file: tensor by tensor, with little more than one in memory."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from coreinfer.backends.native.architecture import DecoderConfig
from coreinfer.backends.native.blocks import stored_blocks
from coreinfer.backends.native.container import (
    WEIGHTS,
    Manifest,
    is_converted,
    open_container,
)
from coreinfer.backends.native.draft import JOURNAL, Draft
from coreinfer.backends.native.tensors import Role, TensorPlan, tensor_plans
from coreinfer.errors import UserError
from coreinfer.files import describe_os_error
from coreinfer.files import replace as replace_folder
from coreinfer.kernels.formats import GROUP_SIZES, WeightFormat
from coreinfer.models.cache import cache_dir
from coreinfer.models.loading import find
from coreinfer.models.mlp import SAMPLED_ROWS, fingerprint_of
from coreinfer.models.pull import Progress, silent
from coreinfer.models.stream import Checkpoint, open_checkpoint

_COMPANION_BYTES = 2**25  # room for the tokenizer and the configuration

OnBytes = Callable[[int, int], None]  # bytes written so far, bytes of all tensors


def unwatched(_done: int, _total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class _Job:
    """What is to be written, checked against what there is."""

    checkpoint: Checkpoint
    manifest: Manifest
    plans: dict[str, TensorPlan]


def convert(
    model: str,
    weight_format: WeightFormat,
    out: str | Path,
    *,
    on_progress: Progress = silent,
    on_bytes: OnBytes = unwatched,
) -> Path:
    """Convert a model; a run that was interrupted goes on where it was.

    The unfinished work lies in a folder `.NAME.draft` beside `out`. A conversion of the same files
    to the same format that is there already is checked and left alone; any other converted model
    there is replaced.

    Args:
        model: a short name, a hub id, a folder with safetensors or a .gguf file.
        weight_format: how its linears are stored.
        out: the folder to write.
        on_progress: told, a line each, what takes long.
        on_bytes: told how far the writing is.

    Returns:
        `out`.

    Raises:
        UserError: before anything is written, if the architecture is not one of the native
            backend's, the group size does not divide a row, a tensor is missing or has another
            shape than the configuration says, there is no room, or `out` is something else.
            While it is written, if a weight is not finite, naming the tensor.
    """
    path, name = find(model, on_progress)
    if path.is_dir() and is_converted(path):
        raise UserError(
            f"{str(path)!r} is a converted model already; convert the model that it was made from"
        )
    _require_replaceable(Path(out))
    return _convert(_job(path, name, weight_format), Path(out), on_progress, on_bytes)


def converted(
    model: str,
    weight_format: WeightFormat,
    *,
    on_progress: Progress = silent,
    on_bytes: OnBytes = unwatched,
) -> Path:
    """The folder of a converted model: the model itself if it is one, or one in the local cache.

    It is made when it is first asked for, and again when the model's files have changed.

    Raises:
        UserError: as `convert` does; or if the model is converted to another format.
    """
    path, name = find(model, on_progress)
    if path.is_dir() and is_converted(path):
        found = open_container(path, dtype=weight_format.dtype).manifest.format
        if found != weight_format:
            raise UserError(
                f"{str(path)!r} is stored in groups of {found.group_size}, "
                f"not {weight_format.group_size}; leave the group size out, or convert anew"
            )
        return path
    folder = _cache_folder(path, name, weight_format)
    checkpoint = open_checkpoint(path)
    if _made_from(folder) == checkpoint.identity:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(describe_os_error(error, folder.parent)) from error
    on_progress(f"converting {name} to {weight_format.dtype}, once")
    return _convert(_job(path, name, weight_format), folder, on_progress, on_bytes)


def _made_from(folder: Path) -> str | None:
    """The identity of the files that a converted model was made from; None if there is none."""
    try:
        return open_container(folder).manifest.source
    except UserError:
        return None


def _cache_folder(path: Path, name: str, weight_format: WeightFormat) -> Path:
    """Models of the same name in different places have folders of their own."""
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    parts = [name.replace("/", "--"), place, weight_format.dtype]
    if weight_format.group_size:
        parts.append(f"g{weight_format.group_size}")
    return cache_dir() / "native" / "-".join(parts)


def _job(path: Path, name: str, weight_format: WeightFormat) -> _Job:
    checkpoint = open_checkpoint(path)
    decoder = DecoderConfig.from_hf(checkpoint.config)
    if decoder.num_layers > len(checkpoint.shapes):
        raise UserError(
            f"{checkpoint.where}: tensors of its {decoder.num_layers} layers are missing"
        )
    plans = tensor_plans(decoder)
    _check_groups(plans, weight_format)
    _check_tensors(checkpoint, plans)
    manifest = Manifest(
        weight_format, name, _fingerprint(checkpoint, plans), checkpoint.identity, decoder
    )
    return _Job(checkpoint, manifest, {plan.name: plan for plan in plans})


def _check_groups(plans: list[TensorPlan], weight_format: WeightFormat) -> None:
    group = weight_format.group_size
    rows = {
        plan.name: plan.shape[1]
        for plan in plans
        if plan.role in (Role.LINEAR, Role.HEAD, Role.MLP)
    }
    bad = next((name for name, columns in rows.items() if group and columns % group), None)
    if bad is None:
        return
    fitting = [size for size in GROUP_SIZES if not any(n % size for n in rows.values())]
    what = f"use --group-size {' or '.join(map(str, fitting))}" if fitting else "use bfloat16"
    raise UserError(f"groups of {group} do not divide the {rows[bad]} columns of {bad}; {what}")


def _check_tensors(checkpoint: Checkpoint, plans: list[TensorPlan]) -> None:
    shapes = checkpoint.shapes
    wanted = [source for plan in plans for source in plan.sources]
    if missing := [source for source in wanted if source not in shapes]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{checkpoint.where}: tensor {missing[0]!r} is missing{more}; the checkpoint is "
            "incomplete"
        )
    for plan in plans:
        found = [shapes[source] for source in plan.sources]
        if not _fits(plan, found):
            raise UserError(
                f"{checkpoint.where}: {', '.join(plan.sources)} of shape "
                f"{', '.join(map(str, found))} do not make {plan.name} {plan.shape}; "
                "config.json and weights are of different models"
            )
    layers = {plan.sources[0].split("layers.")[0] for plan in plans if "layers." in plan.sources[0]}
    known = {_layer_of(source, layers) for source in wanted}
    for name in shapes:
        if _layer_of(name, layers) not in known:
            raise UserError(
                f"{checkpoint.where}: the weights hold {name!r}, a layer that the configuration "
                "has not"
            )


def _fits(plan: TensorPlan, shapes: list[tuple[int, ...]]) -> bool:
    if plan.role is Role.MLP:
        *inputs, down = shapes
        return all(shape == plan.shape for shape in inputs) and down == plan.shape[::-1]
    tails = {shape[1:] for shape in shapes}
    return tails == {plan.shape[1:]} and sum(shape[0] for shape in shapes) == plan.shape[0]


def _layer_of(name: str, roots: set[str]) -> str | None:
    """The number of the layer that a tensor belongs to, as it is written."""
    root, found, rest = name.partition("layers.")
    number = rest.split(".")[0]
    return number if found and root in roots and number.isdigit() else None


def _fingerprint(checkpoint: Checkpoint, plans: list[TensorPlan]) -> str:
    mlps = [plan for plan in plans if plan.role is Role.MLP]

    def edges(plan: TensorPlan) -> Tensor:
        rows, down = plan.shape[1], plan.sources[-1]
        if rows <= 2 * SAMPLED_ROWS:
            return checkpoint.rows(down, 0, rows)
        ends = (0, SAMPLED_ROWS), (rows - SAMPLED_ROWS, rows)
        return torch.cat([checkpoint.rows(down, *end) for end in ends])

    shapes = [(plan.shape[1], plan.shape[0]) for plan in mlps]
    return fingerprint_of(checkpoint.config, shapes, map(edges, mlps))


def _convert(job: _Job, out: Path, on_progress: Progress, on_bytes: OnBytes) -> Path:
    try:
        with _alone(out, on_progress) as folder:
            if _is_there(job.manifest, out):
                return out
            _require_room(job.manifest, folder)
            draft = Draft(folder, job.manifest)
            try:
                _write(job, draft, on_bytes)
            except UserError:  # the model is damaged: there is nothing to go on with
                draft.discard()
                raise
            finally:
                draft.close()
            job.checkpoint.write_companions(draft.model)
            replace_folder(draft.model, out, folder / "replaced")
    except OSError as error:
        raise UserError(describe_os_error(error, error.filename or out)) from error
    return out


@contextmanager
def _alone(out: Path, on_progress: Progress) -> Iterator[Path]:
    """The draft folder of `out`, for one process at a time.

    It stays if the block fails and work is done in it, so that the next run goes on.
    """
    folder = out.parent / f".{out.name}.draft"
    lock = FileLock(folder / "lock")
    while not lock.is_locked:
        folder.mkdir(exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_progress(f"waiting for another process that writes {str(out)!r}")
            with suppress(FileNotFoundError):  # the other one is done, and its folder is gone
                lock.acquire()
        if not Path(lock.lock_file).exists():
            lock.release()
    done = False
    try:
        yield folder
        done = True
    finally:
        if done or not (folder / JOURNAL).exists():
            for entry in folder.iterdir():  # the lock last: who waits for it begins then
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _require_replaceable(out: Path) -> None:
    """Raises UserError if `out` is something else than a converted model: it would be missed."""
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty and not is_converted(out):
        raise UserError(
            f"{str(out)!r} exists and is no converted model; choose another folder, or remove it"
        )


def _is_there(manifest: Manifest, out: Path) -> bool:
    """Whether `out` is this very conversion, whole and undamaged."""
    try:
        there = open_container(out)
        if there.manifest != manifest:
            return False
        there.verify_all()
    except UserError:
        return False
    return True


def _require_room(manifest: Manifest, folder: Path) -> None:
    """Of a draft that is there, what is written needs no more room."""
    needed = manifest.data_bytes + _COMPANION_BYTES
    written = sum(getattr(file.stat(), "st_blocks", 0) * 512 for file in folder.rglob(WEIGHTS))
    free = shutil.disk_usage(folder).free
    if free < needed - written:
        raise UserError(
            f"{str(folder.parent)!r} has {free / 1e6:.0f} MB free, the converted model needs "
            f"{(needed - written) / 1e6:.0f} MB; free some, or write elsewhere"
        )


def _write(job: _Job, draft: Draft, on_bytes: OnBytes) -> None:
    tensors = job.manifest.tensors()
    total = job.manifest.data_bytes
    done = sum(tensors[name].stop - tensors[name].start for name in draft.done)
    on_bytes(done, total)

    def counted(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        nonlocal done
        for block in blocks:
            yield block
            done += block.nbytes
            on_bytes(done, total)

    for name in tensors:
        if name not in draft.done:
            plan = job.plans[name]
            with closing(stored_blocks(job.checkpoint, plan, job.manifest.format)) as blocks:
                draft.write(name, counted(blocks))
    draft.finish()
