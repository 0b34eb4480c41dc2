"""GCN message passing as our users would otherwise write it: peers of `gcn_propagate`.

All take node features, edges as the sampler leaves them (`EdgeSample`), and edge values that require grad, and build
whatever format they need inside the call, because learned edges are redrawn in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import acgkd_fast as af
from acgkd_fast import EdgeSample

Layer = Callable[[torch.Tensor, EdgeSample, torch.Tensor], torch.Tensor]


def ours(x: torch.Tensor, edges: EdgeSample, value: torch.Tensor) -> torch.Tensor:
    return af.gcn_propagate(x, edges.with_value(value, symmetric=edges.symmetric))


def _rows(edges: EdgeSample) -> torch.Tensor:
    counts = (edges.rowptr[1:] - edges.rowptr[:-1]).long()
    nodes = torch.arange(edges.num_nodes, device=counts.device)
    return nodes.repeat_interleave(counts, output_size=edges.col.numel())


def _normalised(
    row: torch.Tensor, col: torch.Tensor, value: torch.Tensor, nodes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled entries of A and the diagonal that self-loops add."""
    scale = torch.ones(nodes, device=value.device, dtype=value.dtype).index_add(0, row, value).rsqrt()
    return scale[row] * value * scale[col], scale * scale


def gather_scatter(x: torch.Tensor, edges: EdgeSample, value: torch.Tensor) -> torch.Tensor:
    """The naive path: one message per edge, added up by index_add (atomics on CUDA)."""
    row, col = _rows(edges), edges.col.long()
    entry, diagonal = _normalised(row, col, value, x.shape[0])
    return (diagonal[:, None] * x).index_add(0, row, entry[:, None] * x[col])


def compiled() -> Layer:
    # The row numbers are made outside: repeat_interleave breaks the graph.
    @torch.compile(dynamic=True)
    def core(x: torch.Tensor, row: torch.Tensor, col: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        entry, diagonal = _normalised(row, col, value, x.shape[0])
        return (diagonal[:, None] * x).index_add(0, row, entry[:, None] * x[col])

    return lambda x, edges, value: core(x, _rows(edges), edges.col.long(), value)


def torch_csr(x: torch.Tensor, edges: EdgeSample, value: torch.Tensor) -> torch.Tensor:
    """torch.sparse CSR (cuSPARSE), with a new matrix per call."""
    row = _rows(edges)
    entry, diagonal = _normalised(row, edges.col.long(), value, x.shape[0])
    size = (x.shape[0], x.shape[0])
    matrix = torch.sparse_csr_tensor(edges.rowptr, edges.col, entry, size, check_invariants=False)
    return diagonal[:, None] * x + torch.sparse.mm(matrix, x)


def torch_coo(x: torch.Tensor, edges: EdgeSample, value: torch.Tensor) -> torch.Tensor:
    """torch.sparse COO, whose values get gradients on every device."""
    row, col = _rows(edges), edges.col.long()
    entry, diagonal = _normalised(row, col, value, x.shape[0])
    size = (x.shape[0], x.shape[0])
    matrix = torch.sparse_coo_tensor(torch.stack([row, col]), entry, size, is_coalesced=True, check_invariants=False)
    return diagonal[:, None] * x + torch.sparse.mm(matrix, x)


def dense_bmm(x: torch.Tensor, edges: EdgeSample, value: torch.Tensor) -> torch.Tensor:
    """Padded batch of dense matrices. The graphs here are of one size, so nothing is wasted on padding."""
    graphs = edges.num_graphs
    n = x.shape[0] // graphs
    row, col = _rows(edges), edges.col.long()
    adjacency = value.new_zeros(graphs * n * n).index_put((row * n + col % n,), value).view(graphs, n, n)
    adjacency = adjacency + torch.eye(n, device=x.device, dtype=x.dtype)
    scale = adjacency.sum(-1, keepdim=True).rsqrt()
    return (scale * torch.bmm(adjacency, scale * x.view(graphs, n, -1))).view_as(x)


def pyg(width: int, device: torch.device) -> Layer:
    """PyTorch Geometric's GCNConv without its weight matrix."""
    from torch_geometric.nn import GCNConv

    layer = GCNConv(width, width, bias=False).to(device)
    layer.lin = torch.nn.Identity()

    def run(x: torch.Tensor, edges: EdgeSample, value: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = layer(x, torch.stack([edges.col.long(), _rows(edges)]), value)
        return result

    return run


def torch_scatter() -> Layer:
    from torch_scatter import segment_csr

    def run(x: torch.Tensor, edges: EdgeSample, value: torch.Tensor) -> torch.Tensor:
        row, col, rowptr = _rows(edges), edges.col.long(), edges.rowptr.long()
        scale = (1.0 + segment_csr(value, rowptr)).rsqrt()
        entry = scale[row] * value * scale[col]
        result: torch.Tensor = (scale * scale)[:, None] * x + segment_csr(entry[:, None] * x[col], rowptr)
        return result

    return run


def torch_sparse() -> Layer:
    from torch_sparse import SparseTensor, matmul

    def run(x: torch.Tensor, edges: EdgeSample, value: torch.Tensor) -> torch.Tensor:
        row, col, rowptr = _rows(edges), edges.col.long(), edges.rowptr.long()
        entry, diagonal = _normalised(row, col, value, x.shape[0])
        size = (x.shape[0], x.shape[0])
        promises = {"is_sorted": True, "trust_data": True}
        matrix = SparseTensor(row=row, rowptr=rowptr, col=col, value=entry, sparse_sizes=size, **promises)
        result: torch.Tensor = diagonal[:, None] * x + matmul(matrix, x)
        return result

    return run


def available(width: int, device: torch.device, *, compile_naive: bool) -> tuple[dict[str, Layer], dict[str, str]]:
    """Peers by name, ours first, and the reasons why others are absent."""
    layers: dict[str, Layer] = {"acgkd_fast": ours}
    absent: dict[str, str] = {}
    optional: dict[str, Callable[[], Any]] = {
        "PyG": lambda: pyg(width, device),
        "torch-scatter": torch_scatter,
        "torch-sparse": torch_sparse,
    }
    for name, make in optional.items():
        try:
            layers[name] = make()
        except (ImportError, OSError) as error:
            absent[name] = str(error).splitlines()[0]
    layers |= {"torch CSR": torch_csr, "torch COO": torch_coo, "dense bmm": dense_bmm, "gather-scatter": gather_scatter}
    if compile_naive:
        layers["torch.compile"] = compiled()
    else:
        absent["torch.compile"] = "not asked for (--compile)"
    return layers, absent
