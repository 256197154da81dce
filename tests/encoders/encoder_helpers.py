"""Random encoders as transformers builds them, and our model of the same checkpoint, run step by step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from kvloom.config import EngineConfig
from kvloom.interfaces import Comm, ForwardContext, NewSequence, Step, TokenRange
from kvloom.params import PoolingParams
from kvloom.runtime.batch import BatchState
from kvloom.runtime.builder import build_model, open_source
from kvloom.runtime.comm import LocalComm
from kvloom.runtime.device import CpuDevice
from kvloom.runtime.forward import Forward, LayerState
from kvloom.runtime.logits import LogitsPipeline
from kvloom.runtime.model_plan import make_loader
from kvloom.runtime.runner import Runner
from kvloom.runtime.tables import SequenceTables
from kvloom.runtime.weights import load_weights
from kvloom.startup import load_config_plugins
from kvloom_samplers.token_sampler import TokenSampler

VOCAB, POSITIONS = 101, 80
BASE = {"vocab_size": VOCAB, "hidden_size": 60, "intermediate_size": 92, "num_hidden_layers": 3, "num_attention_heads": 6,
        "max_position_embeddings": POSITIONS, "bos_token_id": None, "eos_token_id": None}
DISTIL = {"vocab_size": VOCAB, "dim": 60, "hidden_dim": 92, "n_layers": 3, "n_heads": 6, "max_position_embeddings": POSITIONS}
MODERN = BASE | {"num_hidden_layers": 4, "local_attention": 12, "pad_token_id": 0, "cls_token_id": None, "sep_token_id": None}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", BASE | {"pad_token_id": 0}),
    "bert-tanh-3-types": ("Bert", BASE | {"hidden_act": "gelu_new", "type_vocab_size": 3, "pad_token_id": 0, "layer_norm_eps": 1e-5}),
    "roberta": ("Roberta", BASE | {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}),
    "roberta-far-pad": ("Roberta", BASE | {"pad_token_id": 7}),
    "xlm-roberta": ("XLMRoberta", BASE | {"pad_token_id": 1}),
    "distilbert": ("DistilBert", DISTIL),
    "distilbert-relu": ("DistilBert", DISTIL | {"activation": "relu", "sinusoidal_pos_embds": True}),
    "modernbert": ("ModernBert", MODERN),
    "modernbert-biases-mean": ("ModernBert", MODERN | {
        "norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True, "classifier_pooling": "mean",
        "local_attention": 7, "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0},
                                                  "sliding_attention": {"rope_type": "default", "rope_theta": 70.0}}}),
}


def make(family: str, kind: str, directory: Path, *, labels: int = 3, seed: int = 0) -> torch.nn.Module:
    """Save a random checkpoint of ``{family}{kind}``; transformers' model of it."""
    name, values = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**values, num_labels=labels)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}{kind}")(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "norm" in parameter_name.lower() and p.dim() == 1:
                p.copy_(parameter_name.endswith("weight") + 0.2 * torch.randn(p.shape, generator=generator))
            elif p.dim() == 1:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
            else:
                scale = 1.0 if "embed" in parameter_name else 1.5 / math.sqrt(p.shape[1])
                p.copy_(scale * torch.randn(p.shape, generator=generator))
    model.save_pretrained(directory)
    return model


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_tokenizer(directory: Path, *, types: bool) -> None:
    """Words w8 to w100 are ids 8 to 100; a pair is ``[CLS] a [SEP] b [SEP]``, with token types or without."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(names[:5])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1" if types else "[CLS] $A [SEP] $B [SEP]"
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if types else [])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        model_input_names=inputs).save_pretrained(directory)


class OurEncoder:
    """A worker's model and runner without an engine around them."""

    def __init__(self, directory: Path, max_num_seqs: int = 16, comm: Comm | None = None, **values: Any) -> None:
        comm = comm or LocalComm()
        config = EngineConfig.from_kwargs(**{"model": str(directory), "dtype": "float32", "plugins": []} | values)
        plugins = load_config_plugins(config)
        self.source = open_source(config, plugins)
        built = build_model(config, plugins, self.source, torch.device("cpu"), comm)
        self.model, self.notes = built.model, built.notes
        self.report = load_weights(built.model, make_loader(config, plugins), directory)
        tables = SequenceTables(CpuDevice(), max_num_seqs, self.source.max_model_len, (), tuple(built.model.extra_inputs))
        layers = LayerState((), len(built.model.state_specs()), built.backends, {})
        self.runner = Runner(built.model, Forward(built.model, comm, layers, tables, CpuDevice()), TokenSampler(), LogitsPipeline(()),
                             BatchState(tables))
        self._next = 0

    def hidden(self, prompts: Sequence[Sequence[int]], types: Sequence[Sequence[int] | None] | None = None) -> list[torch.Tensor]:
        """Hidden states ``[tokens, H]`` of each prompt, all in one step."""
        seen: list[torch.Tensor] = []
        original = self.model.forward
        self.model.forward = lambda inputs, ctx: seen.append(original(inputs, ctx).hidden) or original(inputs, ctx)
        new, ranges, finished = [], [], tuple(range(self._next))
        for prompt, own in zip(prompts, types or [None] * len(prompts), strict=True):
            extras = {} if own is None else {"token_type_ids": tuple(own)}
            new.append(NewSequence(self._next, tuple(prompt), len(prompt), 0, (), pooling=PoolingParams(), extras=extras))
            ranges.append(TokenRange(self._next, 0, len(prompt)))
            self._next += 1
        try:
            self.runner.execute(Step(self._next, tuple(ranges), new=tuple(new), finished=finished))
        finally:
            self.model.forward = original
        return list(seen[0].split([len(p) for p in prompts]))

    def scores(self, prompts: Sequence[Sequence[int]], types: Sequence[Sequence[int] | None] | None = None) -> torch.Tensor:
        """``[prompts, labels]``, pooled as the model says."""
        pool = {"CLS": lambda h: h[0], "MEAN": lambda h: h.mean(0)}[self.model.pooling]
        with torch.inference_mode():
            pooled = torch.stack([pool(h) for h in self.hidden(prompts, types)])
            return self.model.classify(pooled, ForwardContext(LocalComm(), ()))
