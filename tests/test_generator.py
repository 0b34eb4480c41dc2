"""Generator and pool: shapes, gradients, reproducibility."""

from __future__ import annotations

import copy

import pytest
import torch
from synthesis_helpers import make_generator, make_teacher, same, some_graphs

import acgkd_fast as af
from acgkd_fast.errors import InputError

# Generator.


@pytest.mark.parametrize("estimator", ["relaxed", "hard_concrete", "straight_through", "sparse_straight_through"])
@pytest.mark.parametrize("kind", ["one-hot", "continuous", "constant"])
def test_generator_trains_every_parameter(estimator, kind):
    prior = af.GraphPrior(4, 9, 4.0, kind)
    generator = af.Generator(3, prior, batch_size=8, num_classes=2, estimator=estimator, seed=3)
    z = torch.randn(8, generator.nz, generator=torch.Generator().manual_seed(0), requires_grad=True)
    graphs = generator(z)
    assert graphs.num_graphs == 8 and graphs.sizes.tolist() == list(generator.sizes) and graphs.x.shape[1] == 3
    if kind == "one-hot":
        assert torch.equal(graphs.x, (graphs.x == 1).float()) and graphs.x.sum(1).eq(1).all()
    loss = torch.nn.functional.cross_entropy(make_teacher()(graphs.x, graphs.edges), graphs.y)
    loss.backward()
    assert z.grad.any()
    rank = generator.rank
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    # Structure alone: the rows of the node layer that make factors, not features.
    by_node = generator.nodes.weight.grad.view(max(generator.sizes), rank + 3, -1)
    assert by_node[:, :rank].any()


def test_generator_edges_alone_carry_a_gradient():
    generator = make_generator()
    graphs = generator()
    logits = make_teacher()(graphs.x.detach(), graphs.edges)
    torch.nn.functional.cross_entropy(logits, graphs.y).backward()
    assert generator.nodes.weight.grad.any() and generator.density.weight.grad.any()


def test_generator_starts_at_the_priors_density():
    prior = af.GraphPrior(10, 29, 2.5)
    graphs = af.Generator(3, prior, batch_size=400, estimator="straight_through", seed=1)()
    assert abs(graphs.edges.num_edges / graphs.num_nodes - 2.5) < 0.25


def test_generator_repeats_itself_and_goes_on():
    first, second = make_generator(), make_generator()
    same(first(), second())
    state = copy.deepcopy(first.state_dict())
    third = first()
    assert not torch.equal(third.x, make_generator()().x) or third.edges.num_edges != second().edges.num_edges
    restored = make_generator(seed=3)
    restored.load_state_dict(state)
    same(restored(), third)
    first.reset()
    same(first(), make_generator()())


def test_generator_clones_learn_alone():
    generator = make_generator()
    generator()
    fast = generator.clone()
    assert int(fast.calls) == 1
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    graphs = fast()
    torch.nn.functional.cross_entropy(make_teacher()(graphs.x, graphs.edges), graphs.y).backward()
    optimizer.step()
    for own, cloned in zip(generator.parameters(), fast.parameters(), strict=True):
        assert own.grad is None and not torch.equal(own, cloned)
    # FOMAML: the clone's gradient moves the original.
    for own, cloned in zip(generator.parameters(), fast.parameters(), strict=True):
        own.grad = cloned.grad.clone()
    torch.optim.SGD(generator.parameters(), lr=0.1).step()
    for own, cloned in zip(generator.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(own, cloned)


def test_generator_z_is_standard_normal():
    z = make_generator(nz=50).draw_z(400)
    assert z.shape == (400, 50) and abs(float(z.mean())) < 0.03 and abs(float(z.std()) - 1) < 0.03


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g(torch.zeros(2, 5)), "z: expected a tensor of shape"),
        (lambda g: g(y=torch.zeros(2)), "y: expected dtype int64"),
        (lambda g: g(torch.zeros(3, 32), torch.zeros(2, dtype=torch.int64)), "y: expected a tensor of shape"),
        (lambda g: af.Generator(3)(y=torch.zeros(2, dtype=torch.int64)), "y: expected None"),
        (lambda g: af.Generator(0), "num_features: expected at least 1"),
        (lambda g: af.Generator(3, estimator="arm"), "estimator: expected one of relaxed"),
    ],
)
def test_generator_names_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(make_generator())


# Pool.


def test_pool_keeps_the_newest():
    pool, parts = af.GraphPool(10), [some_graphs(6, seed) for seed in range(3)]
    for part in parts:
        pool.add(part)
    assert len(pool) == 10
    same(pool.graphs, af.GraphBatch.concatenate(parts).select(range(8, 18)))
    pool.clear()
    assert len(pool) == 0
    with pytest.raises(InputError, match="data_pool: expected at least one graph"):
        pool.sample()


def test_pool_draws_every_graph_before_any_twice():
    pool = af.GraphPool(seed=4)
    graphs = some_graphs(7)
    pool.add(af.GraphBatch(graphs.x, graphs.edges), torch.arange(7))
    assert sorted(pool.sample().y.tolist()) == list(range(7))
    drawn = pool.sample(17).y
    assert sorted(drawn[:7].tolist()) == sorted(drawn[7:14].tolist()) == list(range(7))
    assert drawn[:7].tolist() != drawn[7:14].tolist()
    again = af.GraphPool(seed=4)
    again.add(graphs, torch.arange(7))
    again.calls = 1
    assert torch.equal(again.sample(17).y, drawn)
    only = pool.sample(1).y.tolist() + pool.sample(1).y.tolist() + pool.sample(1).y.tolist()
    assert len(set(only)) > 1


def test_pool_balances_classes():
    pool = af.GraphPool(seed=1)
    pool.add(some_graphs(30), torch.tensor([0] * 20 + [1] * 6 + [2] * 4))
    for _ in range(3):
        assert torch.bincount(pool.sample(12, balance=True).y).tolist() == [4, 4, 4]
    assert torch.bincount(pool.sample(20, balance=True).y).tolist() == [10, 6, 4]
    unlabelled = af.GraphPool()
    unlabelled.add(af.GraphBatch(pool.graphs.x, pool.graphs.edges))
    with pytest.raises(InputError, match="balance: expected labels"):
        unlabelled.sample(3, balance=True)
    with pytest.raises(InputError, match="targets: expected labels on all"):
        unlabelled.add(some_graphs(2))


def test_pool_holds_no_gradients_and_no_absent_pairs():
    graphs = make_generator()()
    assert (graphs.edges.value == 0).any()
    pool = af.GraphPool()
    pool.add(graphs)
    held = pool.sample(3)
    assert not held.x.requires_grad and not held.edges.value.requires_grad and held.edges.value.eq(1).all()


def test_pool_as_a_data_set():
    pytest.importorskip("torch_geometric")
    pool = af.GraphPool()
    pool.add(some_graphs(5))
    assert len(pool.get_dataset()) == 5 and "y" not in pool.get_dataset(labeled=False)[0]
