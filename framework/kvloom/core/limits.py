"""What bounds the scheduler: numbers from the configuration, checked once."""

from __future__ import annotations

from dataclasses import dataclass, fields

from kvloom.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one engine's steps and requests.

    Args:
        max_model_len: tokens of the longest sequence, prompt and output together.
        max_num_seqs: sequences that may run at once; the worker has as many rows.
        max_num_batched_tokens: token budget of a step, shared by prompts, chunks and decodes.
        long_prefill_token_threshold: most tokens of one request in one step; 0 sets no such bound.
        enable_chunked_prefill: False schedules a prompt whole or not at all, and the threshold has no effect.
        enable_prefix_caching: False keeps no block for later requests.
        chunkable: `Model.chunkable`; False also means that requests never take prompts of others from the prefix cache.

    Raises:
        ConfigError: a number is below 1 (the threshold: below 0), or prompts that may not be cut do not fit the budget.
    """

    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    chunkable: bool = True

    def __post_init__(self) -> None:
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name == "long_prefill_token_threshold" else 1
            if f.type == "int" and value < least:
                raise ConfigError(f"{f.name} must be at least {least}, got {value}")
        if not self.chunked and self.max_num_batched_tokens < self.max_model_len:
            change = "or set enable_chunked_prefill=True" if self.chunkable else "as this model computes a prompt in one step"
            raise ConfigError(
                f"prompts are not cut into chunks, so max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_model_len={self.max_model_len}; raise the first, lower the second, {change}"
            )

    @property
    def chunked(self) -> bool:
        """Whether a prompt may be computed over several steps."""
        return self.enable_chunked_prefill and self.chunkable

    @property
    def cached(self) -> bool:
        """Whether blocks are kept for later requests and found again."""
        return self.enable_prefix_caching and self.chunkable

    @property
    def max_chunk_tokens(self) -> int:
        """Most tokens of one request in one step."""
        if self.chunked and self.long_prefill_token_threshold:
            return min(self.long_prefill_token_threshold, self.max_num_batched_tokens)
        return self.max_num_batched_tokens
