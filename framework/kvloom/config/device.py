"""Where it runs: device, attention, executor, parallelism."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from kvloom.config.section import NoEffect, Section, Unsupported

_NOTHING_CAPTURED = "nothing is captured or compiled on a CPU device so far: every step runs call by call"


class DeviceSection(Section):
    """Devices and workers."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="where the model runs"),
                      Unsupported("use 'cpu' or 'auto'", ("cpu",))] = "auto"
    attention_backend: Annotated[str, Field(min_length=1, description="auto, cpu, torch, reference, or a plugin's name")] = "auto"
    distributed_executor_backend: Annotated[str, Field(
        min_length=1, description="uni (in this process), or a plugin's name; None: uni")] = "uni"
    tensor_parallel_size: Annotated[int, Field(ge=1, description="ranks that divide each layer"), Unsupported("use 1")] = 1
    pipeline_parallel_size: Annotated[int, Field(ge=1, description="ranks that divide the layers"), Unsupported("use 1")] = 1
    enforce_eager: Annotated[bool | None, Field(description="never capture or compile"), NoEffect(_NOTHING_CAPTURED)] = None
    max_seq_len_to_capture: Annotated[int | None, Field(description="longest captured sequence"), NoEffect(_NOTHING_CAPTURED)] = 8192
    compilation_config: Annotated[Any, Field(description="level 0..3 or a dict"), Unsupported("leave it out, or use 0", (0,))] = None
    disable_custom_all_reduce: Annotated[bool, Field(description="for tensor parallelism on GPUs"),
                                         NoEffect("there is one rank")] = False
    disable_async_output_proc: Annotated[bool, Field(description="of an older engine"),
                                         NoEffect("outputs are made after each step; there is no separate path")] = False
    enable_sleep_mode: Annotated[bool, Field(description="allow sleep() and wake_up(), which give memory back between uses")] = False
    profile_dir: Annotated[str | None, Field(min_length=1, description="folder for the traces of start_profile(), made when it is "
                                             "needed")] = None

    @field_validator("distributed_executor_backend", mode="before")
    @classmethod
    def _none_is_default(cls, value: Any) -> Any:
        return "uni" if value is None else value
