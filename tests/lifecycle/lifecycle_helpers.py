"""Engines, and workers whose device is treated as one with memory of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvloom import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [list(range(1, 40)), list(range(100, 150)), [5, 5, 5]]


def engine(checkpoint: Path, **values: Any) -> LLM:
    return LLM(str(checkpoint), **{"dtype": "float32", "enable_sleep_mode": True, **values})


def tokens(llm: LLM, prompts: Any = PROMPTS, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]


SEPARATE = """
from kvloom import hookimpl
from kvloom.runtime.worker import HostLink
from kvloom_plugins.executors.in_process import InProcessExecutor
KVLOOM_API = {"executors": 0}
class Separate(InProcessExecutor):
    '''The worker is told that its device has memory of its own: blocks and weights are moved.'''
    STEPS = []
    def start(self, factory, num_workers):
        def told(rank):
            worker = factory(rank)
            worker.host_link = HostLink(bytes_per_s=1e12, tokens_per_s=1.0)
            return worker
        return super().start(told, num_workers)
    def submit(self, step):
        self.STEPS.append(step)
        super().submit(step)
@hookimpl
def kvloom_register_executors(registry):
    registry.add("separate", "acme_0:Separate")
"""


def separate_device(install: Any) -> list:
    """Install the executor "separate"; the steps that it will see."""
    install("acme", {"acme": SEPARATE})
    import acme_0  # what the fixture installed

    return acme_0.Separate.STEPS
