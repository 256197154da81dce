"""Every parameter is in one of three states, every wrong value is refused with its name, every value knows where it came from."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest
from parameter_helpers import engine, scores

from kvloom import LLM
from kvloom.config import OTHER_ARGS, RENAMED, SECTION_OF, SECTIONS, EngineConfig, NoEffect, Unsupported
from kvloom.config.cache import parse_bytes
from kvloom.errors import ConfigError, UnknownKeyError, UnsupportedFeatureError

REFERENCE_PARAMETERS = [
    "model", "tokenizer", "tokenizer_mode", "skip_tokenizer_init", "trust_remote_code", "allowed_local_media_path",
    "tensor_parallel_size", "dtype", "quantization", "revision", "tokenizer_revision", "seed", "gpu_memory_utilization", "swap_space",
    "cpu_offload_gb", "enforce_eager", "max_seq_len_to_capture", "disable_custom_all_reduce", "disable_async_output_proc", "hf_overrides",
    "mm_processor_kwargs", "task", "override_pooler_config", "compilation_config",
]
"""vLLM 0.8's LLM constructor, in order."""
STARRED = """
max_model_len load_format download_dir generation_config override_generation_config enable_sleep_mode max_logprobs block_size
enable_prefix_caching kv_cache_dtype num_gpu_blocks_override swap_space cpu_offload_gb gpu_memory_utilization max_num_batched_tokens
max_num_seqs enable_chunked_prefill scheduling_policy tensor_parallel_size pipeline_parallel_size distributed_executor_backend enable_lora
max_loras max_lora_rank limit_mm_per_prompt mm_processor_kwargs speculative_config guided_decoding_backend disable_log_stats
""".split()
"""EngineArgs that offline users really use."""
STATES = {**{name: SECTIONS[section].state(name) for name, section in SECTION_OF.items()},
          **{name: other.state for name, other in OTHER_ARGS.items()}}
OTHER_VALUE = "something else"
"""Of the parameters in `OTHER_ARGS`: no such value has a meaning."""
UNSUPPORTED_VALUES = {
    "task": "transcription", "tensor_parallel_size": 2, "pipeline_parallel_size": 2, "enable_lora": True, "max_loras": 2,
    "max_lora_rank": 8, "limit_mm_per_prompt": {"image": 1}, "mm_processor_kwargs": {"x": 1},
    "speculative_config": {"method": "ngram"},
}
NO_EFFECT_VALUES = {
    "gpu_memory_utilization": 0.5, "swap_space": 1.0, "cpu_offload_gb": 1.0, "enforce_eager": True, "max_seq_len_to_capture": 100,
    "disable_custom_all_reduce": True, "disable_async_output_proc": True, "compilation_config": 3,
    "use_tqdm_on_load": False, "override_neuron_config": {"x": 1}, "tokenizer_pool_size": 4, "prefix_caching_hash_algo": "sha256",
    "calculate_kv_scales": True, "preemption_mode": "swap", "use_v2_block_manager": False, "max_num_partial_prefills": 4,
    "max_long_partial_prefills": 2, "scheduler_delay_factor": 0.5, "num_scheduler_steps": 8, "multi_step_stream_outputs": False,
    "num_lookahead_slots": 2, "disable_cascade_attn": True, "async_scheduling": True, "max_parallel_loading_workers": 2,
    "ray_workers_use_nsight": True, "disable_mm_preprocessor_cache": True, "disable_chunked_mm_input": True,
}
WRONG_VALUES = {
    "gpu_memory_utilization": [0, 1.5, True], "swap_space": [-1.0, "4"], "cpu_offload_gb": [-1.0, "4"], "enforce_eager": ["yes", 1], "max_seq_len_to_capture": [0, -1, "8192"],
    "disable_custom_all_reduce": [1], "disable_async_output_proc": ["x"],
    "compilation_config": [4, -1, True, 1.0, "3", {"level": 4}, {"mode": "fast"}, {1: 2}], "use_tqdm_on_load": ["no"],
    "override_neuron_config": [1, "x"], "tokenizer_pool_size": [-1, 1.5, True], "tokenizer_pool_type": [3], "tokenizer_pool_extra_config": [3],
    "logits_processor_pattern": [3], "prefix_caching_hash_algo": ["md5", None], "calculate_kv_scales": ["yes"], "preemption_mode": ["drop"],
    "use_v2_block_manager": [2], "max_num_partial_prefills": [0, True], "max_long_partial_prefills": [-1, "2"],
    "scheduler_delay_factor": [-1.0, float("nan"), "x"], "num_scheduler_steps": [0, 2.5], "multi_step_stream_outputs": ["x"],
    "num_lookahead_slots": [-1], "disable_cascade_attn": [3], "async_scheduling": ["x"], "max_parallel_loading_workers": [0, "x"],
    "ray_workers_use_nsight": ["x"], "disable_mm_preprocessor_cache": [0], "disable_chunked_mm_input": ["x"],
    "show_hidden_metrics_for_version": [3],
}
"""Of parameters without effect: what vLLM does not take either."""


def test_the_constructor_has_the_reference_parameters_in_order() -> None:
    parameters = list(inspect.signature(LLM.__init__).parameters)
    assert parameters[1:-1] == REFERENCE_PARAMETERS


def test_every_parameter_of_the_reference_and_every_starred_one_is_known() -> None:
    assert [n for n in (*REFERENCE_PARAMETERS, *STARRED) if n not in SECTION_OF] == []


def test_constructor_defaults_are_the_sections_defaults() -> None:
    for name, parameter in inspect.signature(LLM.__init__).parameters.items():
        if name in SECTION_OF and name not in ("model", "seed"):
            assert parameter.default == SECTIONS[SECTION_OF[name]].model_fields[name].get_default(), name


def default_of(name: str) -> Any:
    return OTHER_ARGS[name].default if name in OTHER_ARGS else SECTIONS[SECTION_OF[name]].model_fields[name].get_default()


@pytest.mark.parametrize("name", [n for n, s in STATES.items() if isinstance(s, Unsupported)])
def test_unsupported_parameters__are_refused_with_what_works(name: str) -> None:
    state, value = STATES[name], UNSUPPORTED_VALUES.get(name, OTHER_VALUE)
    with pytest.raises(UnsupportedFeatureError) as caught:
        LLM("/nowhere", **{name: value})  # before anything is read
    error = caught.value
    assert (error.parameter, error.value, error.works) == (name, value, state.works)
    assert error.works in str(error)
    for works in (default_of(name), *state.values):
        assert EngineConfig.from_kwargs(model="m", **{name: works}).notes == ()


@pytest.mark.parametrize(("name", "value"), [(name, value) for section in SECTIONS.values() for name in section.model_fields
                                             for value in section.not_yet(name)])
def test_values_that_come_later__are_refused_with_what_to_do(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedFeatureError, match=f"{name}='{value}' is not supported so far; ") as caught:
        LLM("/nowhere", **{name: value})  # before anything is read
    assert caught.value.works == SECTIONS[SECTION_OF[name]].not_yet(name)[value]


@pytest.mark.parametrize("name", [n for n, s in STATES.items() if isinstance(s, NoEffect)])
def test_parameters_without_effect__refuse_what_makes_no_sense(name: str) -> None:
    for value in WRONG_VALUES[name]:
        with pytest.raises(ConfigError, match=re.escape(f"{name}{'' if isinstance(value, dict) else f'={value!r}'}")):
            EngineConfig.from_kwargs(model="m", **{name: value})


@pytest.fixture(scope="module")
def plain(small_checkpoint: Path) -> tuple[list[int], float]:
    """What the checkpoint computes."""
    with engine(small_checkpoint) as llm:
        return scores(llm)


@pytest.mark.parametrize("name", [n for n, s in STATES.items() if isinstance(s, NoEffect)])
def test_parameters_without_effect__change_nothing_and_are_named_once_with_the_reason(small_checkpoint: Path, plain: tuple, capsys,
                                                                                      name: str) -> None:
    value = NO_EFFECT_VALUES.get(name, OTHER_VALUE)
    assert EngineConfig.from_kwargs(model="m", **{name: default_of(name)}).notes == ()
    with engine(small_checkpoint, **{name: value}) as llm:
        assert scores(llm) == plain
        assert llm.llm_engine.config.notes == (f"{name}={value!r} has no effect: {STATES[name].reason}",)
    assert capsys.readouterr().err.count(f"{name}={value!r} has no effect") == 1


RENAMED_VALUES = {"kv_cache_memory_bytes": 2**20, "max_seq_len": 100, "pooler_config": None, "additional_config": {"a": {"b": 1}}, "structured_outputs_backend": "auto"}


@pytest.mark.parametrize("name", RENAMED)
def test_names_of_other_versions__are_taken_with_a_note(name: str) -> None:
    ours, value = RENAMED[name], RENAMED_VALUES[name]
    config = EngineConfig.from_kwargs(model="m", **{name: value})
    assert getattr(getattr(config, SECTION_OF[ours]), ours) == value
    assert config.notes == (f"{name} is called {ours} here",)
    with pytest.raises(ConfigError, match=f"{name} and {ours} mean the same"):
        EngineConfig.from_kwargs(model="m", **{name: value, ours: value})


def test_an_unknown_name_is_a_type_error_with_the_near_name() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_num_seq'; did you mean 'max_num_seqs'"):
        LLM("m", max_num_seq=1)


@pytest.mark.parametrize(("values", "message"), [
    ({"max_num_seqs": 0}, "max_num_seqs=0"), ({"max_num_seqs": True}, "max_num_seqs=True"), ({"max_num_seqs": "5"}, "max_num_seqs='5'"),
    ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"), ({"gpu_memory_utilization": float("nan")}, "nan"),
    ({"swap_space": -1.0}, "swap_space=-1.0"), ({"dtype": "int8"}, "Unknown dtype"), ({"seed": 1.5}, "seed=1.5"),
    ({"task": "sing"}, "task='sing'"), ({"kv_cache_memory": "4 GiBs"}, "4 GiBs"), ({"kv_cache_memory": 0}, "kv_cache_memory=0"),
    ({"max_model_len": 1}, "max_model_len=1"), ({"plugins": "acme"}, "plugins='acme'"), ({"model": ""}, "model=''"),
    ({"num_gpu_blocks_override": 1}, "num_gpu_blocks_override=1"), ({"hf_overrides": [1]}, "hf_overrides"),
    ({"kv_cache_dtype": "int4"}, "kv_cache_dtype='int4'"), ({"device": "tpu"}, "device='tpu'"), ({"config_format": "xml"}, "config_format='xml'"),
    ({"model_impl": "jax"}, "model_impl='jax'"), ({"served_model_name": []}, "must be a name"), ({"served_model_name": ["a", ""]}, "must be a name"),
    ({"served_model_name": 3}, "served_model_name"), ({"rope_theta": 0.0}, "rope_theta=0.0"), ({"rope_theta": float("inf")}, "rope_theta=inf"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear'"), ({"hf_config_path": ""}, "hf_config_path=''"), ({"ignore_patterns": 3}, "ignore_patterns"),
    ({"model_loader_extra_config": "x"}, "model_loader_extra_config='x'"), ({"disable_sliding_window": 1}, "disable_sliding_window=1"),
    ({"chat_template": ""}, "chat_template=''"), ({"chat_template": "/no/file"}, "no Jinja text"), ({"trust_remote_code": "yes"}, "trust_remote_code='yes'"),
    ({"code_revision": "v1"}, "code_revision='v1' needs trust_remote_code=True"), ({"allowed_local_media_path": "/no/such"}, "does not exist"),
    ({"allowed_local_media_path": __file__}, "is no directory"), ({"scheduler_cls": 3}, "scheduler_cls=3"), ({"scheduler_cls": "nodots"}, "scheduler_cls='nodots'"),
    ({"scheduler_cls": "a.B", "scheduling_policy": "priority"}, "mean the same"), ({"worker_cls": "a b.C"}, "worker_cls='a b.C'"),
    ({"worker_extension_cls": 1}, "worker_extension_cls=1"), ({"logits_processors": "a.B"}, "logits_processors='a.B'"),
    ({"logits_processors": [3]}, "logits_processors[0]=3"), ({"disable_log_stats": "no"}, "disable_log_stats='no'"),
])
def test_a_wrong_value_is_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        EngineConfig.from_kwargs(**{"model": "m", **values})


def test_several_wrong_values_of_a_section_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"max_num_seqs=0.*long_prefill_token_threshold=-1"):
        EngineConfig.from_kwargs(model="m", max_num_seqs=0, long_prefill_token_threshold=-1)


def test_dtypes_are_taken_by_name_in_any_case_and_as_torch_dtypes() -> None:
    import torch

    for given, meant in (("Half", "float16"), ("FLOAT", "float32"), (torch.bfloat16, "bfloat16"), ("auto", "auto")):
        assert EngineConfig.from_kwargs(model="m", dtype=given).model.dtype == meant


def test_none_means_the_default() -> None:
    config = EngineConfig.from_kwargs(model="m", block_size=None, max_num_seqs=None, enable_prefix_caching=None, seed=None,
                                      enable_chunked_prefill=None, distributed_executor_backend=None)
    assert config == EngineConfig.from_kwargs(model="m")


@pytest.mark.parametrize(("text", "size_bytes"), [("4GiB", 4 * 2**30), ("512 MB", 512 * 10**6), ("1.5kib", 1536), ("7", 7)])
def test_memory_is_taken_as_text(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes
    assert EngineConfig.from_kwargs(model="m", kv_cache_memory=text).cache.kv_cache_memory == size_bytes


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_gives_the_same_configuration_as_arguments(tmp_path: Path) -> None:
    file = write(tmp_path / "engine.yaml", "model: m\nmax_num_seqs: 7\nkv_cache_memory: 1GiB\nplugins: [a]\nhf_overrides: {x: 1}\n"
                                           "plugin_config:\n  a: {b: 2}\n")
    assert EngineConfig.from_file(file) == EngineConfig.from_kwargs(
        model="m", max_num_seqs=7, kv_cache_memory="1GiB", plugins=["a"], hf_overrides={"x": 1}, plugin_config={"a": {"b": 2}})


def test_every_value_knows_where_it_came_from(tmp_path: Path) -> None:
    file = write(tmp_path / "engine.yaml", "model: m\n# a comment\nmax_num_seqs: 7\nhf_token: very-secret\n")
    rows = {name: (value, origin) for name, value, origin in EngineConfig.from_file(file, block_size=8).rows()}
    assert rows["max_num_seqs"] == (7, f"{file}:3")
    assert rows["block_size"] == (8, "argument")
    assert rows["seed"] == (0, "default")
    assert rows["hf_token"] == ("***", f"{file}:4")
    assert set(rows) == set(SECTION_OF)


@pytest.mark.parametrize(("text", "message"), [
    ("model: m\n\nmax_num_sqs: 7\n", r"engine\.yaml:3: unknown key 'max_num_sqs'; did you mean 'max_num_seqs'"),
    ("model: m\nmax_num_seqs: 0\n", r"engine\.yaml:2: max_num_seqs=0"),
    ("model: m\nmodel: n\n", r"engine\.yaml:2: 'model' is there twice"),
    ("- model\n", r"engine\.yaml:1: expected"),
    ("model: [\n", "not valid YAML"),
    ("model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ("", "model is missing"),
])
def test_a_mistake_in_a_file_is_pointed_at(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_file(write(tmp_path / "engine.yaml", text))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing.yaml: cannot be read"):
        EngineConfig.from_file(tmp_path / "nothing.yaml")
    with pytest.raises(UnknownKeyError):
        EngineConfig.from_file(write(tmp_path / "a.yaml", "model: m\nx: 1\n"))


def test_a_secret_is_not_in_an_error_message_nor_in_the_configurations_text() -> None:
    assert "very-secret" not in repr(EngineConfig.from_kwargs(model="m", hf_token="very-secret"))
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_kwargs(model="m", hf_token=["very-secret"])
    assert "very-secret" not in str(caught.value)


def test_configuration_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, kvloom, kvloom.config, kvloom.hooks.loader, kvloom.core, kvloom.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False).returncode == 0


def test_positional_arguments_after_the_model_warn_while_the_flag_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError), pytest.warns(DeprecationWarning, match="by keyword"):
        LLM("m", None, "auto", False, False, "", 1, "int8")
    monkeypatch.setattr(LLM, "DEPRECATE_INIT_POSARGS", False)
    with pytest.raises(ConfigError):
        LLM("m", None, "auto", False, False, "", 1, "int8")


@pytest.mark.parametrize(("values", "message"), [
    ({"max_num_batched_tokens": 8, "max_num_seqs": 9}, "max_num_batched_tokens=8 must be at least max_num_seqs=9"),
    ({"max_num_batched_tokens": 8, "max_num_seqs": 4, "enable_chunked_prefill": False}, "must be at least max_model_len=100"),
])
def test_limits_that_contradict_each_other_are_refused(values: dict, message: str) -> None:
    section = EngineConfig.from_kwargs(model="m", **values).scheduler
    with pytest.raises(ConfigError, match=message):
        section.limits(100, enable_prefix_caching=True, chunkable=True)


def test_the_token_budget_grows_with_what_it_must_hold() -> None:
    def budget(max_model_len: int, **values) -> int:
        section = EngineConfig.from_kwargs(model="m", **values).scheduler
        return section.limits(max_model_len, enable_prefix_caching=True, chunkable=True).max_num_batched_tokens

    assert budget(100) == 2048
    assert budget(100, max_num_seqs=5000) == 5000
    assert budget(9000, enable_chunked_prefill=False) == 9000


def test_max_model_len_is_at_most_what_the_model_was_made_for() -> None:
    assert EngineConfig.from_kwargs(model="m").resolved_max_model_len(512) == 512
    assert EngineConfig.from_kwargs(model="m", max_model_len=100).resolved_max_model_len(512) == 100
    with pytest.raises(ConfigError, match="max_model_len=513 is more than the 512 tokens"):
        EngineConfig.from_kwargs(model="m", max_model_len=513).resolved_max_model_len(512)
