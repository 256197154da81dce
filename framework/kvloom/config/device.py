"""Where it runs: device, attention, executor, parallelism."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from kvloom.config.class_path import ClassPath
from kvloom.config.section import NoEffect, Section, Unsupported

_NOT_CAPTURED = "a recorded step serves sequences of every length"
_NOT_COMPILED = "models are not compiled: steps are recorded and repeated, unless enforce_eager=True"


class DeviceSection(Section):
    """Devices and workers."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Field(
        description="where the model runs; auto: cuda where torch can use a GPU, else cpu. cuda has not been measured yet")] = "auto"
    attention_backend: Annotated[str, Field(min_length=1, description="auto, cpu, triton, torch, reference, a plugin's")] = "auto"
    distributed_executor_backend: Annotated[str, Field(
        min_length=1, description="uni (in this process), or a plugin's name; None: uni")] = "uni"
    tensor_parallel_size: Annotated[int, Field(ge=1, description="ranks that divide each layer"), Unsupported("use 1")] = 1
    pipeline_parallel_size: Annotated[int, Field(ge=1, description="ranks that divide the layers"), Unsupported("use 1")] = 1
    worker_cls: Annotated[ClassPath, Field(description="a subclass of `kvloom.runtime.worker.DeviceWorker`, or where it is; None and "
                                           "auto: that class itself")] = None
    worker_extension_cls: Annotated[ClassPath, Field(description="a class, or where it is, whose methods workers get besides theirs: "
                                                     "`collective_rpc` finds them")] = None
    enforce_eager: Annotated[bool | None, Field(
        description="True: every step runs call by call; else steps are recorded and repeated (on a GPU: decode steps), with equal "
                    "results")] = None
    max_seq_len_to_capture: Annotated[int | None, Field(ge=1, description="longest captured sequence"), NoEffect(_NOT_CAPTURED)] = 8192
    compilation_config: Annotated[Any, Field(description="level 0..3, or a dict of settings with a level"),
                                  NoEffect(_NOT_COMPILED)] = None
    deterministic: Annotated[bool, Field(description="True: a request's tokens and log-probabilities have the same bits whatever its "
                                         "neighbours, chunks, cached prefix or preemptions; what cannot keep that is refused")] = False
    disable_custom_all_reduce: Annotated[bool, Field(description="for tensor parallelism on GPUs"),
                                         NoEffect("there is one rank")] = False
    disable_async_output_proc: Annotated[bool, Field(description="of an older engine"),
                                         NoEffect("outputs are made after each step; there is no separate path")] = False
    enable_sleep_mode: Annotated[bool, Field(description="allow sleep() and wake_up(), which give memory back between uses")] = False
    profile_dir: Annotated[str | None, Field(min_length=1, description="folder for the traces of start_profile(), made when it is "
                                             "needed")] = None

    @field_validator("compilation_config", mode="before")
    @classmethod
    def _level_or_settings(cls, value: Any) -> Any:
        """vLLM takes many more keys than can be checked here: none of them has an effect, and the levels are its own."""
        level = value.get("level", value.get("mode")) if isinstance(value, dict) else value
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise ValueError("the keys of a dict must be texts")
        if level is not None and (type(level) is not int or not 0 <= level <= 3):
            raise ValueError("must be a level from 0 to 3, or a dict whose 'level' is one")
        return value

    @field_validator("worker_cls", "worker_extension_cls", mode="before")
    @classmethod
    def _vllms_defaults(cls, value: Any) -> Any:
        return None if isinstance(value, str) and value in ("", "auto") else value

    @field_validator("distributed_executor_backend", mode="before")
    @classmethod
    def _none_is_default(cls, value: Any) -> Any:
        return "uni" if value is None else value
