"""Checkpoint tensors into a model: names are matched exactly, and nothing is left out, left over or reshaped in silence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch

from kvloom.errors import CheckpointError, InternalError
from kvloom.interfaces import Model, ModuleTarget, ParamSpec, TensorInfo, WeightLoader

LISTED = 10
"""Names of one kind of problem that a message lists; the rest is counted."""
CASTABLE = frozenset({"float16", "bfloat16", "float32", "float64"})
"""Dtypes that are cast into each other. float8 is not one of them: its numbers mean nothing without their scales."""


class Slot(NamedTuple):
    """Where one checkpoint tensor goes."""

    target: ModuleTarget
    suffix: str
    spec: ParamSpec


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded: tensors, their bytes in the files, and the names that the model lists as ignorable."""

    num_tensors: int
    size_bytes: int
    ignored: tuple[str, ...]


def load_weights(model: Model, loader: WeightLoader, directory: Path) -> LoadReport:
    """Fill a model's layers from a checkpoint, one tensor at a time, then let every layer finish (`LoadableLayer.post_load`).

    Anonymous memory grows by the model's own parameters: the tensors are views of the files, and a layer casts while it copies.

    Raises:
        CheckpointError: missing, unused, wrongly shaped or typed tensors, all of them in one message; damaged or unsafe files.
    """
    slots = wanted_slots(model)
    catalog = loader.catalog(directory, wanted_infos(slots))
    wanted = check_catalog(model, slots, catalog, directory)
    left = set(wanted)
    with torch.no_grad():
        for name, tensor in loader.read(list(wanted)):
            slot = wanted.get(name)
            if slot is None or name not in left or tuple(tensor.shape) != slot.spec.shape:
                raise InternalError(f"the loader gave {name} {tuple(tensor.shape)}, wanted once as {slot and slot.spec.shape}")
            left.remove(name)
            slot.target.layer.load_param(slot.suffix, slot.target.shard, tensor)
        if left:
            raise InternalError(f"the loader did not give {sorted(left)[:LISTED]}")
        for layer in {id(t.layer): t.layer for t in model.module_map().values()}.values():
            layer.post_load()
    return LoadReport(len(wanted), sum(catalog[n].size_bytes for n in wanted), tuple(sorted(catalog.keys() - wanted.keys())))


def wanted_tensors(model: Model) -> dict[str, TensorInfo]:
    """What the model asks of a checkpoint: name -> whole shape, dtype of the parameter, bytes in that dtype."""
    return wanted_infos(wanted_slots(model))


def wanted_slots(model: Model) -> dict[str, Slot]:
    """Checkpoint tensor name -> where it goes. A name is a module's prefix, a dot, and a suffix that the module's layer names."""
    slots: dict[str, Slot] = {}
    for prefix, target in model.module_map().items():
        for suffix, spec in target.layer.checkpoint_params(target.shard).items():
            name = f"{prefix}.{suffix}" if prefix else suffix
            if name in slots:
                raise InternalError(f"two modules of {type(model).__name__} ask for {name}")
            slots[name] = Slot(target, suffix, spec)
    return slots


def wanted_infos(slots: Mapping[str, Slot]) -> dict[str, TensorInfo]:
    """Shape, dtype and bytes of each wanted tensor, as `WeightLoader.catalog` takes them."""
    return {name: TensorInfo(s.spec.shape, s.spec.dtype, math.prod(s.spec.shape) * getattr(torch, s.spec.dtype).itemsize)
            for name, s in slots.items()}


def check_catalog(model: Model, slots: Mapping[str, Slot], catalog: Mapping[str, TensorInfo], directory: Path) -> dict[str, Slot]:
    """Compare what is wanted with what is there, from headers alone.

    Returns:
        What to read: the name in the file of every wanted tensor that is there, and where it goes.

    Raises:
        CheckpointError: with every kind of problem at once.
    """
    ours, twice = _our_names(model, catalog)
    missing = [n for n, s in slots.items() if n not in ours and not s.spec.optional]
    unused = [file_name for n, file_name in ours.items() if n not in slots and not _may_be_unused(model, n)]
    present = {ours[n]: slot for n, slot in slots.items() if n in ours}
    shaped = [f"{n}: {list(catalog[n].shape)}, the model needs {list(s.spec.shape)}" for n, s in present.items()
              if catalog[n].shape != s.spec.shape]
    typed = [f"{n}: {catalog[n].dtype}, the model needs {s.spec.dtype}" for n, s in present.items()
             if not _castable(catalog[n].dtype, s.spec.dtype)]
    problems = [
        _listed("tensors are there twice, under two names", twice),
        _listed("tensors are missing", [_with_near_name(n, unused) if i < LISTED else n for i, n in enumerate(missing)]),
        _listed("tensors are used by nothing in the model", unused),
        _listed("tensors have the wrong shape", shaped),
        _listed("tensors have a dtype that cannot be cast", typed),
    ]
    if any(problems):
        raise CheckpointError(f"the checkpoint in {directory} does not fit {type(model).__name__}:\n"
                              + "\n".join(filter(None, problems))
                              + "\nIs config.json the one that belongs to these weights?")
    return present


def _our_names(model: Model, catalog: Mapping[str, TensorInfo]) -> tuple[dict[str, str], list[str]]:
    """Name in the model -> name in the file (`Model.tensor_name`), and those whose name in the model was taken already."""
    ours: dict[str, str] = {}
    twice: list[str] = []
    for file_name in catalog:
        name = model.tensor_name(file_name)
        if ours.setdefault(name, file_name) != file_name:
            twice.append(f"{file_name} and {ours[name]}")
    return ours, twice


def _may_be_unused(model: Model, name: str) -> bool:
    return (any(fnmatchcase(name, pattern) for pattern in model.ignored)
            or any(name.startswith(f"{prefix}.") for prefix in model.other_stage_prefixes()))


def _castable(source: str, target: str) -> bool:
    return source == target or (source in CASTABLE and target in CASTABLE)


def _with_near_name(name: str, candidates: list[str]) -> str:
    near = get_close_matches(name, candidates[:1000], n=1, cutoff=0.8)
    return f"{name} (there is {near[0]})" if near else name


def _listed(what: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f"\n    ... and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return f"  {len(items)} {what}:" + "".join(f"\n    {item[:300]}" for item in items[:LISTED]) + more
