"""Public message passing: checks, then one operator call per direction."""

from __future__ import annotations

import torch

from ..edges.reference import compute_dtype
from ..errors import check, check_choice, check_tensor, fail, is_number
from ..graphs import EdgeSample
from . import ops, reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_MODES = {"sum": reference.SUM, "mean": reference.MEAN, "max": reference.MAX}

assert ops.GCN_PROPAGATE  # importing the module declares the operators


def _check(x: torch.Tensor, edges: EdgeSample, name: str = "x") -> None:
    check(isinstance(edges, EdgeSample), "edges", "an EdgeSample", edges)
    check_tensor(name, x, shape=(edges.num_nodes, None), dtypes=_DTYPES, device=edges.rowptr.device)


def _fuses_candidates(x: torch.Tensor) -> bool:
    """Whether one kernel turns node factors into gradients of the logits, with no float per candidate between."""
    return x.is_cuda


def _value(x: torch.Tensor, edges: EdgeSample) -> torch.Tensor:
    return edges.value.to(x.dtype).contiguous()


def _operands(x: torch.Tensor, edges: EdgeSample) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, int]:
    value = _value(x, edges)
    port = edges.port
    if port is not None and edges.draw is not None and _fuses_candidates(x):
        port = torch.ops.acgkd_fast.node_port(*edges.draw, x)
    elif port is not None and port.dtype != x.dtype:
        port = port.to(x.dtype)
    layout = edges.layout
    if layout is None:
        return value, None, None, 0
    return value, port, None if port is None else layout.table, layout.kind


def gcn_propagate(x: torch.Tensor, edges: EdgeSample, add_self_loops: bool = True) -> torch.Tensor:
    """D^-1/2 (A + I) D^-1/2 x, with D taken from the sampled edge values.

    Args:
        x: node features [N, F]; float32, float64 or bfloat16 (accumulated in float32).
        edges: the edges of the batch; row i receives from its columns.
        add_self_loops: add I; without it, rows whose values sum to nothing give zeros.

    Returns:
        [N, F], dtype of `x`. Equal input gives equal bits.

    Gradients:
        `x` and ``edges.value``, through the degrees too; for straight-through samples also the
        absent candidates (``edges.port``). With symmetric edges the gradient of a value is defined
        up to its exchange with the opposite direction's: their sum is exact, which is all that the
        shared logit sees.

    Raises:
        InputError: `x` has another number of nodes, dtype or device than the edges.

    Source: Kipf and Welling, arXiv 1609.02907, eq. 2, with weighted degrees as in PyTorch
    Geometric (in-degrees on both sides of a directed graph).
    """
    _check(x, edges)
    value, port, table, kind = _operands(x, edges)
    out: torch.Tensor
    out, _ = torch.ops.acgkd_fast.gcn_propagate(
        x.contiguous(), value, port, table, edges.rowptr, edges.col, *edges.transposed(), add_self_loops, kind
    )
    return out


def gin_propagate(x: torch.Tensor, edges: EdgeSample, eps: float | torch.Tensor = 0.0) -> torch.Tensor:
    """(1 + eps) x + A x.

    Args:
        x: node features [N, F]; float32, float64 or bfloat16 (accumulated in float32).
        edges: the edges of the batch.
        eps: a number, or a tensor with one element that may require grad.

    Returns:
        [N, F], dtype of `x`. Equal input gives equal bits.

    Gradients:
        `x`, ``edges.value`` (see :func:`gcn_propagate`), absent candidates, and `eps`.

    Raises:
        InputError: `x` does not fit the edges, or `eps` has more than one element.

    Source: Xu et al., arXiv 1810.00826, eq. 4.1, with edge weights.
    """
    _check(x, edges)
    if isinstance(eps, torch.Tensor):
        if eps.numel() != 1:
            raise fail("eps", "a number or a tensor with one element", eps)
        eps = eps.to(device=x.device)
    else:
        check(is_number(eps), "eps", "a number or a tensor with one element", eps)
        eps = torch.full((1,), float(eps), dtype=compute_dtype(x.dtype), device=x.device)
    value, port, table, kind = _operands(x, edges)
    result: torch.Tensor = torch.ops.acgkd_fast.gin_propagate(
        x.contiguous(), value, eps, port, table, edges.rowptr, edges.col, *edges.transposed(), kind
    )
    return result


def gat_propagate(
    sent: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    edges: EdgeSample,
    *,
    negative_slope: float = 0.2,
    add_self_loops: bool = True,
) -> torch.Tensor:
    """sum_j alpha_ij sent_j, with attention alpha over the senders of every node and, by head, over the node itself:

        alpha_ij = A_ij exp(e_ij) / sum_k A_ik exp(e_ik),    e_ij = leaky_relu(source_j + target_i)

    Args:
        sent: what nodes send, [N, H F], H heads side by side; float32, float64 or bfloat16 (accumulated in float32).
        source, target: what a node adds to the score as a sender and as a receiver, [N, H], dtype of `sent`.
        edges: the edges of the batch, of weights of at least 0, which count as multiplicities.
        negative_slope: of the leaky rectifier.
        add_self_loops: add an edge of weight 1 from every node to itself; edges must have none then.

    Returns:
        [N, H F], dtype of `sent`; rows whose values are all 0 give zeros. Equal input gives equal bits.

    Gradients:
        `sent`, `source`, `target` and ``edges.value``, stored edges of value 0 too; none for absent candidates that the
        sample does not store (``edges.port``).

    Raises:
        InputError: tensors that do not fit the edges or each other.

    Source: Veličković et al., arXiv 1710.10903, eqs. 3 to 5, with edge weights.
    """
    _check(sent, edges, "sent")
    check_tensor("source", source, shape=(edges.num_nodes, None), dtypes=(sent.dtype,), device=sent.device)
    check_tensor("target", target, shape=tuple(source.shape), dtypes=(sent.dtype,), device=sent.device)
    heads = source.shape[1]
    # A message made in advance would tie a compiled graph to one width.
    if heads == 0 or sent.shape[1] % heads:
        raise fail("source", f"heads that divide {sent.shape[1]} channels", source)
    out: torch.Tensor
    out, *_ = torch.ops.acgkd_fast.gat_propagate(
        sent.contiguous(),
        source.contiguous(),
        target.contiguous(),
        _value(sent, edges),
        edges.rowptr,
        edges.col,
        *edges.transposed(),
        negative_slope,
        add_self_loops,
    )
    return out


def readout(x: torch.Tensor, ptr: torch.Tensor, mode: str = "sum") -> torch.Tensor:
    """Reduce node features to one row per graph.

    Args:
        x: node features [N, F]; float32, float64 or bfloat16.
        ptr: int64 [B + 1]: graph g owns rows ptr[g] .. ptr[g + 1] - 1; starts at 0, ends at N.
        mode: "sum", "mean" or "max".

    Returns:
        [B, F]; a graph without nodes gives zeros.

    Gradients:
        `x`; for "max" the first node that reached the maximum.

    Raises:
        InputError: unknown mode, or tensors of the wrong form.
    """
    check_choice("mode", mode, _MODES)
    check_tensor("x", x, shape=(None, None), dtypes=_DTYPES)
    check_tensor("ptr", ptr, shape=(None,), dtypes=(torch.int64,), device=x.device)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = ptr.numpy()
        spans = offsets.size > 0 and offsets[0] == 0 and offsets[-1] == x.shape[0]
        check(spans, "ptr", f"node offsets from 0 to {x.shape[0]}", ptr.tolist())
    out: torch.Tensor = torch.ops.acgkd_fast.readout(x.contiguous(), ptr, _MODES[mode])[0]
    return out
