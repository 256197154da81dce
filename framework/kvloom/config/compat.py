"""Names of vLLM's EngineArgs, older and newer, that are no parameters of their own here: never a TypeError, never silent."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from kvloom.config.section import NoEffect, Unsupported
from kvloom.errors import ConfigError, UnsupportedFeatureError

RENAMED: Mapping[str, str] = MappingProxyType({
    "pooler_config": "override_pooler_config",
    "kv_cache_memory_bytes": "kv_cache_memory",
    "structured_outputs_backend": "guided_decoding_backend",
    "max_seq_len": "max_model_len",
})
"""Name in another version -> ours; taken with a warning that names ours."""


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
    """A parameter that has only one meaning here."""

    default: Any
    state: NoEffect | Unsupported


def _later(works: str, default: Any = None) -> OtherArg:
    return OtherArg(default, Unsupported(works))


def _idle(reason: str, default: Any = None) -> OtherArg:
    return OtherArg(default, NoEffect(reason))


_OLD_ENGINE = "it steered a part of an older engine that does not exist here"
_SERVER = "it belongs to the server"

OTHER_ARGS: Mapping[str, OtherArg] = MappingProxyType({
    # model and loading
    "served_model_name": _idle(_SERVER),
    "hf_config_path": _later("put config.json into the model's directory"),
    "config_format": _later("leave it at 'auto'", "auto"),
    "code_revision": _later("the code of a checkpoint is never run"),
    "rope_scaling": _later("use hf_overrides={'rope_scaling': ...}"),
    "rope_theta": _later("use hf_overrides={'rope_theta': ...}"),
    "model_impl": _later("leave it at 'auto'", "auto"),
    "model_loader_extra_config": _later("use plugin_config"),
    "ignore_patterns": _later("remove the files from the directory"),
    "qlora_adapter_name_or_path": _later("merge the adapter into the checkpoint"),
    "use_tqdm_on_load": _idle("loading shows no bar: the start report has its time", True),
    "override_neuron_config": _later("there is no such device"),
    "disable_sliding_window": _later("lower max_model_len to the window", False),
    "tokenizer_pool_size": _idle("text is encoded where generate is called", 0),
    "tokenizer_pool_type": _idle("there is no tokenizer pool", "ray"),
    "tokenizer_pool_extra_config": _idle("there is no tokenizer pool"),
    "additional_config": _later("use plugin_config"),
    "logits_processor_pattern": _idle(_SERVER),
    "logits_processors": _later("register a plugin"),
    # KV cache
    "prefix_caching_hash_algo": OtherArg("builtin", Unsupported("the hash is always SHA-256", ("sha256",))),
    "calculate_kv_scales": _later("leave it out"),
    "preemption_mode": _later("use 'recompute'", None)._replace(state=Unsupported("use 'recompute'", ("recompute",))),
    "use_v2_block_manager": _idle(_OLD_ENGINE, True),
    # scheduler
    "max_num_partial_prefills": _later("use long_prefill_token_threshold", 1),
    "max_long_partial_prefills": _later("use long_prefill_token_threshold", 1),
    "scheduler_delay_factor": _later("leave it at 0", 0.0),
    "num_scheduler_steps": _later("leave it at 1", 1),
    "multi_step_stream_outputs": _idle(_OLD_ENGINE, True),
    "num_lookahead_slots": _later("leave it at 0", 0),
    "scheduler_cls": _later("register a scheduling policy in a plugin"),
    "disable_cascade_attn": _idle("there is no cascade attention", False),
    "async_scheduling": _idle("a worker in this process leaves nothing to overlap", False),
    # parallel and executor
    "data_parallel_size": _later("start one LLM a process", 1),
    "enable_expert_parallel": _later("leave it at False", False),
    "max_parallel_loading_workers": _idle("there is one worker"),
    "worker_cls": _later("register an executor in a plugin", "auto"),
    "worker_extension_cls": _later("use apply_model", ""),
    "ray_workers_use_nsight": _later("leave it at False", False),
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
    "disable_mm_preprocessor_cache": _later("text only so far", False),
    "disable_chunked_mm_input": _later("text only so far", False),
    "enable_prompt_embeds": _later("give text or token prompts", False),
    "enable_reasoning": _later("leave it out"),
    "reasoning_parser": _later("leave it out"),
    "structured_outputs_config": _later("leave it out"),
    # observability and transfer
    "show_hidden_metrics_for_version": _idle("no metric is hidden"),
    "otlp_traces_endpoint": _later("use the observer hooks"),
    "collect_detailed_traces": _later("use the observer hooks"),
    "kv_transfer_config": _later("leave it out"),
    "kv_events_config": _later("leave it out"),
})
