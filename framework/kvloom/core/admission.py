"""Whether a request can ever run here; if not, the arithmetic and what to change."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from kvloom.core.kv_blocks import KVBlocks
from kvloom.core.limits import SchedulerLimits
from kvloom.core.request import RequestSpec
from kvloom.core.stop import StopRule
from kvloom.errors import RequestValidationError
from kvloom.interfaces.state import KVGroup


class Admission:
    """Refuses what can never fit, so that whatever is let in can always run to its end once all others have given way."""

    def __init__(self, limits: SchedulerLimits, groups: Sequence[KVGroup], kv: KVBlocks) -> None:
        self._limits, self._groups, self._kv = limits, tuple(groups), kv

    def check(self, spec: RequestSpec) -> StopRule:
        """When the request will end.

        Raises:
            RequestValidationError: an empty or over-long prompt, or more blocks than there are.
        """
        prompt_tokens = len(spec.prompt_token_ids)
        check_prompt_length(prompt_tokens, self._limits.max_model_len, output_tokens=spec.pooling is None)
        stop = StopRule.of(spec.sampling, prompt_tokens, self._limits.max_model_len, spec.eos_token_id, spec.extra_eos_token_ids,
                           has_grammar=spec.grammar is not None)
        if spec.sampling is not None and spec.sampling.min_tokens > stop.end_tokens - prompt_tokens:
            raise RequestValidationError(
                f"min_tokens={spec.sampling.min_tokens} cannot be reached: {stop.end_tokens - prompt_tokens} output tokens fit after a "
                f"prompt of {prompt_tokens} tokens.", "min_tokens", spec.sampling.min_tokens)
        if spec.max_branches > self._limits.max_num_seqs:
            raise RequestValidationError(
                f"This request keeps up to {spec.max_branches} sequences at a time, and max_num_seqs is {self._limits.max_num_seqs}: "
                "ask for fewer (a smaller beam_width), or raise max_num_seqs.", "beam_width", spec.max_branches)
        needed = self._needed_by_group(stop.end_tokens, prompt_tokens, spec.max_branches)
        if sum(needed) > self._kv.num_usable:
            raise self._never_fits(needed, prompt_tokens, stop.end_tokens, spec.max_branches, pooled=spec.pooling is not None)
        return stop

    def _needed_by_group(self, end_tokens: int, prompt_tokens: int, branches: int) -> list[int]:
        """For sequences of one prompt. A branch that has to be computed again finds the prompt's full blocks with the others, but not
        where layers have windows: theirs may have gone."""
        # The last token is never computed.
        alone = self._kv.needed_by_group(end_tokens - 1, chunked=self._limits.chunked)
        shared = prompt_tokens // self._kv.block_tokens if all(g.window_tokens is None for g in self._groups) else 0
        return [n * branches - shared * (branches - 1) for n in alone]

    def _never_fits(self, needed: Sequence[int], prompt_tokens: int, end_tokens: int, branches: int, *,
                    pooled: bool) -> RequestValidationError:
        def needed_for(tokens: int) -> int:
            return sum(self._needed_by_group(max(tokens, 1), prompt_tokens, branches if tokens > prompt_tokens else 1))

        by_group = " + ".join(f"{n} ({_name(g)})" for n, g in zip(needed, self._groups, strict=True))
        fitting = bisect_right(range(self._limits.max_model_len + 1), self._kv.num_usable, key=needed_for) - 1
        times = f" for each of {branches} branches" if branches > 1 else ""
        if fitting > prompt_tokens and not pooled:
            change = f"lower max_tokens to {fitting - prompt_tokens}"
        else:
            change = f"shorten the prompt to less than {fitting} tokens" if fitting > 1 else "use a model with less state"
        output = "" if pooled else f" + up to {end_tokens - prompt_tokens} output tokens - 1"
        return RequestValidationError(
            f"This request can never fit: {prompt_tokens} prompt tokens{output} = {end_tokens - 1} tokens to keep{times}, in blocks of "
            f"{self._kv.block_tokens} tokens; that is {by_group} = {sum(needed)} "
            f"blocks, and the KV cache has {self._kv.num_usable}. Either {change}, or give the cache {sum(needed) + 1} blocks "
            "(kv_cache_memory, gpu_memory_utilization or num_gpu_blocks_override).",
            *(("prompt_token_ids", prompt_tokens) if pooled else ("max_tokens", end_tokens - prompt_tokens)),
        )


def check_prompt_length(prompt_tokens: int, max_model_len: int, *, output_tokens: bool = True) -> None:
    """Raises `RequestValidationError` for a prompt without tokens or one that is too long: with `output_tokens` it must leave room
    for one."""
    if not prompt_tokens:
        raise RequestValidationError("The prompt cannot be empty.", "prompt_token_ids", [])
    if not output_tokens and prompt_tokens > max_model_len:
        raise RequestValidationError(
            f"The prompt has {prompt_tokens} tokens, which is longer than the maximum model length of {max_model_len}; shorten the "
            "prompt, set truncate_prompt_tokens=-1 or raise max_model_len.", "prompt_token_ids", prompt_tokens)
    if output_tokens and prompt_tokens >= max_model_len:
        raise RequestValidationError(
            f"The prompt has {prompt_tokens} tokens, which with at least one output token is longer than the maximum model "
            f"length of {max_model_len}; shorten the prompt or raise max_model_len.", "prompt_token_ids", prompt_tokens)


def _name(group: KVGroup) -> str:
    if group.window_tokens is None:
        return f"group {group.index}: {group.kind}"
    return f"group {group.index}: window of {group.window_tokens} tokens"
