"""Teachers and graphs for the tests of the search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from helpers import dense

from acgkd_fast import EdgeSample, GraphBatch, PairLayout, gin_propagate, readout
from acgkd_fast.distill.edge_lists import EdgeLists, unpack
from acgkd_fast.distill.energy import Energy
from acgkd_fast.distill.moves import MoveMix
from acgkd_fast.distill.proposal_weights import EdgeProposals
from acgkd_fast.distill.refine import Refiner, RefineSettings
from acgkd_fast.distill.starts import balanced_labels, random_features, random_graphs, random_trees
from acgkd_fast.nn.models import GraphClassifier, build_model
from acgkd_fast.search import pack_teacher, search_steps
from acgkd_fast.search.api import SearchState
from acgkd_fast.search.reference import forward
from acgkd_fast.teachers import Teacher, as_teacher

WIDTH = 4
SIZES = (6, 9, 1, 5, 2, 12, 7, 3)


class GraphNormTeacher(GraphClassifier):
    """A BatchNorm after the readout: one row per graph."""

    def __init__(self) -> None:
        super().__init__("gcn3-8", WIDTH, 2)
        self.norm = torch.nn.BatchNorm1d(8)

    def classify(self, h, ptr):
        return self.classifier(self.norm(readout(h, ptr, "mean")))


class PlainTeacher(torch.nn.Module):
    """No BatchNorm at all."""

    num_features = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(WIDTH, 8), torch.nn.Linear(8, 2)

    def forward(self, x, edges):
        return self.second(readout(torch.relu(self.first(gin_propagate(x, edges))), edges.ptr))


def make_teacher(kind: str = "gcn3-8") -> Teacher:
    torch.manual_seed(0)
    if kind == "plain":
        return as_teacher(PlainTeacher())
    model = GraphNormTeacher() if kind == "graph-norm" else build_model(kind, WIDTH, 2)
    # Statistics of graphs unlike the start, so that there is something to reach.
    graphs = make_graphs(seed=50, sizes=[8, 12] * 20, degree=3.0)
    skewed = torch.nn.functional.one_hot((graphs.x.argmax(1) * 0.6).long(), WIDTH).float()
    for _ in range(40):
        model(skewed, graphs.edges)
    return as_teacher(model)


def make_graphs(
    seed: int = 0, sizes: Sequence[int] = SIZES, degree: float | None = None, kind: str = "one-hot"
) -> GraphBatch:
    edges = random_trees(sizes, seed=seed) if degree is None else random_graphs(sizes, degree, seed=seed)
    x = random_features(kind, WIDTH, edges.num_nodes, seed=seed, edges=edges)
    return GraphBatch(x, edges, balanced_labels(len(sizes), 2, seed))


def assert_simple(edges: EdgeSample, sizes: Sequence[int]) -> None:
    """Symmetric, no self-loop, no doubled edge, none between graphs, columns ascending."""
    adjacency = dense(edges)
    assert edges.ptr.tolist() == [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    assert ((adjacency == 0) | (adjacency == 1)).all()
    assert torch.equal(adjacency, adjacency.T) and (adjacency.diagonal() == 0).all()
    blocks = torch.block_diag(*[torch.ones(n, n) for n in sizes])
    assert (adjacency <= blocks).all()
    rowptr, col = edges.rowptr.tolist(), edges.col.tolist()
    for row in range(edges.num_nodes):
        assert col[rowptr[row] : rowptr[row + 1]] == sorted(set(col[rowptr[row] : rowptr[row + 1]]))


def listed(lists: EdgeLists, graph: int) -> list[tuple[int, int]]:
    low, high = unpack(lists.pairs[graph, : int(lists.counts[graph])])
    return list(zip(low.tolist(), high.tolist(), strict=True))


def edge_sets(lists: EdgeLists) -> torch.Tensor:
    """Each graph's edges as a bit mask over pair numbers, int64 [B]; a plain sum, so doubled edges would show."""
    low, high = unpack(lists.pairs)
    return torch.where(lists.used(), 1 << (high * (high - 1) // 2 + low), 0).sum(1)


def drawn_teacher(arch: str = "gcn3-8", readout: str = "sum", seed: int = 0, logit_scale: float = 1.0) -> Teacher:
    """Statistics and affine parameters of every norm are drawn, so that each counts."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = build_model(arch, WIDTH, 2, readout=readout)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.3, 2.0, generator=generator)
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
            torch.nn.init.normal_(layer.bias, generator=generator)
    with torch.no_grad():
        model.classifier.weight.mul_(logit_scale)
        for block in model.blocks:
            if hasattr(block.conv, "eps"):
                block.conv.eps.fill_(0.3)
    return as_teacher(model)


def searched(teacher, graphs, seed=3, steps=100, *, edge_weights=None, **options) -> Refiner:
    refiner = Refiner(teacher, graphs, RefineSettings(steps=steps, **options), seed=seed, edge_weights=edge_weights)
    refiner.advance(steps)
    return refiner


def assert_state_is_fresh(refiner: Refiner, start: GraphBatch | None = None) -> None:
    """Sums, losses and energy are those of a forward pass over the graphs as they stand.

    The sums begin as those of the teacher's own pass over `start`, so that pass's rounding stays in them.
    """
    now = refiner.graphs()
    assert_simple(now.edges, refiner._sizes.tolist())
    energy = refiner._energy
    fresh_energy, fresh = Energy.start(energy.lam_k, energy.w_ce, energy.cap, refiner.teacher, now)
    first = fresh if start is None else Energy.start(energy.lam_k, energy.w_ce, energy.cap, refiner.teacher, start)[1]
    size = torch.maximum(fresh.sums.abs(), first.sums.abs()).amax((0, 2)).clamp(min=1.0)[None, :, None]
    torch.testing.assert_close(refiner._scores.sums / size, fresh.sums / size, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(refiner._scores.loss, fresh.loss, rtol=1e-4, atol=1e-4 * float(fresh.loss.max()) + 1e-5)
    margin = forward(pack_teacher(refiner.teacher.module), now.x, now.edges)[0].diff(dim=1).abs().squeeze(1)
    assert (refiner._scores.hit == fresh.hit)[margin > 1e-3].all()
    torch.testing.assert_close(refiner._total, refiner._scores.sums.sum(0), rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(refiner._excess, energy.excess(refiner._scores.loss).sum(), rtol=1e-9, atol=1e-9)
    value = fresh_energy.value(refiner._total, refiner._excess)
    torch.testing.assert_close(refiner._trace[-1], value, rtol=1e-9, atol=1e-12)


def edge_lists(lists: EdgeLists) -> torch.Tensor:
    """Each graph's list as one number, float64; the order counts."""
    place = torch.arange(1, lists.pairs.shape[1] + 1).double().sqrt()
    return (torch.where(lists.used(), lists.pairs + 1, 0) * place).sum(1)


def drawn_logits(sizes: Sequence[int], xi: float | None = None, seed: int = 0) -> tuple[PairLayout, torch.Tensor]:
    """A layout of all pairs, or of a share `xi`, and logits of which some exclude their pair."""
    layout = PairLayout.complete(sizes) if xi is None else PairLayout.budget(sizes, xi)
    logits = 2.0 * torch.randn(layout.num_pairs, generator=torch.Generator().manual_seed(seed))
    logits[2::5] = -torch.inf
    return layout, logits


def operator_arguments(
    arch: str = "gcn3-8",
    *,
    steps: int = 6,
    relabel: float = 1.0,
    mix: MoveMix | None = None,
    edge_weights: tuple[PairLayout, torch.Tensor] | None = None,
    features: str = "one-hot",
    **options,
) -> tuple:
    """What `search_steps` hands to the operator."""
    graphs, labelled = make_graphs(sizes=SIZES * 2, kind=features), features == "one-hot"
    refiner = Refiner(drawn_teacher(arch), graphs, RefineSettings(engine="generic"), seed=3)
    caught: list[tuple] = []
    plain = torch.ops.acgkd_fast.search_steps

    class Catch(Exception):
        pass

    def catch(*arguments):
        caught.append(arguments)
        raise Catch

    energy = refiner._energy
    energy = Energy(energy.lam_k, energy.w_ce, 0.0, energy.num_graphs, energy.rows, energy.running)
    excess = energy.excess(refiner._scores.loss).sum()
    level = torch.stack([excess, energy.value(refiner._total, excess)])
    state = SearchState(refiner._lists, refiner._x.argmax(1) * labelled, refiner._scores, refiner._total, level)
    try:
        torch.ops.acgkd_fast.search_steps = catch
        search_steps(
            pack_teacher(refiner.teacher.module),
            energy,
            state,
            refiner._x,
            refiner._y,
            refiner._ptr,
            refiner._ids,
            seed=3,
            first_step=0,
            steps=steps,
            edited=9,
            mix=mix or MoveMix(relabel, 0.5),
            num_labels=WIDTH if labelled else 0,
            weights=None if edge_weights is None else EdgeProposals.from_logits(*edge_weights, refiner._ptr),
            **options,
        )
    except Catch:
        pass
    finally:
        torch.ops.acgkd_fast.search_steps = plain
    return caught[0]
