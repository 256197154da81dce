"""A header that lies is refused before anything is allocated; one that does not is read as the safetensors library reads it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loading_helpers import LoadableModel, random_tensors, split_file, write_file
from safetensors import safe_open
from safetensors.torch import save_file

from kvloom.errors import CheckpointError
from kvloom_plugins.loaders.header import DTYPES, read_header
from kvloom_plugins.loaders.safetensors_loader import SafetensorsLoader


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file(random_tensors(LoadableModel()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def entry(shape: list[int], begin: int, end: int, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", [d for d in DTYPES if d != "F8_E8M0"])
def test_every_dtype_is_read_as_the_library_reads_it(tmp_path: Path, name: str) -> None:
    path = write_file(tmp_path / "a.safetensors", {"x": entry([3, 2], 0, 6 * DTYPES[name][1], name)}, bytes(6 * DTYPES[name][1]))
    info = read_header(path)["x"].info
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("x").dtype == getattr(torch, info.dtype)
    assert info.shape == (3, 2)


def test_scalars_empty_tensors_and_padding_are_fine(tmp_path: Path) -> None:
    header = (b'{"s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, '
              b'"e": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]}}   ')
    tensors = read_header(write_file(tmp_path / "a.safetensors", header, bytes(4)))
    assert {n: t.info.shape for n, t in tensors.items()} == {"s": (), "e": (0, 3)}


@pytest.mark.parametrize(("content", "phrase"), [
    (b"", "has 0 bytes"),
    (b"\x01\x02", "has 2 bytes"),
    ((2**63).to_bytes(8, "little") + b"{}", f"header has {2**63} bytes; the file has 10 bytes"),
    ((3).to_bytes(8, "little") + b"{}", "header has 3 bytes"),
    ((2).to_bytes(8, "little") + b"[]", "starts with b'['"),
    ((8).to_bytes(8, "little") + b'{"\xff": 1}', "not valid"),
    ((5).to_bytes(8, "little") + b'{"a":', "not valid"),
])
def test_a_file_that_is_cut_or_no_header_is_refused(tmp_path: Path, content: bytes, phrase: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert phrase in refused(path)


@pytest.mark.parametrize(("header", "data_bytes", "phrase"), [
    ({"x": entry([4], 0, 5)}, 5, "tensor 'x' has the shape [4] of U8, which is 4 bytes, but data_offsets [0, 5] hold 5"),
    ({"x": entry([4], 4, 0)}, 4, "hold -4"),
    ({"x": entry([4], 0, 4)}, 3, "ends at byte 4 of the data, which has 3 bytes"),
    ({"x": entry([4], 0, 4)}, 5, "take 4 bytes, but the data has 5"),
    ({"x": entry([4], 0, 4), "y": entry([4], 2, 6)}, 6, "'x' and 'y' overlap"),
    ({"x": entry([4], 0, 4), "y": entry([4], 0, 4)}, 4, "overlap"),
    ({"x": entry([4], 0, 4), "y": entry([1], 5, 6)}, 6, "bytes 4 to 5 of the data, before tensor 'y', belong to no tensor"),
    ({"x": entry([-1], 0, 0)}, 0, "shape [-1]"),
    ({"x": entry([2**32, 2**32], 0, 0, "F32")}, 0, "more elements than can be counted"),
    ({"x": entry([2**62, 2**62, 0], 0, 0, "F32")}, 0, "more elements than can be counted"),
    ({"x": entry([2**64], 0, 0)}, 0, "shape"),
    ({"x": entry([1] * 65, 0, 1)}, 1, "up to 64 sizes"),
    ({"x": entry([True], 0, 1)}, 1, "shape [True]"),
    ({"x": entry([1.0], 0, 1)}, 1, "shape [1.0]"),
    ({"x": entry([1], 0, 1, "F4")}, 1, "the dtype 'F4'; known are"),
    ({"x": {**entry([1], 0, 1), "dtype": ["U8"]}}, 1, "dtype"),
    ({"x": {**entry([1], 0, 1), "data_offsets": [0, 1, 2]}}, 1, "data_offsets"),
    ({"x": {**entry([1], 0, 1), "more": 1}}, 1, "nothing else"),
    ({"x": {"dtype": "U8", "shape": [1]}}, 1, "needs dtype, shape and data_offsets"),
    ({"x": [1]}, 1, "needs dtype"),
    ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    (b'{"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "x": [1]}', 1, "'x' is there twice"),
    (b'{"x": {"dtype": "U8", "dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}', 1, "'dtype' is there twice"),
    (b'{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', 1, "not valid"),
    (b'{"x": NaN}', 0, "not valid"),
    (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "not valid"),
    (b'{"x": {"dtype": "U8", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 1]}}', 1, "not valid"),
])
def test_a_header_that_lies_is_refused_with_tensor_and_numbers(tmp_path: Path, header: object, data_bytes: int,
                                                               phrase: str) -> None:
    message = refused(write_file(tmp_path / "a.safetensors", header, bytes(data_bytes)))
    assert phrase in message
    assert len(message) < 1000 + len(str(tmp_path))


def test_what_is_not_a_regular_file_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    assert "not a regular file" in refused(tmp_path / "folder.safetensors")
    assert "does not exist" in refused(tmp_path / "none.safetensors")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.sampled_from([2**31, 2**32, 2**61, 2**63, 2**64, 10**30]), st.floats(),
    st.sampled_from(["F16", "BF16", "F32", "I32", "F64", "U8", "x", ""]), st.lists(st.integers(-2, 2**64), max_size=4),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), st.integers(0, 9), max_size=3),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_header_field_is_refused_or_gives_the_same_bytes(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory,
                                                                    data: st.DataObject) -> None:
    original, content = split_file(checkpoint / "model.safetensors")
    header = copy.deepcopy(original)
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "size", "offset", "name", "entry"]))
    if field in ("size", "offset"):
        target = header[name]["shape" if field == "size" else "data_offsets"]
        target[data.draw(st.integers(0, len(target) - 1))] = data.draw(VALUES)
    elif field == "name":
        header[data.draw(st.text(max_size=8))] = header.pop(name)
    elif field == "entry":
        header[name] = data.draw(VALUES)
    else:
        header[name][field] = data.draw(VALUES)
    assert_refused_or_same_bytes(checkpoint, write_file(tmp_path_factory.mktemp("x") / "model.safetensors", header, content))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_are_refused_or_give_the_same_bytes(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory,
                                                          data: st.DataObject) -> None:
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("x") / "model.safetensors"
    path.write_bytes(content[:data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
    assert_refused_or_same_bytes(checkpoint, path)


def assert_refused_or_same_bytes(checkpoint: Path, changed: Path) -> None:
    """The loader refuses with a `CheckpointError`, or every tensor that kept its name and range has its bytes."""
    original = read_header(checkpoint / "model.safetensors")
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        expected = {n: file.get_tensor(n) for n in original}
    loader = SafetensorsLoader()
    try:
        names = list(loader.catalog(changed.parent, {}))
        got = dict(loader.read(names))
    except CheckpointError:
        return
    ranges = read_header(changed)
    assert {(t.begin, t.end) for t in ranges.values()} >= {(t.begin, t.end) for t in original.values() if t.end > t.begin}
    for name, tensor in got.items():
        twin = next(n for n, t in original.items() if (t.begin, t.end) == (ranges[name].begin, ranges[name].end))
        assert torch.equal(as_bytes(tensor), as_bytes(expected[twin]))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
