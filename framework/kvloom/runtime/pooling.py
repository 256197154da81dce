"""The end of a pooling step: hidden states -> poolers -> dense layers or label head -> results, float32 on the host at the end.

A step may come again after it raised: states of poolers are replaced when everything is computed, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kvloom.config.pooling import PoolingPlan
from kvloom.errors import PluginError, RequestError, RequestFailedError
from kvloom.hooks.loader import PluginSet
from kvloom.hooks.registry import Registry
from kvloom.interfaces.model import ForwardContext, Model
from kvloom.interfaces.pooling import Pooler
from kvloom.interfaces.step import NewSequence, Pooled, RowError, RowResult, TokenRange
from kvloom.params import PoolingParams
from kvloom.runtime.outbox import Outbox
from kvloom_kernels.transfer import to_device

ALL_TOKENS = "ALL"
"""Pooling type of the tasks that begin with ``token_``."""
TOKEN_TASKS = ("token_embed", "token_classify")

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PoolingState:
    """One sequence that is pooled.

    Args:
        params: with the engine's defaults filled in.
        state: the pooler's.
        error: what the pooler raised; the sequence's last row fails with it.
    """

    params: PoolingParams
    pooler: Pooler
    state: Any
    error: RequestError | None = None


class PoolerSet:
    """The poolers that an engine can use, made when they are first asked for. Needs no worker: admission asks it, too.

    Args:
        plan: what the engine does.
        of_model: `Model.pooling`.
        options: `Model.pooling_options`.

    Raises:
        NotRegisteredError: nobody offers the pooling type.
    """

    def __init__(self, registry: Registry[Pooler], plan: PoolingPlan, of_model: str, options: Mapping[str, Any]) -> None:
        self._registry, self._made = registry, dict[str, Pooler]()
        self.plan, self.pooling_type, self.options = plan, plan.pooling_type(of_model), options
        self._get(self.pooling_type)

    def _get(self, name: str) -> Pooler:
        if name not in self._made:
            self._made[name] = self._registry.resolve(name).load()()
        return self._made[name]

    def pooler(self, params: PoolingParams) -> Pooler:
        """The one that serves a request."""
        return self._get(ALL_TOKENS if params.task in TOKEN_TASKS else self.pooling_type)

    def filled(self, params: PoolingParams) -> PoolingParams:
        """A copy with the engine's defaults."""
        config = self.plan.config
        tag = params.step_tag_id
        columns = params.returned_token_ids or config.returned_token_ids
        return replace(
            params,
            use_activation=self.plan.activates(self.options) if params.use_activation is None else params.use_activation,
            step_tag_id=(self.options.get("step_tag_id") if config.step_tag_id is None else config.step_tag_id) if tag is None else tag,
            returned_token_ids=None if columns is None else list(columns))

    def start(self, params: PoolingParams, token_ids: Sequence[int]) -> PoolingState:
        """A sequence's state. What the pooler raises is kept in it."""
        params, pooler = self.filled(params), self.pooler(params)
        try:
            return PoolingState(params, pooler, pooler.start(params, token_ids))
        except Exception as error:  # noqa: BLE001  (somebody else's code: it fails this request)
            return PoolingState(params, pooler, None, _blame(pooler, error))


class RowPooler:
    """Pools the rows of a step.

    Args:
        model: for its label head.
        dense: dense layers after pooling.
        dtype: of the model, which its label head takes.
        width: of hidden states.
    """

    def __init__(self, poolers: PoolerSet, model: Model, dense: Head, dtype: torch.dtype, width: int) -> None:
        self._poolers, self._model, self._dense, self._dtype, self._width = poolers, model, dense, dtype, width

    def start(self, new: NewSequence, params: PoolingParams) -> PoolingState:
        """State of a sequence that comes."""
        return self._poolers.start(params, new.token_ids[:new.prompt_tokens])

    def pool(self, ranges: Sequence[TokenRange], states: Sequence[PoolingState], starts: Sequence[int], hidden: Tensor,
             ctx: ForwardContext, outbox: Outbox) -> tuple[list[RowResult], list[PoolingState]]:
        """One result a range, and the states after it.

        Args:
            outbox: brings what was pooled to the host.
            starts: ``[R + 1]`` first row of each range in `hidden` ``[T, H]``.
        """
        after = [self._update(s, r, hidden[starts[i]:starts[i + 1]]) for i, (s, r) in enumerate(zip(states, ranges, strict=True))]
        done: dict[int, Tensor] = {}
        for i, (state, r) in enumerate(zip(after, ranges, strict=True)):
            if r.sample and state.error is None:
                try:
                    done[i] = self._finished(state)
                except RequestError as error:
                    after[i] = replace(state, error=error)
        found = self._heads({i: (after[i].params, rows) for i, rows in done.items()}, ctx, outbox)
        return [self._result(r, after[i], found.get(i)) for i, r in enumerate(ranges)], after

    def _update(self, s: PoolingState, r: TokenRange, hidden: Tensor) -> PoolingState:
        if s.error is not None or (s.pooler.needs == "last" and not r.sample):
            return s
        skipped = r.num_tokens - 1 if s.pooler.needs == "last" else 0
        try:
            return replace(s, state=s.pooler.update(s.state, hidden[skipped:], r.start + skipped))
        except Exception as error:  # noqa: BLE001  (see `PoolerSet.start`)
            return replace(s, error=_blame(s.pooler, error))

    def _finished(self, s: PoolingState) -> Tensor:
        try:
            rows = s.pooler.finish(s.state)
        except Exception as error:
            raise _blame(s.pooler, error) from error
        sound = isinstance(rows, Tensor) and rows.ndim in (1, 2) and rows.numel() and rows.shape[-1] == self._width
        if not sound or not rows.is_floating_point():
            shape = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise _blame(s.pooler, PluginError(f"it must give a float tensor [{self._width}] or [n, {self._width}], it gave {shape}"))
        return rows

    def _heads(self, done: Mapping[int, tuple[PoolingParams, Tensor]], ctx: ForwardContext, outbox: Outbox) -> dict[int, Tensor]:
        """Dense layers or label head over all rows of the step at once; then what requests want of their own, those that want the
        same together."""
        if not done:
            return {}
        parts = [rows.reshape(-1, self._width) for _, rows in done.values()]
        rows = torch.cat([p.to(self._dtype if self._poolers.plan.labels else torch.float32) for p in parts])
        rows = self._model.classify(rows, ctx).float() if self._poolers.plan.labels else self._dense(rows)
        own = dict(zip(done, torch.split(rows, [len(p) for p in parts]), strict=True))
        alike: dict[tuple[Any, ...], list[int]] = {}
        for i, (params, _) in done.items():
            wanted = (params.use_activation, params.dimensions, tuple(params.returned_token_ids or ()))
            alike.setdefault(wanted, []).append(i)
        sent = []
        for same in alike.values():
            together = rows if len(same) == len(done) else torch.cat([own[i] for i in same])
            sent.append((same, outbox.add(self._activated(done[same[0]][0], together))))
        for same, arrives in sent:
            own |= zip(same, torch.split(arrives()[0], [len(own[i]) for i in same]), strict=True)
        return {i: own[i] if given.ndim == 2 else own[i][0] for i, (_, given) in done.items()}

    def _activated(self, params: PoolingParams, rows: Tensor) -> Tensor:
        """``[n, labels]`` or ``[n, H]``, float32."""
        if self._poolers.plan.labels:
            if params.returned_token_ids is not None:
                rows = rows[:, to_device(np.array(params.returned_token_ids, np.int64), rows.device)]
            if not params.use_activation or self._poolers.plan.activation == "identity":
                return rows
            return rows.sigmoid() if self._poolers.plan.activation == "sigmoid" else rows.softmax(-1)
        rows = rows if params.dimensions is None else rows[:, :params.dimensions]
        return functional.normalize(rows, dim=-1) if params.use_activation else rows

    def _result(self, r: TokenRange, s: PoolingState, data: Tensor | None) -> RowResult:
        if not r.sample:
            return RowResult(r.sequence_id)
        if s.error is not None or data is None:
            return RowResult(r.sequence_id, error=RowError(type(s.error).__name__, str(s.error)))
        numbers = data.numpy()
        if not np.isfinite(numbers).all():
            return RowResult(r.sequence_id, error=RowError(RequestFailedError.__name__, "the model's hidden states are not finite"))
        return RowResult(r.sequence_id, pooled=Pooled(tuple(numbers.shape), numbers.astype("<f4").tobytes()))


def _blame(pooler: Pooler, error: Exception) -> RequestError:
    """What a request fails with; the pooler's own refusals stay as they are."""
    if isinstance(error, RequestError):
        return error
    return RequestFailedError(f"the pooler {type(pooler).__name__} raised {type(error).__name__}: {error}")


def make_poolers(plugins: PluginSet, plan: PoolingPlan, of_model: tuple[str, dict[str, Any]]) -> PoolerSet:
    """What pools: `of_model` is what `model_pooling` gives.

    Raises:
        NotRegisteredError: nobody offers the pooling type.
    """
    return PoolerSet(plugins.registries["poolers"], plan, *of_model)


def model_pooling(worker: Any) -> tuple[str, dict[str, Any]]:
    """For ``Executor.call``: how a worker's model wants to be pooled, and what is not its task's default."""
    return worker.model.pooling, dict(worker.model.pooling_options)
