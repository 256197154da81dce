"""How checkpoint tensors of any format are divided and fused: data in, slices out."""

from __future__ import annotations

import pytest
import torch

from kvloom.errors import CheckpointError, ConfigError, PluginError
from kvloom.interfaces import LinearShape, MergeRule, ParamSpec
from kvloom.layers.base import LoadableModule
from kvloom.layers.params import Span, in_span, out_spans


def load(shape: LinearShape, specs: dict, tensors: dict) -> LoadableModule:
    layer = LoadableModule("layer")
    layer.add_params(specs, in_span(shape), out_spans(shape), torch.device("cpu"))
    for (shard, suffix), tensor in tensors.items():
        layer.load_param(suffix, shard, tensor)
    layer.post_load()
    return layer


def packed(out_features: int, in_features: int, group: int) -> dict[str, ParamSpec]:
    """A made-up format: 8 output features in an int32, scales for groups of inputs, one scale a tensor, an order that must agree."""
    return {
        "qweight": ParamSpec((in_features, out_features // 8), "int32", in_axis=0, out_axis=1, pack_factor=8, pack_axis=1),
        "scales": ParamSpec((in_features // group, out_features), "float32", in_axis=0, out_axis=1, group=group),
        "input_scale": ParamSpec((), "float32", merge=MergeRule.STACK),
        "order": ParamSpec((in_features,), "int32", in_axis=0, merge=MergeRule.EQUAL),
    }


def tensors_of(specs: dict[str, ParamSpec], start: int) -> dict[str, torch.Tensor]:
    found = {}
    for suffix, spec in specs.items():
        count = int(torch.tensor(spec.shape).prod()) if spec.shape else 1
        first = 0 if suffix == "order" else start
        found[suffix] = torch.arange(first, first + count).reshape(spec.shape).to(getattr(torch, spec.dtype))
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_packed_parts_are_divided_by_their_features_and_fused_side_by_side(size: int) -> None:
    specs = {shard: packed(64, 32, group=16) for shard in ("a", "b")}
    whole = {shard: tensors_of(specs[shard], start) for shard, start in (("a", 1000), ("b", 9000))}
    for rank in range(size):
        shape = LinearShape("layer", 32, (("a", 64), ("b", 64)), "out", rank, size)
        layer = load(shape, specs, {(s, n): t for s, ts in whole.items() for n, t in ts.items()})
        for suffix in ("qweight", "scales"):
            expected = torch.cat([whole[s][suffix].chunk(size, dim=1)[rank] for s in ("a", "b")], dim=1)
            assert torch.equal(layer.tensors[suffix], expected)
        assert layer.tensors["input_scale"].tolist() == [1000, 9000]
        assert torch.equal(layer.tensors["order"], whole["a"]["order"])


@pytest.mark.parametrize("size", [1, 2])
def test_inputs_are_divided_by_whole_groups(size: int) -> None:
    specs = {None: packed(16, 32, group=16)}
    whole = tensors_of(specs[None], 0)
    for rank in range(size):
        shape = LinearShape("layer", 32, ((None, 16),), "in", rank, size)
        layer = load(shape, specs, {(None, n): t for n, t in whole.items()})
        for suffix in ("qweight", "scales", "order"):
            assert torch.equal(layer.tensors[suffix], whole[suffix].chunk(size)[rank])


def test_a_size_that_cuts_through_packed_features_or_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="stored together"):
        load(LinearShape("layer", 32, ((None, 16),), "out", 0, 4), {None: packed(16, 32, 16)}, {})
    with pytest.raises(ConfigError, match="stored together"):
        load(LinearShape("layer", 32, ((None, 16),), "in", 0, 4), {None: packed(16, 32, 16)}, {})


def test_parts_that_must_be_equal_and_are_not_are_refused() -> None:
    specs = {shard: packed(16, 32, 16) for shard in ("a", "b")}
    tensors = {(s, n): t for s in ("a", "b") for n, t in tensors_of(specs[s], 0).items()}
    tensors["b", "order"] = tensors["b", "order"].flip(0)
    with pytest.raises(CheckpointError, match=r"layer\.order: shard 'b' differs"):
        load(LinearShape("layer", 32, (("a", 16), ("b", 16)), "out"), specs, tensors)


def test_a_format_that_contradicts_the_layer_is_the_plugins_mistake() -> None:
    with pytest.raises(PluginError, match="the layer has 64 features there"):
        load(LinearShape("layer", 32, ((None, 64),), "out", 0, 2), {None: {"w": ParamSpec((60, 32), "float32", 1, 0)}}, {})


def test_a_tensor_that_was_not_loaded_is_named_unless_optional() -> None:
    shape = LinearShape("layer", 4, (("a", 4), ("b", 4)))
    spec = ParamSpec((4, 4), "float32", 1, 0)
    with pytest.raises(CheckpointError, match=r"layer\.w was not loaded for shards \['b'\]"):
        load(shape, {s: {"w": spec} for s in ("a", "b")}, {("a", "w"): torch.ones(4, 4)})
    optional = ParamSpec((4, 4), "float32", 1, 0, optional=True)
    assert load(shape, {s: {"w": optional} for s in ("a", "b")}, {}).tensors == {}


@pytest.mark.parametrize(("features", "size"), [(10, 1), (100, 2), (129, 2), (7, 4)])
def test_padded_parts_have_equal_room_and_cover_everything_once(features: int, size: int) -> None:
    spans = [Span.padded_part(features, rank, size, 64) for rank in range(size)]
    assert [i for s in spans for i in range(s.start, s.stop)] == list(range(features))
    assert len({s.room for s in spans}) == 1
    assert size == 1 or spans[0].room % 64 == 0
