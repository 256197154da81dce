"""Pooling: hidden states of a sequence to one result (embedding, classification, score, reward)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvloom.params import PoolingParams

if TYPE_CHECKING:
    from torch import Tensor


class Pooler(ABC):
    """Reduces hidden states chunk by chunk, so that a mean over a chunked prompt is right.

    Registered with ``kvloom_register_poolers``; chosen per request by its task. The model does not know it.
    """

    needs: ClassVar[Literal["last", "all"]] = "last"
    """"all" wants every position's hidden state: such a request does not read the prefix cache."""
    tasks: ClassVar[tuple[str, ...]] = ("embed",)

    @abstractmethod
    def start(self, params: PoolingParams, prompt_tokens: int) -> Any:
        """State of one sequence. Raises `RequestValidationError` for parameters it cannot serve."""

    @abstractmethod
    def update(self, state: Any, hidden: Tensor, first_position: int) -> Any:
        """``hidden [t, H]`` of positions [first_position, first_position + t): returns the new state.

        With ``needs == "last"`` it is called once, with the last position's row.
        """

    @abstractmethod
    def finish(self, state: Any) -> Tensor:
        """The result, float32 on the CPU: ``[H]``, ``[labels]`` or ``[tokens, dim]``."""
