"""What the tests of the API share: a checkpoint whose output varies, transformers' model of the same files, outputs made to order."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kvloom import LLM, CompletionOutput, RequestOutput, SamplingParams
from kvloom.interfaces import Step
from kvloom.testing.checkpoints import EOS, make_checkpoint

TOLERANCE = 1e-4
"""Of float32 log-probabilities between two implementations."""
MADE_UP = 1e4
"""Added to the logit of a token that is to come: nothing else has a probability then, and minus infinity stays what it is."""


def lively_checkpoint(directory: Path, generation: dict | None = None, words: Sequence[str] = (), **config) -> Path:
    """A random Llama whose greedy output does not repeat itself: no token has more than about a tenth of the probability.

    Args:
        generation: content of generation_config.json.
        words: texts that become one token each, as they are (258, 260, ...) and after a space (259, 261, ...).
    """
    make_checkpoint(directory, tie_word_embeddings=False, **config)
    weights, generator = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.dim() == 2:
            scale = 1.0 if "embed" in name else 0.25 if "lm_head" in name else 1.5 / math.sqrt(weight.shape[1])
            weights[name] = torch.randn(weight.shape, generator=generator) * scale
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    if words:
        add_words(directory / "tokenizer.json", words)
    return directory


def add_words(file: Path, words: Sequence[str]) -> None:
    """Merges that make one token of each word, which are of two letters, and of it after a space."""
    content = json.loads(file.read_text())
    model = content["model"]
    for word in words:
        for parts in ((word[0], word[1]), ("Ġ", word)):
            model["vocab"]["".join(parts)] = max(EOS, *model["vocab"].values()) + 1
            model["merges"].append(list(parts))
    file.write_text(json.dumps(content))


class Truth:
    """transformers' model of a checkpoint, in float32."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import LlamaForCausalLM

        self._model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """``[T, V]``: row i is what comes after token i."""
        return self._model(torch.tensor([list(token_ids)])).logits[0]

    def after(self, token_ids: Sequence[int]) -> torch.Tensor:
        """``[V]``: logits of the token that comes next."""
        return self.logits(token_ids)[-1]

    def greedy(self, prompt: Sequence[int], count: int,
               change: Callable[[torch.Tensor, list[int]], torch.Tensor] = lambda logits, output: logits) -> list[int]:
        """The best tokens one after the other, after ``change(logits [V], output so far)``."""
        output: list[int] = []
        for _ in range(count):
            output.append(int(change(self.after([*prompt, *output]), output).argmax()))
        return output

    def check_output(self, prompt: Sequence[int], done: CompletionOutput, wanted: int) -> None:
        """Log-probabilities and ranks of an output are those of the raw logits."""
        logits = self.logits([*prompt, *done.token_ids])[len(prompt) - 1:-1]
        check_candidates(logits, done.token_ids, done.logprobs, wanted)
        total = sum(candidates[token_id].logprob for token_id, candidates in zip(done.token_ids, done.logprobs, strict=True))
        assert math.isclose(done.cumulative_logprob, total, rel_tol=1e-9)

    def check_prompt(self, prompt: Sequence[int], output: RequestOutput, wanted: int) -> None:
        """The same for the prompt's tokens; the first has none."""
        assert len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        check_candidates(self.logits(prompt)[:-1], prompt[1:], output.prompt_logprobs[1:], wanted)


def check_candidates(logits: torch.Tensor, token_ids: Sequence[int], got: Sequence[dict], wanted: int) -> None:
    """Each position has its token and the `wanted` best ones, with log-probability and rank; near ties may be either way round."""
    expected = logits.log_softmax(-1)
    assert len(got) == len(token_ids) == len(expected)
    for row, token_id, candidates in zip(expected, token_ids, got, strict=True):
        assert next(iter(candidates)) == token_id
        others = [i for i in candidates if i != token_id]
        ranked = sorted((c for c in candidates.values()), key=lambda c: c.rank)
        assert [c.rank for c in ranked[:wanted]] == list(range(1, wanted + 1))
        assert len(candidates) in (wanted, wanted + 1)
        assert all(candidates[i].rank <= wanted for i in others)
        for i, c in candidates.items():
            assert abs(c.logprob - row[i].item()) < TOLERANCE
            assert 1 + int((row > row[i] + TOLERANCE).sum()) <= c.rank <= int((row >= row[i] - TOLERANCE).sum())


def run(llm: LLM, prompts, params: SamplingParams | Sequence[SamplingParams], **kwargs) -> list[RequestOutput]:
    """Without a bar, and the engine is empty afterwards."""
    outputs = llm.generate(prompts, params, use_tqdm=False, **kwargs)
    assert_idle(llm)
    return outputs


def complete(llm: LLM, prompt, **params) -> CompletionOutput:
    """The one completion of one prompt."""
    (output,) = run(llm, [prompt], SamplingParams(**params))
    (done,) = output.outputs
    return done


def ids(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """The first completion's tokens of each."""
    return [list(o.outputs[0].token_ids) for o in outputs]


def assert_idle(llm: LLM) -> None:
    """Nothing is queued, no block is held, and the scheduler's numbers add up."""
    scheduler = llm.llm_engine.engine.scheduler
    scheduler.check_integrity()
    assert not llm.llm_engine.has_work
    assert scheduler.num_free_blocks == scheduler.num_usable_blocks


def writes(what: str | Sequence[int], then: int = EOS):
    """A function for `logits_processors` that makes the output these tokens (a text's bytes), and then `then`."""
    wanted = list(what.encode()) if isinstance(what, str) else list(what)

    def write(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[wanted[len(output_ids)] if len(output_ids) < len(wanted) else then] += MADE_UP
        return logits

    return write


def written(llm: LLM, what: str | Sequence[int], prompt="?", **params) -> CompletionOutput:
    """A completion that is made to be this, and then end of text."""
    return complete(llm, prompt, **{"temperature": 0, "max_tokens": 40, "logits_processors": [writes(what)]} | params)


def is_set_to(probabilities: Sequence[float]):
    """A function for `logits_processors` that gives the first tokens these probabilities and all others none."""

    def set_to(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(logits, -torch.inf)
        out[:len(probabilities)] = torch.tensor(probabilities).log()
        return out

    return set_to


def drawn(llm: LLM, prompt, count: int = 2000, **params) -> Counter:
    """First tokens of `count` samples."""
    (output,) = run(llm, [prompt], SamplingParams(**{"n": count, "max_tokens": 1, "seed": 0} | params))
    return Counter(o.token_ids[0] for o in output.outputs)


def check_drawn(found: Counter, probabilities: torch.Tensor) -> None:
    """Nothing that has no probability came, and the rest came as often as expected (chi-squared, five standard deviations)."""
    count = sum(found.values())
    assert all(probabilities[i] > 0 for i in found)
    often = [i for i in range(len(probabilities)) if probabilities[i] * count >= 5]
    expected = {i: float(probabilities[i]) * count for i in often}
    distance = sum((found[i] - e) ** 2 / e for i, e in expected.items())
    freedom = max(1, len(often) - 1)
    assert distance < freedom + 5 * math.sqrt(2 * freedom), (distance, freedom)


@contextmanager
def recorded_steps(llm: LLM) -> Iterator[list[Step]]:
    """Every step that reaches the executor meanwhile; none means that nothing was computed."""
    executor, steps = llm.llm_engine.executor, []
    submit = executor.submit

    def record(step: Step) -> None:
        steps.append(step)
        submit(step)

    executor.submit = record
    try:
        yield steps
    finally:
        del executor.submit


def computed_of_prompts(steps: Sequence[Step], prompt_tokens: int) -> int:
    """How many tokens of prompts of this length were computed."""
    return sum(max(0, min(r.start + r.num_tokens, prompt_tokens) - r.start) for step in steps for r in step.ranges)
