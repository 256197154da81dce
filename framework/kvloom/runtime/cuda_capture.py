"""CUDA graphs: a step's kernel launches, recorded while a stream is captured, launched again at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvloom.runtime.capture import Capture, Replay
from kvloom_kernels.plan import NotRecordableError

WAITING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
                     "is_nonzero"})
"""Operations of torch whose result the host waits for."""
INDEXING = frozenset({"index", "index_put", "index_put_"})
"""Those that do, where they are given masks."""

Compute = Callable[[], Sequence[Tensor]]


class GraphRecorder(ABC):
    """Makes graphs of one device, which share one pool of memory."""

    @abstractmethod
    def warm_up(self, compute: Compute) -> None:
        """Run it on the stream on which it will be captured: kernels are compiled, libraries take their workspaces."""

    @abstractmethod
    def capture(self, compute: Compute) -> tuple[Callable[[], object], Sequence[Tensor]]:
        """Record what `compute` launches, without running it. How to launch it, and the results' memory.

        Raises:
            RuntimeError: something that cannot be captured.
        """


class TorchGraphs(GraphRecorder):
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, compute: Compute) -> None:
        """See `GraphRecorder.warm_up`."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            compute()
        current.wait_stream(self._stream)

    def capture(self, compute: Compute) -> tuple[Callable[[], object], Sequence[Tensor]]:
        """See `GraphRecorder.capture`. Other threads may use the device meanwhile."""
        if not self._graphs:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = compute()
        self._graphs.add(graph)
        return graph.replay, results


class CudaCapture(Capture):
    """Records CUDA graphs. A graph computes all of its rows each time, so there is one for every size or so.

    Args:
        recorder: makes them.
    """

    def __init__(self, recorder: GraphRecorder) -> None:
        self._recorder = recorder

    def size(self, rows: int, recorded: Collection[int], most: int) -> int:
        """1, 2, 3, 4, 6, 8, 12, 16, 24 ... and `most`: at most half as many rows again as are needed, and all sizes together have less
        than 4.5 times the rows of the largest."""
        power = 1 << (rows - 1).bit_length()
        return min(power - power // 4 if rows <= power - power // 4 else power, most)

    def repeated_rows(self, rows: int, size: int) -> int:
        """All of them."""
        return size

    def record(self, compute: Compute, rows: int) -> tuple[Replay, tuple[Tensor, ...]]:
        """See `Capture.record`. What it writes it writes three times, the same numbers to the same places."""
        with NoWaiting():  # type: ignore[no-untyped-call]
            self._recorder.warm_up(compute)
        try:
            launch, results = self._recorder.capture(compute)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotRecordableError(f"it cannot be captured: {str(error).splitlines()[0]}") from error
        if any(r.shape[0] != rows for r in results):
            raise NotRecordableError("its results are no rows of the step")

        def replay(_rows: int) -> None:
            launch()

        replay(rows)
        return replay, tuple(results)


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it every operation of torch that waits for the device, or copies between it and the host, raises `NotRecordableError`:
    repeated, it would see the numbers of the recording."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """See `OnlyViews`."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything else through; operations that are made of others are judged by those."""
        with self:
            made_of_others = func.decompose(*args, **(kwargs or {}))
        if made_of_others is not NotImplemented:
            return made_of_others
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in WAITING or (name in INDEXING and any(t.dtype is torch.bool for t in tensors[1:])):
            raise NotRecordableError(f"it waits for the device ({name})")
        results = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and len({t.device.type for t in (results, *tensors)}) > 1:
            raise NotRecordableError(f"it copies between the device and the host ({name})")
        return results
