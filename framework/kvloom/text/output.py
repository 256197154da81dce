"""From finished sequences to what callers get."""

from __future__ import annotations

from kvloom.core import Finish, Request
from kvloom.errors import InternalError
from kvloom.interfaces.tokenizer import Tokenizer
from kvloom.outputs import CompletionOutput, RequestOutput
from kvloom.text.detokenizer import Detokenizer


def request_output(request_id: str, prompt: str | None, request: Request, tokenizer: Tokenizer | None) -> RequestOutput:
    """The output of a request that has ended.

    Raises:
        Exception: whatever the tokenizer raises; only this request is affected.
    """
    finish = request.finish
    if finish is None:
        raise InternalError(f"sequence {request.sequence_id} has not ended")
    completion = CompletionOutput(
        index=request.spec.sample_index,
        text=_text(request, finish, tokenizer),
        token_ids=request.output_token_ids,
        finish_reason=finish.reason,
        stop_reason=finish.stop_reason,
    )
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=list(request.spec.prompt_token_ids),
        prompt_logprobs=None,
        outputs=[completion],
        finished=True,
        metrics=request.metrics,
        num_cached_tokens=request.metrics.num_cached_tokens,
    )


def _text(request: Request, finish: Finish, tokenizer: Tokenizer | None) -> str:
    """The output without its stop token; empty where no text is wanted."""
    sampling = request.spec.sampling
    if tokenizer is None or not sampling.detokenize:
        return ""
    token_ids = request.output_token_ids
    stopped_by_token = finish.reason == "stop" and not isinstance(finish.stop_reason, str)
    text = Detokenizer(tokenizer, request.spec.prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens)
    return text.add(token_ids[:-1] if stopped_by_token else token_ids) + text.finish()
