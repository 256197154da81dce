"""The contracts that plugins implement, one small file each. Torch-free."""

from __future__ import annotations

from kvloom.interfaces.adapter import AdaptableLayer, Adapter, AdapterBatch, AdapterReport
from kvloom.interfaces.attention import AttentionBackend, AttentionBatch, AttentionSpec, LayerCache, TensorShape
from kvloom.interfaces.comm import Comm
from kvloom.interfaces.decoder import Branch, Branching, Candidates, Decision, Decoder, FinishedBranch, Proposer
from kvloom.interfaces.executor import Executor
from kvloom.interfaces.grammar import CompiledGrammar, Grammar, GrammarMatcher, GrammarProblem, GrammarSpec, GrammarVocabulary
from kvloom.interfaces.loader import TensorInfo, WeightLoader
from kvloom.interfaces.media import MediaItem, MediaProcessor
from kvloom.interfaces.model import (
    BackendFactory,
    BuildContext,
    ForwardContext,
    LayerStep,
    LoadableLayer,
    Model,
    ModelInputs,
    ModelOutputs,
    ModuleTarget,
)
from kvloom.interfaces.model_config import ModelConfig, RopeParameters
from kvloom.interfaces.pooling import Pooler
from kvloom.interfaces.quant import (
    CacheMethod,
    EmbeddingMethod,
    ExpertsMethod,
    LinearMethod,
    LinearShape,
    MergeRule,
    ParamSpec,
    QuantMethod,
)
from kvloom.interfaces.registrar import Registrar
from kvloom.interfaces.routes import EngineHandle, EngineInfo, Route, RouteProvider
from kvloom.interfaces.sampling import LogitsProcessor, SampledTokens, Sampler, SamplingRows, SequenceView, Stage
from kvloom.interfaces.scheduling import RequestView, SchedulingPolicy
from kvloom.interfaces.state import KVGroup, LayerStateSpec, StateKind
from kvloom.interfaces.stats import StepStats
from kvloom.interfaces.step import (
    BlockCopy,
    BlockMove,
    EncoderWork,
    NewSequence,
    Pooled,
    RowError,
    RowResult,
    Step,
    StepResult,
    TokenLogprob,
    TokenRange,
)
from kvloom.interfaces.tokenizer import EncodedPair, Tokenizer
from kvloom.interfaces.worker import HostTierReport, Worker, WorkerFactory, WorkerReport

__all__ = [
    "AdaptableLayer",
    "Adapter",
    "AdapterBatch",
    "AdapterReport",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionSpec",
    "BackendFactory",
    "BlockCopy",
    "BlockMove",
    "Branch",
    "Branching",
    "BuildContext",
    "CacheMethod",
    "Candidates",
    "Comm",
    "CompiledGrammar",
    "Decision",
    "Decoder",
    "EmbeddingMethod",
    "EncodedPair",
    "EncoderWork",
    "EngineHandle",
    "EngineInfo",
    "Executor",
    "ExpertsMethod",
    "FinishedBranch",
    "ForwardContext",
    "Grammar",
    "GrammarMatcher",
    "GrammarProblem",
    "GrammarSpec",
    "GrammarVocabulary",
    "HostTierReport",
    "KVGroup",
    "LayerCache",
    "LayerStateSpec",
    "LayerStep",
    "LinearMethod",
    "LinearShape",
    "LoadableLayer",
    "LogitsProcessor",
    "MediaItem",
    "MediaProcessor",
    "MergeRule",
    "Model",
    "ModelConfig",
    "ModelInputs",
    "ModelOutputs",
    "ModuleTarget",
    "NewSequence",
    "ParamSpec",
    "Pooled",
    "Pooler",
    "Proposer",
    "QuantMethod",
    "Registrar",
    "RequestView",
    "RopeParameters",
    "Route",
    "RouteProvider",
    "RowError",
    "RowResult",
    "SampledTokens",
    "Sampler",
    "SamplingRows",
    "SchedulingPolicy",
    "SequenceView",
    "Stage",
    "StateKind",
    "Step",
    "StepResult",
    "StepStats",
    "TensorInfo",
    "TensorShape",
    "TokenLogprob",
    "TokenRange",
    "Tokenizer",
    "WeightLoader",
    "Worker",
    "WorkerFactory",
    "WorkerReport",
]
