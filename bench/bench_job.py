"""From teacher to student in one piece, wall time: by search, and by learning beside what users would write otherwise.

Learning takes few steps, since the slowest peer takes half a second for each; GFKD publishes 1500. Students are trained
for few epochs alike. Rounds are two, without a warm-up: a job is run once.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import facts
import pytest
import torch

pytest.importorskip("torch_geometric", reason="data and peers need torch-geometric")
import gfkd_peers
from job_peers import thresholded, train_student
from step_peers import SHAPES, make_learner, make_pseudo_graphs, make_teacher, pyg_drawn_edges

import acgkd_fast as af
from acgkd_fast.data import house_or_cycle
from acgkd_fast.distill.student import StudentSettings
from acgkd_fast.nn.models import GraphClassifier
from acgkd_fast.teachers import evaluate, train_classifier

GRAPHS, SEARCH_STEPS, EPOCHS, BATCH = 300, 1500, 40, 16
LEARNING_STEPS, STUDENT = 25, StudentSettings(epochs=EPOCHS, batch_size=BATCH)
ROUNDS = 2
Job = Callable[[], Any]


def timed(jobs: dict[str, Job]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """(seconds of each round, what each job returned last)."""
    seconds: dict[str, list[float]] = {label: [] for label in jobs}
    results = {}
    for _ in range(ROUNDS):
        for label, job in jobs.items():
            begin = time.perf_counter()
            results[label] = job()
            seconds[label].append(time.perf_counter() - begin)
    return seconds, results


@functools.cache
def house_teacher() -> GraphClassifier:
    return train_classifier("gcn5-64", house_or_cycle(420, seed=0).graphs, epochs=60, seed=0)


@pytest.mark.filterwarnings("ignore:k. expected at most 0.05")
def test_search(benchmark: Any) -> None:
    """Pool by search, then the student: compiled engine beside the batched torch one. Students must have learned."""
    teacher = af.as_teacher(house_teacher(), feature_kind="constant")
    prior = af.GraphPrior(20, 30, feature_kind="constant")

    def job(engine: str) -> torch.nn.Module:
        start = af.start_graphs(teacher, prior, GRAPHS, seed=0)
        pool = af.refine(start, teacher, steps=SEARCH_STEPS, engine=engine, seed=0).graphs
        return af.distill_student(teacher, pool, "gcn3-32", STUDENT, seed=0)

    seconds, students = timed({"ours": lambda: job("native"), "generic engine": lambda: job("generic")})
    fresh = house_or_cycle(200, seed=7).graphs
    accuracy = {label: evaluate(student, fresh)["accuracy"] for label, student in students.items()}
    # Half of the graphs are houses.
    assert min(accuracy.values()) > 0.6, accuracy
    info = {"operator": "teacher to student, search", "shape": f"house or cycle, {GRAPHS} x 20..30"}
    benchmark.extra_info.update(facts.report(seconds, accuracy=accuracy, steps=SEARCH_STEPS, epochs=EPOCHS, **info))
    benchmark.pedantic(lambda: job("native"), rounds=1)


def test_learning(benchmark: Any) -> None:
    """Pool by learning, then the student. The networks of all jobs agree before they are timed."""
    shape = SHAPES["MUTAG"]
    gfkd_peers.check_agreement(shape)
    teacher = make_teacher(shape)

    def ours() -> torch.nn.Module:
        learner = make_learner(shape, "sparse_straight_through")
        for _ in range(LEARNING_STEPS):
            learner.advance()
        return af.distill_student(af.as_teacher(teacher), learner.pseudo_graphs.harden(seed=0), "gcn3-32", STUDENT)

    def drawn_edges() -> torch.nn.Module:
        pseudo = make_pseudo_graphs(shape)
        step = pyg_drawn_edges(shape, start=pseudo)
        for _ in range(LEARNING_STEPS):
            step()
        return train_student(teacher, pseudo.harden(seed=0).to_pyg().to_data_list(), EPOCHS, BATCH)

    def gfkd(make: Callable[..., gfkd_peers.Iteration]) -> torch.nn.Module:
        iteration = make(shape)
        for _ in range(LEARNING_STEPS):
            iteration()
        sizes = gfkd_peers.start(shape).layout.sizes
        theta = iteration.params if len(iteration.params) > 1 else list(iteration.params[0])
        matrices = [t[:n, :n].detach() for t, n in zip(theta, sizes, strict=True)]
        graphs = thresholded(matrices, iteration.features.detach().softmax(1))
        return train_student(teacher, graphs, EPOCHS, BATCH)

    jobs: dict[str, Job] = {
        "ours": ours,
        "PyG on drawn edges": drawn_edges,
        "GFKD vectorised": lambda: gfkd(gfkd_peers.in_one_tensor),
        "GFKD node by node, as published": lambda: gfkd(gfkd_peers.published),
    }
    seconds, _ = timed(jobs)
    info = {"operator": "teacher to student, learning", "shape": "MUTAG, 131 x 10..29"}
    benchmark.extra_info.update(facts.report(seconds, steps=LEARNING_STEPS, epochs=EPOCHS, **info))
    benchmark.pedantic(ours, rounds=1)
