"""Which model, which tokenizer, in which numbers."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from kvloom.config.section import Secret, Section, Unsupported

DTYPES = {"auto": "auto", "half": "float16", "float16": "float16", "bfloat16": "bfloat16", "float": "float32", "float32": "float32"}
"""What can be given, in any case, and what it means."""


class ModelSection(Section):
    """The checkpoint and how it is read."""

    model: Annotated[str, Field(min_length=1, description="directory, or hub id whose files are in the hub's cache or can be fetched")]
    tokenizer: Annotated[str | None, Field(description="directory or hub id; None: the model's")] = None
    tokenizer_mode: Annotated[str, Field(description="auto: fast (Rust) where there is one, else slow (Python); fast or slow: only "
                                         "that one; or a plugin's name")] = "auto"
    skip_tokenizer_init: Annotated[bool, Field(description="no tokenizer: token prompts only, output text is empty")] = False
    trust_remote_code: Annotated[bool, Field(description="run code that comes with a checkpoint"),
                                 Unsupported("the code of a checkpoint is never run; install a plugin for its architecture")] = False
    revision: Annotated[str | None, Field(description="branch, tag or commit of a hub id")] = None
    tokenizer_revision: Annotated[str | None, Field(description="the same for the tokenizer; None: `revision`")] = None
    dtype: Annotated[str, Field(description="of weights and activations: auto, float32, bfloat16, float16, or a torch dtype")] = "auto"
    quantization: Annotated[str | None, Field(description="method's name; None: what the checkpoint says")] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64, description="of requests without a seed; None behaves as 0")] = 0
    max_model_len: Annotated[int | None, Field(ge=2, description="longest sequence, tokens; None: what the model was made for")] = None
    load_format: Annotated[str, Field(description="auto, safetensors, dummy, or a plugin's name")] = "auto"
    download_dir: Annotated[str | None, Field(description="the hub's cache folder")] = None
    hf_token: Annotated[bool | str | None, Field(repr=False, description="for downloads; True: the stored one"), Secret()] = None
    hf_overrides: Annotated[dict[str, Any] | None, Field(description="keys set on config.json; a function is not taken")] = None
    allowed_local_media_path: Annotated[str, Field(description="folder of media files"),
                                        Unsupported("leave it empty: text only so far")] = ""
    generation_config: Annotated[str, Field(min_length=1, description="where sampling defaults and end tokens come from: auto (the "
                                            "checkpoint's generation_config.json), vllm (no file), or a folder")] = "auto"
    override_generation_config: Annotated[dict[str, Any] | None, Field(description="keys of generation_config.json, on top")] = None
    task: Annotated[Literal["auto", "generate", "embed", "classify", "score", "reward", "transcription", "pooling"],
                    Field(description="what the model is used for; auto: what its architecture and files say; pooling: the same, but "
                          "not generate; embedding is an old name of embed"),
                    Unsupported("text models generate, embed, classify, score or reward",
                                ("generate", "embed", "classify", "score", "reward", "pooling"))] = "auto"

    @field_validator("dtype", mode="before")
    @classmethod
    def _name_of_dtype(cls, value: Any) -> Any:
        """``torch.float32`` and ``"Float"`` both mean float32."""
        if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
            value = str(value).removeprefix("torch.")
        if not isinstance(value, str) or value.lower() not in DTYPES:
            raise ValueError(f"Unknown dtype: use one of {', '.join(DTYPES)}")
        return DTYPES[value.lower()]

    @field_validator("seed", mode="before")
    @classmethod
    def _none_is_zero(cls, value: Any) -> Any:
        return 0 if value is None else value

    @field_validator("task", mode="before")
    @classmethod
    def _old_name(cls, value: Any) -> Any:
        if value != "embedding":
            return value
        warnings.warn("task='embedding' is deprecated: use task='embed'", DeprecationWarning, stacklevel=2)
        return "embed"

    @field_validator("tokenizer_mode", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value
