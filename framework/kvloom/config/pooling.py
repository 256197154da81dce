"""What an engine does with hidden states: its task, and how it pools, from configuration, checkpoint and model. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvloom.config.pooler import PoolerConfig
from kvloom.config.sentence_transformers import DenseLayer, SentenceModules
from kvloom.errors import ConfigError, ModelError, UnsupportedFeatureError, shown
from kvloom.interfaces.model_config import ModelConfig

GENERATE = "generate"
LABEL_TASKS = ("classify", "score", "reward")
"""Tasks that end in the model's label head."""
MODELS: Mapping[str, str] = {
    GENERATE: "decoders, ...ForCausalLM", "embed": "decoders and encoders, ...ForCausalLM or ...Model",
    "classify": "with a label head, ...ForSequenceClassification", "score": "with one label, ...ForSequenceClassification",
    "reward": "...ForRewardModel, ...ForProcessRewardModel",
}
"""Task -> the models that have it, and how their architectures are called."""
PROBLEM_ACTIVATIONS: Mapping[str, str] = {
    "regression": "identity", "single_label_classification": "softmax", "multi_label_classification": "sigmoid",
}
"""``problem_type`` of config.json, what the labels were trained as, -> activation of their scores."""
LABEL_ACTIVATIONS: Mapping[str, str] = {"Sigmoid": "sigmoid", "Identity": "identity", "Softmax": "softmax"}
"""Last part of the class path that a cross-encoder's config.json may name."""


@dataclass(frozen=True, slots=True)
class PoolingPlan:
    """How an engine pools. Two workers with equal plans and models give equal results.

    Args:
        task: embed, classify, score or reward.
        config: what the caller said.
        modules: what the checkpoint says of embeddings.
        activation: of label scores: softmax, sigmoid or identity; None: as the task has it.
        num_labels: of the label head; None for embeddings.
        embedding_size: numbers in an uncut embedding.
        dimensions: lengths to which embeddings may be cut; None: not at all; empty: any.
    """

    task: str
    config: PoolerConfig
    modules: SentenceModules | None
    activation: str
    num_labels: int | None
    embedding_size: int
    dimensions: tuple[int, ...] | None

    @property
    def dense(self) -> tuple[DenseLayer, ...]:
        """Layers after pooling."""
        return self.modules.dense if self.modules is not None else ()

    @property
    def max_tokens(self) -> int | None:
        """Longest prompt that the checkpoint means; None: what the model can take."""
        return self.modules.max_tokens if self.modules is not None else None

    @property
    def labels(self) -> bool:
        """Whether results are scores of labels."""
        return self.task in LABEL_TASKS

    def pooling_type(self, of_model: str) -> str:
        """The caller's, else the checkpoint's, else the model's."""
        return self.config.pooling_type or (self.modules and self.modules.pooling_type) or of_model

    def activates(self, options: Mapping[str, Any]) -> bool:
        """Whether embeddings are normalized, or label scores activated, unless a request says otherwise.

        Args:
            options: `Model.pooling_options`.
        """
        if self.labels:
            said = self.config.activates_labels
            return bool(options.get("softmax", self.task != "reward")) if said is None else said
        said = self.config.activates_embeddings
        if said is not None:
            return said
        return bool(options.get("normalize", True)) if self.modules is None else self.modules.normalize


def choose_task(requested: str, tasks: Sequence[str], *, is_sentence_model: bool, model: str) -> str:
    """What an engine is for.

    Args:
        requested: ``task=``: "auto", "pooling" (whatever but generating), or one task.
        tasks: of the model, preferred first.
        is_sentence_model: whether the checkpoint comes with a ``modules.json``.

    Raises:
        ConfigError: the model cannot do that.
    """
    wanted: Sequence[str] = (requested,)
    if requested in ("auto", "pooling"):
        usable = [t for t in tasks if t != GENERATE or requested == "auto"]
        wanted = ["embed"] if is_sentence_model and "embed" in usable else usable
    found = next((t for t in wanted if t in tasks), None)
    if found is None:
        other = f"; {requested} needs a model of these: {MODELS[requested]}" if requested in MODELS else ""
        raise ConfigError(f"This model does not support the {requested!r} task. Supported tasks: {{{', '.join(map(repr, tasks))}}} "
                          f"({model}){other}")
    return found


def refuse_in_vain(task: str, config: PoolerConfig | None) -> None:
    """Raises `ConfigError` where a caller's wishes would change nothing."""
    said = {} if config is None else config.model_dump(exclude_none=True)
    if not said:
        return
    if task == GENERATE:
        raise ConfigError(f"override_pooler_config says {', '.join(said)}, but this engine generates; make it with task='embed' (or "
                          "classify, score, reward), or leave it out")
    other, ours = ("normalize", "softmax") if task in LABEL_TASKS else ("softmax", "normalize")
    if said.get(other):
        raise ConfigError(f"override_pooler_config: {other}=True means nothing with task={task!r}; {ours} does")
    if task not in LABEL_TASKS and "returned_token_ids" in said:
        raise ConfigError("override_pooler_config: returned_token_ids choose scores of labels, this engine gives embeddings")


def plan_pooling(task: str, config: PoolerConfig | None, modules: SentenceModules | None, model: ModelConfig,
                 raw: Mapping[str, Any]) -> PoolingPlan:
    """See `PoolingPlan`.

    Args:
        raw: config.json, for keys that concern no model class.

    Raises:
        ModelError: modules that do not fit, or Matryoshka dimensions that are none.
    """
    size = model.hidden_size
    if modules is not None and modules.pooled_size not in (None, size):
        raise ModelError(f"the pooling module of modules.json is for {modules.pooled_size} numbers (word_embedding_dimension), the "
                         f"model gives {size}")
    for layer in (modules.dense if modules is not None else ()):
        if layer.in_features != size:
            raise ModelError(f"{layer.directory.name} takes {layer.in_features} numbers, what comes before it gives {size}")
        size = layer.out_features
    num_labels = getattr(model, "num_labels", None) if task in LABEL_TASKS else None
    return PoolingPlan(task, config or PoolerConfig(), modules, _activation(raw, num_labels), num_labels, size, _dimensions(raw, size))


def _activation(raw: Mapping[str, Any], num_labels: int | None) -> str:
    """Of label scores, as cross-encoders' config.json may name it; else as they were trained; else sigmoid of one, softmax of more."""
    newer = raw.get("sentence_transformers")
    named = raw.get("sbert_ce_default_activation_function") or (newer.get("activation_fn") if isinstance(newer, Mapping) else None)
    if named is not None:
        kind = str(named).rpartition(".")[2]
        if kind not in LABEL_ACTIVATIONS:
            raise UnsupportedFeatureError("activation of the cross-encoder", kind, f"it may be {', '.join(LABEL_ACTIVATIONS)}")
        return LABEL_ACTIVATIONS[kind]
    problem = raw.get("problem_type")
    if problem is None or num_labels is None:
        return "sigmoid" if num_labels == 1 else "softmax"
    if problem not in PROBLEM_ACTIVATIONS:
        raise UnsupportedFeatureError("problem_type of config.json", problem, f"it may be {', '.join(PROBLEM_ACTIVATIONS)}")
    return "sigmoid" if num_labels == 1 and problem == "single_label_classification" else PROBLEM_ACTIVATIONS[problem]


def _dimensions(raw: Mapping[str, Any], size: int) -> tuple[int, ...] | None:
    given = raw.get("matryoshka_dimensions")
    if given is None:
        return () if raw.get("is_matryoshka") is True else None
    if not isinstance(given, list) or not given or not all(type(d) is int and 0 < d <= size for d in given):
        raise ModelError(f"matryoshka_dimensions must be lengths of at most {size}, got {shown(given)}")
    return tuple(given)
