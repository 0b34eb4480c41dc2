"""The annealed search on the 64 graphs of four nodes: chances of all proposals by counting, and long chains."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from search_helpers import WIDTH, drawn_teacher, edge_sets, make_graphs, searched

from acgkd_fast import EdgeSample, GraphBatch, PairLayout, _library
from acgkd_fast.distill.edge_lists import EdgeLists, pack
from acgkd_fast.distill.moves import Limits, MoveMix, log_proposal_ratio, propose
from acgkd_fast.distill.proposal_weights import EdgeProposals

NATIVE = _library.backend("search_steps", "cpu") == "native"
ENGINES = ["generic", pytest.param("native", marks=pytest.mark.skipif(not NATIVE, reason="the extension is not built"))]
pytestmark = pytest.mark.filterwarnings("ignore:k. expected at most 0.05")
# In the order of pair numbers, which are the bits of a state.
PAIRS = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
LAYOUT = PairLayout.complete([4])
# Every sum of these that a draw may divide by divides 120 or 12.
SHARES = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
WEIGHTED = LAYOUT, torch.logit(SHARES / 12)
CASES = {
    "uniform": (MoveMix(0.0, 0.5), Limits(), False),
    "two-hop": (MoveMix(0.0, 0.5, 0.5), Limits(), False),
    "logits": (MoveMix(0.0, 0.5), Limits(), True),
    "logits, two-hop": (MoveMix(0.0, 0.5, 0.5), Limits(), True),
    "swaps": (MoveMix(0.0, 0.5, 0.0, True), Limits(), False),
    "connected": (MoveMix(0.0, 0.5, 0.5), Limits(True), False),
    "degree": (MoveMix(0.0, 0.5, 0.5), Limits(False, 2), False),
}


def bits(mask: int) -> list[int]:
    return [pair for pair in range(6) if mask >> pair & 1]


@functools.cache
def chances(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [64, 64]: how likely each graph is proposed from each, by an even grid of draws; the stated ratios."""
    mix, limits, weighted = CASES[case]
    weights = EdgeProposals.from_logits(*WEIGHTED, LAYOUT.node_ptr) if weighted else None
    quarter, half, once = (torch.arange(4) + 0.5) / 4, torch.tensor([0.25, 0.75]), torch.tensor([0.5])
    # Multiples of all numbers of edges, nodes, partners and weights that a draw chooses among.
    first, second = ((torch.arange(n) + 0.5) / n for n in (120 if weighted else 60, 60 if mix.keep_degrees else 12))
    kind, near = (once if mix.keep_degrees else quarter), (half if mix.two_hop else once)
    u = torch.cartesian_prod(once, kind, first, second, half, once, near, once).double()
    sizes, graphs = torch.full((len(u),), 4), torch.zeros(len(u), dtype=torch.int64)
    chance, ratio = torch.zeros(64, 64, dtype=torch.float64), torch.full((64, 64), torch.nan, dtype=torch.float64)
    for mask in range(64):
        packed = pack(*torch.tensor([PAIRS[pair] for pair in bits(mask)], dtype=torch.int64).view(-1, 2).T)
        lists = EdgeLists(packed.expand(len(u), -1).contiguous(), torch.full((len(u),), len(packed)))
        lists.reserve(1)
        options = {"limits": limits, "weights": weights, "graphs": graphs}
        edits = propose(lists, sizes, u, mix, 1, **options)
        to = edge_sets(lists.edited(edits))[edits.valid]
        stated = log_proposal_ratio(edits, lists, sizes, mix, weights, graphs)[edits.valid]
        chance[mask] = torch.bincount(to, minlength=64).double() / len(u)
        lowest, highest = (
            torch.full((64,), start, dtype=torch.float64).scatter_reduce(0, to, stated, how)
            for start, how in ((torch.inf, "amin"), (-torch.inf, "amax"))
        )
        ratio[mask] = torch.where(chance[mask] > 0, lowest, torch.nan)
        torch.testing.assert_close(lowest[chance[mask] > 0], highest[chance[mask] > 0])
    return chance, ratio


@pytest.mark.parametrize("case", CASES)
def test_stated_ratios_are_those_of_the_chances(case):
    if case == "logits, two-hop":
        rows = [SHARES[[p for p in range(6) if node in PAIRS[p]]].tolist() for node in range(4)]
        parts = {sum(part) for row in rows for k in (1, 2, 3) for part in itertools.combinations(row, k)}
        assert all(12 % part == 0 for part in parts) and 120 % float(SHARES.sum()) == 0
    chance, ratio = chances(case)
    both_ways = (chance > 0) & (chance.T > 0)
    assert both_ways.sum() >= (12 if case == "swaps" else 60)
    expected = (chance.T / chance).log()
    torch.testing.assert_close(ratio[both_ways], expected[both_ways], rtol=0.0, atol=1e-6)
    if case in ("uniform", "swaps"):
        rewired = [[i.bit_count() == j.bit_count() for i in range(64)] for j in range(64)]
        assert ratio[torch.tensor(rewired) & both_ways].abs().max() == 0.0


@pytest.mark.parametrize("case", CASES)
def test_the_boltzmann_distribution_is_stationary(case):
    """The exact transition matrix of the test that the search makes, over the graphs that reach one another."""
    chance, ratio = chances(case)
    energy = 1.5 * torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    accept = (energy[:, None] - energy[None] + ratio).exp().clamp(max=1.0)
    step = torch.where(chance > 0, chance * accept, 0.0)
    step += torch.diag(1.0 - step.sum(1))
    assert (step >= -1e-12).all()
    # From graphs that the limits allow no way leads to others.
    allowed = torch.tensor([fits(mask, CASES[case][1]) for mask in range(64)])
    assert (step[allowed][:, ~allowed] == 0).all()
    weight = torch.where(allowed, (-energy).exp(), 0.0)
    torch.testing.assert_close(weight @ step, weight, rtol=1e-9, atol=1e-9)
    if case != "swaps":
        reached = torch.linalg.matrix_power(step[allowed][:, allowed], 64)
        assert (reached > 0).all() and allowed.sum() >= (38 if case == "connected" else 30)


def fits(mask: int, limits: Limits) -> bool:
    edges = torch.tensor([PAIRS[pair] for pair in bits(mask)], dtype=torch.int64).view(-1, 2)
    lists = EdgeLists(pack(*edges.T)[None], torch.tensor([len(edges)]))
    degree = torch.bincount(edges.flatten(), minlength=4)
    whole = not limits.connected or bool(lists.connected(torch.tensor([4])))
    return whole and (not limits.max_degree or int(degree.max()) <= limits.max_degree)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options", [{}, {"two_hop": 0.6}, {"edge_weights": WEIGHTED}, {"edge_weights": WEIGHTED, "two_hop": 0.4}]
)
def test_the_metropolis_chain_has_the_boltzmann_distribution(options, engine):
    """Without K every graph is a chain of its own."""
    count, heat = 4000 if engine == "native" else 1500, 0.7
    teacher = drawn_teacher("gcn3-8", logit_scale=10.0)
    graphs = make_graphs(sizes=[4] * count, degree=0.0, kind="constant")
    graphs = GraphBatch(graphs.x, graphs.edges, torch.zeros(count, dtype=torch.int64))
    settings = {"lam_k": 0.0, "cap": 0.0, "temperature": heat, "share": 1.0, "rewire": 0.3, "engine": engine}
    settings["connected"] = False
    if "edge_weights" in options:
        options = {**options, "edge_weights": (PairLayout.complete([4] * count), WEIGHTED[1].repeat(count))}
    refiner = searched(teacher, graphs, 11, 150, **options, **settings)
    observed = torch.bincount(edge_sets(EdgeLists.from_edges(refiner.graphs().edges)), minlength=64)

    index = [(4 * mask + a, 4 * mask + b) for mask in range(64) for a, b in (PAIRS[p] for p in bits(mask))]
    both = torch.tensor(index + [(b, a) for a, b in index]).T
    batch = GraphBatch(torch.ones(256, WIDTH), EdgeSample.from_edge_index(both, torch.arange(0, 257, 4)))
    loss = torch.nn.functional.cross_entropy(teacher(batch), torch.zeros(64, dtype=torch.int64), reduction="none")
    expected = count * torch.softmax(-loss.double() / heat, 0)
    assert expected.max() > 3 * expected.min() > 15 * count / 4000
    chi_square = ((observed - expected) ** 2 / expected).sum()
    # 99.9 % point of chi-square with 63 degrees of freedom.
    assert math.isfinite(chi_square) and chi_square < 103.4, chi_square
