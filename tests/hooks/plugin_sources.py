"""Sources of small plugins for tests."""

from __future__ import annotations


def registers(kind: str, name: str, target: str, version: int = 0, extra: str = "") -> str:
    """A plugin module that offers one component."""
    return f"""
from kvloom import hookimpl
KVLOOM_API = {{"{kind}": {version}}}
{extra}
@hookimpl
def kvloom_register_{kind}(registry):
    registry.add("{name}", "{target}")
"""


LAST_FIRST = '''
from kvloom.interfaces import SchedulingPolicy
class LastFirst(SchedulingPolicy):
    """The newest request first."""
    def sort_key(self, request):
        return (-request.sequence_id,)
'''


def policy(name: str, module: str) -> str:
    """A plugin module that offers a scheduling policy of its own."""
    return registers("schedulers", name, f"{module}:LastFirst", extra=LAST_FIRST)
