"""Every hook. One table of kinds, one registration hook a kind, all of one shape; three observers.

docs/hooks.md has a section for each; a test compares signatures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvloom.hooks.markers import hookspec

if TYPE_CHECKING:
    from kvloom.interfaces import EngineInfo, Registrar, StepStats
    from kvloom.outputs import RequestOutput
    from kvloom.pooling_outputs import PoolingRequestOutput


class Kind(NamedTuple):
    """One kind of component.

    Fields:
        name: as in ``KVLOOM_API`` and in the hook's name, ``kvloom_register_{name}``.
        contracts: names in `kvloom.interfaces`; a target must be a subclass of one of them.
        version: of the contract; a plugin declares the one that it was written for. 0: not frozen yet.
    """

    name: str
    contracts: tuple[str, ...]
    version: int = 0

    @property
    def hook(self) -> str:
        """Name of its registration hook."""
        return f"kvloom_register_{self.name}"


KINDS: dict[str, Kind] = {kind.name: kind for kind in (
    Kind("models", ("Model",)),
    Kind("quantizations", ("QuantMethod",)),
    Kind("logits_processors", ("LogitsProcessor",)),
    Kind("samplers", ("Sampler",)),
    Kind("decoders", ("Decoder", "Proposer")),
    Kind("poolers", ("Pooler",)),
    Kind("attention_backends", ("AttentionBackend",)),
    Kind("adapters", ("Adapter",)),
    Kind("executors", ("Executor",)),
    Kind("grammars", ("Grammar",)),
    Kind("loaders", ("WeightLoader",)),
    Kind("schedulers", ("SchedulingPolicy",)),
    Kind("tokenizers", ("Tokenizer",)),
    Kind("media", ("MediaProcessor",)),
    Kind("routes", ("RouteProvider",)),
)}
OBSERVERS = ("kvloom_engine_started", "kvloom_step_finished", "kvloom_request_finished")


class HookSpecs:
    """What a plugin module may implement with ``@hookimpl``."""

    @hookspec
    def kvloom_register_models(self, registry: Registrar) -> None:
        """Offer model families under their config.json architecture names."""

    @hookspec
    def kvloom_register_quantizations(self, registry: Registrar) -> None:
        """Offer quantization methods under their ``quantization_config.quant_method`` names."""

    @hookspec
    def kvloom_register_logits_processors(self, registry: Registrar) -> None:
        """Offer logits processors under the names that requests use."""

    @hookspec
    def kvloom_register_samplers(self, registry: Registrar) -> None:
        """Offer token samplers."""

    @hookspec
    def kvloom_register_decoders(self, registry: Registrar) -> None:
        """Offer decoding algorithms and draft proposers."""

    @hookspec
    def kvloom_register_poolers(self, registry: Registrar) -> None:
        """Offer pooling heads."""

    @hookspec
    def kvloom_register_attention_backends(self, registry: Registrar) -> None:
        """Offer attention backends under the names that ``attention_backend=`` takes."""

    @hookspec
    def kvloom_register_adapters(self, registry: Registrar) -> None:
        """Offer kinds of adapters."""

    @hookspec
    def kvloom_register_executors(self, registry: Registrar) -> None:
        """Offer executors under the names that ``distributed_executor_backend=`` takes."""

    @hookspec
    def kvloom_register_grammars(self, registry: Registrar) -> None:
        """Offer grammar libraries."""

    @hookspec
    def kvloom_register_loaders(self, registry: Registrar) -> None:
        """Offer weight loaders under the names that ``load_format=`` takes."""

    @hookspec
    def kvloom_register_schedulers(self, registry: Registrar) -> None:
        """Offer scheduling policies under the names that ``scheduling_policy=`` takes."""

    @hookspec
    def kvloom_register_tokenizers(self, registry: Registrar) -> None:
        """Offer tokenizers under the names that ``tokenizer_mode=`` takes."""

    @hookspec
    def kvloom_register_media(self, registry: Registrar) -> None:
        """Offer media processors under model architecture names."""

    @hookspec
    def kvloom_register_routes(self, registry: Registrar) -> None:
        """Offer HTTP routes."""

    @hookspec
    def kvloom_engine_started(self, engine: EngineInfo) -> None:
        """An engine is ready for its first request."""

    @hookspec
    def kvloom_step_finished(self, stats: StepStats) -> None:
        """A step was committed."""

    @hookspec
    def kvloom_request_finished(self, output: RequestOutput | PoolingRequestOutput[Any]) -> None:
        """A request ended, for whatever reason; called before its caller gets the output."""
