"""Accuracy tables over data sets, teachers, splits and methods: one resumable grid of cells, kept as JSON lines.

A cell is one student of one row (method) for one teacher on one split. Nothing is chosen on held-out graphs: settings
are the same in every cell, the last epoch counts, and a method sees the teacher and the prior alone.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from .baselines import Pool, balanced_random_pool, dfad, gfkd_graphs, inverted_features, random_pools
from .checkpoints import load_model, save_model
from .data import GraphDataset, house_or_cycle, load_dataset
from .distill.config import RunConfig
from .distill.metrics import MetricsLog
from .distill.pool import random_pool
from .distill.prior_search import find_prior
from .distill.run import Run
from .distill.student import distill_student, plain_student, pool_agreement, teacher_logits
from .distill.student_pool import PoolChanges
from .errors import InputError, check
from .graphs import GraphBatch
from .nn.models import parse_arch
from .pseudo_graphs import SHAPE, GraphPrior
from .tasks import split_dataset, split_positions
from .teachers import Teacher, as_teacher, evaluate, train_classifier

# Published mean node counts: all that the prior is told about a data set.
MEAN_NODES = {
    "house-or-cycle": 25,
    "MUTAG": 18,
    "PTC_MR": 14,
    "PROTEINS": 39,
    "IMDB-BINARY": 20,
    "COLLAB": 74,
    "REDDIT-BINARY": 430,
}
# Beyond these a baseline takes hours on a CPU; its cell then says so.
_MOST_GFKD_PAIRS = 3_000_000
_MOST_DFAD_PAIRS = 20_000_000

# Our own method with one part changed at a time.
VARIANTS: dict[str, dict[str, Any]] = {
    "acgkd-fast": {},
    "learn only": {"learn.steps": 400, "refine.steps": 0},
    "learn only at xi 0.3": {"learn.steps": 400, "refine.steps": 0, "xi": 0.3},
    "learn then refine": {"learn.steps": 400},
    "refine without K": {"refine.lam_k": 0.0},
    "refine without CE": {"refine.w_ce": 0.0},
    # Measured, and rejected, before there were twins.
    "cross-entropy to 0.5": {"refine.cap": 0.5, "twins": 0.0},
    "a quarter of the steps": {"refine.steps": 2000},
    "four times the steps": {"refine.steps": 32000},
    "1000 graphs": {"num_graphs": 1000},
    "labels at random": {"refine.unlabelled": 0.0},
    "density not looked for": {"prior.mean_degree": 2.05},
    "plain shape": {
        "prior.hub_share": 0.0,
        "prior.size_spread": 0.0,
        "prior.degree_growth": 0.0,
        "prior.ego_networks": False,
    },
    "start graphs": {"refine.steps": 0},
    "all graphs searched": {"start_share": 0.0},
    "graphs in parts": {"refine.connected": False},
    "no twins": {"twins": 0.0},
    "pool as it is": {"perturbation": 0.0},
    "first defaults": {
        "student.reuse_classifier": False,
        "refine.connected": False,
        "perturbation": 0.0,
        "start_share": 0.0,
    },
    "plain student": {"student.reuse_classifier": False},
    "no feature matching": {"student.feature_weight": 0.0},
    "linear projector": {"student.projector": "linear"},
    "curriculum by the teacher's loss": {"student.curriculum.difficulty": "teacher_loss"},
    "self-paced curriculum": {"student.curriculum.difficulty": "disagreement"},
    "adversarial temperature": {"student.adversary.mode": "global"},
    "adversarial temperature per graph": {"student.adversary.mode": "graph"},
    "logits as they are": {"student.margin": 0.0},
    "mean square of logits": {"student.kl_weight": 0.0, "student.mse_weight": 1.0},
}

# Settings that the pool does not depend on.
_OF_STUDENTS = ("perturbation", "twins", "student")
# What a cell keeps of what the run says about its pool.
_WITNESS = ("k", "cross_entropy", "agreement", "edges", "mean_degree", "density", "candidates", "peak_memory_mib")

Report = Callable[[str], None]


class Skipped(Exception):
    """A cell that is left out, with the reason."""


@dataclass(frozen=True)
class Case:
    """One teacher on one split, and what a method may know of it.

    Attributes:
        dataset, arch, split: name of the data set, the teacher's architecture, seed of the 70/30 split.
        teacher: trained on `train`.
        prior: built on the published mean number of nodes, all else as :func:`find_prior` finds it.
        train, test: real graphs; `train` is for the rows on real data, `test` measures.
    """

    dataset: str
    arch: str
    split: int
    teacher: Teacher
    prior: GraphPrior
    train: GraphBatch
    test: GraphBatch


@dataclass(frozen=True)
class Task:
    """What a row gets: a case, the student's architecture, the settings and a seed."""

    case: Case
    student: str
    config: RunConfig
    seed: int

    def taught(self, pool: Pool) -> nn.Module:
        """A student of the run's settings on a pool."""
        return distill_student(self.case.teacher, pool, self.student, self.config.student, seed=self.seed)

    @property
    def plain(self) -> Task:
        """The same with a student that has a classifier of its own."""
        return replace(self, config=self.config.with_settings({"student.reuse_classifier": False}))

    @cached_property
    def common(self) -> tuple[Teacher, GraphPrior, int]:
        return self.case.teacher, self.case.prior, self.config.num_graphs


def _real_labels(task: Task) -> nn.Module:
    settings = task.config.student
    model = plain_student(task.case.teacher, task.student, task.seed, dropout=settings.dropout)
    return train_classifier(
        model, task.case.train, epochs=settings.epochs, lr=settings.lr, batch_size=settings.batch_size, seed=task.seed
    )


def _gfkd(task: Task) -> nn.Module:
    teacher, prior, count = task.common
    pairs = count * prior.max_nodes**2 // 2
    if pairs > _MOST_GFKD_PAIRS:
        raise Skipped(f"about {pairs:,} directed pairs, half of them edges, in each of 1500 steps")
    # Its sizes are uniform on a range, and its students have classifiers of their own.
    return task.plain.taught(gfkd_graphs(teacher, replace(prior, size_spread=0.0), count, seed=task.seed))


def _dfad(task: Task) -> nn.Module:
    teacher, prior, _ = task.common
    pairs = 128 * prior.max_nodes**2
    if pairs > _MOST_DFAD_PAIRS:
        raise Skipped(f"about {pairs:,} dense pairs in each of 1000 steps")
    return dfad(teacher, prior, task.student, seed=task.seed)[0]


BASELINES: dict[str, Callable[[Task], nn.Module]] = {
    "teacher": lambda task: task.case.teacher.module,
    "real labels": _real_labels,
    "real graphs": lambda task: task.taught(task.case.train),
    "real graphs to a plain student": lambda task: task.plain.taught(task.case.train),
    "random graphs": lambda task: task.taught(random_pool(*task.common, seed=task.seed)),
    "random graphs anew": lambda task: task.taught(random_pools(*task.common, seed=task.seed)),
    # Matching features on graphs unlike the real ones helps on some sets and harms on others; the better is the floor.
    "random graphs anew to a plain student": lambda task: task.plain.taught(random_pools(*task.common, seed=task.seed)),
    "balanced random graphs": lambda task: task.taught(balanced_random_pool(*task.common, seed=task.seed)),
    "inverted features": lambda task: task.taught(inverted_features(*task.common, seed=task.seed)),
    "GFKD": _gfkd,
    "DFAD-GNN": _dfad,
}
ROWS = ("majority class", *BASELINES, *VARIANTS)
# The best of these is the floor that a method has to leave below.
FLOOR = ("majority class", "random graphs anew", "random graphs anew to a plain student")
CEILING = "real graphs"
OURS = "acgkd-fast"


class Table:
    """The grid, its file of finished cells and its folder of teachers.

    Args:
        out: JSON lines, one finished cell each; cells that are there are not run again, and all must be of one set of
            settings.
        work: folder for teachers.
        data_root: folder of the TUDatasets.
        config: settings of every cell; prior and seed are set by the cell.
        report: called with one line per finished cell.
    """

    def __init__(
        self,
        out: Path,
        work: Path,
        data_root: Path | None,
        config: RunConfig | None = None,
        *,
        report: Report | None = None,
    ) -> None:
        self.work, self.data_root = work, data_root
        self.config = config or RunConfig()
        self._report = report or (lambda _: None)
        out.parent.mkdir(parents=True, exist_ok=True)
        self._log = MetricsLog(out)
        # Of one case, by the settings that made them: rows that differ in the student alone share a pool.
        self._pools: dict[str, tuple[GraphBatch, dict[str, Any]]] = {}

    def run(
        self,
        datasets: Sequence[str],
        *,
        teachers: Sequence[str] = ("gcn5-64",),
        students: Sequence[str] = ("gcn3-32",),
        splits: Sequence[int] = (1, 2, 3, 4, 5),
        rows: Sequence[str] = ROWS,
        variants: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Run every cell that is not in the file yet.

        Args:
            datasets: names in :data:`MEAN_NODES`.
            teachers, students: architectures.
            splits: seeds of the splits; also the seed of the teacher, the pool and the student.
            rows: names in :data:`ROWS` or in `variants`.
            variants: more rows of our own method: name -> dotted settings that differ from the defaults.

        Raises:
            InputError: an unknown data set, row, architecture or setting, or a file with cells of other settings.
        """
        variants = {**VARIANTS, **(variants or {})}
        known = {"majority class", *BASELINES, *variants}
        for name in rows:
            check(name in known, "rows", f"names among {', '.join(sorted(known))}", name)
        for name in datasets:
            check(name in MEAN_NODES, "datasets", f"names among {', '.join(MEAN_NODES)}", name)
        for arch in (*teachers, *students):
            parse_arch(arch)
        for name in rows:
            self.config.with_settings(variants.get(name, {}))
        stamps = {name: self._stamp(variants.get(name, {})) for name in rows}
        done = self._finished(stamps)
        for dataset, arch, split in _product(datasets, teachers, splits):
            wanted = [
                (student, row)
                for student in students
                for row in rows
                if (dataset, arch, split, student, row) not in done
            ]
            if not wanted:
                continue
            case = self._case(dataset, arch, split)
            self._pools.clear()
            for student, row in wanted:
                settings = {"seed": split, "prior": case.prior.__dict__, **variants.get(row, {})}
                config = self.config.with_settings(settings)
                cell = self._cell(Task(case, student, config, split), row, stamps[row])
                self._log.write(row, 0, cell)
                self._report(_line(cell))

    def _finished(self, stamps: dict[str, str]) -> set[tuple[Any, ...]]:
        """Keys of the cells in the file, of the rows that have stamps, whose own must be the same."""
        cells = [cell for cell in self._log.read() if cell["row"] in stamps]
        for cell in cells:
            if cell.get("settings") != stamps[cell["row"]]:
                raise InputError(
                    f"out: expected cells of the settings at hand, got {_line(cell)}, of others; start a new file"
                )
        return {_key(cell) for cell in cells}

    def _stamp(self, changes: dict[str, Any]) -> str:
        """Digest of what a row's settings are, apart from what a case sets itself."""
        values = self.config.with_settings({**changes, "seed": 0, "prior": {}}).to_dict()
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    def _cell(self, task: Task, row: str, stamp: str) -> dict[str, Any]:
        case = task.case
        cell: dict[str, Any] = {
            "dataset": case.dataset,
            "teacher": case.arch,
            "split": case.split,
            "student": task.student,
            "row": row,
            "settings": stamp,
            "prior": {name: getattr(case.prior, name) for name in SHAPE},
        }
        start = time.perf_counter()
        if row == "majority class":
            assert case.train.y is not None and case.test.y is not None
            answer = case.train.y.bincount().argmax()
            return {**cell, "accuracy": float((case.test.y == answer).double().mean())}
        facts: dict[str, Any] = {}
        try:
            if row in BASELINES:
                model = BASELINES[row](task)
            else:
                model, facts = self._ours(task)
        except Skipped as reason:
            return {**cell, "skipped": str(reason)}
        seconds = time.perf_counter() - start
        answers = GraphBatch(case.test.x, case.test.edges, teacher_logits(case.teacher, case.test).argmax(1))
        return {
            **cell,
            "accuracy": evaluate(model, case.test)["accuracy"],
            "fidelity": evaluate(model, answers)["accuracy"],
            "seconds": round(seconds, 2),
            **facts,
        }

    def _ours(self, task: Task) -> tuple[nn.Module, dict[str, Any]]:
        graphs, facts = self._pool(task)
        changes = PoolChanges.decided(task.case.teacher, graphs, task.config, task.student)
        model = task.taught(changes.pool(graphs, task.seed))
        witness = pool_agreement(task.case.teacher, model, graphs, settings=task.config.student)
        facts = {**facts, "twins": changes.twins}
        return model, {**facts, "student_agreement": witness["agreement"], "student_divergence": witness["divergence"]}

    def _pool(self, task: Task) -> tuple[GraphBatch, dict[str, Any]]:
        """Through a run folder, so that the table measures what users run."""
        values = task.config.to_dict()
        settings = json.dumps({name: value for name, value in values.items() if name not in _OF_STUDENTS})
        if settings not in self._pools:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                run = Run(Path(folder) / "run", task.case.teacher, task.config, student=task.student)
                start = time.perf_counter()
                graphs = run.make_graphs()
                facts: dict[str, Any] = {"pool_seconds": round(time.perf_counter() - start, 2)}
                witness = [row for row in run.metrics.read() if row["stage"] == "pool"]
            facts |= {name: value for name, value in witness[-1].items() if name in _WITNESS}
            self._pools[settings] = graphs, facts
        return self._pools[settings]

    def _case(self, dataset: str, arch: str, split: int) -> Case:
        data, train, test = self._graphs(dataset, split)
        path = self.work / f"{dataset}-{arch}-{split}.safetensors"
        if not path.exists():
            trained = train_classifier(arch, train, num_classes=data.num_classes, seed=split)
            save_model(path, trained, {"feature_kind": data.feature_kind, "dataset": dataset, "split_seed": split})
        model = load_model(path)[0]
        mean = MEAN_NODES[dataset]
        teacher = as_teacher(model)
        prior = GraphPrior.around(mean, feature_kind=data.feature_kind)
        if self.config.prior_steps > 0:
            prior = find_prior(teacher, prior, steps=self.config.prior_steps, seed=split).prior
        return Case(dataset, arch, split, teacher, prior, train, test)

    def _graphs(self, dataset: str, split: int) -> tuple[GraphDataset, GraphBatch, GraphBatch]:
        if dataset == "house-or-cycle":
            data = house_or_cycle(seed=split)
            return data, *split_dataset(data, "stratified", split)
        if self.data_root is None:
            raise InputError(f"data-root: expected the folder that holds {dataset}, got none")
        data = load_dataset(dataset, self.data_root)
        if data.feature_kind == "degree":
            seen = split_positions(data, "gfkd", split)[0]
            data = load_dataset(dataset, self.data_root, degrees_from=seen)
        return data, *split_dataset(data, "gfkd", split)


def _key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[name] for name in ("dataset", "teacher", "split", "student", "row"))


def _product(datasets: Sequence[str], teachers: Sequence[str], splits: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    return ((dataset, arch, split) for dataset in datasets for arch in teachers for split in splits)


def _line(cell: dict[str, Any]) -> str:
    value = f"{100 * cell['accuracy']:.1f}" if "accuracy" in cell else f"skipped: {cell['skipped']}"
    return f"{cell['dataset']}, {cell['teacher']} -> {cell['student']}, split {cell['split']}, {cell['row']}: {value}"


def default_rows() -> tuple[str, ...]:
    """The rows of a table without ablations."""
    return ("majority class", *BASELINES, OURS)
