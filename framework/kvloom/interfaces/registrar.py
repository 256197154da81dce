"""What a registration hook gets."""

from __future__ import annotations

from typing import Protocol

from pydantic import BaseModel

from kvloom_kernels.requirement import Requirement


class Registrar(Protocol):
    """Bound to one kind and one distribution; every ``kvloom_register_*`` hook gets one as `registry`.

    A plugin with a module-level ``KVLOOM_CONFIG`` (a pydantic model, or ``"package.module:Model"``) has a configuration section,
    ``plugin_config={"entry-point name": {...}}``. Its components read it as ``self.plugin_config``.
    """

    config: BaseModel | None
    """The plugin's configuration section, validated; None when it declares none."""

    def add(self, name: str, target: str, *, needs: Requirement | None = None,
            config: type[BaseModel] | str | None = None) -> None:
        """Offer a component.

        Args:
            name: what configurations and requests call it; a free string.
            target: ``"package.module:Class"``, imported when the component is first used.
            needs: hardware, dtypes and packages, as data that is read without importing the target.
            config: pydantic model of the component's parameters (a model's config.json, a processor's request parameters, a
                loader's ``model_loader_extra_config``), or
                ``"package.module:Class"`` of it.

        Raises:
            PluginError: at the line that called: malformed target or name, a name this distribution already offers, or
                registration after start-up.
        """
