"""A model with fused, tied and plain layers and no forward; checkpoints for it; files with hand-made headers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvloom.interfaces import LayerStateSpec, Model, ModuleTarget, ParamSpec, StateKind


class FusedLayer:
    """Rows of several checkpoint tensors one above the other, in one parameter."""

    def __init__(self, shards: Mapping[str | None, int], width: int | None, dtype: torch.dtype, bias: bool = False) -> None:
        shape = (sum(shards.values()),) + (() if width is None else (width,))
        self.params = {"weight": torch.empty(shape, dtype=dtype)}
        if bias:
            self.params["bias"] = torch.empty(shape[:1], dtype=dtype)
        self.shards = dict(shards)
        self.post_loads = 0

    def checkpoint_params(self, shard: str | None) -> Mapping[str, ParamSpec]:
        rows = self.shards[shard]
        return {suffix: ParamSpec((rows, *p.shape[1:]), str(p.dtype).removeprefix("torch."))
                for suffix, p in self.params.items()}

    def load_param(self, suffix: str, shard: str | None, tensor: Tensor) -> None:
        start = 0
        for name, rows in self.shards.items():
            if name == shard:
                self.params[suffix][start:start + rows].copy_(tensor)
            start += rows

    def post_load(self) -> None:
        self.post_loads += 1


class LoadableModel(Model):
    """`num_layers` layers of fused q, k, v and a norm, over an embedding."""

    ignored = ("*.rotary_emb.inv_freq", "lm_head.weight")

    def __init__(self, config: Any = None, build: Any = None, *, num_layers: int = 2, width: int = 8, vocab_size: int = 32,
                 dtype: torch.dtype = torch.float32) -> None:
        self.layers: dict[str, FusedLayer] = {"model.embed_tokens": FusedLayer({None: vocab_size}, width, dtype)}
        for i in range(num_layers):
            self.layers[f"model.layers.{i}.self_attn"] = FusedLayer({"q": width, "k": width // 2, "v": width // 2}, width, dtype,
                                                                    bias=True)
            self.layers[f"model.layers.{i}.norm"] = FusedLayer({None: width}, None, dtype)

    def forward(self, inputs: Any, ctx: Any) -> Any:
        raise NotImplementedError

    def logits(self, hidden: Any, ctx: Any) -> Any:
        raise NotImplementedError

    def state_specs(self) -> list[LayerStateSpec]:
        return [LayerStateSpec(StateKind.FULL, 1, 4, 4)]

    def module_map(self) -> Mapping[str, ModuleTarget]:
        return {(f"{prefix}.{shard}_proj" if shard else prefix): ModuleTarget(layer, shard)
                for prefix, layer in self.layers.items() for shard in layer.shards}

    def tensors(self) -> dict[str, Tensor]:
        """What was loaded, under checkpoint names."""
        out = {}
        for prefix, layer in self.layers.items():
            for suffix, parameter in layer.params.items():
                parts = parameter.split(list(layer.shards.values()))
                out |= {(f"{prefix}.{s}_proj.{suffix}" if s else f"{prefix}.{suffix}"): p.clone()
                        for s, p in zip(layer.shards, parts, strict=True)}
        return out


def random_tensors(model: LoadableModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A checkpoint for `model`."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(t.shape, generator=generator).to(dtype) for name, t in model.tensors().items()}


def save_sharded(directory: Path, tensors: Mapping[str, Tensor], shards: int) -> dict[str, str]:
    """Write shards and their index; returns the weight map."""
    names = sorted(tensors)
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8:8 + length]), content[8 + length:]


def write_file(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    """A safetensors file with whatever header: bytes are taken as they are, everything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path
