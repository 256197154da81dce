"""The class of workers: ours, or the one that ``worker_cls`` names, with the methods of ``worker_extension_cls``."""

from __future__ import annotations

from kvloom.config.class_path import load_class
from kvloom.config.device import DeviceSection
from kvloom.errors import ConfigError
from kvloom.runtime.worker import DeviceWorker


def worker_class(section: DeviceSection) -> type[DeviceWorker]:
    """What to make workers of.

    Raises:
        ConfigError: a class that cannot be loaded or is no worker, or an extension with a name that workers have.
    """
    base: type[DeviceWorker] = DeviceWorker
    if section.worker_cls is not None:
        base = load_class("worker_cls", section.worker_cls, DeviceWorker)
    if section.worker_extension_cls is None:
        return base
    extension = load_class("worker_extension_cls", section.worker_extension_cls)
    taken = sorted(name for name in dir(extension) if hasattr(base, name) and not name.startswith("__"))
    if taken:
        raise ConfigError(f"worker_extension_cls={section.worker_extension_cls!r} has {', '.join(taken)}, which workers have already: "
                          "rename them")
    if any("__new__" in vars(cls) for cls in extension.__mro__[:-1]):
        raise ConfigError(f"worker_extension_cls={section.worker_extension_cls!r} must be a plain class of methods: workers are made "
                          "by their own class, and this one has a __new__")
    return type(base.__name__, (base, extension), {"__doc__": base.__doc__, "__module__": base.__module__})
