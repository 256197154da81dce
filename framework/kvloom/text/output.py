"""From finished sequences to what callers get."""

from __future__ import annotations

from kvloom.core import Request
from kvloom.errors import InternalError
from kvloom.interfaces.tokenizer import Tokenizer
from kvloom.outputs import CompletionOutput, RequestOutput
from kvloom.text.detokenizer import Detokenizer


def request_output(request_id: str, prompt: str | None, request: Request, text: str) -> RequestOutput:
    """The output of a request that has ended, with this text."""
    finish = request.finish
    if finish is None:
        raise InternalError(f"sequence {request.sequence_id} has not ended")
    completion = CompletionOutput(
        index=request.spec.sample_index,
        text=text,
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


def stopped_by_token(request: Request) -> bool:
    """Whether its last token is an end-of-text or stop token, whose text does not belong to the output."""
    return request.finish is not None and request.finish.reason == "stop" and not isinstance(request.finish.stop_reason, str)


def output_text(request: Request, tokenizer: Tokenizer | None) -> str:
    """The output's text without its stop token, unless asked for; empty where no text is wanted.

    Raises:
        Exception: whatever the tokenizer raises; only this request is affected.
    """
    sampling = request.spec.sampling
    if tokenizer is None or not sampling.detokenize:
        return ""
    token_ids = request.output_token_ids
    if stopped_by_token(request) and not sampling.include_stop_str_in_output:
        token_ids = token_ids[:-1]
    text = Detokenizer(tokenizer, request.spec.prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens)
    return text.add(token_ids) + text.finish()
