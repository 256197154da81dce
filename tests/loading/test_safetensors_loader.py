"""Which files make a checkpoint, and what is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from loading_helpers import LoadableModel, random_tensors, save_sharded
from safetensors.torch import save_file

from kvloom.errors import CheckpointError
from kvloom.runtime.weights import wanted_tensors
from kvloom_plugins.loaders.dummy import DummyLoader
from kvloom_plugins.loaders.plugin import kvloom_register_loaders
from kvloom_plugins.loaders.safetensors_loader import SafetensorsLoader

TENSORS = random_tensors(LoadableModel())
INDEX = "model.safetensors.index.json"


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    loader = SafetensorsLoader()
    return dict(loader.read(list(loader.catalog(directory, {}))))


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], expected[n]) for n in expected)


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_all(directory)
    return str(error.value)


def change_index(directory: Path, change: dict[str, object]) -> None:
    path = directory / INDEX
    content = json.loads(path.read_text())
    content["weight_map"] |= change
    path.write_text(json.dumps(content))


def test_one_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_same(read_all(tmp_path), TENSORS)


def test_shards_with_an_index(tmp_path: Path) -> None:
    save_sharded(tmp_path, TENSORS, 3)
    assert_same(read_all(tmp_path), TENSORS)


def test_files_without_an_index(tmp_path: Path) -> None:
    half = dict(list(TENSORS.items())[:4])
    save_file(half, tmp_path / "b.safetensors")
    save_file({n: t for n, t in TENSORS.items() if n not in half}, tmp_path / "a.safetensors")
    assert_same(read_all(tmp_path), TENSORS)


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"stale": torch.zeros(1)}, 1)
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_same(read_all(tmp_path), TENSORS)


def test_links_into_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_sharded(blobs, TENSORS, 2)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert_same(read_all(snapshot), TENSORS)


@pytest.mark.parametrize("file", [
    "../outside.safetensors", "/etc/outside.safetensors", "sub/a.safetensors", "..\\a.safetensors", "C:a.safetensors", "..", "",
    "a.safetensors\0", "model.bin", 3, None, ["a.safetensors"],
])
def test_an_index_cannot_name_a_path(tmp_path: Path, file: object) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"outside": torch.zeros(1)}, tmp_path / "outside.safetensors")
    save_sharded(directory, TENSORS, 2)
    change_index(directory, {"outside": file})
    message = refused(directory)
    assert "'outside' is said to be in" in message
    assert "not a path" in message


@pytest.mark.parametrize("content", [
    b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff", b"[" * 100_000,
    b'{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}',
])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX).write_bytes(content)
    assert INDEX in refused(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_sharded(tmp_path, TENSORS, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors: does not exist" in refused(tmp_path)


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path: Path) -> None:
    weight_map = save_sharded(tmp_path, TENSORS, 2)
    name = "model.embed_tokens.weight"
    other = next(f for f in weight_map.values() if f != weight_map[name])
    change_index(tmp_path, {name: other, "model.ghost.weight": other})
    message = refused(tmp_path)
    assert f"2 tensors are not in the file that it names: '{name}' ({other}), 'model.ghost.weight' ({other})" in message


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    save_file({"model.embed_tokens.weight": torch.zeros(1)}, tmp_path / "b.safetensors")
    assert "'model.embed_tokens.weight' is in two files" in refused(tmp_path)


def test_a_tensor_that_no_index_lists_is_still_in_the_catalog(tmp_path: Path) -> None:
    save_sharded(tmp_path, TENSORS, 1)
    content = json.loads((tmp_path / INDEX).read_text())
    del content["weight_map"]["model.embed_tokens.weight"]
    (tmp_path / INDEX).write_text(json.dumps(content))
    assert_same(read_all(tmp_path), TENSORS)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "it's a model"
    directory.mkdir()
    (directory / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    message = refused(directory)
    assert name in message
    command = next(line for line in message.splitlines() if line.startswith("    python -c "))
    code = shlex.split(command)[2]
    compile(code, "command", "exec")
    assert f"from_pretrained({str(directory)!r}" in code
    assert "save_pretrained(" in code


def test_a_folder_without_weights_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert f"no weights in {tmp_path}: expected model.safetensors" in refused(tmp_path)


def test_a_file_cut_after_its_header_was_checked_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    loader = SafetensorsLoader()
    names = list(loader.catalog(tmp_path, {}))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        list(loader.read(names))


def test_dummy_numbers_follow_from_names_and_are_small() -> None:
    model = LoadableModel(dtype=torch.bfloat16)
    wanted = wanted_tensors(model)

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        loader = DummyLoader()
        return dict(loader.read([n for n in loader.catalog(Path("nowhere"), wanted) if n in names]))

    first, alone = read(list(wanted)), read(["model.layers.1.norm.weight"])
    assert torch.equal(first["model.layers.1.norm.weight"], alone["model.layers.1.norm.weight"])
    assert {n: (tuple(t.shape), t.dtype) for n, t in first.items()} == {n: (i.shape, torch.bfloat16) for n, i in wanted.items()}
    for name, tensor in first.items():
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        assert (tensor.float() - centre).abs().max() < 0.2, name
    assert not torch.equal(first["model.layers.0.self_attn.q_proj.weight"], first["model.layers.1.self_attn.q_proj.weight"])


def test_kvloom_register_loaders_offers_the_formats() -> None:
    offered = {}

    class Registrar:
        def add(self, name: str, target: str, **_: object) -> None:
            offered[name] = target.split(":")[1]

    kvloom_register_loaders(Registrar())
    assert offered == {"auto": "SafetensorsLoader", "safetensors": "SafetensorsLoader", "dummy": "DummyLoader"}
