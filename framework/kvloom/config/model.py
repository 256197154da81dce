"""Which model, which tokenizer, in which numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from kvloom.config.checkpoint import Fetch
from kvloom.config.section import NotYet, Secret, Section, Unsupported

DTYPES = {"auto": "auto", "half": "float16", "float16": "float16", "bfloat16": "bfloat16", "float": "float32", "float32": "float32"}
"""What can be given, in any case, and what it means."""

Texts = Annotated[tuple[str, ...], Field(strict=False)]
"""A list or tuple of texts."""
JINJA_MARKS = ("{{", "{%", "\n")
"""A chat template has one of these, a file's path has none."""


class ModelSection(Section):
    """The checkpoint and how it is read."""

    model: Annotated[str, Field(min_length=1, description="directory, or hub id whose files are in the hub's cache or can be fetched")]
    tokenizer: Annotated[str | None, Field(min_length=1, description="directory or hub id; None: the model's")] = None
    tokenizer_mode: Annotated[str, Field(description="auto: fast (Rust) where there is one, else slow (Python); fast or slow: only "
                                         "that one; or a plugin's name")] = "auto"
    skip_tokenizer_init: Annotated[bool, Field(description="no tokenizer: token prompts only, output text is empty")] = False
    trust_remote_code: Annotated[bool, Field(description="run the code of tokenizers and configurations that comes with a checkpoint; "
                                             "that of models is unsupported so far")] = False
    revision: Annotated[str | None, Field(min_length=1, description="branch, tag or commit of a hub id")] = None
    tokenizer_revision: Annotated[str | None, Field(min_length=1, description="the same for the tokenizer; None: `revision`")] = None
    code_revision: Annotated[str | None, Field(description="the same for code that another hub repository holds, with "
                                               "`trust_remote_code`")] = None
    hf_config_path: Annotated[str | None, Field(min_length=1, description="directory or hub id of config.json; None: `model`")] = None
    config_format: Annotated[Literal["auto", "hf", "mistral"], Field(description="auto and hf: config.json"), NotYet({
        "mistral": "params.json is not read: use the repository's files in Hugging Face format"})] = "auto"
    model_impl: Annotated[Literal["auto", "kvloom", "vllm", "transformers"], Field(
        description="auto and kvloom (vllm means the same): the architecture's plugin"), NotYet({
            "transformers": "use 'auto', and install a plugin for the model's architecture"})] = "auto"
    served_model_name: Annotated[str | Texts | None, Field(
        description="what logs and plugins call it; of a list the first; None: `model`")] = None
    dtype: Annotated[str, Field(description="of weights and activations: auto, float32, bfloat16, float16, or a torch dtype")] = "auto"
    quantization: Annotated[str | None, Field(description="method's name; None: what the checkpoint says")] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64, description="of requests without a seed; None behaves as 0")] = 0
    max_model_len: Annotated[int | None, Field(ge=2, description="longest sequence, tokens; None: what the model was made for")] = None
    load_format: Annotated[str, Field(description="auto, safetensors, dummy, or a plugin's name")] = "auto"
    download_dir: Annotated[str | None, Field(description="the hub's cache folder")] = None
    hf_token: Annotated[bool | str | None, Field(repr=False, description="for downloads; True: the stored one"), Secret()] = None
    ignore_patterns: Annotated[str | Texts | None, Field(
        description="files of a hub repository that are not fetched, such as 'original/*'")] = None
    model_loader_extra_config: Annotated[dict[str, Any] | None, Field(
        description="settings of the loader that `load_format` names; the built-in ones have none")] = None
    hf_overrides: Annotated[dict[str, Any] | Callable[[Any], Any] | None, Field(
        description="keys set on config.json, or a function that gets it, with attributes and items alike, and returns it")] = None
    rope_theta: Annotated[float | None, Field(gt=0, description="base of rotary embeddings, instead of config.json's")] = None
    rope_scaling: Annotated[dict[str, Any] | None, Field(description="config.json's rope_scaling")] = None
    disable_sliding_window: Annotated[bool, Field(
        description="no layer has a window; the model then takes at most a window's tokens")] = False
    chat_template: Annotated[str | None, Field(min_length=1, description="Jinja text or a file for `chat` instead of the model's "
                                               "own")] = None
    allowed_local_media_path: Annotated[str, Field(description="folder that `file://` addresses in conversations may lie in; empty: "
                                                   "none may")] = ""
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

    @field_validator("allowed_local_media_path")
    @classmethod
    def _is_directory(cls, value: str) -> str:
        if value and not Path(value).is_dir():
            raise ValueError("is no directory" if Path(value).exists() else "does not exist; give a directory")
        return value

    @field_validator("chat_template")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        if value is not None and not any(mark in value for mark in JINJA_MARKS) and not Path(value).is_file():
            raise ValueError("is no Jinja text (it has no {{ or {%), and no file")
        return value

    @field_validator("served_model_name")
    @classmethod
    def _has_a_name(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if value is not None and (not value or not all(value)):
            raise ValueError("must be a name, or a list of names, of which the first is used")
        return value

    @model_validator(mode="after")
    def _code_is_trusted(self) -> Self:
        if self.code_revision is not None and not self.trust_remote_code:
            raise ValueError(f"code_revision={self.code_revision!r} needs trust_remote_code=True: without it no code is loaded")
        return self

    @property
    def in_vain(self) -> list[str]:
        """Lines for the log about revisions of what is no hub id."""
        named = {"revision": self.model, "tokenizer_revision": self.tokenizer or self.model}
        return [f"{name}={given!r} has no effect: {where!r} is a directory" for name, where in named.items()
                if (given := getattr(self, name)) is not None and Path(where).expanduser().is_dir()]

    @property
    def fetch(self) -> Fetch:
        """What is fetched of hub repositories."""
        given = self.ignore_patterns
        return Fetch(self.trust_remote_code, () if given is None else (given,) if isinstance(given, str) else given)

    @property
    def name(self) -> str:
        """What logs and plugins call the model."""
        given = self.served_model_name
        return self.model if given is None else given if isinstance(given, str) else given[0]

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
