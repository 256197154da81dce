"""``kvloom plan MODEL``."""

from __future__ import annotations

import argparse

from kvloom.cli.settings import read_config
from kvloom.startup import load_config_plugins


def plan(arguments: argparse.Namespace) -> int:
    """Print the memory plan; exit code 1 when it does not fit. Nothing of the model's size is read or allocated."""
    config = read_config(arguments, model=arguments.model)
    plugins = load_config_plugins(config)
    from kvloom.layers.base import dtype_name
    from kvloom.runtime.builder import open_source
    from kvloom.runtime.model_plan import plan_model

    source = open_source(config, plugins)
    made, built = plan_model(config, plugins, source)
    print(f"{source.entry.name} in {dtype_name(source.dtype)}, {', '.join(built.notes)}")
    print(made.table())
    return 0 if made.problem is None else 1
