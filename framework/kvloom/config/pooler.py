"""``PoolerConfig``: what a caller says about pooling. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class PoolerConfig(BaseModel):
    """How hidden states are pooled: wins over what the checkpoint says, which wins over the model's own way. None leaves it to them.

    Args:
        pooling_type: LAST, CLS, MEAN, ALL, STEP, or a plugin's name; in any case.
        normalize: whether embeddings get length 1.
        softmax: whether label scores become probabilities.
        use_activation: newer versions' name of both.
        step_tag_id: with STEP, rows of this token are given; None: all.
        returned_token_ids: columns of the label head's output that are given; None: all.

    Raises:
        ValidationError: a wrong value; it is a `ValueError`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    pooling_type: str | None = None
    normalize: bool | None = None
    softmax: bool | None = None
    use_activation: bool | None = None
    step_tag_id: TokenId | None = None
    returned_token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1)] | None = None

    @field_validator("pooling_type")
    @classmethod
    def _upper(cls, value: str | None) -> str | None:
        return value and value.upper()

    @field_validator("returned_token_ids", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_activation(self) -> Self:
        if self.use_activation is not None and not {self.normalize, self.softmax} <= {None, self.use_activation}:
            raise ValueError("use_activation contradicts normalize or softmax")
        return self

    @property
    def activates_embeddings(self) -> bool | None:
        """`normalize` or `use_activation`."""
        return self.use_activation if self.normalize is None else self.normalize

    @property
    def activates_labels(self) -> bool | None:
        """`softmax` or `use_activation`."""
        return self.use_activation if self.softmax is None else self.softmax
