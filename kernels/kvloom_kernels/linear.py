"""Matrix products of linear layers, ``x [T, in] @ weight [out, in].T + bias``, over weights that were packed once for this CPU."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding as lookup_reference
from torch.nn.functional import linear as linear_reference
from torch.nn.functional import pad

from kvloom_kernels.activation import Finish, gated_mul, gated_mul_reference
from kvloom_kernels.call import is_native, pointer
from kvloom_kernels.native import library, problem
from kvloom_kernels.plan import run
from kvloom_kernels.scratch import empty


class _Product(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
                *((name, ctypes.c_int64) for name in ("rows", "n", "k", "x_stride", "out_stride", "is_bf16", "finish", "is_widened")))


class _Packing(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("packed", ctypes.c_void_p),
                *((name, ctypes.c_int64) for name in ("rows", "k", "is_bf16", "unpacks")))


class _Lookup(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in ("ids", "table", "out")),
                *((name, ctypes.c_int64) for name in ("rows", "k", "is_bf16", "is_packed")))


class WeightShape(NamedTuple):
    """Of a packed weight ``[out, in]``."""

    out_features: int
    in_features: int


@cache
def product_kind() -> str:
    """How bfloat16 is multiplied on this CPU.

    Returns:
        "tiles" (AMX), "native" (vector instructions of its own), "widened" (to float32), or "torch" where there are no kernels.
    """
    if problem() is not None:
        return "torch"
    return ("widened", "native", "tiles")[library().kvloom_bf16_products()]


def can_pack(weight: Tensor) -> bool:
    """Whether `pack` takes a weight."""
    return is_native(weight)


@cache
def packed_elements(shape: WeightShape, dtype: torch.dtype) -> int:
    """Elements of a packed weight."""
    count: int = library().kvloom_packed_elements(*shape, dtype is torch.bfloat16)
    return count


@cache
def panel_features() -> int:
    """Output features that a packed weight keeps together."""
    count: int = library().kvloom_panel_features()
    return count


def pack_reference(weight: Tensor, features: int) -> Tensor:
    """See `pack`: panels of so many output features, ``[out / features, in / S, features, S]`` in one axis, where S is 2 for bfloat16
    and 1 for float32, and what is beyond out or in is 0."""
    side = 4 // weight.element_size()
    padded = pad(weight, (0, -weight.shape[1] % side, 0, -weight.shape[0] % features))
    return padded.reshape(-1, features, padded.shape[1] // side, side).transpose(1, 2).flatten()


def pack(weight: Tensor) -> Tensor:
    """``weight [out, in]`` float32 or bfloat16, on the CPU -> its panels, one axis of the same dtype.

    Where it has whole panels they take its own memory, and the weight is no weight any more.
    """
    weight, shape = weight.contiguous(), WeightShape(*weight.shape)
    count = packed_elements(shape, weight.dtype)
    packed = weight.view(-1) if count == weight.numel() else torch.empty(count, dtype=weight.dtype)
    run("kvloom_pack", _Packing(pointer(weight), pointer(packed), *shape, weight.dtype is torch.bfloat16, 0))
    return packed


def unpack(packed: Tensor, shape: WeightShape) -> Tensor:
    """The weight ``[out, in]`` again, in memory of its own."""
    weight = torch.empty(shape, dtype=packed.dtype)
    run("kvloom_pack", _Packing(pointer(weight), pointer(packed), *shape, packed.dtype is torch.bfloat16, 1))
    return weight


def product_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, finish: Finish = Finish.PLAIN, *,
                      widened: bool = False) -> Tensor:
    """See `product`, with a weight that is not packed; sums in float32, rounded once."""
    out = linear_reference(x.float(), weight.float(), None if bias is None else bias.float())
    if finish is Finish.PLAIN:
        return out if widened else out.to(x.dtype)
    return gated_mul_reference(out.to(x.dtype), finish)


def product(x: Tensor, packed: Tensor, shape: WeightShape, bias: Tensor | None = None, finish: Finish = Finish.PLAIN, *,
            widened: bool = False) -> Tensor:
    """``x [T, in]`` times a packed weight, in x's dtype. A row's result does not depend on the other rows.

    Args:
        x: of the weight's dtype; rows at any stride.
        bias: ``[out]`` of that dtype, or None.
        finish: of a weight whose first half is the gate of its second.
        widened: give float32, whatever x is; for a plain product.

    Returns:
        ``[T, out]``, or ``[T, out / 2]`` of an activated gated product.

    Raises:
        ValueError: x, the weight or the bias is not what `shape` says.
    """
    if x.shape[-1] != shape.in_features or x.dtype is not packed.dtype or packed.numel() != packed_elements(shape, packed.dtype):
        raise ValueError(f"{tuple(x.shape)} {x.dtype} cannot be multiplied with {packed.numel()} packed {packed.dtype} of {shape}")
    if bias is not None and (bias.dtype is not x.dtype or bias.shape != shape[:1]):
        raise ValueError(f"{tuple(bias.shape)} {bias.dtype} is no bias of {shape.out_features} {x.dtype} features")
    bias = None if bias is None else bias.contiguous()
    if x.stride(-1) != 1:
        x = x.contiguous()
    if finish and shape.out_features // 2 % panel_features():  # the halves have no panels of their own
        return gated_mul(product(x, packed, shape, bias), finish)
    width = shape.out_features // (2 if finish else 1)
    out = empty((x.shape[0], width), torch.float32 if widened else x.dtype)
    run("kvloom_product", _Product(pointer(x), pointer(packed), pointer(bias), pointer(out), x.shape[0], *shape, x.stride(0), width,
                                   x.dtype is torch.bfloat16, finish, widened))
    return out


def lookup(token_ids: Tensor, table: Tensor, shape: WeightShape | None = None) -> Tensor:
    """Rows of a table: ``token_ids [T] int64 -> [T, in]``.

    Args:
        table: ``[rows, in]``, or a packed weight.
        shape: of a packed weight.
    """
    if not is_native(table):
        return lookup_reference(token_ids, table)
    width, token_ids = table.shape[1] if shape is None else shape.in_features, token_ids.contiguous()
    out = empty((token_ids.shape[0], width), table.dtype)
    run("kvloom_lookup", _Lookup(pointer(token_ids), pointer(table), pointer(out), token_ids.shape[0], width,
                                 table.dtype is torch.bfloat16, shape is not None))
    return out
