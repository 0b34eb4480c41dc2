"""How good are the edge gradients? Every estimator against the exact gradient, by enumeration of all graphs of 5 nodes.

    python bench/study_estimators.py --data-root DIR --out bench/results/estimators.json

For a frozen teacher, fixed features and edge logits theta, E[CE] over Bernoulli(sigmoid(theta)) graphs is a sum over
1,024 graphs, so its gradient is exact. Each estimator gives thousands of independent samples of it: copies of one graph
in a batch, which the random stream tells apart by their ids.

Medians over problems (features, logits, label), per estimator: cosine of the mean with the exact gradient; norm of the
bias and standard deviation of one sample, both over the norm of the exact gradient; share of pairs whose mean has the
right sign; and the same for single samples, where only pairs with a gradient count.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import acgkd_fast as af
from acgkd_fast.data import load_dataset
from acgkd_fast.files import write_text
from acgkd_fast.graphs import GraphBatch
from acgkd_fast.tasks import split_dataset
from acgkd_fast.teachers import train_classifier

NODES, SAMPLES = 5, 4096
PAIRS = NODES * (NODES - 1) // 2
DENSITIES = {"sparse (0.2)": 0.2, "half (0.5)": 0.5}
STARTS = 6

Estimate = Callable[["Problem"], torch.Tensor]


class Problem:
    """One teacher, features, label and logits."""

    def __init__(self, teacher: af.Teacher, density: float, label: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        kinds = torch.randint(teacher.num_features, (NODES,), generator=generator)
        self.x = nn.functional.one_hot(kinds, teacher.num_features).float()
        self.theta = torch.logit(torch.tensor(density)) + torch.randn(PAIRS, generator=generator)
        self.teacher, self.label, self.seed = teacher, label, seed

    def layout(self, count: int) -> af.PairLayout:
        return af.PairLayout.complete([NODES] * count)

    def losses(self, edges: af.EdgeSample) -> torch.Tensor:
        """Cross-entropy of each graph, [B]."""
        graphs = GraphBatch(self.x.repeat(edges.num_graphs, 1), edges)
        y = torch.full((edges.num_graphs,), self.label)
        return nn.functional.cross_entropy(self.teacher(graphs), y, reduction="none")

    def exact(self) -> torch.Tensor:
        """Gradient of E[CE], [PAIRS], by enumeration."""
        bits = (torch.arange(2**PAIRS)[:, None] >> torch.arange(PAIRS)) & 1
        certain = torch.where(bits == 1, 1e4, -1e4).float()
        with torch.no_grad():
            losses = self.losses(af.sample_edges(certain.reshape(-1), self.layout(2**PAIRS), seed=0)).double()
        theta = self.theta.double().requires_grad_()
        log_p = nn.functional.logsigmoid(torch.where(bits == 1, theta, -theta)).sum(1)
        return torch.autograd.grad((log_p.exp() * losses).sum(), theta)[0]

    def sampled(self, estimator: str, temperature: float) -> torch.Tensor:
        """Gradients of single draws, [SAMPLES, PAIRS], through the package's own operators."""
        leaf = self.theta.repeat(SAMPLES).requires_grad_()
        edges = af.sample_edges(
            leaf, self.layout(SAMPLES), seed=self.seed, temperature=temperature, estimator=estimator
        )
        if estimator == "arm":
            assert edges.antithetic is not None
            with torch.no_grad():
                pair = [self.losses(draw) for draw in (edges, edges.antithetic)]
            return af.arm_gradient(edges, *pair).view(SAMPLES, PAIRS)
        return torch.autograd.grad(self.losses(edges).sum(), leaf)[0].view(SAMPLES, PAIRS)

    def slopes(self, *, fixed_degrees: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(0/1 draws, dCE/da of every pair at them), each [SAMPLES, PAIRS]: a weight on every candidate.

        `fixed_degrees` holds the normaliser still; it then needs a teacher of GCN layers.
        """
        layout = self.layout(SAMPLES)
        with torch.no_grad():
            drawn = af.sample_edges(self.theta.repeat(SAMPLES), layout, seed=self.seed).pair.unique()
        weight = torch.zeros(layout.num_pairs).index_fill_(0, drawn, 1.0).requires_grad_()
        # Every candidate an entry, absent ones with weight 0: relaxed edges with our own values.
        full = af.sample_edges(self.theta.repeat(SAMPLES), layout, seed=self.seed, estimator="relaxed")
        assert full.pair is not None
        value = weight[full.pair]
        if fixed_degrees:
            loss = _with_fixed_degrees(self, full.with_value(value))
        else:
            loss = self.losses(full.with_value(value)).sum()
        slope = torch.autograd.grad(loss, weight)[0]
        return weight.detach().view(SAMPLES, PAIRS), slope.view(SAMPLES, PAIRS)

    def isolated(self, draws: torch.Tensor) -> torch.Tensor:
        """Which pairs of each draw have an end without other partners, bool [SAMPLES, PAIRS]."""
        row, col = af.PairLayout.complete([NODES]).pair_nodes()
        ends = nn.functional.one_hot(row, NODES) + nn.functional.one_hot(col, NODES)
        others = (draws @ ends.float())[:, :, None].transpose(1, 2) - draws[:, :, None]
        return ((others < 0.5) & (ends > 0)).any(-1)


def _with_fixed_degrees(problem: Problem, edges: af.EdgeSample) -> torch.Tensor:
    """Sum of losses with the degrees of the normaliser as constants."""
    from acgkd_fast.nn import GCNConv

    assert edges.value is not None
    row = edges.row()
    degree = torch.ones(edges.num_nodes).index_add(0, row, edges.value.detach())
    scale = degree.rsqrt()
    normalised = edges.with_value(edges.value * scale[row] * scale[edges.col.long()])
    model = problem.teacher.module
    x = problem.x.repeat(edges.num_graphs, 1)
    for position, block in enumerate(model.blocks):
        assert isinstance(block.conv, GCNConv)
        h = block.conv.lin(x)
        h = h * scale[:, None].square() + af.gin_propagate(h, normalised, -1.0)
        h = torch.relu(nn.functional.batch_norm(
            h + block.conv.bias, block.norm.running_mean, block.norm.running_var, block.norm.weight, block.norm.bias
        ))  # fmt: skip
        x = h + x if position else h
    logits = model.classifier(af.readout(x, edges.ptr, "sum"))
    y = torch.full((edges.num_graphs,), problem.label)
    return nn.functional.cross_entropy(logits, y, reduction="sum")


def straight_through(problem: Problem) -> torch.Tensor:
    """dCE/da times p (1 - p): the slope of the mean rather than of the relaxation."""
    p = problem.theta.sigmoid()
    return problem.slopes()[1] * p * (1.0 - p)


def drawn_only(problem: Problem) -> torch.Tensor:
    draws, slope = problem.slopes()
    p = problem.theta.sigmoid()
    return draws * slope * p * (1.0 - p)


def isolated_masked(problem: Problem) -> torch.Tensor:
    draws, slope = problem.slopes()
    p = problem.theta.sigmoid()
    return torch.where(problem.isolated(draws), 0.0, slope * p * (1.0 - p))


def fixed_normaliser(problem: Problem) -> torch.Tensor:
    p = problem.theta.sigmoid()
    return problem.slopes(fixed_degrees=True)[1] * p * (1.0 - p)


def reinmax(problem: Problem) -> torch.Tensor:
    """Second-order straight-through of two outcomes, Liu et al., arXiv 2304.08612."""
    draws, slope = problem.slopes()
    p = problem.theta.sigmoid()
    middle = (p + draws) / 2.0
    return slope * (2.0 * middle * (1.0 - middle) - 0.5 * p * (1.0 - p))


ESTIMATES: dict[str, Estimate] = {
    "relaxed, temperature 1": lambda problem: problem.sampled("relaxed", 1.0),
    "relaxed, temperature 0.5": lambda problem: problem.sampled("relaxed", 0.5),
    "relaxed, temperature 0.1": lambda problem: problem.sampled("relaxed", 0.1),
    "hard concrete, temperature 0.67": lambda problem: problem.sampled("hard_concrete", 0.67),
    "straight-through": lambda problem: problem.sampled("straight_through", 1.0),
    "sparse straight-through": lambda problem: problem.sampled("sparse_straight_through", 1.0),
    "straight-through with slope p (1 - p)": straight_through,
    "the same, drawn edges only": drawn_only,
    "the same, isolated ends masked": isolated_masked,
    "the same, normaliser held fixed": fixed_normaliser,
    "ReinMax": reinmax,
    "ARM": lambda problem: problem.sampled("arm", 1.0),
}


def measure(estimate: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    mean, size = estimate.double().mean(0), exact.norm()
    moved = estimate != 0
    right = (estimate.double().sign() == exact.sign()) & moved
    return {
        "cosine": float(nn.functional.cosine_similarity(mean, exact, dim=0)),
        "bias": float((mean - exact).norm() / size),
        "deviation": float((estimate.double() - mean).square().sum(1).mean().sqrt() / size),
        "sign_of_mean": float((mean.sign() == exact.sign()).double().mean()),
        "sign_of_sample": float(right.sum() / moved.sum()),
    }


def problems(teacher: af.Teacher, density: float) -> Iterator[Problem]:
    for seed in range(STARTS):
        for label in range(teacher.num_classes):
            yield Problem(teacher, density, label, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("bench/results/estimators.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset("MUTAG", arguments.data_root)
    train, _ = split_dataset(data, "gfkd", 29)
    results = []
    for arch in ("gcn3-32", "gcn5-64"):
        teacher = af.as_teacher(train_classifier(arch, train, num_classes=data.num_classes, seed=29))
        for name, density in DENSITIES.items():
            cases = [(problem, problem.exact()) for problem in problems(teacher, density)]
            for estimator, estimate in ESTIMATES.items():
                figures = [measure(estimate(problem), exact) for problem, exact in cases]
                medians = {key: round(statistics.median(f[key] for f in figures), 4) for key in figures[0]}
                results.append({"teacher": arch, "density": name, "estimator": estimator, **medians})
                print(results[-1], flush=True)
    settings = {"nodes": NODES, "samples": SAMPLES, "problems": 2 * STARTS, "dataset": "MUTAG", "split": 29}
    write_text(arguments.out, json.dumps({"settings": settings, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
