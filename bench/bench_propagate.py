"""Message passing and readout, forward and backward, beside gather and scatter, sparse and dense products."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from bench_propagate_gpu import DENSITIES, TOLERANCE, Problem, Size
from propagate_peers import available
from shapes import REAL

import acgkd_fast as af
from acgkd_fast import EdgeSample, _library

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Molecules of MUTAG have 18 nodes and 20 bonds on average; the dense batch is what an untrained sampler emits.
SHAPES = {"MUTAG": (131, 1.1), "dense": (131, 6.0)}
WIDTHS = (7, 64)
DENSITIES |= {name: (shape.density, shape.hubs) for name, shape in REAL.items()}
MAX_DENSE = 2**26


@functools.cache
def graphs(shape: str, device: str) -> EdgeSample:
    """Rings with random chords, as many undirected edges per node as the shape says."""
    count, density = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    sizes = [10 + (7 * g) % 20 for g in range(count)]
    pairs, first = [], 0
    for n in sizes:
        node = torch.arange(n)
        ring = torch.stack([node, (node + 1) % n])
        chords = torch.randint(0, n, (2, int((density - 1) * n)), generator=generator)
        both = torch.cat([ring, chords[:, chords[0] != chords[1]]], 1).sort(0)[0]
        pairs.append(torch.unique(both, dim=1) + first)
        first += n
    low, high = torch.cat(pairs, 1)
    ptr = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    edge_index = torch.stack([torch.cat([low, high]), torch.cat([high, low])])
    weight = torch.rand(len(low), generator=generator).add_(0.5).repeat(2)
    return EdgeSample.from_edge_index(edge_index, ptr, weight, symmetric=True).to(device)


def gcn_normalise(row, col, weight, nodes):
    degree = torch.ones(nodes, device=weight.device).scatter_add(0, row, weight)
    scale = degree.rsqrt()
    return scale[row] * weight * scale[col], scale.square()


def gather_scatter(layer, x, row, col, weight):
    """The default path of PyTorch Geometric: messages of all edges, added up by scatter."""
    own = torch.ones(len(x), device=x.device)
    if layer == "gcn":
        weight, own = gcn_normalise(row, col, weight, len(x))
    messages = weight[:, None] * x.index_select(0, col)
    return own[:, None] * x + torch.zeros_like(x).scatter_add(0, row[:, None].expand_as(messages), messages)


def sparse_product(layer, x, row, col, weight):
    """torch.sparse, whose backward yields the gradient of the values too."""
    own = torch.ones(len(x), device=x.device)
    if layer == "gcn":
        weight, own = gcn_normalise(row, col, weight, len(x))
    matrix = torch.sparse_coo_tensor(torch.stack([row, col]), weight, (len(x), len(x)), is_coalesced=True)
    return own[:, None] * x + torch.sparse.mm(matrix, x)


def dense_product(layer, x, edges, weight):
    """Graphs padded to the largest, one batched matrix product."""
    adjacency, mask = edges.with_value(weight).to_dense()
    adjacency = adjacency + torch.eye(adjacency.shape[1], device=x.device)
    padded = x.new_zeros(*mask.shape, x.shape[1])
    padded[mask] = x
    if layer == "gcn":
        scale = adjacency.sum(-1).rsqrt()
        adjacency = scale[:, :, None] * adjacency * scale[:, None, :]
    return (adjacency @ padded)[mask]


def both_ways(forward: Callable, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = forward(x, weight)
    return (out.detach(), *torch.autograd.grad(out, (x, weight), grad))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layer", ["gcn", "gin"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape, layer, width, device, contest):
    edges = graphs(shape, device)
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(edges.num_nodes, width, generator=generator).to(device) for _ in range(2))
    x.requires_grad_()
    weight = edges.value.clone().requires_grad_()
    row, col = edges.row(), edges.col.long()
    propagate = af.gcn_propagate if layer == "gcn" else af.gin_propagate
    layers = {
        "ours": lambda x, weight: propagate(x, edges.with_value(weight, symmetric=True)),
        "gather and scatter": lambda x, weight: gather_scatter(layer, x, row, col, weight),
        "torch.sparse": lambda x, weight: sparse_product(layer, x, row, col, weight),
        "padded dense": lambda x, weight: dense_product(layer, x, edges, weight),
    }
    contenders = {label: functools.partial(both_ways, forward, x, weight, grad) for label, forward in layers.items()}

    opposite = torch.argsort(col * edges.num_nodes + row)
    wanted = contenders["gather and scatter"]()
    for label, run in contenders.items():
        out, grad_x, grad_weight = run()
        torch.testing.assert_close(out, wanted[0], rtol=1e-4, atol=1e-4, msg=lambda text, n=label: f"{n}: {text}")
        torch.testing.assert_close(grad_x, wanted[1], rtol=1e-4, atol=1e-4, msg=lambda text, n=label: f"{n}: {text}")
        # Of tied values only the sum over both directions is defined.
        tied, expected = grad_weight + grad_weight[opposite], wanted[2] + wanted[2][opposite]
        torch.testing.assert_close(tied, expected, rtol=1e-3, atol=1e-3, msg=lambda text, n=label: f"{n}: {text}")

    contest(
        contenders,
        device,
        operator=f"{layer}_propagate",
        backend=_library.backend(f"{layer}_propagate", device),
        nodes=edges.num_nodes,
        edges=edges.num_edges,
        width=width,
    )


def scattered_attention(sent, source, target, row, col, weight):
    """The way of PyTorch Geometric with edge weights: scores of all edges, their softmax by scatter, messages."""
    nodes, heads = source.shape
    own = torch.arange(nodes, device=sent.device)
    row, col, weight = torch.cat([row, own]), torch.cat([col, own]), torch.cat([weight, weight.new_ones(nodes)])
    score = torch.nn.functional.leaky_relu(source[col] + target[row], 0.2)
    index = row[:, None].expand_as(score)
    highest = torch.full_like(source, -torch.inf).scatter_reduce(0, index, score.detach(), "amax")
    share = weight[:, None] * (score - highest[row]).exp()
    share = share / torch.zeros_like(source).scatter_add(0, index, share)[row]
    messages = (share[..., None] * sent.view(nodes, heads, -1)[col]).flatten(1)
    return torch.zeros_like(sent).scatter_add(0, row[:, None].expand_as(messages), messages)


def dense_attention(sent, source, target, edges, weight):
    """Graphs padded to the largest, one batched softmax and product."""
    nodes, heads = source.shape
    adjacency, mask = edges.with_value(weight).to_dense()
    adjacency = adjacency + torch.eye(adjacency.shape[1], device=sent.device)

    def padded(x):
        return x.new_zeros(*mask.shape, *x.shape[1:]).index_put((mask,), x)

    score = torch.nn.functional.leaky_relu(padded(target)[:, :, None] + padded(source)[:, None], 0.2)
    alpha = (score + adjacency.log()[..., None]).softmax(2)
    return torch.einsum("gijh,gjhf->gihf", alpha, padded(sent.view(nodes, heads, -1)))[mask].flatten(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape, heads, device, contest):
    edges = graphs(shape, device)
    generator = torch.Generator().manual_seed(1)
    widths = (64, heads, heads, 64)
    *leaves, grad = (torch.randn(edges.num_nodes, k, generator=generator).to(device) for k in widths)
    leaves = [leaf.requires_grad_() for leaf in (*leaves, edges.value.clone())]
    row, col = edges.row(), edges.col.long()
    layers = {
        "ours": lambda *x: af.gat_propagate(*x[:3], edges.with_value(x[3], symmetric=True)),
        "gather and scatter": lambda *x: scattered_attention(*x[:3], row, col, x[3]),
        "padded dense": lambda *x: dense_attention(*x[:3], edges, x[3]),
    }

    def run(forward: Callable) -> tuple[torch.Tensor, ...]:
        out = forward(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    contenders = {label: functools.partial(run, forward) for label, forward in layers.items()}
    wanted = contenders["gather and scatter"]()
    for label, call in contenders.items():
        for found, expected in zip(call(), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, msg=lambda text, n=label: f"{n}: {text}")
    contest(
        contenders,
        device,
        operator="gat_propagate",
        backend=_library.backend("gat_propagate", device),
        nodes=edges.num_nodes,
        edges=edges.num_edges,
        width=64,
        heads=heads,
    )


@functools.cache
def compiled_peer() -> Callable:
    """One for all shapes, so that it is compiled once for general sizes."""
    return available(64, torch.device("cpu"), compile_naive=True)[0]["torch.compile"]


@pytest.mark.parametrize("width", [16, 64, 256])
@pytest.mark.parametrize("name", REAL)
def test_peers(name, width, contest):
    """One GCN layer on freshly drawn edges, forward and backward; formats that a peer needs are built in the call."""
    shape = REAL[name]
    if width != 64 and name not in ("MUTAG", "COLLAB", "REDDIT-B"):
        pytest.skip("other widths are measured on three shapes")
    problem = Problem(Size(shape.nodes, shape.graphs, width, name), torch.device("cpu"), torch.float32)
    layers, absent = available(width, torch.device("cpu"), compile_naive=False)
    layers["torch.compile"], _ = compiled_peer(), absent.pop("torch.compile")
    dense = {"dense bmm": shape.graphs * shape.nodes**2, "torch CSR": (shape.graphs * shape.nodes) ** 2}
    for label, floats in dense.items():
        if floats > MAX_DENSE:
            del layers[label]
            absent[label] = f"would make dense matrices of {4e-9 * floats:.2g} GB"
    for label in list(layers):
        error = problem.error(layers[label])
        assert label != "acgkd_fast" or error <= TOLERANCE[torch.float32], error
        if error > TOLERANCE[torch.float32]:
            del layers[label]
            absent[label] = f"disagrees with float64 by {error:.1e}"
    entries = problem.edges.col.numel()
    contest(
        {
            "ours" if label == "acgkd_fast" else label: functools.partial(problem.step, layer)
            for label, layer in layers.items()
        },
        least=3,
        moved=sum(problem.bytes_moved().values()),
        # One multiplication and one addition per entry and channel: forward, gradient of x, gradient of the value.
        flop=6 * entries * width,
        absent=absent,
        shape=shape.label,
        operator="gcn_propagate and gradient",
        nodes=problem.edges.num_nodes,
        edges=entries,
        width=width,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_readout(mode, device, contest):
    edges = graphs("MUTAG", device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(edges.num_nodes, 64, generator=generator).to(device).requires_grad_()
    grad = torch.randn(edges.num_graphs, 64, generator=generator).to(device)
    ptr, code = edges.ptr, {"sum": 0, "mean": 1, "max": 2}[mode]
    batch = torch.arange(edges.num_graphs, device=device).repeat_interleave(ptr[1:] - ptr[:-1])

    def scatter() -> torch.Tensor:
        index = batch[:, None].expand_as(x)
        start = x.new_zeros(edges.num_graphs, 64)
        reduce = {"sum": "sum", "mean": "mean", "max": "amax"}[mode]
        return start.scatter_reduce(0, index, x, reduce, include_self=False)

    def run(forward: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        out = forward()
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    contenders = {
        "ours": functools.partial(run, lambda: af.readout(x, ptr, mode)),
        "scatter": functools.partial(run, scatter),
        "plain torch": functools.partial(
            lambda: _library.reference("readout_backward")(
                grad, _library.reference("readout")(x.detach(), ptr, code)[1], ptr, code, edges.num_nodes
            )
        ),
    }
    for ours, theirs in zip(contenders["ours"](), contenders["scatter"](), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(contenders["ours"]()[1], contenders["plain torch"](), rtol=1e-5, atol=1e-5)
    contest(contenders, device, operator="readout", backend=_library.backend("readout", device), width=64)
