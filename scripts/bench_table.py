"""The table that `scripts/bench` makes of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from bench_limits import batch_s
from bench_rounds import Run

KV_BYTES = 2**30
"""Of kvloom's and vLLM's cache."""
WIDTHS = {"bfloat16": 1, "float32": 2}
"""Of an engine's weights beside the checkpoint's."""
LIMITS = ("read_bytes_s", "flop_s")
NOT_MEASURED = "not measured"
MEMORY_NOTE = ("A peak holds only those pages of kvloom's cache that were used, at the start (for a quarter of a second) or by "
               "requests: beyond weights and cache it is negative where they are less than the cache.")


class Line(NamedTuple):
    """Of the table: a figure of ours by a peer's, or a peer's by ours where less is better."""

    what: str
    workload: str
    figure: str
    ours: str
    peer: str
    must: float | None
    goal: float | None
    less_is_better: bool = False


LINES = (
    Line("output tok/s, 64 requests, beside vLLM", "mixed", "output_tok_s", "kvloom", "vllm", 1.2, 1.4),
    Line("output tok/s, 64 requests, prefix of 512 tokens", "prefix", "output_tok_s", "kvloom", "vllm", 1.2, 1.5),
    Line("output tok/s, qwen3-0.6b, 32 requests", "qwen3", "output_tok_s", "kvloom", "vllm", 1.2, 1.4),
    Line("output tok/s, sampled with text, beside greedy without", "text", "output_tok_s", "kvloom, sampled, text", "kvloom", 0.9,
         0.97),
    Line("output tok/s, lengths of a trace, 128 requests", "trace", "output_tok_s", "kvloom", "vllm", 1.2, 1.4),
    Line("decoding one request, tok/s, beside llama.cpp", "mixed", "decode_tok_s", "kvloom", "llama.cpp", 1.0, 1.2),
    Line("one request with its prompt, tok/s, beside llama.cpp", "mixed", "single_tok_s", "kvloom", "llama.cpp", 1.0, 1.2),
    Line("s until 4 tokens were answered, compiled kernels at hand", "mixed", "start_s", "kvloom", "vllm eager", 4, 6, True),
    Line("s until 4 tokens were answered, kernels compiled first", "mixed", "start_s", "kvloom cold", "vllm", None, None, True),
    Line("peak memory beyond weights and 1 GiB of cache, MB", "mixed", "extra_mb", "kvloom", "vllm", 2, 3, True),
    Line("output tok/s, 64 requests, beside transformers", "mixed", "output_tok_s", "kvloom", "transformers", 3, 3),
    Line("decoding one request, tok/s, beside transformers", "mixed", "decode_tok_s", "kvloom", "transformers", 1, 1),
)


class Round(NamedTuple):
    """Engines' runs in turn, on what machine, and what it could do then."""

    machine: str
    limits: Mapping[str, float]
    runs: list[Run]

    @property
    def day(self) -> str:
        """When it was measured."""
        return self.machine.removeprefix("Measured on ").partition(": ")[0]

    @property
    def processor(self) -> str:
        """Cores, their name, how they multiply: hosts that hide their name ("AMD EPYC") differ in that."""
        return self.machine.partition(": ")[2].partition(", Python ")[0]

    @property
    def workload(self) -> str:
        """Lines of machines did not always say it."""
        name: str = self.runs[0]["workload"]
        return name


def rounds_of_last_machine(lines: Sequence[Run]) -> list[Round]:
    """Of all lines of runs.jsonl, where figures of several machines may be. Rounds that were broken off before a run have none."""
    rounds: list[Round] = []
    for line in lines:
        if "machine" in line:
            rounds.append(Round(line["machine"], line["limits"], []))
        else:
            rounds[-1].runs.append(line)
    rounds = [r for r in rounds if r.runs]
    return [r for r in rounds if r.processor == rounds[-1].processor]


def table(lines: Sequence[Run]) -> Iterator[str]:
    """Lines of Markdown, from those of runs.jsonl, at least one run among them."""
    rounds = rounds_of_last_machine(lines)
    runs = [run for r in rounds for run in r.runs]
    mixed = [r for r in rounds if r.workload == "mixed"]  # shares are of this workload: by the limits of the same minutes
    limits = {key: statistics.median(r.limits[key] for r in mixed or rounds) for key in LIMITS}
    yield from (header(rounds, limits), "", "| figure | kvloom | peer | ratio | must | goal |", "|---|---|---|---|---|---|")
    yield from (row(line, runs) for line in LINES)
    yield from shares(runs, limits)
    yield from ("", MEMORY_NOTE)
    ours = {r["workload"] for r in runs if r["name"].startswith("kvloom")}
    if missing := [name for name in dict.fromkeys(line.workload for line in LINES) if name not in ours]:
        yield f"Not measured on this machine: {', '.join(missing)}.{' A trace is named by `--trace`.' if 'trace' in missing else ''}"


def header(rounds: Sequence[Round], limits: Mapping[str, float]) -> str:
    """Days, machine, versions, limits."""
    first, last = min(r.day for r in rounds), max(r.day for r in rounds)
    when = f"on {last}" if first == last else f"from {first} to {last}"
    versions = dict.fromkeys(run["version"] for r in rounds for run in r.runs if "version" in run)  # older runs do not say theirs
    return (f"Measured {when}: {rounds[-1].machine.partition(': ')[2]}{'; ' if versions else ''}{', '.join(versions)}; "
            f"memory is read at {limits['read_bytes_s'] / 1e9:.0f} GB/s, products run at {limits['flop_s'] / 1e9:.0f} GFLOP/s.")


def row(line: Line, runs: Sequence[Run]) -> str:
    """One of the table."""
    ours, peers = values(runs, line.workload, line.ours, line.figure), values(runs, line.workload, line.peer, line.figure)
    bounds = ["" if bound is None else f"{bound:g}" for bound in (line.must, line.goal)]
    cells = [line.what, spread(ours), f"{named(runs, line.peer)}: {spread(peers)}", ratio(line, ours, peers), *bounds]
    return f"| {' | '.join(cells)} |"


def ratio(line: Line, ours: Sequence[float], peers: Sequence[float]) -> str:
    """How far ours is ahead."""
    if not ours or not peers:
        return ""
    a, b = statistics.median(ours), statistics.median(peers)
    if not line.less_is_better:
        return f"{a / b:.2f}"
    return f"{b / a:.2f}" if a > 0 else "nothing of ours"  # a cache that is not full takes less than was given to it


def shares(runs: Sequence[Run], limits: Mapping[str, float]) -> Iterator[str]:
    """Of what the machine could do."""
    found = [(r["figures"], r["shape"]) for r in runs if r["workload"] == "mixed" and r["name"] == "kvloom"]
    batch = [batch_s(s, f, limits) * f["output_tok_s"] / f["output_tokens"] for f, s in found]
    one = [s["weight_bytes"] / limits["read_bytes_s"] * f["decode_tok_s"] for f, s in found]
    for what, parts, bounds in (("all at once", batch, "65 % | 75 %"), ("decoding one request", one, "80 % | 90 %")):
        yield f"| share of the limit, {what} | {f'{statistics.median(parts):.0%}' if parts else NOT_MEASURED} | | | {bounds} |"


def values(runs: Sequence[Run], workload: str, name: str, figure: str) -> list[float]:
    """One figure of all rounds."""
    found = [r for r in runs if r["workload"] == workload and r["name"] == name]
    if figure != "extra_mb":
        return [r["figures"][figure] for r in found]
    return [(r["figures"]["peak_rss_bytes"] - r["shape"]["weight_bytes"] * WIDTHS[r["dtype"]] - KV_BYTES) / 1e6 for r in found]


def named(runs: Sequence[Run], name: str) -> str:
    """A peer, with what it computed in if that is not bfloat16."""
    others = {r["dtype"] for r in runs if r["name"] == name} - {"bfloat16"}
    return f"{name} in {others.pop()}" if others else name


def spread(found: Sequence[float]) -> str:
    """Median and extremes."""
    if not found:
        return NOT_MEASURED
    digits = 1 if statistics.median(found) < 100 else 0
    return f"{statistics.median(found):.{digits}f} ({min(found):.{digits}f} to {max(found):.{digits}f})"
