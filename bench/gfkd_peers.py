"""One iteration of GFKD (arXiv 2105.07519): as published, vectorised, and by our learner with estimator "arm".

An iteration moves features by gradient on the thresholded graphs and structure by the ARM pair from two forward passes,
with Adam for both. Ours takes the features' gradient on the first graph of the pair, which saves one pass of three; the
structure's gradient is the same number. The peers share network (PyTorch Geometric), losses and optimiser and differ in
one thing: how matrices of 0 and 1 become an edge list, which happens three times per iteration. The published code
visits every node in Python and inserts its edges node by node; it does so into DGL graphs, whose own cost is not in
these figures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from step_peers import C_BN, C_OH, PyGTeacher, Shape, make_teacher

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from host_loops import GFKDHost

from acgkd_fast.distill.inversion import Learner, LearnSettings
from acgkd_fast.distill.objectives import one_hot_entropy
from acgkd_fast.distill.statistics import BatchNormProbe, running_stats_norm
from acgkd_fast.formats.gfkd import matrices_from_pairs
from acgkd_fast.layout import PairLayout
from acgkd_fast.pseudo_graphs import PseudoGraphs

Tensors = list[torch.Tensor]
Edges = Callable[[Tensors], torch.Tensor]


def start(shape: Shape) -> PseudoGraphs:
    """Directed logits of probabilities that are uniform in (0, 1), as GFKD starts."""
    generator = torch.Generator().manual_seed(1)
    low, high = shape.sizes
    sizes = torch.randint(low, high + 1, (shape.num_graphs,), generator=generator).tolist()
    layout = PairLayout.complete(sizes, directed=True)
    logits = torch.rand(layout.num_pairs, generator=generator).clamp(1e-6, 1 - 1e-6).logit()
    features = torch.randn(layout.num_nodes, shape.num_features, generator=generator)
    return PseudoGraphs(logits, features, torch.arange(shape.num_graphs) % 2, layout, feature_kind="one-hot")


def node_by_node(structures: Tensors) -> torch.Tensor:
    return GFKDHost.edge_list(structures)[0]


def vectorised(sizes: tuple[int, ...]) -> Edges:
    """Of one padded tensor [B, n, n]: a single nonzero for the whole batch."""
    counts = torch.tensor(sizes)
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    inside = torch.arange(int(counts.max())) < counts[:, None]
    allowed = inside[:, :, None] & inside[:, None, :] & ~torch.eye(inside.shape[1], dtype=torch.bool)

    def edges(structures: Tensors) -> torch.Tensor:
        graph, row, col = ((structures[0] == 1) & allowed).nonzero(as_tuple=True)
        return torch.stack([row, col]) + first[graph]

    return edges


class Iteration:
    """GFKD's iteration on logits in one matrix per graph, or in one padded tensor.

    Args:
        params: logits, the leaves.
        to_edges: of 0/1 matrices in the form of `params`, the edge index of the batch.
        uniforms: of nothing, noise in the form of `params`.
    """

    def __init__(self, shape: Shape, params: Tensors, to_edges: Edges, uniforms: Callable[[], Tensors]) -> None:
        begin = start(shape)
        self.net = PyGTeacher(make_teacher(shape))
        self.params, self.to_edges, self.uniforms = params, to_edges, uniforms
        self.batch, self.y = begin.layout.graph_of_node(), begin.y
        self.features = begin.features.detach().clone().requires_grad_()
        self.optimizers = [torch.optim.Adam([self.features], lr=0.01), torch.optim.Adam(params, lr=1.0)]

    def losses(self, structures: Tensors, x: torch.Tensor) -> torch.Tensor:
        edge_index = self.to_edges(structures)
        with BatchNormProbe(self.net) as probe:
            logits = self.net(x, edge_index, torch.ones(edge_index.shape[1]), self.batch)
        moments = [torch.var_mean(h, dim=0, correction=0)[::-1] for h in probe.inputs]
        per_graph = torch.nn.functional.cross_entropy(logits, self.y, reduction="none")
        return per_graph + C_BN * running_stats_norm(moments, probe.running)

    def __call__(self) -> torch.Tensor:
        x = self.features.softmax(1)
        loss = self.losses([(theta >= 0).int() for theta in self.params], x).mean() + C_OH * one_hot_entropy(x)
        self.features.grad = torch.autograd.grad(loss, self.features)[0]
        with torch.no_grad():
            x, noise = self.features.softmax(1), self.uniforms()
            first = [(u > torch.sigmoid(-t)).int() for u, t in zip(noise, self.params, strict=True)]
            second = [(u < torch.sigmoid(t)).int() for u, t in zip(noise, self.params, strict=True)]
            difference = self.losses(first, x) - self.losses(second, x)
            shares = difference.split([len(difference) // len(noise)] * len(noise))
            for theta, share, u in zip(self.params, shares, noise, strict=True):
                theta.grad = share.view(-1, *[1] * (u.dim() - 1)) * (u - 0.5) if u.dim() == 3 else share * (u - 0.5)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()


def published(shape: Shape, noise: Tensors | None = None) -> Iteration:
    begin = start(shape)
    params = [m.clone().requires_grad_() for m in matrices_from_pairs(begin.logits.detach(), begin.layout)]
    return Iteration(shape, params, node_by_node, lambda: noise or [torch.rand_like(theta) for theta in params])


def padded(matrices: Tensors, fill: float) -> torch.Tensor:
    n = max(len(m) for m in matrices)
    return torch.stack([torch.nn.functional.pad(m, (0, n - len(m), 0, n - len(m)), value=fill) for m in matrices])


def in_one_tensor(shape: Shape, noise: Tensors | None = None) -> Iteration:
    begin = start(shape)
    theta = padded(matrices_from_pairs(begin.logits.detach(), begin.layout), -30.0).requires_grad_()
    given = None if noise is None else [padded(noise, 0.5)]
    return Iteration(shape, [theta], vectorised(begin.layout.sizes), lambda: given or [torch.rand_like(theta)])


def learner(shape: Shape, estimator: str = "arm") -> Learner:
    settings = LearnSettings(
        steps=10_000, estimator=estimator, c_bn=C_BN, c_oh=C_OH, c_degree=0.0, lr_structure=1.0, lr_features=0.01
    )
    return Learner(make_teacher(shape), start(shape), settings)


def check_agreement(shape: Shape) -> None:
    """From one start and the same uniforms all three find one gradient of the structure."""
    ours = learner(shape)
    layout = ours.pseudo_graphs.layout
    table, rng = layout.table, torch.tensor([ours.seed, ours.step])
    u = torch.ops.acgkd_fast.pair_uniforms(table, rng, layout.kind, 0, layout.num_pairs)
    noise = matrices_from_pairs(u, layout, 0.5)
    ours.advance()
    grad = ours.pseudo_graphs.logits.grad
    assert grad is not None
    wanted = matrices_from_pairs(layout.num_graphs * grad, layout)
    by_node, together = published(shape, noise), in_one_tensor(shape, noise)
    for peer, structure in ((by_node, wanted), (together, [padded(wanted, 0.0)])):
        peer()
        found = torch.cat([theta.grad.flatten() for theta in peer.params if theta.grad is not None])
        expected = torch.cat([matrix.flatten() for matrix in structure])
        # A difference of two losses: where a graph's is small, rounding is not.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
