"""Rotary position embedding (Su et al., 2021): one table a model, one lookup a step, one rotation a layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from kvloom.errors import ConfigError
from kvloom.interfaces.model import BuildContext
from kvloom.interfaces.model_config import RopeParameters
from kvloom.layers.rope_scaling import rope_frequencies


@dataclass
class Rotation:
    """The rotary embedding of one step's tokens; Dr is the rotated part of a head.

    Args:
        table: ``[max_model_len, Dr]`` float32: Dr/2 cosines, then Dr/2 sines. For kernels that look up themselves.
        positions: ``[T]`` int64, rows of the table.
        dtype: of the activations.
    """

    table: Tensor
    positions: Tensor
    dtype: torch.dtype

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """``cos [T, 1, Dr]``, both halves alike, and ``sin [T, 1, Dr]``, the first half negated, in the activations' dtype."""
        cos, sin = self.table.index_select(0, self.positions).to(self.dtype)[:, None].chunk(2, dim=-1)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class Rotary(nn.Module):
    """Makes the `Rotation` of a step. Has no checkpoint tensors.

    Args:
        rope: from config.json.
        head_dim: elements of a head; the first ``head_dim * partial_rotary_factor`` are rotated.
        max_position_embeddings: from config.json: the context that the model was trained for.

    Raises:
        ConfigError: a rope type that is not known or lacks a parameter, or an odd number of elements to rotate.
    """

    table: Tensor

    def __init__(self, build: BuildContext, rope: RopeParameters, head_dim: int, max_position_embeddings: int) -> None:
        super().__init__()
        rotary_dim = int(head_dim * rope.partial_rotary_factor)
        if rotary_dim < 2 or rotary_dim % 2:
            raise ConfigError(f"rotary embedding turns pairs of elements: head_dim {head_dim} * partial_rotary_factor "
                              f"{rope.partial_rotary_factor} must be even and positive")
        self._dtype = build.dtype
        frequencies, magnitude = rope_frequencies(rope, rotary_dim, max_position_embeddings, build.max_model_len)
        if build.device.type == "meta":  # only the shape matters; arithmetic there would make torch import 70 MB of modules
            table = torch.empty((build.max_model_len, rotary_dim), device="meta")
        else:  # on the host whatever the device is, so that devices agree
            angles = torch.arange(build.max_model_len, dtype=torch.float32)[:, None] * frequencies
            table = (torch.cat((angles.cos(), angles.sin()), dim=-1) * magnitude).to(build.device)
        self.register_buffer("table", table, persistent=False)

    def forward(self, positions: Tensor) -> Rotation:
        """``positions [T]`` int64, all below ``max_model_len``."""
        return Rotation(self.table, positions, self._dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """``x [T, heads, D] -> [T, heads, D]``: element i of the rotated part is paired with element ``i + Dr / 2``."""
    cos, sin = rotation.factors
    rotary_dim = cos.shape[-1]
    turned = x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((second, first), dim=-1) * sin
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), dim=-1)
