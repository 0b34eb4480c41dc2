"""Edge sampling, its gradient and the candidate gradient, beside the plain-torch oracle and dense products."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from bench_edges_gpu import allowed_mismatches, bytes_moved, check_ours, check_peer, leaf_of
from edges_peers import PEERS, Problem, ours
from shapes import REAL

import acgkd_fast.edges  # noqa: F401  declares the operators
from acgkd_fast import PairLayout, _library
from acgkd_fast.edges.estimators import Estimator, Noise

OPS = torch.ops.acgkd_fast
# The size of MUTAG's training part, and one graph whose matrix would be 3000 x 3000; logits at which about 1 pair
# in 8, or in 250, is drawn. The oracle draws 300,000 pairs a second, so the big graph is checked at 500 nodes.
SHAPES = {"131 x 10..29": ([10 + (7 * g) % 20 for g in range(131)], -2.0), "1 x 3000": ([3000], -6.0)}
CHECKED = {"131 x 10..29": SHAPES["131 x 10..29"], "1 x 3000": ([500], -6.0)}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ESTIMATORS = list(Estimator)[:4]
STRETCH = (-0.1, 1.1, 0.25)
WIDTH = 64


@functools.cache
def inputs(sizes: tuple[int, ...], level: float, device: str) -> tuple[PairLayout, tuple[torch.Tensor, ...]]:
    layout = PairLayout.complete(sizes, device=device)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layout.num_pairs, generator=generator).add_(level).to(device)
    rng = torch.tensor([1, 2], device=device)
    return layout, (logits, layout.table, rng, torch.ones(1, dtype=torch.float64, device=device))


def timed_and_checked(shape: str, device: str):
    for sizes, level in (SHAPES[shape], CHECKED[shape]):
        yield inputs(tuple(sizes), level, device)


def settings(layout: PairLayout, estimator: Estimator, noise: Noise) -> tuple[Any, ...]:
    return (layout.kind, int(estimator), int(noise), *STRETCH)


def sampling(
    layout: PairLayout, tensors: tuple[torch.Tensor, ...], estimator: Estimator, noise: Noise
) -> tuple[Any, ...]:
    return (*tensors, *settings(layout, estimator, noise), layout.num_nodes, -1)


def check_same_edges(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...], pairs: int) -> None:
    """Equal but for pairs that rounding puts on the threshold: 1 in 100,000 at most."""
    both, counts = torch.cat([found[3].unique(), wanted[3].unique()]).unique(return_counts=True)
    assert both.numel() - int((counts == 2).sum()) <= 1 + pairs // 100_000
    if torch.equal(found[3], wanted[3]):
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[2], wanted[2])


def dense_sample(logits: torch.Tensor, mask: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
    """What is usually written: padded matrices of uniforms, a threshold, and the non-zeros as an edge index."""
    u = torch.rand_like(logits)
    drawn = logits + (u.logit() if noise == Noise.LOGISTIC else -torch.log(-u.log()))
    upper = (drawn > 0) & mask
    graph, row, col = (upper | upper.mT).nonzero(as_tuple=True)
    node = graph * logits.shape[1]
    return torch.stack([col + node, row + node]), (drawn[graph, row, col] > 0).float()


def padded(layout: PairLayout, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = max(layout.sizes)
    mask = torch.zeros(layout.num_graphs, largest, largest, dtype=torch.bool, device=logits.device)
    matrix = torch.zeros(mask.shape, device=logits.device)
    low, high = layout.pair_nodes()
    graph = layout.graph_of_pair(torch.arange(layout.num_pairs, device=logits.device))
    first = layout.node_ptr[graph]
    mask[graph, low - first, high - first] = True
    matrix[graph, low - first, high - first] = logits
    return matrix, mask


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", [Noise.LOGISTIC, Noise.GUMBEL], ids=["logistic", "gumbel"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.name.lower())
@pytest.mark.parametrize("shape", SHAPES)
def test_sample_edges(shape, estimator, noise, device, contest):
    if shape == "1 x 3000" and (estimator == Estimator.RELAXED or noise == Noise.GUMBEL):
        pytest.skip("the big graph is for estimators whose samples are sparse, with one noise")
    timed, checked = timed_and_checked(shape, device)
    arguments = sampling(*checked, estimator, noise)
    plain = functools.partial(_library.reference("sample_edges"), *arguments)
    check_same_edges(OPS.sample_edges(*arguments), plain(), checked[0].num_pairs)

    layout, (logits, *_) = timed
    ours = functools.partial(OPS.sample_edges, *sampling(*timed, estimator, noise))
    contenders = {"ours": ours}
    if checked[0].sizes == layout.sizes:
        contenders["plain torch"] = plain
    if estimator == Estimator.STRAIGHT_THROUGH:
        contenders["dense matrices"] = functools.partial(dense_sample, *padded(layout, logits), noise)
    contest(
        contenders,
        device,
        operator="sample_edges",
        backend=_library.backend("sample_edges", device),
        pairs=layout.num_pairs,
        edges=ours()[0].numel(),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.name.lower())
@pytest.mark.parametrize("shape", SHAPES)
def test_sample_edges_backward(shape, estimator, device, contest):
    if shape == "1 x 3000" and estimator == Estimator.RELAXED:
        pytest.skip("the big graph is for estimators whose samples are sparse")

    def arguments(layout: PairLayout, tensors: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        value, *where, _ = OPS.sample_edges(*sampling(layout, tensors, estimator, Noise.LOGISTIC))
        return (torch.ones_like(value), *where, *tensors, *settings(layout, estimator, Noise.LOGISTIC))

    timed, checked = (arguments(*given) for given in timed_and_checked(shape, device))
    plain = functools.partial(_library.reference("sample_edges_backward"), *checked)
    found, wanted = OPS.sample_edges_backward(*checked), plain()
    # A pair on the threshold of sparse straight-through may be divided by its chance or not.
    wrong = (found - wanted).abs() > 1e-4 * (1.0 + wanted.abs())
    assert int(wrong.sum()) <= 1 + len(wanted) // 100_000
    contenders = {"ours": functools.partial(OPS.sample_edges_backward, *timed)}
    if shape != "1 x 3000":
        contenders["plain torch"] = plain
    contest(
        contenders,
        device,
        operator="sample_edges_backward",
        backend=_library.backend("sample_edges_backward", device),
        pairs=len(timed[4]),
        edges=len(timed[0]),
    )


# Sigmoid and its slope, noise and comparison: about 40 operations of a pair in forward and backward together, the ten
# rounds of Philox (4 pairs at a time) not counted.
FLOP_PER_PAIR = 40


@pytest.mark.parametrize("name", REAL)
def test_draw_and_gradient(name, contest):
    """From logits to edges and back, with a gradient for every candidate, as users would otherwise write it."""
    shape = REAL[name]
    problem = Problem.make(shape.graphs, shape.nodes, shape.density, torch.device("cpu"), dense=True)
    gate = check_ours(problem)
    # One seed gives one sample, so its entries have one gradient; peers get ones.
    entries = gate["pull"][gate["sample"].pair.clamp(min=0)]

    def draw_and_pull() -> torch.Tensor:
        sample = ours(problem)
        return torch.autograd.grad((sample.value, sample.port), problem.logits, (entries, gate["pull"]))[0]

    def peer(way: Any) -> Any:
        result, wrong = check_peer(way, problem, gate)
        assert wrong <= allowed_mismatches(problem), f"{wrong} edges differ"
        grad, leaf = torch.ones_like(result), leaf_of(way, problem)

        def run() -> torch.Tensor:
            drawn = way(problem)
            return torch.autograd.grad(drawn, leaf, grad if drawn.shape == grad.shape else torch.ones_like(drawn))[0]

        return run

    moved = sum(bytes_moved(shape.pairs, shape.graphs * shape.nodes, gate["sample"].num_edges).values())
    contest(
        {"ours": draw_and_pull, **{label: peer(way) for label, way in PEERS.items()}},
        least=3,
        moved=moved,
        flop=FLOP_PER_PAIR * shape.pairs,
        shape=shape.label,
        operator="sample_edges and gradient",
        pairs=shape.pairs,
        edges=gate["sample"].num_edges,
    )


def dense_candidate_gradient(left: torch.Tensor, right: torch.Tensor, layout: PairLayout) -> torch.Tensor:
    """<left_i, right_j> + <left_j, right_i> of all pairs of one graph by one matrix product."""
    products = left @ right.T
    low, high = layout.pair_nodes()
    return products[low, high] + products[high, low]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_candidate_gradient(shape, device, contest):
    layout, _ = next(timed_and_checked(shape, device))
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(layout.num_nodes, WIDTH, generator=generator).to(device) for _ in range(2))
    arguments = (left, right, left.new_zeros(layout.num_nodes), layout.table, layout.kind, layout.num_pairs)
    ours = functools.partial(OPS.candidate_gradient, *arguments)
    if layout.num_graphs == 1:
        peers = {"dense product": functools.partial(dense_candidate_gradient, left, right, layout)}
    else:
        peers = {"plain torch": functools.partial(_library.reference("candidate_gradient"), *arguments)}
    for peer in peers.values():
        torch.testing.assert_close(ours(), peer(), rtol=1e-4, atol=1e-4)
    contest(
        {"ours": ours, **peers},
        device,
        operator="candidate_gradient",
        backend=_library.backend("candidate_gradient", device),
        pairs=layout.num_pairs,
        width=WIDTH,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_candidate_port_backward(shape, device, contest):
    def arguments(layout: PairLayout, tensors: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        return (torch.ones_like(tensors[0]), *tensors, layout.kind, int(Noise.LOGISTIC))

    timed, checked = (arguments(*given) for given in timed_and_checked(shape, device))
    plain = functools.partial(_library.reference("candidate_port_backward"), *checked)
    wrong = (OPS.candidate_port_backward(*checked) - plain()).abs() > 1e-5
    assert int(wrong.sum()) <= 1 + len(wrong) // 100_000
    contenders = {"ours": functools.partial(OPS.candidate_port_backward, *timed)}
    if shape != "1 x 3000":
        contenders["plain torch"] = plain
    contest(
        contenders,
        device,
        operator="candidate_port_backward",
        backend=_library.backend("candidate_port_backward", device),
        pairs=len(timed[0]),
    )
