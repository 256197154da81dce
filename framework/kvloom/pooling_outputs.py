"""What pooling requests give back: embeddings, class probabilities, scores. Field names and meanings are vLLM's. Torch-free."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from kvloom.errors import KvloomError, RequestValidationError
from kvloom.outputs import RequestMetrics


class PooledData(Protocol):
    """What of a tensor or an array is used here."""

    @property
    def ndim(self) -> int:
        """Number of axes."""

    def tolist(self) -> Any:
        """Numbers in nested lists; a single number without axes."""


@dataclass(eq=False)
class PoolingOutput:
    """What a pooler made of one prompt. Equal are outputs of the same shape and numbers.

    Args:
        data: float32, on the CPU: embedding ``[hidden]``, classes ``[labels]``, one row a token ``[tokens, dim]``, score ``[]``.
    """

    data: PooledData

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PoolingOutput):
            return NotImplemented
        return self.data.ndim == other.data.ndim and bool(self.data.tolist() == other.data.tolist())

    __hash__ = None  # type: ignore[assignment]  # its data can change

    @property
    def embedding(self) -> Any:
        """Deprecated: `data` as lists."""
        _deprecated("PoolingOutput.embedding", "data, or LLM.embed")
        return self.data.tolist()


@dataclass
class EmbeddingOutput:
    """A prompt's embedding, of length 1 where the model normalizes it."""

    embedding: list[float]

    @staticmethod
    def from_base(pooling_output: PoolingOutput) -> EmbeddingOutput:
        """From ``[hidden]``. Raises `RequestValidationError` for anything else."""
        return EmbeddingOutput(_vector(pooling_output.data, "an embedding"))

    @property
    def hidden_size(self) -> int:
        """Numbers in it."""
        return len(self.embedding)


@dataclass
class ClassificationOutput:
    """A probability for each class; they add up to 1 where the model uses softmax."""

    probs: list[float]

    @staticmethod
    def from_base(pooling_output: PoolingOutput) -> ClassificationOutput:
        """From ``[labels]``. Raises `RequestValidationError` for anything else."""
        return ClassificationOutput(_vector(pooling_output.data, "class probabilities"))

    @property
    def num_classes(self) -> int:
        """Classes that there are."""
        return len(self.probs)


@dataclass
class ScoringOutput:
    """How well two texts fit, as the model scores it."""

    score: float

    @staticmethod
    def from_base(pooling_output: PoolingOutput) -> ScoringOutput:
        """From a single number, in whatever number of axes. Raises `RequestValidationError` for more or less than one."""
        data: Any = pooling_output.data.tolist()
        while isinstance(data, list) and len(data) == 1:
            data = data[0]
        if isinstance(data, list):
            raise RequestValidationError(f"pooled data should be a scalar score, it has {pooling_output.data.ndim} axes and not one "
                                         "number", "data", pooling_output.data.ndim)
        return ScoringOutput(float(data))

    @property
    def embedding(self) -> list[float]:
        """Deprecated: the score in a list."""
        _deprecated("ScoringOutput.embedding", "score")
        return [self.score]


T = TypeVar("T", PoolingOutput, EmbeddingOutput, ClassificationOutput, ScoringOutput)


class PoolingRequestOutput(Generic[T]):
    """One pooling request's result, in the order of the prompts.

    Args:
        request_id: counts up over the life of the `LLM`.
        outputs: what was pooled.
        prompt_token_ids: as computed, with whatever the tokenizer added.
        finished: True for everything that `LLM` returns.
        num_cached_tokens: prompt tokens taken from the prefix cache.
        error: why it failed, where errors are returned; `outputs` is None then.
        metrics: see `RequestMetrics`; set for everything that `LLM` returns.
    """

    def __init__(self, request_id: str, outputs: T, prompt_token_ids: list[int], finished: bool, num_cached_tokens: int = 0,
                 error: KvloomError | None = None, metrics: RequestMetrics | None = None) -> None:
        self.request_id = request_id
        self.outputs: T = outputs
        self.prompt_token_ids = prompt_token_ids
        self.finished = finished
        self.num_cached_tokens = num_cached_tokens
        self.error = error
        self.metrics = metrics

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """Of ``LLM.embed``."""

    @staticmethod
    def from_base(request_output: PoolingRequestOutput[PoolingOutput]) -> EmbeddingRequestOutput:
        """See `EmbeddingOutput.from_base`."""
        return EmbeddingRequestOutput(**vars(request_output) | {"outputs": EmbeddingOutput.from_base(request_output.outputs)})


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """Of ``LLM.classify``."""

    @staticmethod
    def from_base(request_output: PoolingRequestOutput[PoolingOutput]) -> ClassificationRequestOutput:
        """See `ClassificationOutput.from_base`."""
        return ClassificationRequestOutput(**vars(request_output) | {"outputs": ClassificationOutput.from_base(request_output.outputs)})


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """Of ``LLM.score``."""

    @staticmethod
    def from_base(request_output: PoolingRequestOutput[PoolingOutput]) -> ScoringRequestOutput:
        """See `ScoringOutput.from_base`."""
        return ScoringRequestOutput(**vars(request_output) | {"outputs": ScoringOutput.from_base(request_output.outputs)})


def _vector(data: PooledData, what: str) -> list[float]:
    if data.ndim != 1:
        raise RequestValidationError(f"pooled data should be a 1-D vector of {what}, it has {data.ndim} axes", "data", data.ndim)
    return [float(x) for x in data.tolist()]


def _deprecated(what: str, instead: str) -> None:
    warnings.warn(f"{what} is deprecated: use {instead}", DeprecationWarning, stacklevel=3)
