"""The synthesizer of data-free distillation loops: ``synthesize(targets)``, then ``sample(n)``.

Attributes, arguments and loss names follow CMI, KamalEngine, Fast-Datafree and NAYER; ``docs/hosts.md`` has the lines
that change in each.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .calling import call_convention
from .distill.inversion import Learner, LearnSettings
from .distill.objectives import degree_term
from .distill.pool import start_graphs
from .distill.refine import Refiner, RefineSettings
from .errors import InputError, check, check_choice, check_tensor
from .generator import Generator
from .graph_pool import GraphPool
from .graphs import GraphBatch
from .hosts.hooks import BatchNormHooks
from .hosts.vision import OneBatch
from .pseudo_graphs import GraphPrior, PseudoGraphs
from .teachers import Teacher, as_teacher

ENGINES = ("learn", "refine", "both", "generator")
RETURNS = ("dict", "timed", "kamal", "nayer")

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Progress = Callable[[int, dict[str, float]], None]


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of each graph, [B]."""
    terms = nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    return terms.sum(-1)


def l1_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the logits of each graph, [B] (DFAD)."""
    return (student - teacher).abs().mean(-1)


CRITERIA: dict[str, Criterion] = {"kl": kl_divergence, "l1": l1_distance}


class GraphSynthesizer:
    """Makes pseudo-graphs for a teacher, and hands out batches of them.

    Engines:

    - "refine": hard graphs by search. With a student and `adv` the labels are judged by teacher logits minus `adv`
      times the student's, so that graphs pay whose class the teacher sees and the student does not.
    - "learn": logits and features by gradient, with the loss oh CE + bn R_bn - adv D(student, teacher).
    - "both": learn, then refine from a draw of what was learned.
    - "generator": trains `generator` on the same loss; samples are new draws from it.

    Args:
        teacher: a Teacher or any module that `as_teacher` accepts; stays frozen.
        student: the model being taught, in any form that `call_convention` knows; only for `adv`. Left as it is.
        generator: for engine "generator": a :class:`Generator` or any module z -> GraphBatch.
        prior: sizes, mean degree and kind of features; default the generator's, else GFKD's sizes.
        engine: default "generator" where one is given, else "refine".
        iterations: steps per :meth:`synthesize`; default that of the engine's settings, 50 for a generator.
        synthesis_batch_size, sample_batch_size: graphs per :meth:`synthesize` and :meth:`sample`.
        lr_g: Adam's step size for the generator.
        adv, bn, oh: weights of the student's disagreement, of the BatchNorm statistics and of the labels'
            cross-entropy. Default 0 and the weights of the engine's settings (1 and 1 for a generator).
        degree: weight of the mean degree's distance from the prior's, for a generator.
        criterion: D, "kl", "l1" or a function of (student logits, teacher logits) that gives [B].
        learn, refine: further settings of these engines.
        mmt_rate: momentum of the BatchNorm statistics (Fast-Datafree), for a generator.
        nz: width of z of a generator of another class.
        capacity: graphs kept in `data_pool`; default all.
        returns: what :meth:`synthesize` gives: "dict" (CMI), "timed" (Fast-Datafree), "kamal" (KamalEngine, which times
            :meth:`sample` too) or "nayer".
        convert: what to make of batches for the loop, such as ``GraphBatch.to_pyg``; default nothing.
        seed: of everything drawn; call t of :meth:`synthesize` is a search of its own.
        progress: called with (step, values) every 50 steps and after the last.

    Attributes:
        teacher, student, generator: as given, the teacher as a Teacher.
        hooks: :class:`BatchNormHooks` of the teacher, registered only while they are read.
        data_pool: :class:`GraphPool` of all that was synthesized, on the teacher's device.
        calls: calls of :meth:`synthesize` so far; set it to resume.

    Raises:
        InputError: arguments that do not fit together, naming them.
    """

    def __init__(
        self,
        teacher: Teacher | nn.Module,
        student: nn.Module | None = None,
        generator: nn.Module | None = None,
        *,
        prior: GraphPrior | None = None,
        engine: str | None = None,
        iterations: int | None = None,
        synthesis_batch_size: int = 64,
        sample_batch_size: int = 64,
        lr_g: float = 1e-3,
        adv: float = 0.0,
        bn: float | None = None,
        oh: float | None = None,
        degree: float = 1.0,
        criterion: str | Criterion = "kl",
        learn: LearnSettings | None = None,
        refine: RefineSettings | None = None,
        mmt_rate: float = 0.0,
        nz: int | None = None,
        capacity: int | None = None,
        returns: str = "dict",
        convert: Callable[[GraphBatch], Any] | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        engine = engine or ("refine" if generator is None else "generator")
        check_choice("engine", engine, ENGINES)
        check_choice("returns", returns, RETURNS)
        check(
            (generator is not None) == (engine == "generator"), "generator", f"one, or none for {engine!r}", generator
        )
        check(iterations is None or iterations >= 1, "iterations", "at least 1", iterations)
        for name, value in (("adv", adv), ("bn", bn), ("oh", oh), ("degree", degree)):
            check(value is None or value >= 0.0, name, "0 or more", value)
        for name, count in (("synthesis_batch_size", synthesis_batch_size), ("sample_batch_size", sample_batch_size)):
            check(count >= 1, name, "at least 1", count)
        check(adv == 0.0 or student is not None, "student", "a model to disagree with, as adv is above 0", student)
        check(engine not in ("learn", "both") or oh != 0.0, "oh", "a number above 0 with this engine", oh)
        if not callable(criterion):
            check_choice("criterion", criterion, CRITERIA)
            criterion = CRITERIA[criterion]
        self.teacher = as_teacher(teacher.model if isinstance(teacher, OneBatch) else teacher)
        self.student = student.model if isinstance(student, OneBatch) else student
        self.generator = generator
        self.engine = engine
        own = generator.prior if isinstance(generator, Generator) else None
        self.prior = prior or own or GraphPrior(feature_kind=self.teacher.feature_kind or "one-hot")
        self.iterations = iterations
        self.synthesis_batch_size, self.sample_batch_size = synthesis_batch_size, sample_batch_size
        self.adv, self.bn, self.oh, self.degree = adv, bn, oh, degree
        self.criterion: Criterion = criterion
        self.learn, self.refine = learn or LearnSettings(), refine or RefineSettings()
        self.nz = generator.nz if isinstance(generator, Generator) else nz
        check(generator is None or self.nz is not None, "nz", "the width of z of a generator of another class", nz)
        self.returns, self.convert, self.seed, self.progress = returns, convert, seed, progress
        self.calls = 0
        self.hooks = BatchNormHooks(self.teacher.module, mmt_rate)
        self.data_pool = GraphPool(capacity, seed=seed)
        self._optimizer = (
            None if generator is None else torch.optim.Adam(generator.parameters(), lr=lr_g, betas=(0.5, 0.999))
        )

    @property
    def device(self) -> torch.device:
        tensor = next((t for t in self.teacher.module.parameters()), torch.zeros(0))
        return tensor.device

    def synthesize(self, targets: torch.Tensor | None = None) -> Any:
        """Make `synthesis_batch_size` graphs and put them into `data_pool`.

        Args:
            targets: int64 [n], the classes wanted; default all equally often.

        Returns:
            By `returns`: {"synthetic": graphs}; that and the seconds; or NAYER's (dict, seconds, cost, cross-entropy),
            where cost is the loss or search energy reached.

        Raises:
            InputError: labels outside the teacher's classes.

        Warns:
            RuntimeWarning: the search ended with graphs that speak against themselves, see :func:`acgkd_fast.refine`.
        """
        started = time.perf_counter()
        y = self._targets(targets)
        with self._student_at_rest():
            graphs, cost = self._from_generator(y) if self.engine == "generator" else self._by_search(y)
        self.calls += 1
        self.data_pool.add(graphs)
        with torch.no_grad():
            cross_entropy = float(nn.functional.cross_entropy(self.teacher(graphs), y))
        result = {"synthetic": self._converted(graphs)}
        seconds = time.perf_counter() - started
        if self.returns == "dict":
            return result
        return (result, seconds, cost, cross_entropy) if self.returns == "nayer" else (result, seconds)

    def sample(self, n: int | None = None) -> Any:
        """A batch without gradients: from `data_pool`, or new from the generator. With "kamal", it and the seconds.

        Args:
            n: graphs; default `sample_batch_size`.

        Raises:
            InputError: nothing has been synthesized yet.
        """
        started = time.perf_counter()
        n = self.sample_batch_size if n is None else n
        if self.generator is None:
            graphs = self.data_pool.sample(n)
        else:
            with torch.no_grad():
                graphs = self._generate(n, None).detach()
        batch = self._converted(graphs)
        return (batch, time.perf_counter() - started) if self.returns == "kamal" else batch

    def _converted(self, graphs: GraphBatch) -> Any:
        return graphs if self.convert is None else self.convert(graphs)

    def _targets(self, targets: torch.Tensor | None) -> torch.Tensor:
        classes, device = self.teacher.num_classes, self.device
        if targets is None:
            return torch.arange(self.synthesis_batch_size, device=device) % classes
        check_tensor("targets", targets, shape=(None,), dtypes=(torch.int64,))
        known = targets.numel() > 0 and 0 <= int(targets.min()) <= int(targets.max()) < classes
        check(known, "targets", f"labels in 0..{classes - 1}", targets.tolist())
        return targets.to(device)

    @contextlib.contextmanager
    def _student_at_rest(self) -> Iterator[None]:
        if self.student is None:
            yield
            return
        was_training = self.student.training
        asked = [p.requires_grad for p in self.student.parameters()]
        self.student.eval().requires_grad_(False)
        try:
            yield
        finally:
            self.student.train(was_training)
            for parameter, ask in zip(self.student.parameters(), asked, strict=True):
                parameter.requires_grad_(ask)

    def _disagreement(self, graphs: GraphBatch, logits: torch.Tensor) -> torch.Tensor:
        """-adv D(student, teacher), [B]."""
        assert self.student is not None
        return -self.adv * self.criterion(call_convention(self.student)(graphs), logits)

    def _by_search(self, y: torch.Tensor) -> tuple[GraphBatch, float]:
        seed = (self.seed << 20) + self.calls
        drawn = start_graphs(self.teacher, self.prior, y.numel(), seed=seed).to(self.device)
        graphs, cost = GraphBatch(drawn.x, drawn.edges, y), float("nan")
        learned = None
        if self.engine != "refine":
            learned, cost = self._learned(graphs, seed)
            graphs = learned.harden(seed=seed, step=self.learn.steps)
        if self.engine != "learn":
            graphs, cost = self._refined(graphs, learned, seed)
        return graphs, cost

    def _learned(self, start: GraphBatch, seed: int) -> tuple[PseudoGraphs, float]:
        # The learner's cross-entropy has weight 1, and Adam does not see the scale of a loss.
        oh = 1.0 if self.oh is None else self.oh
        settings = replace(
            self.learn,
            steps=self.iterations or self.learn.steps,
            c_bn=self.learn.c_bn if self.bn is None else self.bn / oh,
            c_oh=self.learn.c_oh / oh,
            c_degree=self.learn.c_degree / oh,
            target_degree=self.learn.target_degree or self.prior.expected_degree,
        )
        pseudo = PseudoGraphs.from_graphs(start, feature_kind=self.prior.feature_kind).to(self.device)
        extra = None if self.adv == 0.0 else lambda graphs, logits: self._disagreement(graphs, logits) / oh
        learner = Learner(self.teacher, pseudo, settings, seed=seed, extra_loss=extra)
        terms: dict[str, torch.Tensor] = {}
        while learner.step < settings.steps:
            terms = learner.advance()
            self._report(learner.step, settings.steps, terms)
        return pseudo, oh * float(terms["loss"])

    def _refined(self, start: GraphBatch, learned: PseudoGraphs | None, seed: int) -> tuple[GraphBatch, float]:
        settings = replace(
            self.refine,
            steps=self.iterations or self.refine.steps,
            lam_k=self.refine.lam_k if self.bn is None else self.bn,
            w_ce=self.refine.w_ce if self.oh is None else self.oh,
        )
        refiner = Refiner(
            self.teacher if self.adv == 0.0 else self._contrast(),
            start,
            settings,
            seed=seed,
            feature_kind=self.prior.feature_kind,
            edge_weights=None if learned is None else (learned.layout, learned.logits.detach()),
        )
        while not refiner.finished:
            refiner.advance(min(50, settings.steps - refiner.step))
            self._report(refiner.step, settings.steps, refiner.metrics())
        result = refiner.result()
        if result.warning is not None:
            warnings.warn(result.warning, RuntimeWarning, stacklevel=4)
        return result.graphs, float(result.energy.min())

    def _contrast(self) -> Teacher:
        """Teacher logits minus adv times the student's, behind the teacher's own layers and statistics."""
        teacher, student = self.teacher, self.student
        assert student is not None
        call = call_convention(student)
        return Teacher(
            teacher.module,
            lambda graphs: teacher(graphs) - self.adv * call(graphs),
            num_features=teacher.num_features,
            num_classes=teacher.num_classes,
            accepts_edge_weight=teacher.accepts_edge_weight,
            feature_kind=teacher.feature_kind,
            has_adapter=True,
        )

    def _from_generator(self, y: torch.Tensor) -> tuple[GraphBatch, float]:
        assert self.generator is not None and self._optimizer is not None
        steps = self.iterations or 50
        self.generator.train()
        terms: dict[str, torch.Tensor] = {}
        for step in range(steps):
            graphs = self._generate(y.numel(), y)
            with_history = self._generator_terms(graphs, y)
            self._optimizer.zero_grad(set_to_none=True)
            with_history["loss"].backward()
            self._optimizer.step()
            terms = {name: term.detach() for name, term in with_history.items()}
            self._report(step + 1, steps, terms)
        with torch.no_grad():
            graphs = self._generate(y.numel(), y).detach()
        return GraphBatch(graphs.x, graphs.edges, y), float(terms["loss"])

    def _generator_terms(self, graphs: GraphBatch, y: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.hooks as hooks:
            logits = self.teacher(graphs)
            terms = {"cross_entropy": nn.functional.cross_entropy(logits, y), "batch_norm": hooks.loss()}
            for hook in hooks:
                if hook.mmt_rate > 0.0:
                    hook.update_mmt()
        terms["degree"] = degree_term(_mean_degree(graphs), self.prior.expected_degree)
        bn, oh = (1.0 if weight is None else weight for weight in (self.bn, self.oh))
        loss = oh * terms["cross_entropy"] + bn * terms["batch_norm"] + self.degree * terms["degree"]
        if self.adv > 0.0:
            terms["disagreement"] = self._disagreement(graphs, logits).mean()
            loss = loss + terms["disagreement"]
        return {**terms, "loss": loss}

    def _generate(self, count: int, y: torch.Tensor | None) -> GraphBatch:
        generator = self.generator
        if isinstance(generator, Generator):
            if generator.num_classes is not None:
                return generator(y=torch.arange(count, device=self.device) % generator.num_classes if y is None else y)
            return generator(generator.draw_z(count))
        assert generator is not None and self.nz is not None
        graphs = generator(torch.randn(count, self.nz, device=self.device))
        if not isinstance(graphs, GraphBatch):
            raise InputError(f"generator: expected a GraphBatch, got {type(graphs).__name__}")
        return graphs

    def _report(self, step: int, steps: int, values: dict[str, Any]) -> None:
        if self.progress is not None and (step % 50 == 0 or step == steps):
            self.progress(step, {name: float(value) for name, value in values.items()})


def _mean_degree(graphs: GraphBatch) -> torch.Tensor:
    """Mean degree of each graph from its edge values, [B]; differentiable."""
    size = graphs.edges.num_edges
    offsets = graphs.edges.rowptr.long()[graphs.ptr]
    return torch.segment_reduce(graphs.edges.value[:size], "sum", offsets=offsets, unsafe=True) / graphs.sizes
