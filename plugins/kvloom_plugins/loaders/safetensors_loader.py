"""safetensors checkpoints: one file, or shards with an index. Other formats are refused with the command that converts them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvloom.errors import CheckpointError, InternalError
from kvloom.interfaces import TensorInfo, WeightLoader
from kvloom_plugins.loaders.header import MAX_HEADER_BYTES, FileTensor, read_header, strict_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""Formats of torch.save: they hold pickles, which run code when they are read."""


class SafetensorsLoader(WeightLoader):
    """Reads ``model.safetensors``, else the shards of ``model.safetensors.index.json``, else every ``*.safetensors``.

    Files are memory-mapped, and tensors are views of the map: reading one takes no anonymous memory.
    """

    def __init__(self) -> None:
        self._files: dict[str, Path] = {}
        self._tensors: dict[str, FileTensor] = {}

    def catalog(self, directory: Path, wanted: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """See `WeightLoader.catalog`."""
        index = None if (directory / SINGLE).exists() else _read_index(directory)
        files = _files(directory) if index is None else [directory / name for name in sorted(set(index.values()))]
        self._files, self._tensors = {}, {}
        for path in files:
            for name, tensor in read_header(path).items():
                if name in self._files:
                    raise CheckpointError(f"tensor {name!r} is in two files of {directory}: {self._files[name].name} "
                                          f"and {path.name}")
                self._files[name], self._tensors[name] = path, tensor
        _check_index(directory, index or {}, self._files)
        return {name: tensor.info for name, tensor in self._tensors.items()}

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """See `WeightLoader.read`: file by file, in the order of the bytes."""
        unknown = [n for n in names if n not in self._files]
        if unknown:
            raise InternalError(f"{unknown[:3]} are not in the catalog")
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        for path, mine in by_file.items():
            yield from _read_file(path, sorted(mine, key=lambda n: self._tensors[n].begin))


def _read_file(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> file name within the directory, or None when there is no index.

    Raises:
        CheckpointError: not a map of text to names of safetensors files that lie in the directory itself.
    """
    path = directory / INDEX
    if not path.exists():
        return None
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes; an index of more than {MAX_HEADER_BYTES} is refused")
        content = strict_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error)[:200]}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{path}: needs {{"weight_map": {{tensor name: file name}}}}')
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise CheckpointError(f"{path}: tensor {name!r} is said to be in {file!r}; only the name of a .safetensors file "
                                  "in the same folder is taken, not a path")
    return weight_map


def _is_plain(file: str) -> bool:
    """A file name alone: nothing that leaves the folder. (Links are fine: the hub's cache is made of them.)"""
    return file.endswith(".safetensors") and not set(file) & set("/\\\0:")


def _check_index(directory: Path, index: Mapping[str, str], files: Mapping[str, Path]) -> None:
    """Every tensor of the index is where it says. One that no index lists is kept: the engine decides whether it is unused."""
    wrong = [f"{name!r} ({file})" for name, file in index.items() if name not in files or files[name].name != file]
    if wrong:
        raise CheckpointError(f"{directory / INDEX}: {len(wrong)} tensors are not in the file that it names: "
                              f"{', '.join(wrong[:10])}{' ...' if len(wrong) > 10 else ''}. Fetch the checkpoint again")


def _files(directory: Path) -> list[Path]:
    """The files of a checkpoint without an index."""
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise _no_safetensors(directory)
    return files


def _no_safetensors(directory: Path) -> CheckpointError:
    unsafe = sorted(p.name for p in directory.glob("*") if p.suffix in UNSAFE_SUFFIXES)
    if not unsafe:
        return CheckpointError(f"no weights in {directory}: expected {SINGLE}, or {INDEX} and its shards")
    code = (f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(directory)!r}, "
            f"dtype='auto').save_pretrained({str(directory) + '-safetensors'!r})")
    return CheckpointError(
        f"{directory} has its weights in {', '.join(unsafe[:3])}{' ...' if len(unsafe) > 3 else ''}: files that run code "
        "when they are read. kvloom reads safetensors only. If you trust whoever made them, convert them once:\n"
        f"    python -c {shlex.quote(code)}\nand copy the tokenizer's files beside the result.")
