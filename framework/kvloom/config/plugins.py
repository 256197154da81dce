"""Which plugins run, and with what settings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from kvloom.config.section import Section


class PluginSection(Section):
    """Plugins by entry-point name."""

    plugins: Annotated[tuple[str, ...] | None, Field(strict=False, description=(
        "plugins that must run besides the built-in ones; None: every installed one, or with a file: none"))] = None
    plugin_config: Annotated[dict[str, dict[str, Any]], Field(
        default_factory=dict, description="a plugin's name -> its own settings")]
    providers: Annotated[dict[str, dict[str, str]], Field(
        default_factory=dict, description="kind -> component -> distribution, where several offer one name")]
