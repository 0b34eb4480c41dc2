"""Proposals against a plain loop, their chances by counting, and the witness against autograd."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from helpers import philox_words
from hypothesis import given, settings
from hypothesis import strategies as st
from search_helpers import assert_simple, listed, make_graphs, make_teacher

from acgkd_fast import InputError, PairLayout
from acgkd_fast.distill.edge_lists import EdgeLists, pack
from acgkd_fast.distill.energy import Energy
from acgkd_fast.distill.moves import Lane, Limits, Move, MoveMix, proposal_uniforms, propose
from acgkd_fast.distill.proposal_weights import EdgeProposals
from acgkd_fast.distill.starts import random_graphs
from acgkd_fast.distill.statistics import RunningGaussians, gaussian_divergence, graph_moment_sums


def connected(pairs: list[tuple[int, int]], n: int) -> bool:
    return nx.is_connected(nx.Graph([*pairs, *((node, node) for node in range(n))]))


def two_hop_partners(pairs: list[tuple[int, int]], n: int, node: int, gone: int | None) -> list[int]:
    """Nodes at distance two, by networkx, once the edge {node, gone} is taken away; ascending, without `gone`."""
    graph = nx.Graph(pairs)
    graph.add_nodes_from(range(n))
    if gone is not None:
        graph.remove_edge(node, gone)
    far = nx.single_source_shortest_path_length(graph, node, 2)
    return sorted(other for other, distance in far.items() if distance == 2 and other != gone)


def propose_one(pairs: list[tuple[int, int]], n: int, u: list[float], mix: MoveMix, labels: int, limits: Limits):
    """The rules of a proposal without logits for one graph, in plain Python: (kind, new list or None, node, shift)."""
    kind = sum(u[Lane.KIND] >= threshold for threshold in mix.thresholds())
    if mix.keep_degrees and kind != Move.RELABEL:
        kind = Move.SWAP
    if kind == Move.RELABEL:
        return kind, (pairs if labels > 1 else None), int(u[Lane.FIRST] * n), 1 + int(u[Lane.SECOND] * (labels - 1))
    changed = swap(pairs, u) if kind == Move.SWAP else edit_edges(kind, pairs, n, u, mix, limits)
    if changed is not None and limits.connected and not connected(changed, n) and connected(pairs, n):
        changed = None
    return kind, changed, 0, 0


def swap(pairs: list[tuple[int, int]], u: list[float]):
    """The new list, or None where two edges cannot be swapped."""
    if len(pairs) < 2:
        return None
    place = int(u[Lane.FIRST] * len(pairs))
    other = [k for k in range(len(pairs)) if k != place][int(u[Lane.SECOND] * (len(pairs) - 1))]
    ends = pairs[other] if u[Lane.END] < 0.5 else pairs[other][::-1]
    new = [tuple(sorted(pair)) for pair in zip(pairs[place], ends, strict=True)]
    if len({*pairs[place], *ends}) < 4 or set(new) & set(pairs):
        return None
    changed = list(pairs)
    changed[place], changed[other] = new
    return changed


def edit_edges(kind: int, pairs: list[tuple[int, int]], n: int, u: list[float], mix: MoveMix, limits: Limits):
    """The new list, or None where the edit is not possible or raises a degree too far."""
    if kind == Move.ADD:
        if n < 2:
            return None
        one, gone, place = int(u[Lane.FIRST] * n), None, len(pairs)
    else:
        if not pairs:
            return None
        place = int(u[Lane.FIRST] * len(pairs))
        if kind == Move.DELETE:
            return [pairs[-1] if k == place else pair for k, pair in enumerate(pairs)][:-1]
        if n < 3:
            return None
        one, gone = pairs[place] if u[Lane.END] < 0.5 else pairs[place][::-1]
    close = two_hop_partners(pairs, n, one, gone) if u[Lane.NEAR] < mix.two_hop else []
    possible = close or [node for node in range(n) if node not in (one, gone)]
    new = tuple(sorted((one, possible[int(u[Lane.SECOND] * len(possible))])))
    changed = [*pairs[:place], new, *pairs[place + 1 :]]
    before, after = ([sum(node in pair for pair in part) for node in range(n)] for part in (pairs, changed))
    too_far = limits.max_degree and any(b > max(limits.max_degree, a) for a, b in zip(before, after, strict=True))
    return None if new in pairs or too_far else changed


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    degree=st.sampled_from([0.0, 1.5, 3.0, 100.0]),
    seed=st.integers(0, 2**32),
    relabel=st.sampled_from([0.0, 0.3, 1.0]),
    rewire=st.sampled_from([0.0, 0.4, 1.0]),
    labels=st.sampled_from([1, 2, 5]),
    two_hop=st.sampled_from([0.0, 0.5, 1.0]),
    keep_degrees=st.booleans(),
    limits=st.sampled_from([Limits(), Limits(True), Limits(False, 2), Limits(True, 3)]),
)
def test_proposals_follow_the_rules_and_keep_graphs_simple(
    sizes, degree, seed, relabel, rewire, labels, two_hop, keep_degrees, limits
):
    edges = random_graphs(sizes, degree, seed=seed)
    lists, mix = EdgeLists.from_edges(edges), MoveMix(relabel, rewire, two_hop, keep_degrees)
    ids = torch.arange(len(sizes))
    for u in proposal_uniforms(ids, 0, 12, seed):
        lists.reserve(1)
        edits = propose(lists, torch.tensor(sizes), u, mix, labels, limits=limits)
        after = lists.edited(edits)
        for graph, n in enumerate(sizes):
            before = listed(lists, graph)
            kind, expected, node, shift = propose_one(before, n, u[graph].tolist(), mix, labels, limits)
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


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    degree=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_connectivity_and_distance_two_agree_with_networkx(sizes, degree, seed):
    edges = random_graphs(sizes, degree, seed=seed)
    lists, n = EdgeLists.from_edges(edges), torch.tensor(sizes)
    whole = lists.connected(n).tolist()
    node = (proposal_uniforms(torch.arange(len(sizes)), 0, 1, seed)[0, :, 0] * n).long()
    near = lists.distance_two(node, torch.full_like(node, -1), max(sizes))
    degrees = lists.degree(node).tolist()
    for g, size in enumerate(sizes):
        pairs, here = listed(lists, g), int(node[g])
        assert whole[g] == connected(pairs, size)
        assert near[g].nonzero().flatten().tolist() == two_hop_partners(pairs, size, here, None)
        assert degrees[g] == sum(here in pair for pair in pairs)


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
