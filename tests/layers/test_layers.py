"""Rotary tables, activations and norms against transformers and torch."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvloom.errors import ConfigError, PluginError
from kvloom.interfaces import BuildContext, ForwardContext
from kvloom.interfaces.model_config import RopeParameters
from kvloom.layers import FusedShards, GateUpLinear, LayerNorm
from kvloom.layers.activation import ACTIVATIONS, activation
from kvloom.layers.rope_scaling import rope_frequencies
from kvloom.runtime.comm import LocalComm
from kvloom_quant.unquantized import Unquantized

ROPES = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: "-".join(map(str, r.values())))
@pytest.mark.parametrize("dim", [16, 128])
def test_frequencies_are_transformers(rope: dict, dim: int) -> None:
    config = LlamaConfig(hidden_size=2 * dim, num_attention_heads=2, head_dim=dim, max_position_embeddings=256,
                         rope_parameters={"rope_theta": 10000.0, **rope})
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    got, magnitude = rope_frequencies(RopeParameters(**rope), dim, 256, 256)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert magnitude == pytest.approx(factor)


@pytest.mark.parametrize("max_model_len", [100, 256, 400, 512])
def test_dynamic_frequencies_are_computed_once_for_the_longest_sequence(max_model_len: int) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=256,
                         rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=max_model_len)
    got, _ = rope_frequencies(RopeParameters(rope_type="dynamic", factor=2.0), 32, 256, max_model_len)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rope", "message"), [({"rope_type": "spiral"}, "spiral"), ({"rope_type": "linear"}, "needs factor"),
                                               ({"rope_type": "llama3", "factor": 2.0}, "needs low_freq_factor")])
def test_a_rope_type_that_is_unknown_or_incomplete_is_refused(rope: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rope_frequencies(RopeParameters(**rope), 16, 64, 64)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_transformers(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_is_torchs(bias: bool, dtype: torch.dtype) -> None:
    norm, truth = LayerNorm(build(dtype), "norm", 24, 1e-6, bias=bias), torch.nn.LayerNorm(24, 1e-6, bias=bias)
    for suffix in norm.checkpoint_params(None):
        value = torch.randn(24).to(dtype)
        getattr(truth, suffix).data.copy_(value)
        norm.load_param(suffix, None, value)
    norm.post_load()
    x = 3 + torch.randn(2, 5, 24).to(dtype)
    atol, rtol = (2e-6, 1e-5) if dtype is torch.float32 else (2e-2, 2**-8)  # a result is rounded to 8 bits
    torch.testing.assert_close(norm(x).float(), truth(x.float()), atol=atol, rtol=rtol)


def test_a_tensor_with_several_shards_is_cut_among_them() -> None:
    layer = GateUpLinear(build(torch.float32), "mlp", 6, 4, bias=True)
    whole = FusedShards(layer, ("gate", "up"))
    assert {suffix: spec.shape for suffix, spec in whole.checkpoint_params(None).items()} == {"weight": (8, 6), "bias": (8,)}
    weight, bias, x = torch.randn(8, 6), torch.randn(8), torch.randn(3, 6)
    whole.load_param("weight", None, weight)
    whole.load_param("bias", None, bias)
    whole.post_load()
    torch.testing.assert_close(layer(x, ForwardContext(LocalComm(), ())), torch.nn.functional.linear(x, weight, bias))


def test_a_tensor_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(PluginError, match="no out_axis"):
        FusedShards(LayerNorm(build(torch.float32), "norm", 4, 1e-5), (None,)).checkpoint_params(None)


def build(dtype: torch.dtype) -> BuildContext:
    plain = Unquantized({})
    return BuildContext(dtype, torch.device("cpu"), plain, plain, LocalComm(), 64, dtype, 16, make_backend=lambda spec, i: None)


def test_an_unknown_activation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown activation 'swoosh'; known are gelu"):
        activation("swoosh")
