"""Configuration: one section a file, one parameter a field, each with its state and its origin. Torch-free."""

from __future__ import annotations

from kvloom.config.compat import OTHER_ARGS, RENAMED, TASK_ARGS
from kvloom.config.engine_config import SECTION_OF, SECTIONS, EngineConfig
from kvloom.config.section import NoEffect, Section, Unsupported

__all__ = ["OTHER_ARGS", "RENAMED", "SECTIONS", "SECTION_OF", "TASK_ARGS", "EngineConfig", "NoEffect", "Section", "Unsupported"]
