"""Registers the built-in attention backends. Imports no torch."""

from __future__ import annotations

import os

from kvloom import hookimpl
from kvloom.interfaces import Registrar
from kvloom_kernels.requirement import Requirement

KVLOOM_API = {"attention_backends": 0}


@hookimpl
def kvloom_register_attention_backends(registry: Registrar) -> None:
    """The CPU's own kernels; Triton for CUDA, or interpreted for tests; torch, where neither can run; the plain reference."""
    registry.add("cpu", "kvloom_plugins.attention.cpu:CpuAttention",
                 needs=Requirement(devices=("cpu",), dtypes=("float32", "bfloat16")))
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    registry.add("triton", "kvloom_plugins.attention.triton:TritonAttention",
                 needs=Requirement(devices=("cuda", "cpu") if interpreted else ("cuda",), min_capability=(8, 0),
                                   dtypes=("float32", "bfloat16", "float16"), packages=("triton",)))
    registry.add("torch", "kvloom_plugins.attention.torch_batched:TorchAttention")
    registry.add("reference", "kvloom_plugins.attention.reference:ReferenceAttention")
