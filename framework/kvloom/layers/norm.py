"""Normalisation: by the root mean square (Zhang and Sennrich, 2019), and by mean and variance (Ba et al., 2016)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from kvloom.interfaces.model import BuildContext
from kvloom.interfaces.quant import ParamSpec
from kvloom.layers.base import LoadableModule, dtype_name
from kvloom.layers.params import Span
from kvloom_kernels.norm import rms_norm, rms_norm_add


class RMSNorm(LoadableModule):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis; every rank has all of it.

    The mean is taken in float32; the quotient is rounded to x's dtype before it is multiplied with the weight, as the
    Llama family was trained.

    Args:
        prefix: checkpoint module prefix.
        width: length of the normalised axis: the hidden size, or the head dimension for per-head norms.
        eps: added to the mean of squares.
    """

    def __init__(self, build: BuildContext, prefix: str, width: int, eps: float) -> None:
        super().__init__(prefix)
        self.eps = eps
        self.add_params({None: {"weight": ParamSpec((width,), dtype_name(build.dtype))}}, Span.all_of(width),
                        {None: Span.all_of(width)}, build.device)

    @property
    def gain(self) -> Tensor:
        """The weight, ``[width]``."""
        return self.tensors["weight"]

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., width] -> [..., width]``."""
        return rms_norm(x, self.tensors["weight"], self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(norm(residual + x), residual + x)``; a residual of None starts the stream with x."""
        if residual is None:
            return self(x), x
        return rms_norm_add(x, residual, self.tensors["weight"], self.eps)


class LayerNorm(LoadableModule):
    """``(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`` over the last axis, in float32; every rank has all of it.

    Args:
        prefix: checkpoint module prefix.
        width: length of the normalised axis.
        eps: added to the variance.
        bias: whether the checkpoint has a bias.
    """

    def __init__(self, build: BuildContext, prefix: str, width: int, eps: float, *, bias: bool = True) -> None:
        super().__init__(prefix)
        self.width, self.eps = width, eps
        spec = ParamSpec((width,), dtype_name(build.dtype))
        self.add_params({None: {"weight": spec, "bias": spec} if bias else {"weight": spec}}, Span.all_of(width),
                        {None: Span.all_of(width)}, build.device)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., width] -> [..., width]``."""
        return functional.layer_norm(x, (self.width,), self.tensors["weight"], self.tensors.get("bias"), self.eps)
