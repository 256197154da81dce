"""Values of parameters that other versions of vLLM have and nobody registered here: what to give instead."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_CONVERT = "its files are never read: convert the checkpoint to safetensors, and leave load_format at 'auto'"
_QUANTIZED = "such files are not read: use the repository's safetensors, and leave load_format at 'auto'"
_GPU_KERNELS = "kernels of another engine; leave it at 'auto', which takes the best that this machine has"
_ONE_WORKER = "there is one worker, in this process; leave it out"
_TOKENIZER = "use 'auto' with the repository's files in Hugging Face format, or a plugin that registers it"

OTHER_VALUES: Mapping[str, Mapping[str, str]] = MappingProxyType({
    "load_format": {
        **dict.fromkeys(("pt", "npcache", "mistral", "tensorizer", "sharded_state"), _CONVERT),
        **dict.fromkeys(("gguf", "bitsandbytes"), _QUANTIZED),
        **dict.fromkeys(("runai_streamer", "fastsafetensors"), "leave it at 'auto', which reads the same files"),
    },
    "attention_backend": dict.fromkeys(("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "XFORMERS", "TORCH_SDPA", "FLEX_ATTENTION",
                                        "FLASHMLA", "FLASH_ATTN_MLA"), _GPU_KERNELS),
    "distributed_executor_backend": dict.fromkeys(("mp", "ray", "external_launcher"), _ONE_WORKER),
    "tokenizer_mode": dict.fromkeys(("mistral", "custom", "hf"), _TOKENIZER),
})


def instead(parameter: str, value: str) -> str:
    """`` (what to do)`` for a value that another version has, else an empty text."""
    what = OTHER_VALUES.get(parameter, {}).get(value)
    return f" ({what})" if what else ""
