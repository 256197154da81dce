"""Each of our models on a device whose tensors nobody can read: nothing of it is on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
from device_helpers import engine_elsewhere

from kvloom import SamplingParams
from kvloom.testing.checkpoints import make_checkpoint

DECODERS = {
    "LlamaForCausalLM": {}, "Qwen2ForCausalLM": {}, "Qwen3ForCausalLM": {"head_dim": 16, "tie_word_embeddings": False},
    "MistralForCausalLM": {"sliding_window": 20},
}
BERT = {"model_type": "bert", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_act": "gelu"}
MODERN = {"model_type": "modernbert", "norm_eps": 1e-5, "hidden_activation": "gelu", "local_attention": 8, "global_attn_every_n_layers": 2,
          "pad_token_id": 0, "global_rope_theta": 10000.0, "local_rope_theta": 10000.0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_decoders_prefill_and_decode(architecture: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_checkpoint(tmp_path / "m", architecture, tokenizer=False, **DECODERS[architecture])
    with engine_elsewhere(monkeypatch, directory, skip_tokenizer_init=True, dtype=dtype) as (llm, device):
        params = SamplingParams(temperature=0.7, max_tokens=4, ignore_eos=True, logprobs=3, prompt_logprobs=1, top_p=0.9)
        outputs = llm.generate([{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": list(range(50))}], params, use_tqdm=False)
        assert [len(o.outputs[0].token_ids) for o in outputs] == [4, 4]
        assert len(device.fetched) == 4


@pytest.mark.parametrize(("architecture", "config"), [("BertModel", BERT), ("ModernBertModel", MODERN)])
def test_encoders_embed(architecture: str, config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_checkpoint(tmp_path / "m", architecture, tokenizer=False, **config)
    with engine_elsewhere(monkeypatch, directory, skip_tokenizer_init=True) as (llm, device):
        outputs = llm.embed([{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": list(range(30))}], use_tqdm=False)
        assert len(outputs) == 2
        assert len(device.fetched) == 1
