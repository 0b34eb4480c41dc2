"""What each part of the student's training is worth: one JSON line per trained student, finished ones skipped.

    python bench/study_student.py --data-root DIR --work FOLDER --seconds 280 [--group choose] [--rows plain,gat]

Call it again until it says "all done"; --table prints what is there. Teachers and pools are made once in the work
folder: a gcn5-64 teacher on 70 % of a data set, and pools of 400 graphs by start_graphs and refine with default
settings. Students are gcn3-32, last epoch. Defaults are chosen on the group "choose" alone; "confirm" only checks them.
CPU, one thread.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from study import read, study_options

import acgkd_fast as af
from acgkd_fast.checkpoints import load_graphs, load_model, save_graphs, save_model
from acgkd_fast.data import gfkd_split, house_or_cycle, load_dataset
from acgkd_fast.distill.curriculum import CurriculumSettings
from acgkd_fast.distill.projector import equal_size_arch, parameter_counts
from acgkd_fast.distill.student import StudentSettings, distill_student, new_student, pool_agreement
from acgkd_fast.distill.temperature import AdversarySettings
from acgkd_fast.graphs import GraphBatch
from acgkd_fast.pseudo_graphs import GraphPrior
from acgkd_fast.teachers import Teacher, as_teacher, evaluate, train_classifier

RESULTS = Path(__file__).parent / "results" / "study_student.jsonl"
STUDENT, SEEDS, GRAPHS, COLLAPSED = "gcn3-32", range(5), 400, 0.9
# (data set, split seed, teacher seed, pool seeds)
GROUPS = {
    "choose": [("house-or-cycle", 29, 0, (0, 1)), ("MUTAG", 29, 0, (0, 1))],
    "confirm": [
        ("house-or-cycle", 29, 1, (0,)),
        ("house-or-cycle", 29, 2, (0,)),
        ("MUTAG", 1, 1, (0,)),
        ("MUTAG", 2, 2, (0,)),
        ("PTC_MR", 29, 0, (0,)),
        ("IMDB-BINARY", 29, 0, (0,)),
    ],
}
_OLD = {"clip_norm": 0.0, "recalibrate": False}
_GAT = {"reuse_classifier": True, "projector": "gat", "feature_weight": 0.0}
_LINEAR = {"reuse_classifier": True, "projector": "linear", "feature_weight": 0.0}


def _curriculum(difficulty: str, **options: Any) -> dict[str, Any]:
    return {"curriculum": CurriculumSettings(difficulty, **options)}


def _adversary(mode: str, **options: Any) -> dict[str, Any]:
    return {"adversary": AdversarySettings(mode, **options)}


# How to train a plain student; judged by agreement with the teacher on the pool.
TRAINING: dict[str, dict[str, Any]] = {
    "no clipping, running statistics": _OLD,
    "no clipping": {"clip_norm": 0.0},
    "running statistics": {"recalibrate": False},
    "clip 0.1": {"clip_norm": 0.1},
    "clip 0.3": {"clip_norm": 0.3},
    "clip 1": {"clip_norm": 1.0},
    "clip 3": {"clip_norm": 3.0},
    "clip 1, lr 0.01": {"clip_norm": 1.0, "lr": 0.01},
    "clip 1, batch 32": {"clip_norm": 1.0, "batch_size": 32},
    "clip 1, batch 32, lr 0.03": {"clip_norm": 1.0, "batch_size": 32, "lr": 0.03},
}
# Parts of ACGKD's student, each added to the defaults.
PARTS: dict[str, dict[str, Any]] = {
    "real graphs": {},
    "random graphs": {},
    "plain": {},
    "plain, equal size": {},
    "linear": _LINEAR,
    "GAT": _GAT,
    "linear, features": {**_LINEAR, "feature_weight": 1.0},
    "GAT, features": {**_GAT, "feature_weight": 1.0},
    "curriculum: teacher loss": _curriculum("teacher_loss"),
    "curriculum: disagreement, hard": _curriculum("disagreement"),
    "curriculum: disagreement, log": _curriculum("disagreement", weights="log"),
    "curriculum: edges": _curriculum("edges"),
    "adversary: global": _adversary("global"),
    "adversary: graph": _adversary("graph"),
    "all": {**_GAT, "feature_weight": 1.0, **_curriculum("teacher_loss"), **_adversary("global")},
}
ROWS = {**{f"training: {name}": options for name, options in TRAINING.items()}, **PARTS}


@functools.cache
def make_task(
    name: str, split_seed: int, teacher_seed: int, data_root: Path, work: Path
) -> tuple[Teacher, GraphBatch, GraphBatch, GraphPrior]:
    """(teacher, training graphs, held-out graphs, prior)."""
    if name == "house-or-cycle":
        data = house_or_cycle()
        train, test = gfkd_split(data.graphs.num_graphs, split_seed)
        sizes = (20, 30)
    else:
        data = load_dataset(name, data_root, cache_dir=work / "cache")
        train, test = gfkd_split(data.graphs.num_graphs, split_seed)
        if data.feature_kind == "degree":
            data = load_dataset(name, data_root, degrees_from=train, cache_dir=work / "cache")
        sizes = (10, 29)
    file = work / f"{name}-{split_seed}-{teacher_seed}.safetensors"
    if not file.exists():
        model = train_classifier("gcn5-64", data.graphs.select(train), num_classes=data.num_classes, seed=teacher_seed)
        save_model(file, model, {"feature_kind": data.feature_kind})
    teacher = as_teacher(load_model(file)[0], feature_kind=data.feature_kind)
    prior = GraphPrior(*sizes, feature_kind=data.feature_kind)
    return teacher, data.graphs.select(train), data.graphs.select(test), prior


@functools.cache
def make_pool(teacher: Teacher, prior: GraphPrior, seed: int, file: Path) -> GraphBatch:
    if not file.exists():
        start = af.start_graphs(teacher, prior, GRAPHS, seed=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="k. expected at most")
            result = af.refine(start, teacher, seed=seed, feature_kind=prior.feature_kind, connected=False)
        save_graphs(file, result.graphs, {"k": result.k, "cross_entropy": result.cross_entropy})
    return load_graphs(file)[0]


def cells(groups: list[str], rows: list[str]) -> Iterator[dict[str, Any]]:
    """In such an order that a study cut short has seen all rows and tasks about equally often."""
    for group in groups:
        for number in range(max(len(task[3]) for task in GROUPS[group])):
            for seed in SEEDS:
                for name, split_seed, teacher_seed, pool_seeds in GROUPS[group]:
                    if number < len(pool_seeds):
                        for row in rows:
                            yield {
                                "group": group,
                                "dataset": name,
                                "split": split_seed,
                                "teacher": teacher_seed,
                                "pool": pool_seeds[number],
                                "row": row,
                                "seed": seed,
                            }


def measure(cell: dict[str, Any], data_root: Path, work: Path) -> dict[str, Any]:
    teacher, train, test, prior = make_task(cell["dataset"], cell["split"], cell["teacher"], data_root, work)
    file = work / f"{cell['dataset']}-{cell['split']}-{cell['teacher']}-pool{cell['pool']}.safetensors"
    pool = make_pool(teacher, prior, cell["pool"], file)
    row, arch = cell["row"], STUDENT
    # The study is older than the unit of the loss and the reused classifier by default.
    settings = StudentSettings(**{"margin": 0.0, "reuse_classifier": False, **ROWS[row]})
    if row == "random graphs":
        pool = af.random_pool(teacher, prior, GRAPHS, seed=cell["pool"])
    elif row == "real graphs":
        pool = train
    elif row == "plain, equal size":
        wide = parameter_counts(teacher, new_student(teacher, STUDENT, 0, StudentSettings(**_GAT)))
        arch = equal_size_arch(STUDENT, teacher.num_features, teacher.num_classes, wide["student"])
    figures: dict[str, float] = {}
    started = time.perf_counter()
    student = distill_student(
        teacher, pool, arch, settings, seed=cell["seed"], progress=lambda _, values: figures.update(values)
    )
    seconds = time.perf_counter() - started
    scores = evaluate(student, test)
    return {
        "accuracy": scores["accuracy"],
        "majority": scores["majority"],
        "teacher_accuracy": evaluate(teacher, test)["accuracy"],
        **pool_agreement(teacher, student, pool, settings=settings),
        "loss": figures["loss"],
        **({"temperature": figures["temperature"]} if "temperature" in figures else {}),
        "parameters": parameter_counts(teacher, student)["student"],
        "seconds": round(seconds, 2),
    }


def table(results: list[dict[str, Any]], rows: list[str]) -> str:
    """Mean accuracy with its range over students, collapsed students, pool agreement and divergence, by task."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    tasks = []
    for result in results:
        task = f"{result['group']}: {result['dataset']} {result['split']}, teacher {result['teacher']}"
        tasks += [task] * (task not in tasks)
        found[result["row"], task].append(result)
    lines = []
    for task in tasks:
        some = next(result for (_, t), part in found.items() if t == task for result in part)
        lines.append(f"\n{task}: teacher {100 * some['teacher_accuracy']:.1f}, majority {100 * some['majority']:.1f}")
        for row in rows:
            part = found.get((row, task), [])
            if part:
                scores = [100 * result["accuracy"] for result in part]
                agreement = [result["agreement"] for result in part]
                divergence = math.exp(statistics.fmean(math.log(result["divergence"] + 1e-6) for result in part))
                lines.append(
                    f"  {row:40} {statistics.fmean(scores):5.1f} +- {statistics.pstdev(scores):4.1f} "
                    f"({min(scores):.1f}-{max(scores):.1f})  agreement {statistics.fmean(agreement):.3f} min "
                    f"{min(agreement):.3f}, below {COLLAPSED}: {sum(a < COLLAPSED for a in agreement)}/{len(part)}, "
                    f"divergence {divergence:.4f}, {part[0]['parameters']} parameters, "
                    f"{statistics.median(result['seconds'] for result in part):.1f} s"
                )
    return "\n".join(lines)


def main() -> None:
    options = study_options(__doc__, GROUPS, RESULTS, "student")
    rows = [row for row in ROWS if not options.rows or row in options.rows.split(";")]
    if options.table:
        print(table(read(options.results), rows))
        return
    groups = list(GROUPS) if options.group == "all" else [options.group]
    keys = ("group", "dataset", "split", "teacher", "pool", "row", "seed")
    done = {tuple(result[key] for key in keys) for result in read(options.results)}
    started = time.monotonic()
    for cell in cells(groups, rows):
        if tuple(cell.values()) in done:
            continue
        if time.monotonic() - started > options.seconds:
            print("not done yet: call again", file=sys.stderr)
            return
        line = json.dumps({**cell, **measure(cell, options.data_root, options.work)})
        with options.results.open("a") as file:
            file.write(line + "\n")
    print("all done", file=sys.stderr)


if __name__ == "__main__":
    main()
