"""Whether pools of the native and of the generic search teach equally well: five pools of each, five students on each.

    python bench/study_engines.py --data-root DIR --work FOLDER

Every pool and every student is kept in FOLDER or in the JSON file as soon as it is there, so that an interrupted study
goes on where it stopped. Both engines get the same starts, settings and seeds; students differ by their seed alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from acgkd_fast.checkpoints import load_graphs, load_model, save_graphs, save_model
from acgkd_fast.data import house_or_cycle, load_dataset
from acgkd_fast.distill.pool import random_pool, start_graphs
from acgkd_fast.distill.refine import refine
from acgkd_fast.distill.student import distill_student
from acgkd_fast.files import write_text
from acgkd_fast.graphs import GraphBatch
from acgkd_fast.pseudo_graphs import GraphPrior
from acgkd_fast.tasks import split_dataset, train_teacher_file
from acgkd_fast.teachers import Teacher, as_teacher, default_epochs, evaluate, train_classifier

RESULTS = Path(__file__).parent / "results" / "study_engines.json"
SEEDS = range(5)
GRAPHS, STEPS = 400, 2000
ROWS = ("native", "generic", "random")


def mutag(arguments: argparse.Namespace) -> tuple[Teacher, GraphBatch, GraphPrior]:
    """GFKD's split with seed 29, and the teacher that ``acgkd-fast train-teacher`` makes."""
    path = arguments.work / "mutag-teacher.safetensors"
    if not path.exists():
        options: dict[str, Any] = {"arch": "gcn5-64", "split_seed": 29, "split": "gfkd", "epochs": None, "seed": 0}
        train_teacher_file("MUTAG", arguments.data_root, path, progress=lambda *_: None, **options)
    test = split_dataset(load_dataset("MUTAG", arguments.data_root), "gfkd", 29)[1]
    return as_teacher(load_model(path)[0]), test, GraphPrior(10, 29, feature_kind="one-hot")


def house(arguments: argparse.Namespace) -> tuple[Teacher, GraphBatch, GraphPrior]:
    path, data = arguments.work / "house-teacher.safetensors", house_or_cycle(600, seed=0)
    train, test = split_dataset(data, "stratified", 0)
    if not path.exists():
        save_model(path, train_classifier("gcn5-64", train, epochs=default_epochs(train.num_graphs), seed=0))
    model = load_model(path)[0]
    return as_teacher(model, feature_kind="constant"), test, GraphPrior(20, 30, feature_kind="constant")


TASKS: dict[str, Callable[[argparse.Namespace], tuple[Teacher, GraphBatch, GraphPrior]]] = {
    "MUTAG": mutag,
    "house-or-cycle": house,
}


def make_pool(row: str, teacher: Teacher, prior: GraphPrior, seed: int) -> tuple[GraphBatch, dict[str, float]]:
    if row == "random":
        return random_pool(teacher, prior, GRAPHS, seed=seed), {}
    start = start_graphs(teacher, prior, GRAPHS, seed=seed)
    began = time.process_time()
    found = refine(start, teacher, steps=STEPS, engine=row, seed=seed, feature_kind=prior.feature_kind)
    seconds = time.process_time() - began
    assert found.k is not None
    return found.graphs, {"k": found.k, "cross_entropy": found.cross_entropy, "cpu_seconds": seconds}


def study(name: str, arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    teacher, test, prior = TASKS[name](arguments)
    scores = evaluate(teacher, test)
    task = results.setdefault(name, {"teacher": scores["accuracy"], "majority": scores["majority"]})
    for seed in SEEDS:
        for row in ROWS:
            cell = task.setdefault(row, {}).setdefault(str(seed), {"pool": None, "students": []})
            path = arguments.work / f"{name}-{row}-{seed}.safetensors"
            if cell["pool"] is None or not path.exists():
                pool, cell["pool"] = make_pool(row, teacher, prior, seed)
                save_graphs(path, pool)
            pool = load_graphs(path)[0]
            for student in SEEDS[len(cell["students"]) :]:
                taught = distill_student(teacher, pool, seed=student)
                cell["students"].append(evaluate(taught, test)["accuracy"])
                write_text(RESULTS, json.dumps(results, indent=1) + "\n")
                print(f"{name} {row} pool {seed} student {student}: {cell['students'][-1]:.4f}", file=sys.stderr)


def table(results: dict[str, Any]) -> str:
    """Per task and row: mean and deviation over all students, then the mean of each pool."""
    lines = ["| task | pool | students | mean | deviation | per pool | K | cross-entropy |", "|" + " --- |" * 8]
    for name, task in results.items():
        for row in ROWS:
            cells = list(task.get(row, {}).values())
            every = [100 * accuracy for cell in cells for accuracy in cell["students"]]
            if len(every) < 2:
                continue
            pools = ", ".join(f"{100 * statistics.fmean(c['students']):.1f}" for c in cells if c["students"])
            measured = [cell["pool"] for cell in cells if cell["pool"]]
            k, loss = ([f"{statistics.fmean(p[key] for p in measured):.4f}" if measured else "-"] for key in KEYS)
            numbers = [str(len(every)), f"{statistics.fmean(every):.1f}", f"{statistics.stdev(every):.1f}"]
            lines.append("| " + " | ".join([name, row, *numbers, pools, *k, *loss]) + " |")
        for row in ("majority", "teacher"):
            lines.append(f"| {name} | {row} | - | {100 * task[row]:.1f} | - | - | - | - |")
    return "\n".join(lines)


KEYS = ("k", "cross_entropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder that holds MUTAG")
    parser.add_argument("--work", type=Path, required=True, help="where teachers and pools are kept")
    parser.add_argument("--tasks", default=",".join(TASKS), help="separated by commas")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="k: expected at most")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in arguments.tasks.split(","):
        study(name, arguments, results)
    print(table(results))


if __name__ == "__main__":
    main()
