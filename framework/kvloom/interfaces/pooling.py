"""Pooling: hidden states of a sequence to one row, or to a row a token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvloom.params import PoolingParams

if TYPE_CHECKING:
    from torch import Tensor


class Pooler(ABC):
    """Reduces hidden states chunk by chunk, so that a mean over a chunked prompt is right.

    Registered with ``kvloom_register_poolers`` under a pooling type (``MEAN``), which a configuration, a checkpoint or a model names.
    Made once an engine, without arguments. What comes after it is the engine's: dense layers, the cut to `PoolingParams.dimensions`,
    the norm, or the model's label head with its activation. It sees one sequence at a time and knows no model.

    What it raises fails that sequence's request only.
    """

    needs: ClassVar[Literal["last", "all"]] = "all"
    """"all" wants every position's hidden state: such a request does not read the prefix cache. "last" wants the last one's."""

    gives_rows: ClassVar[bool] = False
    """Whether the result has rows of its own for tokens, which embed, classify and score refuse before anything is computed."""

    @abstractmethod
    def start(self, params: PoolingParams, token_ids: Sequence[int]) -> Any:
        """State of one sequence before its first chunk. Raises `RequestValidationError` for parameters it cannot serve.

        Args:
            params: the request's, with the engine's defaults filled in.
            token_ids: of the prompt, all of them.
        """

    @abstractmethod
    def update(self, state: Any, hidden: Tensor, first_position: int) -> Any:
        """``hidden [t, H]``, in the model's dtype, of positions [first_position, first_position + t): the new state.

        The old one must stay as it is, since a step may be computed again; `hidden` must not be kept or changed, a copy of it may.
        With ``needs == "last"`` it is called once, with the last position's row.
        """

    @abstractmethod
    def finish(self, state: Any) -> Tensor:
        """The result: ``[H]``, or ``[n, H]`` for a row a token; the state stays as it is."""
