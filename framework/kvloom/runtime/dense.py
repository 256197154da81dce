"""Dense layers after pooling, as checkpoints of sentence-transformers have them. Small, in float32, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kvloom.config.sentence_transformers import DenseLayer
from kvloom.errors import CheckpointError
from kvloom.interfaces import TensorInfo, WeightLoader

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x, "Tanh": torch.tanh, "ReLU": functional.relu, "GELU": functional.gelu, "Sigmoid": torch.sigmoid,
    "SiLU": functional.silu,
}
"""By the last part of the class path."""


class DenseLayers:
    """``[n, H] -> [n, out]``, layer after layer.

    Args:
        make_loader: the weight loader of the checkpoint, one a layer.
        device: of the rows.

    Raises:
        CheckpointError: tensors are missing, unused or of another shape.
    """

    def __init__(self, layers: Sequence[DenseLayer], make_loader: Callable[[], WeightLoader], device: torch.device) -> None:
        self._layers = [(*_read(layer, make_loader(), device), ACTIVATIONS[layer.activation]) for layer in layers]

    def __call__(self, x: Tensor) -> Tensor:
        """``[n, H] -> [n, out]``, float32."""
        for weight, bias, activation in self._layers:
            x = activation(functional.linear(x, weight, bias))
        return x


def _read(layer: DenseLayer, loader: WeightLoader, device: torch.device) -> tuple[Tensor, Tensor | None]:
    shapes = {"linear.weight": (layer.out_features, layer.in_features)} | ({"linear.bias": (layer.out_features,)} if layer.bias else {})
    wanted = {name: TensorInfo(shape, "float32", 4 * torch.Size(shape).numel()) for name, shape in shapes.items()}
    found = loader.catalog(layer.directory, wanted)
    if {name: info.shape for name, info in found.items()} != shapes:
        raise CheckpointError(f"{layer.directory} should hold {shapes}, it has {({n: i.shape for n, i in found.items()})}")
    tensors = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in loader.read(list(shapes))}
    return tensors["linear.weight"], tensors.get("linear.bias")
