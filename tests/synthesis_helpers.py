"""A small teacher with statistics, graphs, and a generator, for the tests of synthesis and of its hosts."""

from __future__ import annotations

import torch

import acgkd_fast as af
from acgkd_fast.nn import build_model

PRIOR = af.GraphPrior(min_nodes=4, max_nodes=9, mean_degree=2.1)


def make_teacher(arch="gcn3-8", seed=0):
    torch.manual_seed(seed)
    model = build_model(arch, 3, 2).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)
            torch.nn.init.normal_(layer.running_mean)
    return model


def some_graphs(count=12, seed=0):
    return af.start_graphs(af.as_teacher(make_teacher()), PRIOR, count, seed=seed)


def same(first, second):
    assert torch.equal(first.x, second.x) and torch.equal(first.edges.col, second.edges.col)
    assert torch.equal(first.edges.value, second.edges.value)


def registered(model):
    layers = list(model.modules())
    return [m for m in layers if m._forward_hooks or m._forward_pre_hooks or getattr(m, "observer", None) is not None]


def make_generator(**options):
    return af.Generator(3, PRIOR, **({"batch_size": 6, "num_classes": 2, "seed": 3} | options))
