"""A distillation run in a folder: learn, refine, teach, measure, report; interruptible and resumable.

Every stage leaves its product in the folder by an atomic write, and a stage whose product is there
is not run again. Inside the long stages the state is saved every few seconds. A resumed run ends
with the same files as an uninterrupted one.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .. import __version__
from ..checkpoints import load_graphs, load_model, save_graphs, save_model
from ..errors import InputError, check
from ..files import load_state, save_state, write_text
from ..graphs import GraphBatch
from ..nn.models import parse_arch
from ..nn.projected import Classifier
from ..pseudo_graphs import SHAPE, GraphPrior, PseudoGraphs
from ..report import write_report
from ..teachers import Teacher, as_teacher, evaluate
from .captured import stepper
from .config import RunConfig
from .inversion import Learner
from .metrics import MetricsLog
from .pool import divide_starts, random_pool, start_graphs
from .prior_search import Trial, find_prior
from .projector import equal_size_arch, head_can_be_copied, parameter_counts
from .refine import Constraint, Refiner
from .student import Pool, distill_student, new_student, pool_agreement
from .student_pool import PoolChanges
from .student_settings import StudentSettings
from .witness import pool_size, pool_witness

_ABSENT = object()
_SAVE_SECONDS = 20.0
_REFINE_STEPS = 50
_LEARN_STEPS = 10
# Students that agree less with their teacher on the pool, before its graphs are perturbed, have not learned.
_AGREEMENT = 0.7

Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Evaluation:
    """Real graphs that a run is measured on, after everything has been decided.

    Attributes:
        name: of the data set.
        test: held-out graphs with labels.
        train: the graphs the teacher learned from, for the row "student on real graphs"; None
            leaves that row out.
    """

    name: str
    test: GraphBatch
    train: GraphBatch | None = None


class Run:
    """One run folder.

    Args:
        folder: made when missing; must be empty unless `resume`.
        teacher: the trained model.
        config: all settings.
        student: architecture of the student, by name.
        teacher_name: what ``config.json`` says about the teacher.
        resume: go on with what an interrupted run left in the folder.
        progress: called with (stage, step, of how many, values).
        constraint: which graphs the search may make, see :class:`~.refiner.Refiner`. A resumed run needs the same.
            Students then learn from the pool as it is unless the settings perturb it (:class:`RunConfig`).

    Raises:
        InputError: a folder in use, nothing to resume, a folder whose settings differ, or a teacher whose
            classifier cannot be reused where the settings ask for it.

    Attributes:
        student_settings: the student's, with the reuse of the teacher's classifier decided.
        parameters: sizes of teacher and student, see :func:`~.projector.parameter_counts`.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Teacher | nn.Module,
        config: RunConfig,
        *,
        student: str = "gcn3-32",
        teacher_name: str = "",
        resume: bool = False,
        progress: Progress | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        parse_arch(student)
        self.folder = folder
        self.teacher = as_teacher(teacher)
        self.config = config
        self.student = student
        self.student_settings = self._decide()
        self.parameters = parameter_counts(self.teacher, new_student(self.teacher, student, 0, self.student_settings))
        self._progress = progress or (lambda *_: None)
        self._constraint = constraint
        self.description = {
            "teacher": teacher_name,
            "student": student,
            "settings": config.to_dict(),
            "versions": {
                "acgkd-fast": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        self._open(resume)
        self.metrics = MetricsLog(folder / "metrics.jsonl")

    def _decide(self) -> StudentSettings:
        """The student's settings with nothing left open; a file cannot hold the classifier of somebody's module."""
        decided = self.config.student.decided(self.teacher, self.student)
        if decided.reuse_classifier and not head_can_be_copied(self.teacher):
            raise InputError(
                "student.reuse_classifier: expected a teacher of this package, as student.safetensors holds its "
                f"classifier too, got a {type(self.teacher.module).__name__}; call distill_student and keep its module "
                "with torch.save, or set it to false"
            )
        return decided

    def _open(self, resume: bool) -> None:
        record = self.folder / "config.json"
        if resume:
            if not record.exists():
                raise InputError(f"resume: expected an interrupted run in {self.folder}, got no config.json there")
            earlier = json.loads(record.read_text())
            now, before = _flat(self.description), _flat(earlier)
            names = [name for name in now | before if name.startswith(("student", "settings"))]
            other = [
                name.removeprefix("settings.") for name in names if now.get(name, _ABSENT) != before.get(name, _ABSENT)
            ]
            if other:
                raise InputError(
                    f"resume: expected the settings that {record} records, got others of {', '.join(other)}"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(f"out: expected an empty or new folder (or --resume), got {self.folder} with files in it")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(record, json.dumps(self.description, indent=2) + "\n")
        self._state.mkdir(exist_ok=True)

    @property
    def _state(self) -> Path:
        return self.folder / "state"

    def execute(self, evaluation: Evaluation | None = None, *, students: int = 1) -> list[dict[str, Any]]:
        """Run whatever is not done yet and write the report.

        Args:
            evaluation: real graphs to measure on, once everything is decided.
            students: trained per row of the table, with seeds counting up from the run's; the first
                one is saved as ``student.safetensors``.

        Returns:
            The rows of the table, empty without `evaluation`: ``row``, ``accuracy`` (mean over
            seeds), ``deviation``, ``seeds``.
        """
        check(students >= 1, "students", "at least 1", students)
        graphs = self.make_graphs()
        seeds = [self.config.seed + k for k in range(students)]
        pool = self._pool(graphs)
        taught = [self.teach("student", pool, seed) for seed in seeds]
        save_model(self.folder / "student.safetensors", taught[0], {"teacher": self.description["teacher"]})
        self._witness(taught, seeds, graphs)
        self.metrics.rewind("result", -1)
        results = [] if evaluation is None else self._measure(evaluation, taught, seeds, pool)
        for position, row in enumerate(results):
            self.metrics.write("result", position, row)
        write_report(self.folder, self.metrics.read(), graphs, self.description)
        shutil.rmtree(self._state)
        return results

    def _witness(self, taught: Sequence[nn.Module], seeds: list[int], graphs: GraphBatch) -> None:
        """Sizes, and what the pool itself tells about the students; no real graph is looked at."""
        for stage in ("parameters", "agreement"):
            self.metrics.rewind(stage, -1)
        self.metrics.write("parameters", 0, dict(self.parameters))
        found = [pool_agreement(self.teacher, student, graphs, settings=self.config.student) for student in taught]
        for seed, values in zip(seeds, found, strict=True):
            self.metrics.write("agreement", seed, dict(values))
        saved = found[0]["agreement"]
        if saved < _AGREEMENT:
            warnings.warn(
                f"student: expected the teacher's class on {_AGREEMENT:.0%} of the pseudo-graphs, got {saved:.0%}; "
                "it has not learned its pool (try another seed, more epochs or a wider student)",
                RuntimeWarning,
                stacklevel=3,
            )

    def _measure(
        self, evaluation: Evaluation, taught: Sequence[nn.Module], seeds: list[int], pool: Pool
    ) -> list[dict[str, Any]]:
        config = self.config
        random = random_pool(self.teacher, self.prior, config.num_graphs, seed=config.seed)
        rows: dict[str, Sequence[nn.Module]] = {
            f"teacher ({evaluation.name})": [self.teacher.module],
            "student on pseudo-graphs": taught,
            "same student on random graphs": [self.teach("random", random, seed) for seed in seeds],
        }
        settings = self.student_settings
        if settings.reuse_classifier:
            wide = equal_size_arch(
                self.student, self.teacher.num_features, self.teacher.num_classes, self.parameters["student"]
            )
            plain = replace(settings, reuse_classifier=False, feature_weight=0.0)
            rows[f"plain {wide} of equal size on pseudo-graphs"] = [
                self.teach("plain", pool, seed, wide, plain) for seed in seeds
            ]
        if evaluation.train is not None:
            real = evaluation.train
            rows["same student on real graphs"] = [self.teach("real", real, seed) for seed in seeds]
        results = []
        for name, models in rows.items():
            scores = [evaluate(model, evaluation.test)["accuracy"] for model in models]
            results.append(
                {
                    "row": name,
                    "accuracy": statistics.fmean(scores),
                    "deviation": statistics.stdev(scores) if len(scores) > 1 else 0.0,
                    "seeds": len(scores),
                }
            )
        majority = evaluate(self.teacher.module, evaluation.test)["majority"]
        results.append({"row": "majority class", "accuracy": majority, "deviation": 0.0, "seeds": 1})
        return results

    @cached_property
    def prior(self) -> GraphPrior:
        """The prior with what it leaves open looked for by :func:`find_prior`, or as it is where that is left out."""
        config = self.config
        if config.prior_steps == 0:
            return config.prior
        rows = [row for row in self.metrics.read() if row["stage"] == "prior"]
        if not rows or "k" in rows[-1]:
            found = find_prior(
                self.teacher,
                config.prior,
                steps=config.prior_steps,
                seed=config.seed,
                tried=[Trial(**{name: row[name] for name in (*SHAPE, "draws", "k")}) for row in rows],
                progress=lambda step, total, values: self._report("prior", step, total, values),
            )
            chosen = {name: getattr(found.prior, name) for name in SHAPE}
            rows = [chosen]
            self.metrics.write("prior", len(found.tried) + 1, chosen)
        return replace(config.prior, **{name: rows[-1][name] for name in SHAPE})

    def make_graphs(self) -> GraphBatch:
        """Stages one and two: the pseudo-graphs, from ``pseudo_graphs.safetensors`` if already there."""
        product = self.folder / "pseudo_graphs.safetensors"
        if product.exists():
            return load_graphs(product)[0]
        graphs = start_graphs(self.teacher, self.prior, self.config.num_graphs, seed=self.config.seed)
        learned: PseudoGraphs | None = None
        stay: list[GraphBatch] = []
        if self.config.learn.steps > 0:
            learned = self._learn(graphs)
            graphs = learned.harden(seed=self.config.seed, step=self.config.learn.steps)
        else:
            share = self.config.kept_share(constrained=self._constraint is not None)
            graphs, *stay = divide_starts(self.teacher, graphs, share, seed=self.config.seed)
        if self.config.refine.steps > 0 and graphs.num_graphs > 0:
            graphs = self._refine(graphs, learned)
        graphs = GraphBatch.concatenate([part for part in (graphs, *stay) if part.num_graphs > 0])
        self.metrics.rewind("pool", -1)
        layout = None if learned is None else learned.layout
        self.metrics.write("pool", 0, {**pool_witness(self.teacher, graphs), **pool_size(graphs, layout)})
        save_graphs(product, graphs, {"feature_kind": self.config.prior.feature_kind})
        return graphs

    def _pool(self, graphs: GraphBatch) -> Pool:
        """What a student learns from: the pool, changed a little, or with `redraw` drawn anew, every epoch."""
        if not self.config.student.redraw:
            bounded = self._constraint is not None
            changes = PoolChanges.decided(self.teacher, graphs, self.config, self.student, constrained=bounded)
            self.metrics.rewind("changes", -1)
            self.metrics.write("changes", 0, asdict(changes))
            return changes.pool(graphs, self.config.seed)
        learned = self._learn(graphs)
        after = self.config.learn.steps + 1
        return lambda epoch: learned.harden(seed=self.config.seed, step=after + epoch)

    def _learn(self, start: GraphBatch) -> PseudoGraphs:
        pseudo = PseudoGraphs.from_graphs(start, feature_kind=self.config.prior.feature_kind, xi=self.config.xi)
        learner = Learner(self.teacher, pseudo, self.config.learn, seed=self.config.seed)
        total = self.config.learn.steps
        saver = _Saver(self._state / "learn.safetensors", learner.state_dict)
        if saver.path.exists():
            learner.load_state_dict(load_state(saver.path))
        self.metrics.rewind("learn", learner.step)
        advance = stepper(learner) if learner.step < total else None
        while advance is not None and learner.step < total:
            terms = advance(min(_LEARN_STEPS - learner.step % _LEARN_STEPS, total - learner.step))
            self._report("learn", learner.step, total, {name: float(term) for name, term in terms.items()})
            saver.save(learner.step == total)
        return pseudo

    def _refine(self, start: GraphBatch, learned: PseudoGraphs | None) -> GraphBatch:
        # A swap draws its edges from the graph alone.
        weights = (
            None if self.config.refine.keep_degrees or learned is None else (learned.layout, learned.logits.detach())
        )
        refiner = Refiner(
            self.teacher,
            start,
            self.config.search,
            seed=self.config.seed,
            feature_kind=self.config.prior.feature_kind,
            edge_weights=weights,
            constraint=self._constraint,
        )
        total = self.config.search.steps
        saver = _Saver(self._state / "refine.safetensors", refiner.state_dict)
        if saver.path.exists():
            refiner.load_state_dict(load_state(saver.path))
        self.metrics.rewind("refine", refiner.step)
        while not refiner.finished:
            refiner.advance(min(_REFINE_STEPS, total - refiner.step))
            self._report("refine", refiner.step, total, refiner.metrics())
            saver.save(refiner.finished)
        result = refiner.result()
        if result.warning is not None:
            warnings.warn(result.warning, RuntimeWarning, stacklevel=2)
        return result.graphs

    def teach(
        self, row: str, pool: Pool, seed: int, arch: str | None = None, settings: StudentSettings | None = None
    ) -> Classifier:
        """One student on a pool, from its saved state if an earlier process finished or began it.

        Architecture and settings are the run's where none are given.
        """
        settings = settings or self.student_settings
        name = f"{row}-{seed}"
        done = self._state / f"{name}.safetensors"
        if done.exists():
            return load_model(done)[0]
        partial = self._state / f"{name}-partial.safetensors"
        self.metrics.rewind(name, load_state(partial)["epoch"] if partial.exists() else 0)
        taught = distill_student(
            self.teacher,
            pool,
            arch or self.student,
            settings,
            seed=seed,
            progress=lambda epoch, values: self._report(name, epoch, settings.epochs, values),
            checkpoint=partial,
        )
        model = cast(Classifier, taught)
        save_model(done, model, {"row": row, "seed": seed})
        partial.unlink(missing_ok=True)
        return model

    def _report(self, stage: str, step: int, total: int, values: dict[str, float]) -> None:
        self.metrics.write(stage, step, values)
        self._progress(stage, step, total, values)


def _flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings by dotted path."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return flat


class _Saver:
    """Saves a stage's state when some seconds have passed since the last time."""

    def __init__(self, path: Path, state: Callable[[], dict[str, Any]]) -> None:
        self.path = path
        self._state = state
        self._last = time.monotonic()

    def save(self, now: bool) -> None:
        if now or time.monotonic() - self._last > _SAVE_SECONDS:
            save_state(self.path, self._state())
            self._last = time.monotonic()
