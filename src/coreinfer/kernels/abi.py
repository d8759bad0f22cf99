"""The structures of csrc/coreinfer_kernels.h, field by field."""

from __future__ import annotations

import ctypes

ABI_VERSION = 5
PATHS = ("portable", "avx2", "avx512")

_pointer = ctypes.c_void_p


class Matrix(ctypes.Structure):
    """CiMatrix: a packed weight matrix."""

    _fields_ = (
        ("data", _pointer),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
    )


class Mlp(ctypes.Structure):
    """CiMlp: the chosen neurons of a layer."""

    _fields_ = (
        ("into", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("in_bias", _pointer),
        ("least", _pointer),
        ("gated", ctypes.c_int32),
        ("by_neuron", ctypes.c_int32),
    )


class StandIn(ctypes.Structure):
    """CiStandIn: what takes the place of the dropped neurons."""

    _fields_ = (("offset", _pointer), ("left", Matrix), ("right", Matrix))


class Layer(ctypes.Structure):
    """CiLayer: a decoder layer but for its MLP."""

    _fields_ = (
        ("qkv", Matrix),
        ("o", Matrix),
        ("norm1_weight", _pointer),
        ("norm1_bias", _pointer),
        ("norm2_weight", _pointer),
        ("norm2_bias", _pointer),
        ("qkv_bias", _pointer),
        ("o_bias", _pointer),
        ("mlp_out_bias", _pointer),
        ("q_norm", _pointer),
        ("k_norm", _pointer),
        ("rope", ctypes.c_int32),
        ("window", ctypes.c_int32),
    )


class Model(ctypes.Structure):
    """CiModel: a decoder."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("head", Matrix),
        ("embed", _pointer),
        ("position", _pointer),
        ("inverse_frequencies", _pointer),
        ("final_weight", _pointer),
        ("final_bias", _pointer),
        ("hidden_size", ctypes.c_int64),
        ("num_layers", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("layer_norm", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("rope_factor", ctypes.c_float),
    )


class Row(ctypes.Structure):
    """CiRow: one token of one sequence."""

    _fields_ = (
        ("token", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("mlps", ctypes.POINTER(Mlp)),
        ("stand_ins", ctypes.POINTER(StandIn)),
        ("keys", _pointer),
        ("values", _pointer),
        ("layer_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("skipped", _pointer),
        ("cache_bfloat16", ctypes.c_int32),
    )
