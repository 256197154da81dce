"""Engines for tests of single parameters, and what is looked at."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from kvloom import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
PROMPT = list(range(1, 50))


def engine(checkpoint: Path | str, **values: Any) -> LLM:
    """In float32, so that equal work gives equal numbers."""
    return LLM(str(checkpoint), **{"dtype": "float32", **values})


def run(llm: LLM, prompts: Any, params: Any = GREEDY, **arguments: Any) -> list:
    return llm.generate(prompts, params, use_tqdm=False, **arguments)


def token_ids(outputs: list) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in outputs]


def scores(llm: LLM, prompt: Any = PROMPT) -> tuple[list[int], float]:
    """Tokens and their log-probability: what tells two models apart."""
    (output,) = run(llm, [prompt] if isinstance(prompt, list) else prompt)
    return list(output.outputs[0].token_ids), output.outputs[0].cumulative_logprob


def hub_cache(root: Path, repository: str, **revisions: Path) -> Path:
    """A cache as huggingface_hub lays it out: revision -> directory that is copied."""
    folder = root / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    for i, (name, source) in enumerate(revisions.items()):
        commit = f"{i + 1:040x}"
        shutil.copytree(source, folder / "snapshots" / commit)
        (folder / "refs" / name).write_text(commit)
    return root


def python_tokenizer(directory: Path) -> Path:
    """Files for which transformers only has a tokenizer in Python: ids are bytes + 3."""
    directory.mkdir()
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    return directory


def plugin(kind: str, name: str, component: str) -> str:
    """Source of a plugin ``acme_0`` that offers the class `name.title()` that `component` defines."""
    return f"""
from kvloom import hookimpl
KVLOOM_API = {{"{kind}": 0}}
{component}
@hookimpl
def kvloom_register_{kind}(registry):
    registry.add("{name}", "acme_0:{name.title()}")
"""


def observer(install: Any) -> list:
    """Install a plugin that notes every `StepStats`; the list that it fills."""
    install("acme", {"acme": """
from kvloom import hookimpl
STEPS = []
@hookimpl
def kvloom_step_finished(stats):
    STEPS.append(stats)
"""})
    import acme_0  # what the fixture installed

    return acme_0.STEPS
