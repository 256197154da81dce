"""Arguments that methods of `LLM` have in other versions of vLLM: refused with what to do, never a bare `TypeError`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvloom.other_fields import C, OtherField, guarded

_TEXT_ONLY = OtherField(None, "prompts are text only so far")
_NO_ADAPTERS = OtherField(None, "there are no adapters so far")
_STRUCTURE = OtherField(None, "use generate or chat with SamplingParams(structured_outputs=...)")
_TASK = OtherField(None, "encode takes it")
_TEMPLATE = OtherField(None, "pairs are put together by the tokenizer, without a template")
_STEPS = OtherField(None, "call start_profile and stop_profile around the calls to be recorded")

OTHER_ARGUMENTS: Mapping[str, Mapping[str, OtherField]] = MappingProxyType({
    "generate": {"mm_processor_kwargs": _TEXT_ONLY, "multi_modal_data": _TEXT_ONLY},
    "generate_iter": {},
    "chat": {"prompt_adapter_request": _NO_ADAPTERS, "guided_options_request": _STRUCTURE},
    "beam_search": {"mm_processor_kwargs": _TEXT_ONLY, "tokenization_kwargs": OtherField(None, "cut the prompts before"),
                    "structured_outputs": _STRUCTURE},
    "encode": {"mm_processor_kwargs": _TEXT_ONLY},
    "embed": {"mm_processor_kwargs": _TEXT_ONLY, "pooling_task": _TASK},
    "classify": {"mm_processor_kwargs": _TEXT_ONLY, "pooling_task": _TASK},
    "reward": {"mm_processor_kwargs": _TEXT_ONLY, "pooling_task": _TASK},
    "score": {"mm_processor_kwargs": _TEXT_ONLY, "chat_template": _TEMPLATE, "chat_template_kwargs": _TEMPLATE},
    "collective_rpc": {"unique_reply_rank": OtherField(None, "take that rank's result from the list")},
    "apply_model": {},
    "get_tokenizer": {"lora_request": _NO_ADAPTERS},
    "set_tokenizer": {},
    "sleep": {"mode": OtherField("abort", "end the calls that are under way first; sleep() says so while there are any")},
    "wake_up": {},
    "reset_prefix_cache": {
        "reset_running_requests": OtherField(False, "end the calls that are under way first; it returns False while there are any"),
        "reset_connector": OtherField(False, "there is no connector")},
    "start_profile": {"delay_iterations": _STEPS, "max_iterations": _STEPS},
    "stop_profile": {},
})
"""Method -> argument."""


def refuses_arguments(cls: C) -> C:
    """Decorates a class: those of its own methods that `OTHER_ARGUMENTS` has say what to do about such arguments, and give the near
    name of a misspelt one."""
    for name, other in OTHER_ARGUMENTS.items():
        if name in vars(cls):
            setattr(cls, name, guarded(vars(cls)[name], f"LLM.{name}", other))
    return cls
