"""Attributes and methods that `LLM` has for the sake of scripts, and what is said about those that it does not have."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from kvloom.config.compat import OTHER_METHODS
from kvloom.errors import EngineClosedError, KvloomError, UnsupportedMethodError
from kvloom.params import SamplingParams
from kvloom.request_counter import RequestCounter

if TYPE_CHECKING:
    from kvloom.running import RunningEngine


class OtherVersions:
    """Base of `LLM`."""

    if TYPE_CHECKING:
        @property
        def llm_engine(self) -> RunningEngine:
            """See `LLM`."""

    @property
    def engine_class(self) -> type[RunningEngine]:
        """Class of `llm_engine`."""
        return type(self.llm_engine)

    @property
    def request_counter(self) -> RequestCounter:
        """Its ``counter`` is the number of the next request, which is its ``request_id``."""
        return self.llm_engine.numbers

    @property
    def default_sampling_params(self) -> dict[str, Any]:
        """What generation_config.json and ``override_generation_config`` changed of ``SamplingParams()``: field -> value."""
        ours, plain = self.llm_engine.defaults, SamplingParams()
        return {f.name: getattr(ours, f.name) for f in fields(ours) if getattr(ours, f.name) != getattr(plain, f.name)}

    def __repr__(self) -> str:
        """The model's name, and its layers as torch shows them where nothing keeps the workers from saying so. It never raises."""
        try:
            engine = self.llm_engine
        except EngineClosedError:
            return f"{type(self).__name__}(closed)"
        try:
            layers = engine.call_workers("repr()", _tree)
        except KvloomError as error:
            layers = [f"({error})"]
        return "\n".join([f"{type(self).__name__}(model={engine.model_name!r})", *layers])

    def __getattr__(self, name: str) -> Any:
        """Only asked for what is not there. Raises `UnsupportedMethodError` for a method of another version of vLLM."""
        instead = OTHER_METHODS.get(name)
        if instead is not None:
            raise UnsupportedMethodError(f"LLM.{name} is not supported; {instead}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def get_world_size(self) -> int:
        """How many workers there are."""
        return len(self.llm_engine.call_workers("get_world_size()", _rank))


def _rank(worker: Any) -> int:
    return int(worker.rank)


def _tree(worker: Any) -> str:
    return repr(worker.model)
