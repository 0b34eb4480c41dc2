"""Message passing and readout in plain torch: the oracle of the fused kernels.

Gathers, multiplies and scatters whole [E, F] messages. Signatures are those of the operators in
``ops.py``. A matrix A is given by its rows in CSR form (``rowptr``, ``col``, ``value``); row r
receives from its columns. Its transpose comes as CSR too (``t_rowptr``, ``t_col``, ``t_edge`` with
the position of each entry in A), or as None where A equals its transpose ("tied" values).
"""

from __future__ import annotations

import torch

from ..edges.reference import compute_dtype


def rows_of(rowptr: torch.Tensor) -> torch.Tensor:
    """Row of each stored entry, int64 [nnz]."""
    counts = (rowptr[1:] - rowptr[:-1]).long()
    return torch.arange(counts.numel(), device=rowptr.device).repeat_interleave(counts)


def _aggregate(rowptr: torch.Tensor, col: torch.Tensor, value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    row = rows_of(rowptr)
    count = row.numel()
    messages = value[:count, None] * x[col[:count].long()]
    return torch.zeros_like(x).index_add_(0, row, messages)


def _transposed_value(value: torch.Tensor, t_edge: torch.Tensor | None) -> torch.Tensor:
    return value if t_edge is None else value[t_edge.long()]


def gcn_propagate(
    x: torch.Tensor,
    value: torch.Tensor,
    port: torch.Tensor | None,
    table: torch.Tensor | None,
    rowptr: torch.Tensor,
    col: torch.Tensor,
    t_rowptr: torch.Tensor | None,
    t_col: torch.Tensor | None,
    t_edge: torch.Tensor | None,
    add_self_loops: bool,
    kind: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out = D^-1/2 (A + I) D^-1/2 x with D_i = sum_j A_ij (+ 1); also returns D^-1/2."""
    wide = compute_dtype(x.dtype)
    row = rows_of(rowptr)
    degree = torch.zeros(x.shape[0], dtype=wide, device=x.device)
    degree = degree.index_add_(0, row, value[: row.numel()].to(wide)) + float(add_self_loops)
    scale = torch.where(degree > 0, degree, 1.0).rsqrt() * (degree > 0)
    scaled = scale[:, None] * x.to(wide)
    out = _aggregate(rowptr, col, value.to(wide), scaled)
    if add_self_loops:
        out = out + scaled
    return (scale[:, None] * out).to(x.dtype), scale


def gcn_propagate_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor,
    rowptr: torch.Tensor,
    col: torch.Tensor,
    t_rowptr: torch.Tensor | None,
    t_col: torch.Tensor | None,
    t_edge: torch.Tensor | None,
    add_self_loops: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x [N, F], of the entries of A [E], and of the degrees [N].

    The degree gradient is -(<grad_out_i, out_i> + <x_i, grad_x_i>) / (2 D_i); the entry gradient
    holds it already: scale_i scale_j <grad_out_i, x_j> + grad_degree_i.
    """
    wide = compute_dtype(x.dtype)
    g, wide_x = scale[:, None] * grad_out.to(wide), x.to(wide)
    back = _aggregate(
        rowptr if t_rowptr is None else t_rowptr,
        col if t_col is None else t_col,
        _transposed_value(value.to(wide), t_edge),
        g,
    )
    if add_self_loops:
        back = back + g
    grad_x = scale[:, None] * back
    # 1 / D = scale^2 also where D = 0 and the row takes no part.
    grad_degree = -0.5 * scale.square() * ((grad_out.to(wide) * out.to(wide)).sum(-1) + (wide_x * grad_x).sum(-1))
    grad_value = _entry_gradient(g, scale[:, None] * wide_x, grad_degree, rowptr, col, value.shape[0])
    return grad_x.to(x.dtype), grad_value.to(value.dtype), grad_degree


def _entry_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    row_term: torch.Tensor | None,
    rowptr: torch.Tensor,
    col: torch.Tensor,
    length: int,
) -> torch.Tensor:
    """<left_row, right_col> + row_term_row of each entry; zero in the padding behind the last row."""
    row = rows_of(rowptr)
    count = row.numel()
    entries = (left[row] * right[col[:count].long()]).sum(-1)
    if row_term is not None:
        entries = entries + row_term[row]
    return torch.nn.functional.pad(entries, (0, length - count))


def gin_propagate(
    x: torch.Tensor,
    value: torch.Tensor,
    eps: torch.Tensor,
    port: torch.Tensor | None,
    table: torch.Tensor | None,
    rowptr: torch.Tensor,
    col: torch.Tensor,
    t_rowptr: torch.Tensor | None,
    t_col: torch.Tensor | None,
    t_edge: torch.Tensor | None,
    kind: int,
) -> torch.Tensor:
    """out = (1 + eps) x + A x."""
    wide = compute_dtype(x.dtype)
    wide_x = x.to(wide)
    out = (1.0 + eps.to(wide).reshape(())) * wide_x + _aggregate(rowptr, col, value.to(wide), wide_x)
    return out.to(x.dtype)


def gin_propagate_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    value: torch.Tensor,
    eps: torch.Tensor,
    rowptr: torch.Tensor,
    col: torch.Tensor,
    t_rowptr: torch.Tensor | None,
    t_col: torch.Tensor | None,
    t_edge: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x [N, F], of the entries of A [E] and of eps (same shape as eps)."""
    wide = compute_dtype(x.dtype)
    g, wide_x = grad_out.to(wide), x.to(wide)
    back = _aggregate(
        rowptr if t_rowptr is None else t_rowptr,
        col if t_col is None else t_col,
        _transposed_value(value.to(wide), t_edge),
        g,
    )
    grad_x = (1.0 + eps.to(wide).reshape(())) * g + back
    grad_value = _entry_gradient(g, wide_x, None, rowptr, col, value.shape[0])
    grad_eps = (g * wide_x).sum().reshape(eps.shape)
    return grad_x.to(x.dtype), grad_value.to(value.dtype), grad_eps.to(eps.dtype)


SUM, MEAN, MAX = 0, 1, 2


def readout(x: torch.Tensor, ptr: torch.Tensor, mode: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum, mean or maximum over the nodes of each graph; 0 for a graph without nodes.

    Returns:
        out [B, F] and, for the maximum, the first node that reaches it per graph and channel,
        int32 [B, F] (-1 without nodes); for sum and mean an empty int32 tensor [0, F].
    """
    wide = compute_dtype(x.dtype)
    sizes = (ptr[1:] - ptr[:-1]).long()
    graph = rows_of(ptr)
    shape = (sizes.numel(), x.shape[1])
    if mode == MAX:
        index = graph[:, None].expand(-1, shape[1])
        best = torch.full(shape, -torch.inf, dtype=x.dtype, device=x.device).scatter_reduce_(0, index, x, "amax")
        nodes = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(index)
        missing = x.shape[0]
        reached = torch.where(x == best[graph], nodes, missing)
        first = torch.full(shape, missing, device=x.device).scatter_reduce_(0, index, reached, "amin")
        empty = sizes == 0
        first[empty] = -1
        best[empty] = 0
        return best, first.int()
    out = torch.zeros(shape, dtype=wide, device=x.device).index_add_(0, graph, x.to(wide))
    if mode == MEAN:
        out = out / sizes.clamp(min=1)[:, None]
    return out.to(x.dtype), torch.empty(0, shape[1], dtype=torch.int32, device=x.device)


def readout_backward(
    grad_out: torch.Tensor, argmax: torch.Tensor, ptr: torch.Tensor, mode: int, num_nodes: int
) -> torch.Tensor:
    """Gradient of x, [num_nodes, F]; for the maximum only the first node that reached it gets one."""
    if mode == MAX:
        grad_x = grad_out.new_zeros(num_nodes + 1, grad_out.shape[1])
        index = torch.where(argmax < 0, num_nodes, argmax.long())
        return grad_x.scatter_(0, index, grad_out)[:num_nodes]
    if mode == MEAN:
        sizes = (ptr[1:] - ptr[:-1]).clamp(min=1)[:, None]
        grad_out = (grad_out.to(compute_dtype(grad_out.dtype)) / sizes).to(grad_out.dtype)
    return grad_out[rows_of(ptr)]
