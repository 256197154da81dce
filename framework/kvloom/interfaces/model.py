"""What a model is: explicit inputs to hidden states, hidden states to logits, and data about its weights and state.

No ambient state: whatever a forward needs beyond its weights is in `ModelInputs` and `ForwardContext`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvloom.interfaces.attention import AttentionBackend, AttentionSpec, LayerCache
from kvloom.interfaces.comm import Comm
from kvloom.interfaces.model_config import ModelConfig
from kvloom.interfaces.quant import ParamSpec, QuantMethod
from kvloom.interfaces.state import LayerStateSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvloom.interfaces.adapter import AdapterBatch


@dataclass(slots=True)
class ModelInputs:
    """One step's rows, flattened: T tokens of R sequences, no padding between them.

    Args:
        token_ids: ``[T]`` int64.
        positions: ``[P, T]`` int64; P is 1, or more for multi-axis rotary embeddings (`Model.position_axes`).
        embeds: ``(rows [r] int64, values [r, H])``: these rows are given as embeddings (media, soft prompts) and replace
            what `token_ids` would give; None when there are none.
        extras: named per-token integers ``[T]`` that `Model.extra_inputs` lists.
        hidden: ``[T, H]`` from the previous pipeline stage; None on the first.
    """

    token_ids: Tensor
    positions: Tensor
    embeds: tuple[Tensor, Tensor] | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None


@dataclass(slots=True)
class ModelOutputs:
    """``hidden [T, H]``, and hidden states of the layers in ``auxiliary`` that a proposer asked for (layer -> [T, H])."""

    hidden: Tensor
    auxiliary: Mapping[int, Tensor] = field(default_factory=dict)


class LayerStep(NamedTuple):
    """What one attention (or recurrent) layer needs in one step."""

    backend: AttentionBackend
    cache: LayerCache
    meta: Any


@dataclass(slots=True)
class ForwardContext:
    """What a forward may use besides its inputs, for one step.

    Args:
        comm: collectives of this tensor-parallel group.
        layers: by layer index; None for layers that asked for no backend.
        adapters: rows and adapters of this step, None when no row has one.
        auxiliary_layers: layers whose hidden states the caller wants in `ModelOutputs.auxiliary`.
    """

    comm: Comm
    layers: Sequence[LayerStep | None]
    adapters: AdapterBatch | None = None
    auxiliary_layers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class BuildContext:
    """What a model is built with. Layers take it as their first argument.

    Args:
        dtype: of weights and activations.
        device: where parameters are allocated; "meta" when only shapes are wanted (memory plan).
        quant: the checkpoint's quantization method.
        plain: the method for layers that `quant` declines.
        comm: tensor-parallel group; layers divide their heads and features by ``comm.size``.
        pipeline_rank, pipeline_size: which slice of the layers this worker builds.
        max_model_len: longest sequence; rotary tables may be computed for it once.
        cache_dtype: of keys and values.
        block_tokens: tokens in a KV block.
        make_backend: chooses and makes a layer's attention backend, see `BackendFactory`.
        task: one of `Model.tasks_of`: without "generate" nobody asks for logits, and an output head need not be there.
        target: type of the device that the model will run on, where `device` is "meta"; None: `device`.
    """

    dtype: torch.dtype
    device: torch.device
    quant: QuantMethod
    plain: QuantMethod
    comm: Comm
    max_model_len: int
    cache_dtype: torch.dtype
    block_tokens: int
    make_backend: BackendFactory
    pipeline_rank: int = 0
    pipeline_size: int = 1
    task: str = "generate"
    target: str | None = None

    @property
    def device_type(self) -> str:
        """Of the device that the model will run on."""
        return self.target or self.device.type


class BackendFactory(Protocol):
    """Gives a layer's attention backend: the configured one, or the first that supports the spec; raises with every reason.

    Layers with equal specs share one backend. The engine remembers which layer got which: a layer calls it once, when it is built.
    """

    def __call__(self, spec: AttentionSpec, layer_index: int) -> AttentionBackend: ...


class LoadableLayer(Protocol):
    """A layer that takes checkpoint tensors. Every layer in `kvloom.layers` is one."""

    def checkpoint_params(self, shard: str | None) -> Mapping[str, ParamSpec]:
        """Suffix -> what the checkpoint must hold for this shard, in whole (unsharded, unfused) shapes."""

    def load_param(self, suffix: str, shard: str | None, tensor: Tensor) -> None:
        """Copy this rank's part of one checkpoint tensor into place, casting to the parameter's dtype.

        The tensor's shape was already checked against `checkpoint_params`; it is file-backed and must not be kept.
        """

    def post_load(self) -> None:
        """Called once when every tensor is in place: pack, transpose, merge scales."""


class ModuleTarget(NamedTuple):
    """Where tensors under one checkpoint module prefix go: a layer, and which of its fused parts (``"q"``, ``"gate"``, None)."""

    layer: LoadableLayer
    shard: str | None = None


class Model(ABC):
    """A model family. Implementations are ``class X(torch.nn.Module, Model)`` built from `kvloom.layers`.

    Registered with ``kvloom_register_models`` under its config.json architecture name, with ``config=`` its `ModelConfig`
    subclass. The constructor is ``__init__(self, config, build: BuildContext)`` and only allocates (uninitialised) parameters.

    Pipeline stages: a stage builds its slice of the layers; only the first embeds, only the last has logits.
    """

    position_axes: int = 1
    """P of `ModelInputs.positions`."""
    extra_inputs: Mapping[str, int] = MappingProxyType({})
    """Names of the per-token integers that `forward` reads from `ModelInputs.extras`, each with its number of values: an integer
    is 0 or more and less than that, and 0 where a request gives none. An instance may set its own."""
    chunkable: bool = True
    """False when a prompt must be computed in one step (bidirectional encoders)."""
    tasks: tuple[str, ...] = ("generate", "embed")
    """What it can be used for, preferred first: generate, embed, classify, score, reward. See `tasks_of`."""
    pooling: str = "LAST"
    """How its hidden states are pooled when neither the configuration nor the checkpoint says. An instance may set its own."""
    pooling_options: Mapping[str, Any] = MappingProxyType({})
    """Fields of `PoolerConfig` that are not the defaults of its task: ``softmax``, ``normalize``, ``step_tag_id``, ..."""
    row_invariant: bool = False
    """Whether `forward` and `logits` give a token the same bits whatever other rows there are, as far as this is the model's own
    doing: true of a model that computes with our layers and, besides, element by element or row by row."""
    ignored: tuple[str, ...] = ()
    """Shell patterns (`fnmatch`) of checkpoint tensors known to be unused, e.g. ``*.rotary_emb.inv_freq``; see `tensor_name`."""

    @abstractmethod
    def __init__(self, config: Any, build: BuildContext) -> None: ...

    @classmethod
    def tasks_of(cls, config: Any) -> tuple[str, ...]:
        """`tasks` of a checkpoint with this config.json: what depends on its number of labels. Nothing is built yet."""
        return cls.tasks

    @abstractmethod
    def forward(self, inputs: ModelInputs, ctx: ForwardContext) -> ModelOutputs:
        """Hidden states after the last norm (last stage) or after this stage's layers, ``[T, H]``."""

    @abstractmethod
    def logits(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """``hidden [R, H]`` of the rows to sample -> ``[R, V]`` over the whole vocabulary (gathered if it is sharded), in the
        model's dtype or in float32."""

    def classify(self, pooled: Tensor, ctx: ForwardContext) -> Tensor:
        """Pooled rows ``[R, H]``, in the model's dtype -> ``[R, labels]``: the label head, without an activation.

        Called only for tasks that need it (classify, score, reward) of a model that lists one of them in `tasks`.
        """
        from kvloom.errors import UnsupportedFeatureError

        raise UnsupportedFeatureError("classification", type(self).__name__, "this model has no label head")

    @abstractmethod
    def state_specs(self) -> list[LayerStateSpec]:
        """One entry a layer of the whole model, in order, sizes of this rank."""

    @abstractmethod
    def module_map(self) -> Mapping[str, ModuleTarget]:
        """Checkpoint module prefix (``model.layers.0.self_attn.q_proj``) -> target. Prefixes of other pipeline stages are listed
        in `other_stage_prefixes`, a tied ``lm_head`` in `ignored`."""

    def tensor_name(self, name: str) -> str:
        """What `module_map`, `ignored` and `other_stage_prefixes` call the checkpoint's tensor `name`.

        Checkpoints of one architecture differ in the prefix that they give the base model, or in what they call a norm's weight. Our
        own names stay as they are. Two tensors that get one name are refused.
        """
        return name

    def other_stage_prefixes(self) -> tuple[str, ...]:
        """Checkpoint prefixes that another pipeline stage loads."""
        return ()

    def encode(self, kind: str, inputs: Mapping[str, Tensor], ctx: ForwardContext) -> Tensor:
        """Run the encoder of one media kind (``"image"``, ``"audio"``) or of an encoder-decoder (``"text"``): ``[n, H]``.

        A model without encoders never has it called: admission refuses such inputs.
        """
        from kvloom.errors import UnsupportedFeatureError

        raise UnsupportedFeatureError(f"{kind} input", type(self).__name__, "this model takes text only")


__all__ = [
    "BackendFactory", "BuildContext", "ForwardContext", "LayerStep", "LoadableLayer", "Model", "ModelConfig", "ModelInputs",
    "ModelOutputs", "ModuleTarget",
]
