"""Decoders of an engine, and one request's walk with one: what a plugin raises or gives is checked and named here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvloom.core import BranchRule
from kvloom.errors import NotRegisteredError, RequestError, RequestFailedError, RequestValidationError, shown
from kvloom.hooks.registry import Registry
from kvloom.interfaces import Branching, Candidates, Decision, Decoder


class NamedDecoder(NamedTuple):
    """A decoder, and whom to name when it fails."""

    name: str
    plugin: str
    decoder: Decoder

    def failure(self, what: str) -> RequestFailedError:
        """An error that names it."""
        return RequestFailedError(f"decoder {self.name!r} ({self.plugin}) {what}")


@dataclass(frozen=True, slots=True)
class Decoding:
    """In the place of `SamplingParams`: decode with this decoder, whose parameters are its own."""

    decoder: NamedDecoder
    params: Any

    def check(self) -> None:
        """Raises what the decoder has against the parameters, `RequestFailedError` when it breaks over them."""
        try:
            self.decoder.decoder.check(self.params)
        except RequestError:
            raise
        except Exception as error:
            raise self.decoder.failure(f"raised {type(error).__name__}: {error}") from error


def find_decoder(registry: Registry[Any], name: str) -> NamedDecoder:
    """Make the decoder that is registered under a name.

    Raises:
        RequestValidationError: there is none, or it only proposes drafts.
    """
    try:
        entry = registry.resolve(name)
    except NotRegisteredError as error:
        raise RequestValidationError(f"decoder={shown(name)}: {error}", "decoder", name) from error
    made = entry.load()()
    if not isinstance(made, Decoder):
        raise RequestValidationError(f"decoder={shown(name)} proposes drafts, it cannot decode on its own", "decoder", name)
    return NamedDecoder(name, str(entry.origin), made)


class _Walk:
    """One request's state between rounds."""

    def __init__(self, named: NamedDecoder, state: Any, vocab_size: int) -> None:
        self._named, self._state, self._vocab_size = named, state, vocab_size

    def decide(self, candidates: Sequence[Candidates]) -> Decision:
        """Ask the decoder. Raises `RequestFailedError` that names it."""
        try:
            state, decision = self._named.decoder.decide(self._state, candidates)
            tokens = [b.token_id for b in decision.live] + [i for f in decision.finished for i in f.token_ids]
            unknown = next((i for i in tokens if not 0 <= i < self._vocab_size), None)
        except RequestFailedError:
            raise
        except Exception as error:
            raise self._named.failure(f"raised {type(error).__name__}: {error}") from error
        if unknown is not None:
            raise self._named.failure(f"chose the token {shown(unknown)}, ids of this model are 0 to {self._vocab_size - 1}")
        self._state = state
        return decision


def begin(decoding: Decoding, prompt_token_ids: Sequence[int], eos_token_ids: frozenset[int], *, max_model_len: int,
          vocab_size: int, max_logprobs: int) -> BranchRule:
    """A request's rule, its numbers checked.

    Raises:
        RequestValidationError, RequestTypeError: parameters that the decoder refuses, or more candidates than the engine gives.
        RequestFailedError: the decoder raised something else.
    """
    named, room_tokens = decoding.decoder, max_model_len - len(prompt_token_ids)
    try:
        state, asked = named.decoder.start(decoding.params, prompt_token_ids, eos_token_ids, room_tokens)
        needs = Branching(*asked)
        sound = min(needs.max_branches, needs.candidates_per_row, needs.num_results, needs.max_tokens) >= 1 and needs.temperature >= 0
    except RequestError:
        raise
    except Exception as error:
        raise named.failure(f"raised {type(error).__name__}: {error}") from error
    if not sound or needs.max_tokens > room_tokens:
        raise named.failure(f"needs what cannot be: {needs}, with room for {room_tokens} tokens")
    most = vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)
    wanted = min(needs.candidates_per_row, vocab_size)
    if wanted > most:
        raise RequestValidationError(f"{named.name} needs {wanted} candidates a token (beam search twice its beam_width), the engine "
                                     f"gives at most {most}: raise max_logprobs of the LLM, or lower beam_width", "beam_width",
                                     needs.max_branches)
    return BranchRule(needs._replace(candidates_per_row=wanted), _Walk(named, state, vocab_size).decide)
