"""Names of vLLM's EngineArgs, older and newer, that are no parameters of their own here: never a TypeError, never silent."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from kvloom.config.section import NoEffect, Unsupported
from kvloom.errors import ConfigError, UnsupportedFeatureError

RENAMED: Mapping[str, str] = MappingProxyType({
    "pooler_config": "override_pooler_config",
    "kv_cache_memory_bytes": "kv_cache_memory",
    "structured_outputs_backend": "guided_decoding_backend",
    "max_seq_len": "max_model_len",
    "additional_config": "plugin_config",
})
"""Name in another version -> ours; taken with a warning that names ours."""

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Settings = dict[str, Any] | None


TASK_ARGS: Mapping[str, Mapping[str, str | None]] = MappingProxyType({
    "runner": {"auto": None, "generate": "generate", "pooling": "pooling"},
    "convert": {"auto": None, "none": None, "embed": "embed", "classify": "classify", "reward": "reward"},
})
"""Names of newer versions that say with two parameters what `task` says with one; value -> task. ``convert`` says more precisely
what ``runner="pooling"`` says."""


def task_of(values: Mapping[str, Any]) -> str | None:
    """The task that `TASK_ARGS` among `values` mean; None where they leave it open.

    Raises:
        UnsupportedFeatureError: another value.
        ConfigError: they contradict each other, or come beside ``task``.
    """
    given = {name: values[name] for name in TASK_ARGS if values.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, str) or value not in TASK_ARGS[name]:
            raise UnsupportedFeatureError(name, value, f"use one of {', '.join(TASK_ARGS[name])}, or task=")
    runner, convert = (TASK_ARGS[name][given.get(name, "auto")] for name in ("runner", "convert"))
    if (runner or convert) and values.get("task", "auto") != "auto":
        newer = " and ".join(f"{n}={v!r}" for n, v in given.items())
        raise ConfigError(f"task={values['task']!r} and {newer} mean the same; give task")
    if runner == "generate" and convert is not None:
        raise ConfigError(f"runner='generate' contradicts convert={given['convert']!r}; give one of them, or task=")
    return convert or runner


class OtherArg(NamedTuple):
    """A parameter that has only one meaning here.

    Args:
        takes: type of the values that vLLM takes, for pydantic. Others are refused, whatever the state.
    """

    default: Any
    state: NoEffect | Unsupported
    takes: Any = Any

    def check(self, name: str, value: Any) -> None:
        """Raises `ConfigError` unless `value` is one that `takes` allows, or the default."""
        if value == self.default and type(value) is type(self.default):
            return
        try:
            TypeAdapter(self.takes, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
        except ValidationError as error:
            problems = "; ".join(dict.fromkeys(e["msg"] for e in error.errors()))
            raise ConfigError(f"{name}={value!r}: {problems}") from error


def _later(works: str, default: Any = None) -> OtherArg:
    return OtherArg(default, Unsupported(works))


def _idle(reason: str, default: Any = None, takes: Any = Any) -> OtherArg:
    return OtherArg(default, NoEffect(reason), takes)


_OLD_ENGINE = "it steered a part of an older engine that does not exist here"
_SERVER = "it belongs to the server"
_ANY_NUMBER = "any number of prompts may be under way in part; long_prefill_token_threshold bounds what each gets of a step"

OTHER_ARGS: Mapping[str, OtherArg] = MappingProxyType({
    # model and loading
    "qlora_adapter_name_or_path": _later("merge the adapter into the checkpoint"),
    "use_tqdm_on_load": _idle("loading shows no bar: the start report has its time", True, bool),
    "override_neuron_config": _idle("there is no such device", None, Settings),
    "tokenizer_pool_size": _idle("text is encoded where generate is called", 0, Count),
    "tokenizer_pool_type": _idle("there is no tokenizer pool", "ray", str | type),
    "tokenizer_pool_extra_config": _idle("there is no tokenizer pool", None, Settings | str),
    "logits_processor_pattern": _idle(_SERVER, None, str | None),
    "quantization_config": _later("use quantization, or hf_overrides={'quantization_config': ...}"),
    "offload_group_size": _later("use cpu_offload_gb", 0),
    "offload_num_in_group": _later("use cpu_offload_gb", 1),
    "offload_prefetch_step": _later("use cpu_offload_gb", 1),
    "offload_params": _later("use cpu_offload_gb"),
    # KV cache
    "prefix_caching_hash_algo": _idle("keys of the prefix cache are always SHA-256", "builtin",
                                      Literal["builtin", "sha256", "sha256_cbor", "sha256_cbor_64bit"]),
    "calculate_kv_scales": _idle("the cache holds numbers of the model's dtype, which need no scales", None, bool | None),
    "preemption_mode": _idle("the engine chooses for each sequence that gives way", None, Literal["recompute", "swap"] | None),
    "use_v2_block_manager": _idle(_OLD_ENGINE, True, bool),
    # scheduler
    "max_num_partial_prefills": _idle(_ANY_NUMBER, 1, Positive),
    "max_long_partial_prefills": _idle(_ANY_NUMBER, 1, Positive),
    "scheduler_delay_factor": _idle("prompts are served as soon as there is room", 0.0, Annotated[float, Field(ge=0, strict=False)]),
    "num_scheduler_steps": _idle("each step is planned by itself", 1, Positive),
    "multi_step_stream_outputs": _idle(_OLD_ENGINE, True, bool),
    "num_lookahead_slots": _idle("room is taken when tokens are planned", 0, Count),
    "disable_cascade_attn": _idle("there is no cascade attention", False, bool),
    "async_scheduling": _idle("a worker in this process leaves nothing to overlap", False, bool | None),
    # attention and outputs
    "attention_config": _later("use attention_backend"),
    "logprobs_mode": _later("log-probabilities are those of the model's own logits", "raw_logprobs"),
    "return_sampling_mask": _later("leave it at False", False),
    "enable_return_routed_experts": _later("leave it at False", False),
    # parallel and executor
    "data_parallel_size": _later("start one LLM a process", 1),
    "enable_expert_parallel": _later("leave it at False", False),
    "max_parallel_loading_workers": _idle("there is one worker", None, Positive | None),
    "ray_workers_use_nsight": _idle("there are no Ray workers", False, bool),
    # LoRA and prompt adapters
    "max_cpu_loras": _later("no adapters so far"),
    "lora_dtype": _later("no adapters so far", "auto"),
    "lora_extra_vocab_size": _later("no adapters so far", 256),
    "fully_sharded_loras": _later("no adapters so far", False),
    "enable_lora_bias": _later("no adapters so far", False),
    "long_lora_scaling_factors": _later("no adapters so far"),
    "enable_prompt_adapter": _later("no adapters so far", False),
    "max_prompt_adapters": _later("no adapters so far", 1),
    "max_prompt_adapter_token": _later("no adapters so far", 0),
    # media, speculation, structured output
    "allowed_media_domains": _later("text only so far"),
    "spec_method": _later("leave it out"),
    "spec_model": _later("leave it out"),
    "spec_tokens": _later("leave it out"),
    "disable_mm_preprocessor_cache": _idle("prompts have no media", False, bool),
    "disable_chunked_mm_input": _idle("prompts have no media", False, bool),
    "enable_prompt_embeds": _later("give text or token prompts", False),
    "enable_reasoning": _later("leave it out"),
    "reasoning_parser": _later("leave it out"),
    "structured_outputs_config": _later("use guided_decoding_backend"),
    # observability and transfer
    "show_hidden_metrics_for_version": _idle("no metric is hidden", None, str | None),
    "otlp_traces_endpoint": _later("use the observer hooks"),
    "collect_detailed_traces": _later("use the observer hooks"),
    "profiler_config": _later("use profile_dir"),
    "kv_transfer_config": _later("leave it out"),
    "kv_events_config": _later("leave it out"),
})

OTHER_METHODS: Mapping[str, str] = MappingProxyType({
    "from_engine_args": "use LLM(**vars(engine_args))",
    "enqueue": "use generate_iter, which yields outputs as they finish",
    "enqueue_chat": "use chat",
    "wait_for_completion": "use generate, or generate_iter, which yields outputs as they finish",
    "get_metrics": "use llm.llm_engine.stats(), or the hook kvloom_step_finished",
    "reset_mm_cache": "there are no media to forget",
    "release_kv_cache_memory": "use sleep(1), with enable_sleep_mode=True",
    **dict.fromkeys(("init_weight_transfer_engine", "shutdown_weight_transfer_engine", "start_weight_update",
                     "start_draft_weight_update", "update_weights", "finish_weight_update", "update_weight_version",
                     "get_weight_version"), "change weights with apply_model, and call reset_prefix_cache"),
})
"""Methods of other versions of vLLM's LLM -> what to use here."""

_CONFIG = "use llm.llm_engine.config, whose sections are model, cache, scheduler, device, features and plugins"
_CALLS = "use LLM.generate, or LLM.generate_iter, which yields outputs as they finish"
_WORKERS = "use LLM.collective_rpc or LLM.apply_model"
_ADAPTERS = "there are no adapters so far"

OTHER_ENGINE_ATTRIBUTES: Mapping[str, str] = MappingProxyType({
    "model_config": "use llm.llm_engine.config.model; the longest sequence is llm.llm_engine.rules.max_model_len",
    "get_model_config": "use llm.llm_engine.config.model; the longest sequence is llm.llm_engine.rules.max_model_len",
    **dict.fromkeys(("vllm_config", "get_vllm_config", "cache_config", "scheduler_config", "parallel_config", "device_config",
                     "load_config", "lora_config", "observability_config", "decoding_config", "structured_outputs_config"), _CONFIG),
    **dict.fromkeys(("get_tokenizer", "get_tokenizer_group", "init_tokenizer"), "use LLM.get_tokenizer()"),
    **dict.fromkeys(("add_request", "get_num_unfinished_requests"), _CALLS),
    "has_unfinished_requests": "use llm.llm_engine.has_work",
    "abort_request": "leave the loop over LLM.generate_iter, which forgets the requests under way",
    **dict.fromkeys(("model_executor", "driver_worker", "engine_core", "collective_rpc", "apply_model"), _WORKERS),
    **dict.fromkeys(("get_metrics", "do_log_stats", "stat_loggers"), "use llm.llm_engine.stats(), or the hook kvloom_step_finished"),
    **dict.fromkeys(("add_lora", "remove_lora", "list_loras", "pin_lora"), _ADAPTERS),
    "is_sleeping": "use llm.llm_engine.sleeper.state",
    "shutdown": "use LLM.close()",
    **dict.fromkeys(("from_engine_args", "from_vllm_config"), "use LLM(...)"),
})
"""What scripts use of ``llm.llm_engine`` of vLLM -> what to use here."""
