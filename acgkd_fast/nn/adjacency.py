"""What the layers take as edges, in CSR form: sorted once per edge list, then shared by all layers and steps."""

from __future__ import annotations

import functools
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch

from ..edge_sample import EdgeSample, Transposed
from ..errors import InputError, check, check_tensor, fail

Edges = Any
"""EdgeSample, int64 [2, E], torch-sparse SparseTensor, or torch.sparse COO, CSR or CSC (rows receive)."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Edges remembered at most (about 40 bytes each); one list is always remembered, however long.
_CAPACITY = 4_000_000


Function = TypeVar("Function", bound=Callable[..., Any])


_disabled = functools.cache(torch.compiler.disable)


def _untraced(function: Function) -> Function:
    """What looks at node numbers on the host is run by torch.compile as it is, between two graphs."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # torch.compiler.disable imports the compiler, which takes seconds. Where nothing has, nothing is traced.
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        return _disabled(function)(*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast("Function", run)


class EdgeList(NamedTuple):
    """Edges as tensors.

    Attributes:
        ends: integers [2, E], first row the senders.
        weight: [E], or None for ones.
        attr: [E, ...] features that came with a sparse matrix, or None.
        kind: "list", "SparseTensor" or "torch.sparse".
    """

    ends: torch.Tensor
    weight: torch.Tensor | None
    attr: torch.Tensor | None = None
    kind: str = "list"


class SortedEdges:
    """An edge list sorted by receiver and sender, as a square matrix over max(senders, receivers) nodes.

    Attributes:
        rowptr, col: CSR, int32; see :class:`EdgeSample`.
        order: int64 [E], position in the list of each entry; None where the list was sorted already.
        kept: positions of the edges that are no self-loops, int64, where self-loops were exchanged and the
            list had some; else None.
        num_loops: self-loops that were appended to the list.
        has_loops: whether the list held self-loops.
    """

    def __init__(self, index: torch.Tensor, num_senders: int, num_receivers: int, loops: int | None) -> None:
        source, target = index.long()
        check_range("senders (first row)", source, num_senders)
        check_range("receivers (second row)", target, num_receivers)
        self.num_loops = 0 if loops is None else loops
        self.kept: torch.Tensor | None = None
        own = source == target
        self.has_loops = bool(own.any())
        if loops is not None:
            if self.has_loops:
                self.kept = (~own).nonzero().squeeze(1)
                source, target = source[self.kept], target[self.kept]
            nodes = torch.arange(loops, device=index.device)
            source, target = torch.cat([source, nodes]), torch.cat([target, nodes])
        self.num_nodes = max(num_senders, num_receivers)
        key = target * self.num_nodes + source
        self.order: torch.Tensor | None = None
        if not bool((key[1:] >= key[:-1]).all()):
            key, self.order = torch.sort(key, stable=True)
            source, target = source[self.order], target[self.order]
        bounds = torch.arange(self.num_nodes + 1, device=index.device)
        self.rowptr = torch.searchsorted(target.contiguous(), bounds, out_int32=True)
        self.col = source.to(torch.int32)
        self._ptr = torch.tensor([0, self.num_nodes], device=index.device)
        self._plain: dict[torch.dtype, EdgeSample] = {}
        self._is_symmetric: bool | None = None
        self._transposed: Transposed | None = None

    @property
    def num_edges(self) -> int:
        return self.col.numel()

    @_untraced
    def sample(self, weight: torch.Tensor | None, dtype: torch.dtype) -> EdgeSample:
        """The matrix with weights [E] in the order of the list (behind it those of appended self-loops), or ones."""
        if weight is not None:
            return self._filled(weight if self.order is None else weight.index_select(0, self.order))
        if not torch.is_grad_enabled():
            return self._filled(torch.ones(self.num_edges, dtype=dtype, device=self.col.device))
        if dtype not in self._plain:
            self._plain[dtype] = self._ones(dtype)
        return self._plain[dtype]

    def _ones(self, dtype: torch.dtype) -> EdgeSample:
        value = torch.ones(self.num_edges, dtype=dtype, device=self.col.device)
        sample = EdgeSample(self.rowptr, self.col, value, self._ptr, True)
        if self._is_symmetric is None:
            row, col = sample.row(), self.col.long()
            mirrored = torch.sort(col * self.num_nodes + row)[0]
            self._is_symmetric = torch.equal(mirrored, row * self.num_nodes + col)
        return sample if self._is_symmetric else self._filled(value)

    def _filled(self, value: torch.Tensor) -> EdgeSample:
        # Whether a matrix is symmetric matters to the way back alone, and so does its transpose.
        forward_only = not torch.is_grad_enabled()
        sample = EdgeSample(self.rowptr, self.col, value, self._ptr, forward_only)
        if not forward_only:
            sample._transposed = self.transposed()
        return sample

    @_untraced
    def transposed(self) -> Transposed:
        """CSR of the transpose, see :meth:`EdgeSample.transposed`; never the short form of a symmetric matrix."""
        if self._transposed is None:
            self._transposed = EdgeSample(self.rowptr, self.col, self.col, self._ptr, False).transposed()
        return self._transposed

    def unsorted(self, entries: torch.Tensor) -> torch.Tensor:
        """What the entries hold, [E, ...], in the order of the list."""
        if self.order is None:
            return entries
        return torch.empty_like(entries).index_copy(0, self.order, entries)


def revalued(edges: EdgeSample, values: Sequence[torch.Tensor], made: SortedEdges | None = None) -> list[EdgeSample]:
    """The same structure with several sets of weights, in the order of the entries; transposed once for all."""
    forward_only = not torch.is_grad_enabled()
    samples = [edges.with_value(value, symmetric=forward_only) for value in values]
    if forward_only:
        return samples
    transposed = made.transposed() if made is not None else samples[0].transposed()
    for sample in samples:
        sample._transposed = transposed
    return samples


_cache: OrderedDict[int, tuple[weakref.ref[torch.Tensor], int, dict[Any, Any]]] = OrderedDict()


@_untraced
def sorted_edges(
    index: torch.Tensor,
    num_senders: int,
    num_receivers: int | None = None,
    *,
    flow: str = "source_to_target",
    loops: int | None = None,
) -> SortedEdges:
    """An edge list in CSR form, remembered as long as the list lives and is not written to.

    A write is seen by the tensor's version counter, which autograd relies on too: what goes past it
    (``.data``, memory shared with numpy) goes past this as well.

    Args:
        index: integers [2, E].
        num_senders, num_receivers: nodes that the first and the second row count; the latter by
            default as the former.
        flow: "source_to_target", or "target_to_source" to exchange the rows.
        loops: take self-loops out and append one for each of the first `loops` nodes.

    No view of the list is kept, which would keep it alive.

    Raises:
        InputError: no integers [2, E], or node numbers out of range.
    """
    check_tensor("edge_index", index, shape=(2, None), dtypes=_INTEGERS)
    if num_receivers is None:
        num_receivers = num_senders
    what = num_senders, num_receivers, flow, loops
    made = _remembered(index)
    if made is not None and what in made:
        return made[what]
    # What inference mode makes could not be used in a training step later.
    with torch.inference_mode(False):
        ends = index if flow == "source_to_target" else index.flip(0)
        result = SortedEdges(ends, num_senders, num_receivers, loops)
    if made is not None:
        made[what] = result
        _make_room()
    return result


@_untraced
def offsets(index: torch.Tensor, groups: int) -> torch.Tensor | None:
    """int64 [groups + 1], where each group begins in a vector of group numbers; None if it is not ascending.

    Remembered like :func:`sorted_edges`.
    """
    known = _remembered(index)
    if known is not None and groups in known:
        found: torch.Tensor | None = known[groups]
        return found
    with torch.inference_mode(False):
        ascending = bool((index[1:] >= index[:-1]).all())
        inside = index.numel() == 0 or (int(index[0]) >= 0 and int(index[-1]) < groups)
        bounds = torch.arange(groups + 1, device=index.device, dtype=index.dtype)
        found = torch.searchsorted(index.contiguous(), bounds) if ascending and inside else None
    if known is not None:
        known[groups] = found
        _make_room()
    return found


def _remembered(index: torch.Tensor) -> dict[Any, Any] | None:
    """What is known of a list; None where nothing may be remembered."""
    if index.is_inference() or index.requires_grad:
        return None
    key = id(index)
    entry = _cache.get(key)
    if entry is None or entry[0]() is not index or entry[1] != index._version:
        entry = weakref.ref(index, lambda dead: _forget(key, dead)), index._version, {}
        _cache[key] = entry
    _cache.move_to_end(key)
    return entry[2]


def _forget(key: int, dead: weakref.ref[torch.Tensor]) -> None:
    entry = _cache.get(key)
    if entry is not None and entry[0] is dead:
        del _cache[key]


def _make_room() -> None:
    sizes = [sum(_entries_held(made) for made in entry[2].values()) for entry in _cache.values()]
    excess = sum(sizes) - _CAPACITY
    for key, size in list(zip(_cache, sizes, strict=True))[:-1]:
        if excess <= 0:
            break
        _cache.pop(key, None)
        excess -= size


def _entries_held(made: SortedEdges | torch.Tensor | None) -> int:
    if made is None:
        return 0
    return made.num_edges if isinstance(made, SortedEdges) else made.numel()


def edge_list(edges: Edges, edge_weight: torch.Tensor | None) -> EdgeList:
    """Anything but an EdgeSample as senders, receivers and weights.

    Raises:
        InputError: an unknown form, weights of the wrong form, or weights beside a sparse matrix.
    """
    if edge_weight is not None:
        check_tensor("edge_weight", edge_weight, shape=(None,), dtypes=DTYPES)
    as_tensor = getattr(edges, "as_tensor", None)
    if callable(as_tensor):
        edges = as_tensor()
    if isinstance(edges, torch.Tensor) and edges.layout == torch.strided:
        check_tensor("edge_index", edges, shape=(2, None), dtypes=_INTEGERS)
        if edge_weight is not None:
            check_tensor("edge_weight", edge_weight, shape=(edges.shape[1],), device=edges.device)
        return EdgeList(edges, edge_weight)
    is_sparse_tensor = not isinstance(edges, torch.Tensor) and callable(getattr(edges, "coo", None))
    if not isinstance(edges, torch.Tensor) and not is_sparse_tensor:
        raise fail("edge_index", "an EdgeSample, an int64 tensor [2, E] or a sparse matrix", edges)
    if edge_weight is not None:
        raise InputError("edge_weight: expected None beside a sparse matrix, which holds its own")
    row, col, value = edges.coo() if is_sparse_tensor else _entries(edges)
    kind = "SparseTensor" if is_sparse_tensor else "torch.sparse"
    index = torch.stack([col, row]).long()
    if value is not None and value.dim() > 1:
        return EdgeList(index, None, value, kind)
    return EdgeList(index, value, None, kind)


def _entries(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if matrix.layout == torch.sparse_coo:
        matrix = matrix if matrix.is_coalesced() else matrix.coalesce()
        row, col = matrix.indices()
    elif matrix.layout == torch.sparse_csr:
        row, col = _expanded(matrix.crow_indices()), matrix.col_indices()
    elif matrix.layout == torch.sparse_csc:
        row, col = matrix.row_indices(), _expanded(matrix.ccol_indices())
    else:
        raise InputError(f"edge_index: expected a sparse matrix in COO, CSR or CSC form, got {matrix.layout}")
    return row, col, matrix.values()


def matrix_rows(edges: Edges) -> int | None:
    """Rows, which receive, of a sparse matrix; None for other forms of edges, which do not tell."""
    if isinstance(edges, torch.Tensor) and edges.layout != torch.strided:
        return edges.shape[0]
    sizes = getattr(edges, "sparse_sizes", None)
    return int(sizes()[0]) if callable(sizes) else None


def _expanded(ptr: torch.Tensor) -> torch.Tensor:
    return torch.arange(ptr.numel() - 1, device=ptr.device).repeat_interleave(ptr[1:] - ptr[:-1])


def check_range(name: str, nodes: torch.Tensor, count: int) -> None:
    if nodes.numel():
        low, high = (int(bound) for bound in torch.aminmax(nodes))
        check(low >= 0 and high < count, "edge_index", f"{name} in 0..{count - 1}", (low, high))


def check_sample(x: torch.Tensor, edges: EdgeSample, edge_weight: torch.Tensor | None) -> None:
    """Raise InputError where an EdgeSample comes with weights, or with other nodes than `x` [N, ...] has."""
    if edge_weight is not None:
        raise InputError("edge_weight: expected None beside an EdgeSample, which holds its own (edges.with_value)")
    # A message made in advance would tie a compiled graph to this number of nodes.
    if edges.num_nodes != x.shape[0]:
        raise fail("x", f"features of {edges.num_nodes} nodes (the EdgeSample's)", x)


def entry_rows(edges: EdgeSample) -> torch.Tensor:
    """int64 [entries]: the row of each entry, also of unused capacity, whose weight is 0; reads no device."""
    entries = torch.arange(edges.col.numel(), dtype=torch.int32, device=edges.col.device)
    row = torch.searchsorted(edges.rowptr[1:], entries, right=True)
    return row.clamp_(max=max(edges.num_nodes - 1, 0))


def as_edges(
    x: torch.Tensor, edges: Edges, edge_weight: torch.Tensor | None = None, ptr: torch.Tensor | None = None
) -> EdgeSample:
    """Edges of any form that the layers take, as an EdgeSample.

    Args:
        x: node features [N, F].
        edges: an EdgeSample (then nothing else may be given), an edge list or a sparse matrix.
        edge_weight: [E] floating; default ones.
        ptr: int64 [B + 1], node offsets of an edge list; default one graph.

    Raises:
        InputError: tensors of the wrong form, or weights beside an EdgeSample.
    """
    if isinstance(edges, EdgeSample):
        check_sample(x, edges, edge_weight)
        return edges
    given = edge_list(edges, edge_weight)
    if ptr is None:
        ptr = torch.tensor([0, x.shape[0]], device=given.ends.device)
    return EdgeSample.from_edge_index(given.ends.long(), ptr, given.weight)
