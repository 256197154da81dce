"""What a component needs of the machine, as data: read without importing the component. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is: device type, its compute capability (CUDA), dtype names it computes in."""

    device: str
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Requirement:
    """Needs of one component. An empty field asks for nothing.

    Args:
        devices: device types it runs on, e.g. ``("cpu",)``.
        min_capability: CUDA compute capability.
        dtypes: dtype names it computes in.
        packages: importable top-level packages.
    """

    devices: tuple[str, ...] = ()
    min_capability: tuple[int, int] | None = None
    dtypes: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    def unmet(self, machine: Machine, dtype: str) -> str | None:
        """None when the machine has it all; else the first thing that is missing, as a phrase."""
        if self.devices and machine.device not in self.devices:
            return f"runs on {' or '.join(self.devices)}, not on {machine.device}"
        if self.min_capability and machine.capability is not None and machine.capability < self.min_capability:
            have, want = (".".join(map(str, c)) for c in (machine.capability, self.min_capability))
            return f"needs compute capability {want}, the device has {have}"
        if self.dtypes and dtype not in self.dtypes:
            return f"computes in {' or '.join(self.dtypes)}, not in {dtype}"
        missing = [p for p in self.packages if find_spec(p) is None]
        return f"needs the package {missing[0]}" if missing else None
