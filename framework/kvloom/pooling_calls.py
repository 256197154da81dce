"""`LLM`'s methods of pooling engines: encode, embed, classify, reward, score."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from kvloom.calls import run
from kvloom.errors import RequestTypeError, RequestValidationError
from kvloom.other_arguments import refuses_arguments
from kvloom.params import PoolingParams
from kvloom.pooling_outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringRequestOutput,
)
from kvloom.prompts import Truncation, legacy_prompts, split_prompts
from kvloom.request_arguments import OnError, check_on_error, one_each, priorities_each, refuse_later
from kvloom.running import RunningEngine
from kvloom.score import check_one_label, paired, score_embeddings, score_pairs
from kvloom.text.tokenization import cut_prompts, read_truncation

NOT_GIVEN: Any = object()
PoolingChoice = PoolingParams | Sequence[PoolingParams] | None
Bar = bool | Callable[..., Any]
Tokenization = Mapping[str, Any] | None
Wanted = TypeVar("Wanted", EmbeddingRequestOutput, ClassificationRequestOutput, ScoringRequestOutput)


@refuses_arguments
class PoolingCalls:
    """Mixed into `LLM`. The methods share these arguments.

    Args:
        prompts: in `LLM.generate`'s forms, at least one.
        use_tqdm: show a progress bar, or a function that makes one.
        pooling_params: one for all or one a prompt; None: the engine's defaults.
        truncate_prompt_tokens: see `PoolingParams`; for all prompts.
        tokenization_kwargs: as in `LLM.generate`; without ``truncation_side`` a text is cut where the tokenizer cuts.
        lora_request, prompt_adapter_request: unsupported so far unless None.
        priority, on_error: as in `LLM.generate`.

    Raises:
        RequestValidationError, RequestTypeError: no prompt, a bad one, or a task that this engine does not have; nothing was computed.
        RequestFailedError: a request failed while it ran.
    """

    DEPRECATE_LEGACY: ClassVar[bool]

    @property
    @abstractmethod
    def llm_engine(self) -> RunningEngine:
        """The running engine."""

    def encode(
        self,
        prompts: Any = NOT_GIVEN,
        pooling_params: PoolingChoice = None,
        prompt_token_ids: Any = None,
        use_tqdm: Bar = True,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        *,
        pooling_task: str | None = None,
        truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: Tokenization = None,
        priority: int | Sequence[int] | None = None,
        on_error: OnError = "raise",
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Pool prompts; results in their order, as tensors: ``[H]``, ``[labels]``, or ``[tokens, ...]`` where each token has a row.

        Args:
            prompt_token_ids: of older versions: token ids beside or instead of `prompts`.
            pooling_task: embed, classify, score, reward, token_embed or token_classify, as far as the engine's task allows; None:
                the engine's.
        """
        rules = self.llm_engine.rules.need_pooling("encode")
        refuse_later(lora_request=lora_request, prompt_adapter_request=prompt_adapter_request)
        rules.check_task(pooling_task)
        items = cut_prompts(prompts_of(prompts, prompt_token_ids, warn=self.DEPRECATE_LEGACY), tokenization_kwargs)
        return self._pool(items, pooling_params, pooling_task, truncate_prompt_tokens, use_tqdm, priority, on_error)

    def embed(
        self,
        prompts: Any,
        /,
        *,
        use_tqdm: Bar = True,
        pooling_params: PoolingChoice = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: Tokenization = None,
        priority: int | Sequence[int] | None = None,
        on_error: OnError = "raise",
    ) -> list[EmbeddingRequestOutput]:
        """Embed prompts: one list of numbers each, of length 1 where the model normalizes."""
        self.llm_engine.rules.need_pooling("embed").check_one_row("embed")
        refuse_later(lora_request=lora_request, prompt_adapter_request=prompt_adapter_request)
        items = cut_prompts(split_prompts(prompts), tokenization_kwargs)
        outputs = self._pool(items, pooling_params, "embed", truncate_prompt_tokens, use_tqdm, priority, on_error)
        return [converted(o, EmbeddingRequestOutput) for o in outputs]

    def classify(
        self,
        prompts: Any,
        /,
        *,
        use_tqdm: Bar = True,
        pooling_params: PoolingChoice = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: Tokenization = None,
        priority: int | Sequence[int] | None = None,
        on_error: OnError = "raise",
    ) -> list[ClassificationRequestOutput]:
        """Classify prompts: a probability for each of the model's labels."""
        self.llm_engine.rules.need_pooling("classify").check_one_row("classify")
        refuse_later(lora_request=lora_request, prompt_adapter_request=prompt_adapter_request)
        items = cut_prompts(split_prompts(prompts), tokenization_kwargs)
        outputs = self._pool(items, pooling_params, "classify", truncate_prompt_tokens, use_tqdm, priority, on_error)
        return [converted(o, ClassificationRequestOutput) for o in outputs]

    def reward(
        self,
        prompts: Any,
        /,
        *,
        use_tqdm: Bar = True,
        pooling_params: PoolingChoice = None,
        lora_request: Any = None,
        truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: Tokenization = None,
        priority: int | Sequence[int] | None = None,
        on_error: OnError = "raise",
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Reward prompts: ``[tokens, labels]``, or ``[steps, labels]`` of a process reward model."""
        self.llm_engine.rules.need_pooling("reward")
        refuse_later(lora_request=lora_request)
        items = cut_prompts(split_prompts(prompts), tokenization_kwargs)
        return self._pool(items, pooling_params, "reward", truncate_prompt_tokens, use_tqdm, priority, on_error)

    def score(
        self,
        text_1: Any,
        text_2: Any,
        /,
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: Bar = True,
        pooling_params: PoolingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        tokenization_kwargs: Tokenization = None,
        priority: int | Sequence[int] | None = None,
        on_error: OnError = "raise",
    ) -> list[ScoringRequestOutput]:
        """Score pairs of texts, 1 to 1, 1 to N or N to N: by a cross-encoder, or by the cosine of two embeddings.

        Args:
            text_1, text_2: texts, ``{"prompt": ...}`` or ``{"prompt_token_ids": ...}``, whose text then counts; one or a list.
            pooling_params: one for all.
            truncate_prompt_tokens: of both texts together, the longer one cut first; with embeddings of each.
            priority: one for all or one a pair.

        Returns:
            As many as `text_2` has. Of embeddings ``request_id`` is that of both, joined by ``_``, and the token ids are those of both
            with a padding token between them.
        """
        engine = self.llm_engine
        rules = engine.rules.need_pooling("score")
        rules.check_one_row("score")
        check_one_label(engine)
        refuse_later(lora_request=lora_request, prompt_adapter_request=prompt_adapter_request)
        check_on_error(on_error)
        if pooling_params is not None and not isinstance(pooling_params, PoolingParams):
            raise RequestTypeError(f"pooling_params must be one PoolingParams for all pairs, got {type(pooling_params).__name__}",
                                   "pooling_params", pooling_params)
        params = for_task(pooling_params or PoolingParams(), "embed" if rules.task == "embed" else "score", truncate_prompt_tokens)
        cut, params = taken_cut(params, read_truncation(tokenization_kwargs))
        pairs = paired(text_1, text_2, cut)
        priorities = priorities_each(len(pairs.second), priority)
        if rules.task == "embed":
            return score_embeddings(engine, pairs, params, priorities, use_tqdm, on_error)
        return [converted(o, ScoringRequestOutput) for o in score_pairs(engine, pairs, params, priorities, use_tqdm, on_error)]

    def _pool(self, items: Sequence[Any], params: PoolingChoice, task: str | None, truncate: int | None, use_tqdm: Bar,
              priority: int | Sequence[int] | None, on_error: OnError) -> list[PoolingRequestOutput[PoolingOutput]]:
        check_on_error(on_error)
        if not items:
            raise RequestValidationError("You must pass at least one prompt", "prompts", items)
        each = one_each(len(items), params, PoolingParams(), "pooling_params")
        prepared = {id(p): for_task(p, task, truncate) for p in each}
        return run(self.llm_engine, items, [prepared[id(p)] for p in each], priorities_each(len(items), priority), use_tqdm, on_error)


def for_task(params: PoolingParams, task: str | None, truncate: int | None) -> PoolingParams:
    """The caller's with what the call says. Raises `RequestValidationError` where both say something else."""
    for name, value in (("task", task), ("truncate_prompt_tokens", truncate)):
        own = getattr(params, name)
        if value is not None and own is not None and own != value:
            raise RequestValidationError(f"PoolingParams.{name}={own!r} contradicts the call, which says {value!r}", name, own)
    return replace(params, task=params.task if task is None else task,
                   truncate_prompt_tokens=params.truncate_prompt_tokens if truncate is None else truncate)


def taken_cut(params: PoolingParams, cut: Truncation | None) -> tuple[Truncation | None, PoolingParams]:
    """How the texts of a pair are cut, and the parameters without it. Raises `RequestValidationError` where both say it."""
    tokens = params.truncate_prompt_tokens
    if tokens is None:
        return cut, params
    if cut is not None:
        raise RequestValidationError("both tokenization_kwargs and truncate_prompt_tokens say how to cut the texts: give one of them",
                                     "truncate_prompt_tokens", tokens)
    return Truncation(tokens), replace(params, truncate_prompt_tokens=None)


def converted(output: PoolingRequestOutput[Any], wanted: type[Wanted]) -> Wanted:
    """The output of a task from what was pooled; a failed one stays without `outputs`."""
    found: Wanted = wanted(**vars(output)) if output.error is not None else wanted.from_base(output)
    return found


def prompts_of(prompts: Any, prompt_token_ids: Any, *, warn: bool) -> list[Any]:
    """One item a prompt, from today's or yesterday's arguments.

    Args:
        warn: that yesterday's are deprecated.
    """
    if prompt_token_ids is None:
        if prompts is NOT_GIVEN:
            raise RequestValidationError("Either prompts or prompt_token_ids must be provided.", "prompts")
        return split_prompts(prompts)
    if warn:
        warnings.warn("prompt_token_ids is deprecated: give [{'prompt_token_ids': [...]}, ...] as prompts", DeprecationWarning,
                      stacklevel=4)
    return legacy_prompts(None if prompts is NOT_GIVEN else prompts, prompt_token_ids)
