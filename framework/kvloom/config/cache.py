"""The KV cache: how large, in which blocks, what is kept."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from kvloom.config.section import NoEffect, NotYet, Section
from kvloom.errors import ConfigError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

MOST_GIB = 2**30
"""No machine has more."""
MAX_SWAP_SHARE, LARGE_SWAP_SHARE = 0.7, 0.4
"""Of the host's memory: more `swap_space` than the first is an error, than the second a warning. vLLM's figures."""


class CacheSection(Section):
    """The paged KV cache."""

    block_size: Annotated[int, Field(ge=1, le=256, description="tokens in a block; None: 16")] = 16
    kv_cache_memory: Annotated[int | None, Field(ge=1, description="bytes, or text such as '4GiB'; None: see docs/api.md")] = None
    num_gpu_blocks_override: Annotated[int | None, Field(ge=2, description="exactly so many blocks, one of them the null block")] = None
    enable_prefix_caching: Annotated[bool, Field(description="keep blocks for prompts with the same beginning; None: True")] = True
    kv_cache_dtype: Annotated[Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"], Field(
        description="numbers of keys and values; auto: the model's dtype"), NotYet(dict.fromkeys(
            ("fp8", "fp8_e4m3", "fp8_e5m2"), "use 'auto': the model's dtype"))] = "auto"
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1, description="share of a GPU's memory"), NoEffect(
        "on a CPU the KV cache takes kv_cache_memory, or a default bounded by what the process may still use", "cuda")] = 0.9
    swap_space: Annotated[float, Field(ge=0, le=MOST_GIB, description="GiB of host memory for blocks that leave the device; at "
                                       "most 70 % of the host's"), NoEffect(
        "on a CPU device blocks that gave way are recomputed: moving them within the same memory wins nothing", "cuda")] = 4
    cpu_offload_gb: Annotated[float, Field(ge=0, le=MOST_GIB, description="GiB of weights kept on the host"), NoEffect(
        "on a CPU device all weights are on the host", "cuda")] = 0

    def swap_space_note(self, host_bytes: int) -> str | None:
        """What is to be said about `swap_space` on a host with so much memory.

        Raises:
            ConfigError: it is more than 70 % of that.
        """
        share = self.swap_space_bytes / host_bytes
        what = f"swap_space={self.swap_space} GiB is {share:.0%} of the host's {host_bytes / 2**30:.1f} GiB"
        if share > MAX_SWAP_SHARE:
            raise ConfigError(f"Too large swap space: {what}; give at most {MAX_SWAP_SHARE * host_bytes / 2**30:.1f}")
        return f"{what}: little may be left for weights and everything else" if share > LARGE_SWAP_SHARE else None

    @property
    def swap_space_bytes(self) -> int:
        """`swap_space`."""
        return int(self.swap_space * 2**30)

    @property
    def cpu_offload_bytes(self) -> int:
        """`cpu_offload_gb`."""
        return int(self.cpu_offload_gb * 2**30)

    @field_validator("kv_cache_memory", mode="before")
    @classmethod
    def _parse_bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("block_size", "enable_prefix_caching", mode="before")
    @classmethod
    def _none_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value


def parse_bytes(text: str) -> int:
    """``"4GiB"``, ``"512 MB"``, ``"1.5GiB"`` -> bytes. Raises ValueError with what is valid."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([a-zA-Z]{0,3})\s*", text)
    if match is None or match[2].lower() not in UNITS:
        raise ValueError(f"{text!r} is no amount of memory; give bytes, or a number with {', '.join(u for u in UNITS if u)}")
    return int(float(match[1]) * UNITS[match[2].lower()])
