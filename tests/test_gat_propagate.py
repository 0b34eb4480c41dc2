"""Graph attention against a dense softmax, its formula and PyTorch Geometric."""

from __future__ import annotations

import pytest
import torch
from helpers import OPCHECKED, dense, kernels, normal, opcheck, random_edges  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import acgkd_fast as af

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def dense_attention(sent, source, target, edges, slope, loops):
    """The formula of the docstring on whole matrices, without the shift by the largest score."""
    nodes, heads = source.shape
    weight = dense(edges) + (torch.eye(nodes, dtype=sent.dtype) if loops else 0.0)
    score = target[:, None] + source[None, :]
    share = weight[..., None] * torch.where(score > 0, score, slope * score).exp()
    total = share.sum(1, keepdim=True)
    alpha = share / torch.where(total == 0, 1.0, total)
    return torch.einsum("ijh,jhf->ihf", alpha, sent.view(nodes, heads, sent.shape[1] // heads)).flatten(1)


def operands(nodes, heads, width, seed, dtype, leaf_dtype=None):
    shapes = (nodes, heads * width), (nodes, heads), (nodes, heads)
    tensors = (normal(shape, seed + k, dtype).to(leaf_dtype or dtype) for k, shape in enumerate(shapes))
    return [tensor.requires_grad_() for tensor in tensors]


def assert_near(actual, expected, dtype):
    assert actual.dtype == dtype and actual.shape == expected.shape and actual.isfinite().all()
    error, size = (actual.double() - expected).norm().item(), expected.norm().item()
    assert error <= TOLERANCE[dtype] * max(size, 1.0), (error, size)


def compare_with_matrix(sizes, heads, width, *, symmetric, seed, density, dtype, loops=True):
    def run(forward, leaf_dtype):
        edges, weight = random_edges(
            sizes, symmetric=symmetric, seed=seed, density=density, dtype=leaf_dtype, rounded_to=dtype
        )
        leaves = operands(sum(sizes), heads, width, seed, dtype, leaf_dtype)
        out = forward(*leaves, edges)
        upstream = normal(out.shape, seed + 9, dtype).to(leaf_dtype)
        return [out, *torch.autograd.grad(out, [*leaves, weight], upstream)]

    def fused(*arguments):
        return af.gat_propagate(*arguments, negative_slope=0.3, add_self_loops=loops)

    found, wanted = run(fused, dtype), run(lambda *a: dense_attention(*a, 0.3, loops), torch.float64)
    for actual, expected in zip(found, wanted, strict=True):
        assert_near(actual, expected, dtype)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=4),
    st.integers(1, 3),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    st.integers(0, 1000),
)
def test_ragged_batches_against_dense_matrices(sizes, heads, width, loops, symmetric, dtype, density, seed):
    settings_ = {"symmetric": symmetric, "seed": seed, "density": density, "dtype": dtype, "loops": loops}
    compare_with_matrix(sizes, heads, width, **settings_)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 31, 64, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["tied", "directed"])
@pytest.mark.parametrize("heads", [1, 3])
def test_widths_against_dense_matrices(heads, symmetric, dtype, width):
    """Widths on both sides of every vector length that a kernel may use."""
    compare_with_matrix([70, 1, 20], heads, width, symmetric=symmetric, seed=width, density=0.3, dtype=dtype)


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("symmetric", [True, False], ids=["tied", "directed"])
def test_gradcheck(symmetric, loops):
    template, weight = random_edges([1, 4, 3], symmetric=symmetric, seed=3)
    # Which weight each entry takes its value from.
    origin = (template.value[:, None] == weight).nonzero()[:, 1]

    def layer(sent, source, target, weights):
        edges = template.with_value(weights[origin], symmetric=symmetric)
        return af.gat_propagate(sent, source, target, edges, add_self_loops=loops)

    assert gradcheck(layer, (*operands(8, 2, 2, 1, torch.float64), weight))


@pytest.mark.parametrize("loops", [True, False])
def test_weight_zero_is_no_edge_and_its_gradient_is_a_step(loops):
    edge_index = torch.tensor([[0, 1, 2], [1, 0, 0]])
    value = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    edges = af.EdgeSample.from_edge_index(edge_index, torch.tensor([0, 3]), value)
    leaves = operands(3, 1, 2, 4, torch.float64)
    out = af.gat_propagate(*leaves, edges, add_self_loops=loops)
    assert torch.equal(out, leaves[0] if loops else torch.zeros_like(out))
    grads = torch.autograd.grad(out, [*leaves, value], torch.ones_like(out))
    assert all(grad.isfinite().all() for grad in grads) and grads[-1].all()
    # Node 1 has one edge, from node 0: alone, all of the attention is what weight 1 would give it.
    sent, source, target = (leaf.detach() for leaf in leaves)
    score = [float(torch.nn.functional.leaky_relu(source[j] + target[1], 0.2)) for j in (0, 1)]
    step = torch.tensor(score[0] - score[1]).exp() if loops else 1.0
    wanted = step * (sent[0].sum() - (sent[1].sum() if loops else 0.0))
    torch.testing.assert_close(grads[-1][0], wanted, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("loops", [True, False])
def test_absent_edges_among_others_against_a_dense_matrix(loops):
    edges, _ = random_edges([12, 1, 9], symmetric=False, seed=6, density=0.6)
    present = torch.rand(len(edges.value), generator=torch.Generator().manual_seed(2)) > 0.4
    value = (edges.value.detach() * present).requires_grad_()
    edges = edges.with_value(value)
    leaves = operands(22, 2, 3, 5, torch.float64)
    out = af.gat_propagate(*leaves, edges, add_self_loops=loops)
    # The dense formula divides by 0 where nothing is; there the operator's slope is that of the step to weight 1.
    wanted = dense_attention(*leaves, edges, 0.2, loops)
    upstream = normal(out.shape, 3)
    for actual, expected in zip(
        (out, *torch.autograd.grad(out, [*leaves, value], upstream, retain_graph=True)),
        (wanted, *torch.autograd.grad(wanted, [*leaves, value], upstream)),
        strict=True,
    ):
        if actual.shape == value.shape and not loops:
            receivers = edges.row()
            some = torch.zeros(22, dtype=torch.bool).index_fill(0, receivers[present], True)[receivers]
            actual, expected = actual[some], expected[some]
        assert_near(actual, expected, torch.float64)


def test_strided_operands():
    edges, _ = random_edges([6, 4], symmetric=True, seed=2, dtype=torch.float32)
    wide = torch.stack([edges.value.detach()] * 2, 1).requires_grad_()
    leaves = operands(10, 2, 3, 1, torch.float32)
    packed = af.gat_propagate(*leaves, edges)
    strided = [torch.stack([leaf.detach()] * 2, -1)[..., 0] for leaf in leaves]
    out = af.gat_propagate(*strided, edges.with_value(wide[:, 0]))
    assert torch.equal(out, packed)
    out.square().sum().backward()
    assert wide.grad[:, 0].any() and not wide.grad[:, 1].any()


def test_repeated_edges_and_self_loops_of_a_list_add_up():
    edge_index = torch.tensor([[0, 0, 2, 1, 1, 3], [1, 1, 0, 1, 0, 2]])
    weight = normal(6, 1).abs().requires_grad_()
    edges = af.EdgeSample.from_edge_index(edge_index, torch.tensor([0, 4]), weight)
    leaves = operands(4, 2, 3, 2, torch.float64)
    out = af.gat_propagate(*leaves, edges, add_self_loops=False)
    expected = dense_attention(*leaves, edges, 0.2, False)
    upstream = normal(out.shape, 3)
    for actual, wanted in zip(
        (out, *torch.autograd.grad(out, [*leaves, weight], upstream, retain_graph=True)),
        (expected, *torch.autograd.grad(expected, [*leaves, weight], upstream)),
        strict=True,
    ):
        assert_near(actual, wanted, torch.float64)


@pytest.mark.parametrize("scale", [1e-30, 30.0, 1e30])
def test_extreme_scores_stay_finite(scale):
    edges, weight = random_edges([6, 9], symmetric=True, seed=3, dtype=torch.float32)
    sent, source, target = operands(15, 2, 3, 1, torch.float32)
    value = edges.value.where(torch.arange(len(edges.value)) % 3 > 0, 0.0)
    out = af.gat_propagate(sent, source * scale, target * scale, edges.with_value(value))
    assert out.abs().max() <= sent.abs().max() * 1.001
    grads = torch.autograd.grad(out.sum(), [sent, source, target, weight])
    assert all(grad.isfinite().all() for grad in grads)


def test_equal_input_gives_equal_bits():
    results = []
    for _ in range(2):
        edges, weight = random_edges([40, 30], symmetric=False, seed=5, dtype=torch.float32)
        leaves = operands(70, 2, 12, 6, torch.float32)
        out = af.gat_propagate(*leaves, edges)
        results.append((out, *torch.autograd.grad(out.square().sum(), [*leaves, weight])))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_spare_capacity_gets_zero_gradient():
    layout = af.PairLayout.complete([6, 3], directed=True)
    sample = af.sample_edges(torch.zeros(layout.num_pairs), layout, seed=1, capacity=layout.num_pairs + 9)
    value = sample.value.clone().requires_grad_()
    af.gat_propagate(*operands(9, 2, 2, 1, torch.float32), sample.with_value(value)).square().sum().backward()
    assert sample.num_edges < layout.num_pairs
    assert value.grad[: sample.num_edges].any() and not value.grad[sample.num_edges :].any()


def test_values_take_the_dtype_of_the_features():
    edges, weight = random_edges([6, 4], symmetric=True, seed=2, dtype=torch.float64)
    out = af.gat_propagate(*operands(10, 1, 3, 1, torch.float32), edges)
    out.square().sum().backward()
    assert out.dtype == torch.float32 and weight.grad.dtype == torch.float64 and weight.grad.any()


def cases():
    for symmetric in (True, False):
        edges, _ = random_edges([1, 4, 3], symmetric=symmetric, seed=1)
        matrix = (edges.rowptr, edges.col, *edges.transposed())
        leaves = [*operands(8, 2, 3, 2, torch.float64), edges.value.detach().requires_grad_()]
        for loops in (True, False):
            yield "gat_propagate", (*leaves, *matrix, 0.2, loops)
            flat = [leaf.detach() for leaf in leaves]
            sums = torch.ops.acgkd_fast.gat_propagate(*flat, *matrix, 0.2, loops)
            yield "gat_propagate_backward", (normal((8, 6), 3), *flat, *sums, *matrix, 0.2, loops)


CASES = list(cases())
OPCHECKED |= {name for name, _ in CASES}


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_opcheck(name):
    opcheck(name, [arguments for case, arguments in CASES if case == name])


EDGES = random_edges([3, 2], symmetric=True, seed=0)[0]
SENT, SCORE = torch.zeros(5, 4), torch.zeros(5, 2)
BAD = [
    ((SENT[:4], SCORE, SCORE, EDGES), r"sent: expected a tensor of shape \(5, any\)"),
    ((SENT.half(), SCORE, SCORE, EDGES), "sent: expected dtype float32 or float64 or bfloat16"),
    ((SENT, SCORE[:4], SCORE, EDGES), r"source: expected a tensor of shape \(5, any\)"),
    ((SENT, SCORE.double(), SCORE, EDGES), "source: expected dtype float32"),
    ((SENT, SCORE, SCORE[:, :1], EDGES), r"target: expected a tensor of shape \(5, 2\)"),
    ((SENT[:, :3], SCORE, SCORE, EDGES), "source: expected heads that divide 3 channels"),
    ((SENT, SCORE[:, :0], SCORE[:, :0], EDGES), "source: expected heads that divide 4 channels"),
    ((SENT, SCORE, SCORE, torch.zeros(2, 4)), "edges: expected an EdgeSample"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD, ids=[text[:45] for _, text in BAD])
def test_bad_arguments_are_named(arguments, text):
    with pytest.raises(af.InputError, match=f"^{text}"):
        af.gat_propagate(*arguments)
