"""The marker that plugins put on their hook implementations: ``from kvloom import hookimpl``."""

from __future__ import annotations

import pluggy

hookimpl = pluggy.HookimplMarker("kvloom")
hookspec = pluggy.HookspecMarker("kvloom")
