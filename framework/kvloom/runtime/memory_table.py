"""The memory plan as text: what an engine's refusal and ``kvloom plan`` print. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvloom.runtime.memory import MemoryPlan


def plan_table(plan: MemoryPlan) -> str:
    """One line an amount, then the verdict."""
    needs, memory = plan.needs, plan.memory
    rows = [
        ("weights", size_text(needs.weights_bytes), ""),
        ("activations", size_text(needs.activations_bytes), "peak of a step"),
        *([("recorded steps", size_text(needs.recorded_bytes), "of decode")] if needs.recorded_bytes else []),
        *(_cache_rows(plan) if needs.groups else [("KV cache", size_text(0), plan.budget_reason)]),
        ("free on the device", size_text(memory.free_bytes), f"of {size_text(memory.total_bytes)}"),
        ("held by others", size_text(memory.held_by_others_bytes), f"this process holds {size_text(memory.own_bytes)}"),
    ]
    width = max(len(amount) for _, amount, _ in rows)
    lines = [f"  {what:<22} {amount:>{width}}  {note}".rstrip() for what, amount, note in rows]
    return "\n".join(["memory plan", *lines, _verdict(plan)])


def _cache_rows(plan: MemoryPlan) -> list[tuple[str, str, str]]:
    needs = plan.needs
    sequence_blocks = needs.sequence_blocks(needs.max_model_len)
    return [
        ("KV cache of one token", size_text(needs.kv_bytes_per_token), _groups_text(plan)),
        ("KV cache wanted", size_text(needs.cache_bytes(needs.max_model_len)),
         f"{sequence_blocks} blocks of {size_text(needs.block_bytes)}: one sequence of max_model_len={needs.max_model_len}"),
        ("KV cache budget", size_text(plan.budget_bytes), plan.budget_reason),
        ("KV cache planned", size_text(plan.cache_bytes), f"{plan.num_blocks} blocks, {plan.capacity_tokens} tokens"),
    ]


def _groups_text(plan: MemoryPlan) -> str:
    def name(kind: str, window_tokens: int | None) -> str:
        return kind if window_tokens is None else f"window {window_tokens}"

    parts = [f"{len(g.layers)} {name(g.kind.value, g.window_tokens)}" for g in plan.needs.groups]
    shown = " + ".join(parts[:6]) + (f" + {len(parts) - 6} more groups" if len(parts) > 6 else "")
    return f"layers: {shown}"


def _verdict(plan: MemoryPlan) -> str:
    if plan.problem is None:
        return f"fits: {plan.sequences} sequences of max_model_len={plan.needs.max_model_len} at once"
    fixes = [f"{name}={value}" + (f" ({size_text(value)})" if name == "kv_cache_memory" else "")
             for name, value in plan.suggestions()]
    if fixes:
        return f"does not fit: {plan.problem}. Set {', or '.join(fixes)}"
    needs = plan.needs
    least = needs.fixed_bytes + needs.cache_bytes(needs.max_model_len)
    return (f"does not fit: {plan.problem}. No one setting changes that: free memory, or use a machine where at least "
            f"{size_text(least)} are free, a smaller model or a smaller dtype")


def size_text(size_bytes: int) -> str:
    """For people: ``1.50 GiB``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes} B"
