"""The package that trained the demo model lies in scripts/, which is on no path: tests get its modules from here."""

from __future__ import annotations

import sys
from importlib import import_module

from repository import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
corpus, evaluate, facts, objects, stories, story_tables, chat = (
    import_module(f"demo_model.{name}") for name in ("corpus", "evaluate", "facts", "objects", "stories", "story_tables", "chat"))
