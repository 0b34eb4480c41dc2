"""Proposals against a plain loop, their chances by counting, and the witness against autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import philox_words
from hypothesis import given, settings
from hypothesis import strategies as st
from search_helpers import assert_simple, edge_sets, listed, make_graphs, make_teacher

from acgkd_fast import InputError, PairLayout
from acgkd_fast.distill.edge_lists import EdgeLists, pack
from acgkd_fast.distill.energy import Energy
from acgkd_fast.distill.moves import Lane, Move, MoveMix, log_proposal_ratio, proposal_uniforms, propose
from acgkd_fast.distill.proposal_weights import EdgeProposals
from acgkd_fast.distill.starts import random_graphs
from acgkd_fast.distill.statistics import RunningGaussians, gaussian_divergence, graph_moment_sums


def propose_one(pairs: list[tuple[int, int]], n: int, u: list[float], mix: MoveMix, labels: int):
    """The rules of a uniform proposal for one graph, in plain Python: (kind, new list or None, node, shift)."""
    below = mix.thresholds()
    kind = sum(u[Lane.KIND] >= threshold for threshold in below)
    first, second = u[Lane.FIRST], u[Lane.SECOND]
    if kind == Move.RELABEL:
        return kind, (pairs if labels > 1 else None), int(first * n), 1 + int(second * (labels - 1))
    if kind == Move.ADD:
        if n < 2:
            return kind, None, 0, 0
        one, two = int(first * n), int(second * (n - 1))
        new = tuple(sorted((one, two + (two >= one))))
        return kind, (None if new in pairs else [*pairs, new]), 0, 0
    if not pairs:
        return kind, None, 0, 0
    place = int(first * len(pairs))
    if kind == Move.DELETE:
        changed = list(pairs)
        changed[place] = changed[-1]
        return kind, changed[:-1], 0, 0
    if n < 3:
        return kind, None, 0, 0
    low, high = pairs[place]
    kept = low if u[Lane.END] < 0.5 else high
    partner = [node for node in range(n) if node not in (low, high)][int(second * (n - 2))]
    new = tuple(sorted((kept, partner)))
    changed = list(pairs)
    changed[place] = new
    return kind, (None if new in pairs else changed), 0, 0


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    degree=st.sampled_from([0.0, 1.5, 3.0, 100.0]),
    seed=st.integers(0, 2**32),
    relabel=st.sampled_from([0.0, 0.3, 1.0]),
    rewire=st.sampled_from([0.0, 0.4, 1.0]),
    labels=st.sampled_from([1, 2, 5]),
)
def test_proposals_follow_the_rules_and_keep_graphs_simple(sizes, degree, seed, relabel, rewire, labels):
    edges = random_graphs(sizes, degree, seed=seed)
    lists, mix = EdgeLists.from_edges(edges), MoveMix(relabel, rewire)
    ids = torch.arange(len(sizes))
    for u in proposal_uniforms(ids, 0, 12, seed):
        lists.reserve(1)
        edits = propose(lists, torch.tensor(sizes), u, mix, labels)
        after = lists.edited(edits)
        for graph, n in enumerate(sizes):
            before = listed(lists, graph)
            kind, expected, node, shift = propose_one(before, n, u[graph].tolist(), mix, labels)
            assert int(edits.kind[graph]) == kind
            assert bool(edits.valid[graph]) == (expected is not None)
            assert listed(after, graph) == (before if expected is None else expected)
            assert int(edits.shift[graph]) == (shift if kind == Move.RELABEL and expected is not None else 0)
            assert 0 <= int(edits.node[graph]) < n
            if kind == Move.RELABEL:
                assert int(edits.node[graph]) == node
        keep = torch.arange(len(sizes)) % 2 == 0
        untouched = lists.clone()
        lists.put(ids, untouched, edits, keep)
        for graph in range(len(sizes)):
            assert listed(lists, graph) == listed(after if keep[graph] else untouched, graph)
        assert_simple(lists.to_edges(edges.ptr, sum(sizes)), sizes)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), degree=st.sampled_from([0.0, 2.0, 100.0]))
def test_edge_lists_give_the_same_csr_back(sizes, degree):
    edges = random_graphs(sizes, degree, seed=1)
    again = EdgeLists.from_edges(edges).to_edges(edges.ptr, sum(sizes))
    for name in ("rowptr", "col", "value", "ptr"):
        assert torch.equal(getattr(again, name), getattr(edges, name)), name
        assert getattr(again, name).dtype == getattr(edges, name).dtype
    assert again.symmetric


def test_proposal_uniforms_come_from_the_documented_words():
    drawn = proposal_uniforms(torch.tensor([3, 2**32 - 1]), 40, 2, seed=2**63)
    for s in range(2):
        for g, graph in enumerate((3, 2**32 - 1)):
            words = philox_words((0, graph, 40 + s, 3), 2**63) + philox_words((1, graph, 40 + s, 3), 2**63)
            assert drawn[s, g].tolist() == [((word >> 9) + 0.5) / 2**23 for word in words]


def transition_chances(n: int, mix: MoveMix, weights: EdgeProposals | None) -> tuple[dict, dict]:
    """Chance of every proposal from graphs of 2 and 3 edges, by an even grid over all draws; and the stated ratios."""
    every = [(low, high) for high in range(n) for low in range(high)]
    grid = (torch.arange(24) + 0.5) / 24
    half = torch.tensor([0.5])
    kind, end = (torch.arange(4) + 0.5) / 4, torch.tensor([0.25, 0.75])
    u = torch.cartesian_prod(half, kind, grid, grid, end, half, end if mix.two_hop else half, half).double()
    sizes, graphs = torch.full((len(u),), n), torch.zeros(len(u), dtype=torch.int64)
    chances, ratios = {}, {}
    for chosen in [*itertools.combinations(every, 2), *itertools.combinations(every, 3)]:
        packed = pack(*torch.tensor(chosen).T)
        lists = EdgeLists(packed.expand(len(u), -1).contiguous(), torch.full((len(u),), len(chosen)))
        lists.reserve(1)
        edits = propose(lists, sizes, u, mix, 1, weights=weights, graphs=graphs)
        ratio = log_proposal_ratio(edits, lists, sizes, mix, weights, graphs)[edits.valid]
        here, there = int(edge_sets(lists)[0]), edge_sets(lists.edited(edits))[edits.valid]
        for target in there.unique().tolist():
            chances[here, target] = float((there == target).double().mean() * edits.valid.double().mean())
            (ratios[here, target],) = ratio[there == target].unique().tolist()
    return chances, ratios


@pytest.mark.parametrize("weighted", [False, True])
def test_proposal_ratios_are_exact(weighted):
    weights = None
    if weighted:
        layout = PairLayout.complete([4])
        # In twelfths, and with sums that divide 24, so that the grid hits every pair exactly as often as it should.
        share = torch.tensor([1.0, 2.0, 1.0, 3.0, 4.0, 1.0]) / 12
        weights = EdgeProposals.from_logits(layout, torch.logit(share), layout.node_ptr)
        sums = [weights.draw_partner(torch.tensor([0]), torch.tensor([k]), torch.tensor([0.5]))[1] for k in range(4)]
        assert all(24 % round(12 * float(total)) == 0 for total in sums), sums
    chances, ratios = transition_chances(4, MoveMix(0.0, 0.5), weights)
    both_ways = [(here, there) for here, there in chances if (there, here) in chances]
    assert {there.bit_count() - here.bit_count() for here, there in both_ways} == {-1, 0, 1}
    for here, there in both_ways:
        assert ratios[here, there] == pytest.approx(math.log(chances[there, here] / chances[here, there]), abs=1e-6)


def test_weighted_ends_are_drawn_in_proportion_and_only_among_candidates():
    count, n = 4000, 5
    layout = PairLayout.budget([n] * count, 0.5)
    logits = torch.linspace(-2.0, 2.0, n).repeat(count)
    logits.view(count, n)[:, 1] = -torch.inf
    weights = EdgeProposals.from_logits(layout, logits, layout.node_ptr)
    u = proposal_uniforms(torch.arange(count), 0, 1, seed=7)[0]
    empty = EdgeLists(torch.zeros(count, 1, dtype=torch.int64), torch.zeros(count, dtype=torch.int64))
    sizes, graphs = torch.full((count,), n), torch.arange(count)
    u[:, Lane.KIND] = 0.25
    edits = propose(empty, sizes, u, MoveMix(0.0, 0.0), 1, weights=weights, graphs=graphs)
    assert edits.valid.all()
    low, high = layout.pair_nodes(torch.arange(n))
    expected = torch.sigmoid(logits[:n]) / torch.sigmoid(logits[:n]).sum()
    for pair in range(n):
        share = (edits.new == pack(low[pair], high[pair])).double().mean()
        assert share == pytest.approx(float(expected[pair]), abs=4 * float(expected[pair] / count) ** 0.5 + 1e-12)

    # The edge {0, 1} is kept at 0 or 1; of a ring 0-1-2-3-4 the candidates of 0 are 1 and 4, of 1 only 0.
    one_edge = EdgeLists(pack(torch.zeros(count, 1).long(), torch.ones(count, 1).long()), torch.ones(count).long())
    edits = propose(one_edge, sizes, u, MoveMix(0.0, 1.0), 1, weights=weights, graphs=graphs)
    moved = edits.new[edits.valid]
    assert edits.valid.any() and (moved == pack(torch.tensor(0), torch.tensor(4))).all()


def test_k_and_its_closed_form_gradient_agree_with_autograd():
    torch.manual_seed(1)
    inputs = [torch.randn(40, 3).double() * 2 + 1, torch.randn(40, 5).double(), torch.ones(40, 2).double()]
    running = [(torch.randn(x.shape[1]).double(), torch.rand(x.shape[1]).double() + 0.1) for x in inputs]
    raw = [(x.mean(0).requires_grad_(), x.square().mean(0).requires_grad_()) for x in inputs]
    k = gaussian_divergence([(first, (second - first.square()).clamp(min=0.0)) for first, second in raw], running)
    k.backward()
    packed = torch.stack([torch.cat(parts) for parts in zip(*raw, strict=True)]).detach()
    target = RunningGaussians.of(running)
    torch.testing.assert_close(target.divergence(packed), k.detach())
    expected = torch.stack([torch.cat([part.grad for part in parts]) for parts in zip(*raw, strict=True)])
    torch.testing.assert_close(target.gradient(packed), expected)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_moment_sums_are_those_of_each_graph(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    nodes, graphs = sum(sizes), len(sizes)
    inputs = [torch.randn(rows, width, generator=generator) for rows, width in ((nodes, 3), (graphs, 2), (nodes, 1))]
    for layers in (inputs, inputs[::2]):
        sums = graph_moment_sums(layers, ptr, nodes)
        for g, (first, stop) in enumerate(zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True)):
            own = [x[first:stop] if len(x) == nodes else x[g : g + 1] for x in layers]
            expected = torch.stack([torch.cat([x.sum(0) for x in own]), torch.cat([x.square().sum(0) for x in own])])
            torch.testing.assert_close(sums[g].float(), expected)
    if nodes != graphs + 1:
        with pytest.raises(InputError, match="one row per node"):
            graph_moment_sums([torch.ones(graphs + 1, 2)], ptr, nodes)


def test_the_energy_counts_only_what_is_above_the_cap():
    graphs, teacher = make_graphs(), make_teacher()
    energy, scores = Energy.start(0.0, 2.0, 0.3, teacher, graphs)
    expected = 2.0 * (scores.loss - 0.3).clamp(min=0).mean()
    value = energy.value(scores.sums.sum(0), energy.excess(scores.loss).sum())
    assert float(value) == pytest.approx(float(expected))
