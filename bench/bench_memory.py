"""Peak memory of one learning step against pairs, edges and node features, and the law that it follows.

    python bench/bench_memory.py --out bench/results/memory.json

Every allocation and release of torch's CPU allocator during one step is counted, so the figures are exact and the same
on every run; scratch that our CPU kernels take from the C++ heap is not seen. Held between steps are logits, features
and Adam's moments; a step adds gradients, the sample, activations and, for some estimators, floats per candidate.
The docs page docs/step.md explains the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from step_peers import C_BN, C_OH, Shape, dense_bmm, make_teacher

from acgkd_fast.distill.inversion import Learner, LearnSettings
from acgkd_fast.layout import PairLayout
from acgkd_fast.pseudo_graphs import PseudoGraphs

FEATURES = 7
# float32 logit, gradient and two moments of Adam.
STATE_BYTES_PER_PAIR = 16


@dataclass(frozen=True)
class Case:
    """One step: graphs of one size, their candidates, edges per node and the teacher."""

    nodes: int
    graphs: int = 1
    degree: float = 4.0
    width: int = 64
    depth: int = 4
    xi: float = 1.0
    estimator: str = "sparse_straight_through"
    degree_term: bool = False

    @property
    def layout(self) -> PairLayout:
        sizes = [self.nodes] * self.graphs
        return PairLayout.complete(sizes) if self.xi == 1.0 else PairLayout.budget(sizes, self.xi)

    @property
    def shape(self) -> Shape:
        return Shape("memory", self.graphs, (self.nodes, self.nodes), self.degree / (self.nodes - 1), FEATURES)


def peak_bytes(step: Callable[[], Any]) -> int:
    """Most bytes of torch's CPU allocator alive at once during a call, above what was there before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def make_learner(case: Case) -> Learner:
    layout = case.layout
    partners = 2 * layout.num_pairs / layout.num_nodes
    share = torch.tensor(min(case.degree / partners, 0.99))
    generator = torch.Generator().manual_seed(1)
    logits = torch.logit(share) + 0.5 * torch.randn(layout.num_pairs, generator=generator)
    features = torch.randn(layout.num_nodes, FEATURES, generator=generator)
    labels = torch.arange(case.graphs) % 2
    pseudo = PseudoGraphs(logits, features, labels, layout, feature_kind="one-hot")
    settings = LearnSettings(
        estimator=case.estimator,
        c_bn=C_BN,
        c_oh=C_OH,
        c_degree=1.0 if case.degree_term else 0.0,
        target_degree=case.degree,
        lr_structure=1e-3,
        lr_features=1e-3,
    )
    return Learner(make_teacher(case.shape, f"gcn{case.depth + 1}-{case.width}"), pseudo, settings)


def measure(case: Case) -> dict[str, Any]:
    """Bytes of one step after the first, and the amounts that they depend on."""
    learner = make_learner(case)
    pseudo = learner.pseudo_graphs
    learner.advance()
    sample = pseudo.sample(seed=learner.seed, step=learner.step, estimator=case.estimator)
    entries = sample.num_edges
    del sample
    learner.optimizer.zero_grad(set_to_none=True)
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    moments = [t for p in parameters for t in learner.optimizer.state[p].values()]
    held = sum(t.numel() * t.element_size() for t in (*parameters, *moments))
    amounts = {"pairs": pseudo.layout.num_pairs, "node_numbers": pseudo.layout.num_nodes * case.width * case.depth}
    return {**asdict(case), **amounts, "entries": entries, "held": held, "step": peak_bytes(learner.advance)}


def measure_dense(case: Case) -> dict[str, Any]:
    """The padded dense step: what it holds is logits and moments of n x n floats."""
    step = dense_bmm(case.shape)
    step()
    held = 3 * 4 * (case.graphs * case.nodes**2 + case.graphs * case.nodes * FEATURES)
    amounts = {"pairs": case.layout.num_pairs, "node_numbers": case.nodes * case.graphs * case.width * case.depth}
    return {**asdict(case), **amounts, "estimator": "padded dense", "held": held, "step": peak_bytes(step)}


def slopes(estimator: str) -> dict[str, float]:
    """Bytes of a step that one more of each amount costs, each where it is what the peak consists of.

    ``pair``: a teacher too small to matter, its state between steps included. ``entry``: twice as many entries on the
    same nodes ("relaxed" stores two per pair, so they are in ``pair``). ``node_number``: one more float of node
    features in every layer of the teacher.
    """

    def slope(amount: str, less: Case, more: Case, key: Callable[[dict[str, Any]], int]) -> float:
        first, second = measure(less), measure(more)
        return (key(second) - key(first)) / (second[amount] - first[amount])

    def step(row: dict[str, Any]) -> int:
        return int(row["step"])

    # With about one edge in all.
    small = {"degree": 1e-3, "width": 2, "depth": 1, "estimator": estimator}
    found = {"pair": slope("pairs", Case(600, **small), Case(900, **small), lambda row: row["held"] + row["step"])}
    if estimator != "relaxed":
        crowd = {"width": 64, "estimator": estimator}
        found["entry"] = slope("entries", Case(200, degree=40.0, **crowd), Case(200, degree=80.0, **crowd), step)
    wide = {"graphs": 40, "degree": 1.0, "estimator": estimator}
    found["node_number"] = slope("node_numbers", Case(20, width=64, **wide), Case(20, width=128, **wide), step)
    return found


ESTIMATORS = ("sparse_straight_through", "straight_through", "relaxed")
NODES = (20, 100, 300, 1000, 3000)


def cases() -> list[Case]:
    """Pairs, edges and width, one at a time, around a graph of 1000 nodes."""
    found = []
    for estimator in ESTIMATORS:
        found += [Case(nodes, estimator=estimator) for nodes in NODES]
        found += [Case(1000, xi=xi, estimator=estimator) for xi in (0.3, 0.1)]
        found += [Case(1000, width=width, estimator=estimator) for width in (16, 256)]
        if estimator != "relaxed":
            found += [Case(1000, degree=degree, estimator=estimator) for degree in (16.0, 64.0)]
        found.append(Case(1000, estimator=estimator, degree_term=True))
    return [case for case in found if case.estimator != "relaxed" or case.nodes <= 1000]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bytes(estimator: str, benchmark: Any) -> None:
    rows = [measure(case) for case in cases() if case.estimator == estimator and case.nodes <= 300]
    benchmark.extra_info.update(rows=rows)
    benchmark.pedantic(lambda: measure(Case(20, estimator=estimator)), rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--largest", type=int, default=3000, help="leave out graphs of more nodes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in cases():
        if case.nodes <= args.largest:
            rows.append(measure(case))
            print(summary(rows[-1]), flush=True)
    for nodes in NODES:
        if nodes <= args.largest:
            rows.append(measure_dense(Case(nodes)))
            print(summary(rows[-1]), flush=True)
    laws = {name: slopes(name) for name in ESTIMATORS}
    for name, law in laws.items():
        print(name, {key: round(value, 2) for key, value in law.items()})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"torch": torch.__version__, "threads": 1, "python": sys.version.split()[0]}
    args.out.write_text(json.dumps({**facts, "laws": laws, "rows": rows}, indent=1) + "\n")


def summary(row: dict[str, Any]) -> str:
    amounts = f"n={row['nodes']} xi={row['xi']} width={row['width']} pairs={row['pairs']} entries={row.get('entries')}"
    total = row["held"] + row["step"]
    return f"{row['estimator']}: {amounts}: {total / row['pairs']:.1f} B per pair ({total / 2**20:.2f} MiB in all)"


if __name__ == "__main__":
    main()
