"""What the products compute, in plain torch.

bfloat16 weights meet float32 activations; nothing is rounded. With int4 weights the activations
are rounded too, dynamically, to eight bits in groups as long as the weights' own (`round_groups`),
as llama.cpp does: integer products are what a CPU streams at memory speed. With int8 weights they
keep a second digit of eight bits, since rounding them to one would lose more than the weights did;
the weights, which are what is waited for, are read once for both.

The down projection has its groups along the outputs, a scale a neuron. There the scale goes to the
activation, a[n, G] = h_n * scale[n, G], and a is rounded in blocks of 32 neurons, in the order of
the core set: y[G] = sum_n a[n, G] q[n, G]; for int4, whose q are not centred, it is
y[G] = sum_n a[n, G] (q[n, G] - 8) + sum_n h_n (minimum[n, G] + 8 scale[n, G]), the second sum not
rounded, so that the rounding meets numbers around zero. Stored by neuron (where some are skipped)
it is an exact float32 sum over the neurons that are not zero, and a gated MLP's up rows meet exact
float32 inputs for these neurons. Activations (gates') below their `least` count as zero there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from coreinfer.errors import UserError
from coreinfer.kernels.formats import WeightFormat
from coreinfer.kernels.layout import TILE, Packed, PackedDown, PackedMlp
from coreinfer.kernels.packing_twin import unpack_down, unpack_records, unpack_rows

NEURON_BLOCK = 32  # neurons of a down projection whose activations are rounded together
ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")

REST_PARTS = 254  # of a step, of the second digit

_SMALLEST = 1e-30  # a group below it counts as zero: 127 / largest must stay finite


def round_groups(x: Tensor, group_size: int, digits: int = 1) -> Tensor:
    """x [..., n] rounded to 127ths of the largest magnitude of each group of its last dimension.

    q = round(x * (127 / largest)), half to even, and largest / 127 is the step. With a second digit
    what is left of each is rounded too, to 254ths of a step. The last group may be shorter.
    """
    columns = x.shape[-1]
    grouped = functional.pad(x, (0, -columns % group_size)).unflatten(-1, (-1, group_size))
    largest = grouped.abs().amax(-1, keepdim=True)
    zero = largest < _SMALLEST
    steps = torch.where(zero, 0.0, largest / 127)
    in_steps = grouped * (127 / largest.masked_fill(zero, torch.inf))
    q = torch.round(in_steps)
    if digits == 2:
        q += torch.round((in_steps - q) * REST_PARTS) / REST_PARTS
    return (q * steps).flatten(-2)[..., :columns]


def _digits(form: WeightFormat) -> int:
    return 2 if form.dtype == "int8" else 1


def linear_twin(packed: Packed, x: Tensor) -> Tensor:
    """y [B, rows] = x [B, columns] @ W^T, float32."""
    if packed.format.group_size:
        x = round_groups(x, packed.format.group_size, _digits(packed.format))
    return x @ unpack_rows(packed).t()


def down_twin(down: PackedDown, h: Tensor) -> Tensor:
    """y [B, outputs] = sum over neurons of h [B, K] times their columns, float32."""
    q, scales, minima = unpack_down(down)
    if not down.format.group_size:
        return h @ q
    if down.format.dtype == "int4":
        q, minima = q - 8, minima + 8 * scales
    folded = h[:, None, :] * scales.t()  # [B, groups, K]
    if not down.by_neuron:
        folded = round_groups(folded, NEURON_BLOCK, _digits(down.format))
    grouped = q.unflatten(1, (scales.shape[1], down.format.group_size))
    y = torch.einsum("bgk,kgc->bgc", folded, grouped) + (h @ minima)[:, :, None]
    return y.flatten(1)


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation function of that name, one of `ACTIVATIONS`.

    Raises:
        UserError: if there is no such activation.
    """
    match activation:
        case "silu":
            return functional.silu(x)
        case "relu":
            return functional.relu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
    raise UserError(f"no activation {activation!r}; one of {', '.join(ACTIVATIONS)} would do")


def mlp_twin(mlp: PackedMlp, x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """The product [B, d] with x [B, d], of h [B, K], and how many neurons were too small [B].

    h = act(gate x) * up x, or act(fc1 x + bias). Where small activations count as zero, the last is
    the number of zeros, else it is 0.
    """
    z = linear_twin(mlp.into, x)
    if mlp.in_bias is not None:
        z = z + mlp.in_bias
    skipped = torch.zeros(len(x), dtype=torch.int64)
    if mlp.gated and mlp.up is None:  # tiles of gate and up alternate
        gate, up = z.unflatten(1, (-1, 2, TILE)).unbind(2)
        h = (activate(gate, activation) * up).flatten(1)[:, : mlp.num_neurons]
    else:
        h = activate(z, activation)[:, : mlp.num_neurons]
        if mlp.least is not None:
            h = torch.where(h.abs() < mlp.least[: mlp.num_neurons], 0.0, h)
            skipped = (h == 0).sum(dim=1)
        if mlp.up is not None:
            h = h * (x @ unpack_records(mlp.up).t())
    return down_twin(mlp.down, h), h, skipped
