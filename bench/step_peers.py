"""One inversion step, ours and as peers would write it: same teacher, same losses, same optimiser.

Every step draws edges from logits, runs the frozen teacher, adds cross-entropy, GFKD's BatchNorm
norm and the one-hot entropy, goes backward to logits and features, and takes one Adam step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from acgkd_fast.distill.inversion import Learner, LearnSettings
from acgkd_fast.distill.objectives import one_hot_entropy
from acgkd_fast.distill.statistics import BatchNormProbe, running_stats_norm
from acgkd_fast.graphs import GraphBatch
from acgkd_fast.layout import PairLayout
from acgkd_fast.nn.models import GraphClassifier, build_model
from acgkd_fast.pseudo_graphs import PseudoGraphs

C_BN, C_OH = 0.1, 0.01


@dataclass(frozen=True)
class Shape:
    """A batch named after the data set whose node counts and density it has."""

    name: str
    num_graphs: int
    sizes: tuple[int, int]
    density: float
    num_features: int = 7


SHAPES = {
    "MUTAG": Shape("MUTAG", 131, (10, 29), 0.13),
    "COLLAB": Shape("COLLAB", 128, (60, 90), 0.3),
    "REDDIT-B": Shape("REDDIT-B", 32, (300, 560), 0.006),
}


def make_teacher(shape: Shape, arch: str = "gcn5-64", device: str = "cpu") -> GraphClassifier:
    """A teacher with random weights and plausible running statistics."""
    torch.manual_seed(0)
    model = build_model(arch, shape.num_features, 2)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.normal_(0.0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False).to(device)


def make_pseudo_graphs(shape: Shape, device: str = "cpu") -> PseudoGraphs:
    generator = torch.Generator().manual_seed(1)
    low, high = shape.sizes
    sizes = torch.randint(low, high + 1, (shape.num_graphs,), generator=generator).tolist()
    layout = PairLayout.complete(sizes, device=device)
    base = torch.logit(torch.tensor(shape.density))
    logits = base + 0.5 * torch.randn(layout.num_pairs, generator=generator)
    features = torch.randn(layout.num_nodes, shape.num_features, generator=generator)
    labels = torch.arange(shape.num_graphs, device=device) % 2
    return PseudoGraphs(logits.to(device), features.to(device), labels, layout, feature_kind="one-hot")


def make_learner(shape: Shape, estimator: str, device: str = "cpu") -> Learner:
    """Our step with the settings that the peers have too."""
    settings = LearnSettings(
        steps=10_000,
        estimator=estimator,
        c_bn=C_BN,
        c_oh=C_OH,
        c_degree=0.0,
        lr_structure=1e-3,
        lr_features=1e-3,
    )
    return Learner(make_teacher(shape, device=device), make_pseudo_graphs(shape, device), settings)


def ours(shape: Shape, estimator: str, device: str = "cpu") -> Callable[[], torch.Tensor]:
    learner = make_learner(shape, estimator, device)
    return lambda: learner.advance()["loss"]


class PyGTeacher(nn.Module):
    """The same network with torch_geometric's GCNConv and pooling."""

    def __init__(self, teacher: GraphClassifier) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList(block.norm for block in teacher.blocks)
        self.classifier = teacher.classifier
        for block in teacher.blocks:
            conv = GCNConv(block.conv.in_channels, block.conv.out_channels)
            conv.load_state_dict(block.conv.state_dict())
            self.convs.append(conv)
        self.eval().requires_grad_(False)

    def forward(
        self, x: torch.Tensor, edge_index: torch.Tensor, edge_weight: torch.Tensor, batch: torch.Tensor
    ) -> torch.Tensor:
        from torch_geometric.nn import global_add_pool

        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = torch.relu(norm(conv(x, edge_index, edge_weight)))
            x = h + x if i else h
        return self.classifier(global_add_pool(x, batch))


class DenseTeacher(nn.Module):
    """The same network on padded adjacency matrices with ``bmm``."""

    def __init__(self, teacher: GraphClassifier) -> None:
        super().__init__()
        self.lins = nn.ModuleList(block.conv.lin for block in teacher.blocks)
        self.biases = [block.conv.bias for block in teacher.blocks]
        self.norms = nn.ModuleList(block.norm for block in teacher.blocks)
        self.classifier = teacher.classifier
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [B, n, F], adjacency [B, n, n], mask [B, n]."""
        looped = adjacency + torch.diag_embed(mask.to(adjacency.dtype))
        scale = looped.sum(-1).clamp(min=1e-12).rsqrt() * mask
        normalised = scale[:, :, None] * looped * scale[:, None, :]
        for i, (lin, bias, norm) in enumerate(zip(self.lins, self.biases, self.norms, strict=True)):
            h = torch.bmm(normalised, lin(x)) + bias
            # BatchNorm must see the real nodes only, or its statistics would be wrong.
            activated = torch.relu(norm(h[mask]))
            h = torch.zeros_like(h).index_put((mask,), activated)
            x = h + x if i else h
        return self.classifier(x.sum(1))


def _loss(probe: BatchNormProbe, logits: torch.Tensor, y: torch.Tensor, soft_features: torch.Tensor) -> torch.Tensor:
    cross_entropy = torch.nn.functional.cross_entropy(logits, y)
    moments = [torch.var_mean(features, dim=0, correction=0)[::-1] for features in probe.inputs]
    bn = running_stats_norm(moments, probe.running)
    return cross_entropy + C_BN * bn + C_OH * one_hot_entropy(soft_features)


def _straight_through(logits: torch.Tensor) -> torch.Tensor:
    u = torch.rand_like(logits).clamp_(1e-7, 1 - 1e-7)
    soft = torch.sigmoid(logits + u.log() - (-u).log1p())
    return (soft > 0.5).to(soft.dtype) + soft - soft.detach()


def pyg_drawn_edges(shape: Shape, device: str = "cpu", start: PseudoGraphs | None = None) -> Callable[[], torch.Tensor]:
    """PyTorch Geometric on the drawn edges: gradient for drawn edges only. Moves `start`, or graphs of its own."""
    start = start or make_pseudo_graphs(shape, device)
    teacher = PyGTeacher(make_teacher(shape, device=device)).to(device)
    row, col = start.layout.pair_nodes()
    batch = start.layout.graph_of_node()
    logits, features, y = start.logits, start.features, start.y
    optimizer = torch.optim.Adam([logits, features], lr=1e-3)

    def step() -> torch.Tensor:
        weight = _straight_through(logits)
        drawn = weight.detach().nonzero().squeeze(-1)
        edge_index = torch.stack([torch.cat([row[drawn], col[drawn]]), torch.cat([col[drawn], row[drawn]])])
        edge_weight = weight[drawn].repeat(2)
        x = features.softmax(-1)
        with BatchNormProbe(teacher) as probe:
            loss = _loss(probe, teacher(x, edge_index, edge_weight, batch), y, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def dense_bmm(shape: Shape, device: str = "cpu") -> Callable[[], torch.Tensor]:
    """Padded dense matrices: gradient for every candidate."""
    start = make_pseudo_graphs(shape, device)
    teacher = DenseTeacher(make_teacher(shape, device=device))
    layout, y = start.layout, start.y
    width = max(layout.sizes)
    mask = torch.arange(width, device=device) < torch.tensor(layout.sizes, device=device)[:, None]
    row, col = layout.pair_nodes()
    graph = layout.graph_of_pair(torch.arange(layout.num_pairs, device=device))
    first = layout.node_ptr[graph]
    logits = torch.full((layout.num_graphs, width, width), -30.0, device=device)
    logits[graph, row - first, col - first] = start.logits.detach()
    features = torch.zeros(layout.num_graphs, width, shape.num_features, device=device)
    features[mask] = start.features.detach()
    logits.requires_grad_()
    features.requires_grad_()
    optimizer = torch.optim.Adam([logits, features], lr=1e-3)

    def step() -> torch.Tensor:
        upper = _straight_through(logits).triu(1)
        adjacency = upper + upper.transpose(1, 2)
        x = features.softmax(-1) * mask[..., None]
        with BatchNormProbe(teacher) as probe:
            loss = _loss(probe, teacher(x, adjacency, mask), y, x[mask])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def check_agreement(shape: Shape, device: str = "cpu") -> None:
    """All three networks give the same logits and gradients on the same drawn graph."""
    pseudo, teacher = make_pseudo_graphs(shape, device), make_teacher(shape, device=device)
    edges = pseudo.harden(seed=0).edges
    weight = edges.value.clone().requires_grad_()
    x = pseudo.soft_features().detach()
    weighted = edges.with_value(weight)
    batch = GraphBatch(x, weighted)
    edge_index, edge_weight = batch.to_edge_index()
    ours = teacher(x, weighted)
    dense_x, adjacency, mask = batch.to_dense()
    answers = {
        "ours": ours,
        "PyG": PyGTeacher(teacher).to(device)(x, edge_index, edge_weight, batch.batch()),
        "dense": DenseTeacher(teacher)(dense_x, adjacency, mask),
    }
    expected, expected_grad = answers["ours"], None
    for name, logits in answers.items():
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")
        (grad,) = torch.autograd.grad(logits.square().sum(), weight, retain_graph=True)
        expected_grad = grad if expected_grad is None else expected_grad
        scale = expected_grad.abs().max()
        torch.testing.assert_close(grad / scale, expected_grad / scale, rtol=1e-2, atol=2e-3)


STEPS: dict[str, Callable[[Shape], Callable[[], torch.Tensor]]] = {
    "ours": lambda shape: ours(shape, "sparse_straight_through"),
    "ours, straight-through for all candidates": lambda shape: ours(shape, "straight_through"),
    "PyG GCNConv on drawn edges": pyg_drawn_edges,
    "padded dense bmm": dense_bmm,
}
