"""Token embeddings and output heads, divided over the ranks by vocabulary."""

from __future__ import annotations

from torch import Tensor

from kvloom.errors import PluginError
from kvloom.interfaces.model import BuildContext, ForwardContext
from kvloom.interfaces.quant import ParamSpec
from kvloom.layers.base import LoadableModule, dtype_name
from kvloom.layers.params import Span

ROWS_MULTIPLE = 64
"""With several ranks each has room for a multiple of this many rows, so that packed formats are never cut through."""


class Embedding(LoadableModule):
    """An embedding table ``[V, H]``; with `logits` also the output head of a model with tied embeddings.

    Ranks have rooms of equal size; what the last ones hold beyond the vocabulary is zero and never seen outside.

    Args:
        prefix: checkpoint module prefix.
        num_rows: vocabulary size V.
        width: hidden size H.
        bias: whether an output head has a bias ``[V]``.
        is_head: whether `logits` will be called.
    """

    def __init__(self, build: BuildContext, prefix: str, num_rows: int, width: int, *, bias: bool = False,
                 is_head: bool = False) -> None:
        super().__init__(prefix)
        self._is_head = is_head
        method = build.quant.for_embedding(prefix, build.dtype) or build.plain.for_embedding(prefix, build.dtype)
        if method is None:
            raise PluginError(f"{prefix}: neither {type(build.quant).__name__} nor the plain method serves embeddings")
        self.num_rows, self.width = num_rows, width
        self._method = method
        self._rows = Span.padded_part(num_rows, build.comm.rank, build.comm.size, ROWS_MULTIPLE)
        own = {"bias": ParamSpec((num_rows,), dtype_name(build.dtype), out_axis=0)} if bias else {}
        self.add_params({None: {**method.params(num_rows, width), **own}}, Span.all_of(width), {None: self._rows}, build.device)

    def finish(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let the method pack the table; the bias stays."""
        bias = {"bias": tensors.pop("bias")} if "bias" in tensors else {}
        return {**self._method.post_load(tensors, is_head=self._is_head), **bias}

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """``token_ids [T] int64 -> [T, H]``, whole on every rank."""
        if ctx.comm.size == 1:
            return self._method.lookup(self.tensors, token_ids)
        elsewhere = (token_ids < self._rows.start) | (token_ids >= self._rows.stop)
        rows = self._method.lookup(self.tensors, (token_ids - self._rows.start).masked_fill(elsewhere, 0))
        return ctx.comm.all_reduce(rows.masked_fill(elsewhere[:, None], 0))

    def logits(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """``hidden [R, H] -> [R, V]`` in hidden's dtype or in float32, gathered over the ranks."""
        mine = self._method.logits(self.tensors, hidden, self.tensors.get("bias"))
        return ctx.comm.all_gather(mine, axis=1)[:, :self.num_rows]


class LMHead(Embedding):
    """An output head with a table of its own. Arguments as `Embedding`; a tied model uses its embedding's `logits`."""

    def __init__(self, build: BuildContext, prefix: str, num_rows: int, width: int, *, bias: bool = False) -> None:
        super().__init__(build, prefix, num_rows, width, bias=bias, is_head=True)

    def forward(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """The same as `logits`."""
        return self.logits(hidden, ctx)
