"""The header of a safetensors file, checked before anything of a tensor's size is allocated. Torch-free.

Format (https://huggingface.co/docs/safetensors, "Format")::

    8 bytes   N, little-endian unsigned
    N bytes   JSON: {"name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {str: str}};
              starts with "{", may end with spaces, has no key twice
    the rest  data; offsets count from its first byte, and the ranges cover it without holes or overlaps

A header is a stranger's input: sizes are compared as Python integers, which do not overflow, and bounded before they are used.
"""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

from kvloom.errors import CheckpointError
from kvloom.interfaces import TensorInfo

MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""
MAX_AXES = 64
"""torch's bound. With `MAX_ELEMENTS` it keeps the product of a shape cheap to compute."""
MAX_ELEMENTS = 2**63 - 1
"""What torch can count. Axes of size 0 are left out of the product, so they hide nothing."""

DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1), "I16": ("int16", 2), "U16": ("uint16", 2), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I32": ("int32", 4), "U32": ("uint32", 4), "F32": ("float32", 4), "I64": ("int64", 8), "U64": ("uint64", 8),
    "F64": ("float64", 8),
}
"""Name in the file -> torch's name, bytes an element."""


class FileTensor(NamedTuple):
    """One entry: what it is, and its byte range within the data."""

    info: TensorInfo
    begin: int
    end: int


def read_header(path: Path) -> dict[str, FileTensor]:
    """Every tensor of a file by name, in the order of the data.

    Raises:
        CheckpointError: anything that the format does not allow, with file, tensor and numbers.
    """
    try:
        if not path.is_file():  # opening a pipe or a device could block
            raise _lie(path, "is not a regular file" if path.exists() else "does not exist")
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            header_bytes = _header_bytes(path, file.read(8), file_bytes)
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    tensors = {name: _entry(path, name, value) for name, value in _parse(path, text).items() if name != "__metadata__"}
    return _check_ranges(path, tensors, file_bytes - 8 - header_bytes)


def _lie(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}. The file is damaged or was not downloaded completely; fetch it again")


def _header_bytes(path: Path, first: bytes, file_bytes: int) -> int:
    if len(first) < 8:
        raise _lie(path, f"has {len(first)} bytes; a safetensors file starts with the 8-byte length of its header")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES or length > file_bytes - 8:
        raise _lie(path, f"says that its header has {length} bytes; the file has {file_bytes} bytes and the format allows "
                         f"headers of up to {MAX_HEADER_BYTES}")
    return length


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """The header's JSON object. Names are valid text, none is there twice at any level."""
    if not text.startswith(b"{"):
        raise _lie(path, f"has a header that starts with {text[:1]!r} instead of {{")
    try:
        header = strict_json(text)
        for name in header:
            name.encode()  # a lone surrogate is valid JSON and no text
    except (ValueError, RecursionError) as error:
        raise _lie(path, f"has a header that is not valid: {str(error)[:200]}") from error
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _lie(path, "has a header whose __metadata__ does not map text to text")
    return dict(header)


def strict_json(text: bytes) -> Any:
    """Parsed JSON. Raises ValueError or RecursionError, also for a key that is there twice, NaN and infinity."""
    return json.loads(text.decode(), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise ValueError(f"the key {_short(name)} is there twice")
        out[name] = value
    return out


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _entry(path: Path, name: str, value: Any) -> FileTensor:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _lie(path, f"tensor {_short(name)} needs dtype, shape and data_offsets and nothing else, got {_short(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {_short(name)} has the dtype {_short(dtype)}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(_is_size(s) for s in shape):
        raise _lie(path, f"tensor {_short(name)} has the shape {_short(shape)}; it must be a list of up to {MAX_AXES} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o) for o in offsets):
        raise _lie(path, f"tensor {_short(name)} has the data_offsets {_short(offsets)}; they must be two byte positions")
    torch_name, element_bytes = DTYPES[dtype]
    if math.prod(s for s in shape if s) * element_bytes > MAX_ELEMENTS:
        raise _lie(path, f"tensor {_short(name)} has the shape {_short(shape)}: more elements than can be counted")
    size_bytes = math.prod(shape) * element_bytes
    if offsets[1] - offsets[0] != size_bytes:
        raise _lie(path, f"tensor {_short(name)} has the shape {_short(shape)} of {dtype}, which is {size_bytes} bytes, "
                         f"but data_offsets {offsets} hold {offsets[1] - offsets[0]}")
    return FileTensor(TensorInfo(tuple(shape), torch_name, size_bytes), offsets[0], offsets[1])


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ELEMENTS


def _short(value: object) -> str:
    """For a message: bounded in length and depth, since a header may hold anything."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    short.maxlist = 8
    return short.repr(value)


def _check_ranges(path: Path, tensors: dict[str, FileTensor], data_bytes: int) -> dict[str, FileTensor]:
    """The ranges cover the data exactly: no overlap, no hole, nothing outside."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    covered, previous = 0, ""
    for name, tensor in ordered:
        if tensor.end > data_bytes:
            raise _lie(path, f"tensor {_short(name)} ends at byte {tensor.end} of the data, which has {data_bytes} bytes")
        if tensor.begin < covered:
            raise _lie(path, f"tensors {_short(previous)} and {_short(name)} overlap: one ends at byte {covered}, "
                             f"the other begins at {tensor.begin}")
        if tensor.begin > covered:
            raise _lie(path, f"bytes {covered} to {tensor.begin} of the data, before tensor {_short(name)}, belong to no tensor")
        covered, previous = tensor.end, name
    if covered != data_bytes:
        raise _lie(path, f"the tensors take {covered} bytes, but the data has {data_bytes} bytes")
    return dict(ordered)
