"""When a sequence ends by its tokens. Stop strings are the text side's; it calls `Scheduler.finish`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvloom.params import SamplingParams


class Finish(NamedTuple):
    """Why a sequence ended.

    Fields:
        reason: "stop", "length", "abort" or "error".
        stop_reason: the stop token id or stop string; None for the end-of-text token and for other reasons.
    """

    reason: str
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class StopRule:
    """Decides after each token, in this order: end-of-text token, stop token ids, length.

    So an end-of-text token that arrives exactly at the length bound gives "stop".

    Args:
        eos_token_id: end-of-text token; None when there is none or it is ignored.
        stop_token_ids: other tokens that end the output.
        end_tokens: most tokens that the sequence may have, prompt and output together.
    """

    eos_token_id: int | None
    stop_token_ids: frozenset[int]
    end_tokens: int

    @classmethod
    def of(cls, sampling: SamplingParams | None, prompt_tokens: int, max_model_len: int, eos_token_id: int | None,
           extra_eos_token_ids: frozenset[int], *, has_grammar: bool = False) -> StopRule:
        """The rule of one request. `ignore_eos` ignores both kinds of end tokens, never the request's own stop ids.

        Args:
            sampling: None: the sequence is pooled: it gets no token, and its last one is computed.
            has_grammar: the worker offers end tokens only where the grammar lets the output end; with `ignore_eos`, only where
                the output cannot go on.
        """
        if sampling is None:
            return cls(None, frozenset(), prompt_tokens + 1)
        own = frozenset(sampling.stop_token_ids or ())
        end_tokens = max_model_len if sampling.max_tokens is None else min(max_model_len, prompt_tokens + sampling.max_tokens)
        if sampling.ignore_eos and not has_grammar:
            return cls(None, own, end_tokens)
        return cls(eos_token_id, own | extra_eos_token_ids, end_tokens)

    def check(self, token_id: int, num_tokens: int) -> Finish | None:
        """Why the sequence ends with `token_id`, which made it `num_tokens` long; None when it goes on."""
        if token_id == self.eos_token_id:
            return Finish("stop")
        if token_id in self.stop_token_ids:
            return Finish("stop", token_id)
        if num_tokens >= self.end_tokens:
            return Finish("length")
        return None
