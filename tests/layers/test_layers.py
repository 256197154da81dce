"""Rotary tables, activations and norms against transformers and torch."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvloom.errors import ConfigError
from kvloom.interfaces.model_config import RopeParameters
from kvloom.layers.activation import ACTIVATIONS, activation
from kvloom.layers.rope_scaling import rope_frequencies

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


def test_an_unknown_activation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown activation 'swoosh'; known are gelu"):
        activation("swoosh")
