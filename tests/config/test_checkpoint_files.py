"""Where a checkpoint is found, and what of its config.json is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvloom.config.checkpoint import resolve_model_dir
from kvloom.config.generation import end_tokens, read_generation
from kvloom.config.hf_config import overridden
from kvloom.config.model_json import derive_max_model_len, parse_model_config, read_config_file
from kvloom.errors import ModelError
from kvloom.interfaces import ModelConfig

BASE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def hub_cache(root: Path, repository: str, revisions: dict[str, str]) -> Path:
    """A cache as huggingface_hub lays it out: revision name -> text of that revision's config.json."""
    folder = root / f"models--{repository.replace('/', '--')}"
    for i, (name, config) in enumerate(revisions.items()):
        commit = f"{i + 1:040x}"
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(config)
        (snapshot / "model.safetensors").write_bytes(b"")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    return root


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model_dir(str(tmp_path)) == tmp_path


def test_a_hub_id_is_found_in_the_cache_offline_at_each_revision(tmp_path: Path) -> None:
    cache = hub_cache(tmp_path, "acme/tiny", {"main": '{"a": 1}', "v2": '{"a": 2}'})
    found = {revision: resolve_model_dir("acme/tiny", revision, str(cache)) for revision in (None, "main", "v2", f"{2:040x}")}
    read = {revision: json.loads((path / "config.json").read_text())["a"] for revision, path in found.items()}
    assert read == {None: 1, "main": 1, "v2": 2, f"{2:040x}": 2}


@pytest.mark.parametrize(("model", "message"), [
    ("/no/such/directory", "is no directory"), ("./nothing", "is no directory"), ("a/b/c", "is no directory"),
    ("not a name!", "neither a directory nor a valid hub id"), ("acme/missing", "cannot be fetched.*hf download acme/missing"),
])
def test_what_is_neither_is_refused_with_what_to_do(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model_dir(model, download_dir=str(tmp_path))


def test_a_revision_that_is_not_in_the_cache_is_named(tmp_path: Path) -> None:
    cache = hub_cache(tmp_path, "acme/tiny", {"main": "{}"})
    with pytest.raises(ModelError, match="at revision 'v9'.*--revision v9"):
        resolve_model_dir("acme/tiny", "v9", str(cache))


def test_a_directory_without_config_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"has no config\.json \(there is model\.safetensors\)"):
        read_config_file(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"vocab_size": NaN}', "[" * 100_000, "\xff"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match="config.json"):
        read_config_file(tmp_path)


def test_hostile_keys_never_reach_the_model(tmp_path: Path) -> None:
    hostile = {"auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation_internal": "evil/kernel", "trust_remote_code": True,
               "__class__": "x", "model_config": {}, "transformers_weights": "evil"}
    (tmp_path / "config.json").write_text(json.dumps(BASE | hostile))
    raw = read_config_file(tmp_path)
    assert not any(key.startswith("_") for key in raw)
    config = parse_model_config(raw, ModelConfig)
    assert set(config.model_dump()) == set(ModelConfig.model_fields)
    assert config.model_extra is None


@pytest.mark.parametrize("change", [
    {"vocab_size": 0}, {"vocab_size": -5}, {"vocab_size": 2**40}, {"hidden_size": "wide"}, {"num_hidden_layers": 1e9}, {"rms_norm_eps": 0},
    {"num_attention_heads": None}, {"rope_scaling": "yarn"}, {"rope_theta": -1}, {"head_dim": -8}, {"quantization_config": 4},
])
def test_a_wrong_field_is_named(change: dict) -> None:
    with pytest.raises(ModelError, match="config.json cannot be used"):
        parse_model_config(BASE | change, ModelConfig)


def test_old_and_new_rope_keys_mean_the_same() -> None:
    old = parse_model_config(BASE | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, ModelConfig)
    new = parse_model_config(BASE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}, ModelConfig)
    assert old.rope == new.rope
    assert old.rope.rope_type == "linear"


@pytest.mark.parametrize(("rope", "tokens"), [
    ({}, 100), ({"rope_type": "linear", "factor": 4.0}, 400), ({"rope_type": "dynamic", "factor": 2.0}, 200),
    ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 50}, 100),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}, 200),
])
def test_how_long_sequences_may_be(rope: dict, tokens: int) -> None:
    config = parse_model_config(BASE | {"max_position_embeddings": 100, "rope_scaling": rope}, ModelConfig)
    assert derive_max_model_len(config) == tokens


def test_end_tokens_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert end_tokens({"eos_token_id": 2}, read_generation(tmp_path, "auto", None)) == (2, 7)
    assert end_tokens({}, read_generation(tmp_path / "nowhere", "auto", None)) == ()
    with pytest.raises(ModelError, match="eos_token_id"):
        end_tokens({"eos_token_id": "</s>"}, {})


def test_overrides_are_on_top(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert overridden(read_config_file(tmp_path), {"vocab_size": 64})["vocab_size"] == 64


@pytest.mark.parametrize(("given", "window"), [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 8}, 8)])
def test_a_null_says_something_where_the_field_may_be_none(given: dict, window: int | None) -> None:
    import transformers

    from kvloom_models.config import MistralConfig

    raw = {**BASE, "intermediate_size": 8, "num_key_value_heads": None, **given}
    assert parse_model_config(raw, MistralConfig).sliding_window == transformers.MistralConfig(**given).sliding_window == window
    assert parse_model_config(raw, MistralConfig).num_key_value_heads == 2
