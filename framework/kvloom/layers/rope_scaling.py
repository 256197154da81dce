"""Frequencies of the rotary embedding for each ``rope_type``: how a model is stretched beyond the context it was trained for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from kvloom.errors import ConfigError
from kvloom.interfaces.model_config import RopeParameters


@dataclass(frozen=True)
class _Scaling:
    """What a rope type computes from. `trained_tokens`: ``max_position_embeddings``."""

    rope: RopeParameters
    dim: int
    trained_tokens: int
    max_model_len: int

    def plain(self, theta: float | None = None) -> Tensor:
        """``theta^(-2i / dim)`` for each pair i, ``[dim / 2]`` float32."""
        theta = self.rope.rope_theta if theta is None else theta
        return 1.0 / theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)

    @property
    def original_tokens(self) -> int:
        """The context before stretching."""
        return self.rope.original_max_position_embeddings or self.trained_tokens


def rope_frequencies(rope: RopeParameters, dim: int, max_position_embeddings: int, max_model_len: int) -> tuple[Tensor, float]:
    """Angle per position of each pair, ``[dim / 2]`` float32, and a factor on the cosines and sines.

    Args:
        rope: from config.json.
        dim: rotated elements of a head, even.
        max_position_embeddings: from config.json.
        max_model_len: longest sequence of this engine; only ``dynamic`` reads it.

    Raises:
        ConfigError: an unknown ``rope_type``, or one of its parameters is missing.
    """
    if rope.rope_type not in ROPE_TYPES:
        raise ConfigError(f"rope_type {rope.rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    return ROPE_TYPES[rope.rope_type](_Scaling(rope, dim, max_position_embeddings, max_model_len))


def _default(s: _Scaling) -> tuple[Tensor, float]:
    return s.plain(), 1.0


def _linear(s: _Scaling) -> tuple[Tensor, float]:
    """Positions are divided by `factor` (Chen et al., 2023)."""
    return s.plain() / _required(s.rope, "factor"), 1.0


def _dynamic(s: _Scaling) -> tuple[Tensor, float]:
    """NTK-aware: theta grows with the longest sequence. Computed once, for max_model_len, so that cached keys stay valid.

    Up to max_position_embeddings it is the default type; above, short sequences are stretched like long ones.
    """
    factor = _required(s.rope, "factor")
    longest = max(s.max_model_len, s.trained_tokens)
    if longest == s.trained_tokens or s.dim == 2:  # one pair turns by 1 whatever theta is
        return s.plain(), 1.0
    growth = factor * longest / s.trained_tokens - (factor - 1)
    return s.plain(s.rope.rope_theta * growth ** (s.dim / (s.dim - 2))), 1.0


def _llama3(s: _Scaling) -> tuple[Tensor, float]:
    """Llama 3.1: slow pairs are divided by `factor`, fast ones left alone, those between blended."""
    factor = _required(s.rope, "factor")
    low, high = _required(s.rope, "low_freq_factor"), _required(s.rope, "high_freq_factor")
    if high <= low:
        raise ConfigError(f"rope_type llama3 needs high_freq_factor > low_freq_factor, got {high} and {low}")
    frequencies = s.plain()
    turns = s.original_tokens / (2 * math.pi / frequencies)  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / factor + keep * frequencies, 1.0


def _yarn(s: _Scaling) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023): as llama3 with a ramp over pair indices, and attention made sharper by a factor."""
    rope = s.rope
    factor = rope.factor if "factor" in rope.model_fields_set else s.trained_tokens / s.original_tokens
    first, last = (_pair_that_turns(s, turns) for turns in (rope.beta_fast or 32, rope.beta_slow or 1))
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, s.dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    divide = ((torch.arange(s.dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    frequencies = s.plain()
    return frequencies / factor * divide + frequencies * (1 - divide), _yarn_magnitude(rope, factor)


def _pair_that_turns(s: _Scaling, turns: float) -> float:
    """Index (a fraction) of the pair that turns so often within the original context."""
    return s.dim * math.log(s.original_tokens / (turns * 2 * math.pi)) / (2 * math.log(s.rope.rope_theta))


def _yarn_magnitude(rope: RopeParameters, factor: float) -> float:
    """``attention_factor`` if given, else the paper's ``0.1 ln(factor) + 1`` or its DeepSeek variant with two weights."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _required(rope: RopeParameters, name: str) -> float:
    value = getattr(rope, name)
    if name not in rope.model_fields_set or value is None:
        raise ConfigError(f"rope_type {rope.rope_type} needs {name} in config.json's rope_parameters (or rope_scaling)")
    return float(value)


ROPE_TYPES: Mapping[str, Callable[[_Scaling], tuple[Tensor, float]]] = MappingProxyType({
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
})
