"""All settings of a distillation run, and their JSON form."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, InputError, check, is_integer, is_number
from ..pseudo_graphs import GraphPrior
from .curriculum import CurriculumSettings
from .inversion import LearnSettings
from .refine import RefineSettings
from .student_settings import StudentSettings
from .temperature import AdversarySettings

# Mean nodes of the largest graphs that the number of steps was chosen on, and what more steps may cost.
_NODES = 25
_LONGEST = 4.0
# Of IMDB-BINARY's graphs (docs/research.md, section 16).
_START_SHARE = 0.5
# Chosen on MUTAG, IMDB-BINARY and house or cycle (section 13).
_PERTURBATION = 0.2


@dataclass(frozen=True)
class RunConfig:
    """Settings of one run; defaults were chosen by measurement (``docs/results.md``).

    Attributes:
        num_graphs: pseudo-graphs in the pool.
        seed: seed of everything random in the run.
        xi: spatial complexity parameter of the learning stage, in (0, 1].
        prior: what is assumed about the teacher's graphs.
        prior_steps: of each short search for what the prior does not state, such as its mean degree
            (:func:`~.prior_search.find_prior`); 0 leaves it out, also where features are
            degrees and nothing is searched.
        scale_steps: whether ``refine.steps``, chosen on graphs of up to 25 nodes, are taken in proportion to the mean
            number of nodes of larger ones, up to four times (:attr:`search`); False takes them as they are.
        learn: the gradient stage; ``steps = 0`` leaves it out.
        refine: the search over hard graphs; ``steps = 0`` leaves it out. Labels are dealt after a quarter of it.
        start_share: share of the pool that stays as it starts, in [0, 1]; the others are searched. Where node features
            are degrees, the search takes them for labels that it may change, so that its graphs lose what start graphs
            have: features that are the degrees of their nodes (docs/research.md, section 16). None: see
            :meth:`kept_share`. Not with a learning stage. Graphs that stay have the teacher's answers as labels;
            without a search (``refine.steps = 0``) all stay.
        perturbation: the largest probability with which, anew in every epoch of the student, an edge or a node's
            features change (:func:`~.perturbed.perturbed_pool`), so that it cannot learn the pool by heart; 0 teaches
            the pool as it is. None: see :meth:`pool_perturbation`. With ``student.redraw`` the graphs are drawn anew
            in its place.
        twins: the largest probability with which, anew in every epoch, a node gets a twin in a second copy of the
            pool, in [0, 1] (:func:`~.twins.twinned_pool`); 0 leaves that copy out. None: 0.3 in perturbed pools whose
            teacher has the same node features when all nodes have twins, so that it cannot tell a density, and whose
            student has not; 0 elsewhere, and where features are degrees, which a twin's are not. Not with
            ``student.redraw``.
        student: training of the student.
    """

    num_graphs: int = 400
    seed: int = 0
    xi: float = 1.0
    prior_steps: int = 2000
    scale_steps: bool = True
    prior: GraphPrior = field(default_factory=GraphPrior)
    learn: LearnSettings = field(default_factory=lambda: LearnSettings(steps=0))
    refine: RefineSettings = field(default_factory=lambda: RefineSettings(unlabelled=0.25))
    start_share: float | None = None
    perturbation: float | None = None
    twins: float | None = None
    student: StudentSettings = field(default_factory=StudentSettings)

    def __post_init__(self) -> None:
        check(self.num_graphs >= 1, "num_graphs", "at least 1", self.num_graphs)
        check(0.0 < self.xi <= 1.0, "xi", "a number in (0, 1]", self.xi)
        steps = self.prior_steps
        check(is_integer(steps) and steps >= 0, "prior_steps", "0 or more", steps)
        share = self.perturbation
        fits = share is None or (is_number(share) and 0.0 <= share < 1.0)
        check(fits, "perturbation", "None or a number in [0, 1)", share)
        twins = self.twins
        fits = twins is None or (is_number(twins) and 0.0 <= twins <= 1.0)
        check(fits, "twins", "None or a number in [0, 1]", twins)
        check(not (twins and self.student.redraw), "twins", "None or 0 with student.redraw", twins)
        check(isinstance(self.scale_steps, bool), "scale_steps", "True or False", self.scale_steps)
        kept = self.start_share
        fits = kept is None or (is_number(kept) and 0.0 <= kept <= 1.0)
        check(fits, "start_share", "None or a number in [0, 1]", kept)
        check(not kept or self.learn.steps == 0, "start_share", "None or 0 with a learning stage", kept)
        if self.student.redraw and (self.learn.steps == 0 or self.refine.steps > 0):
            raise InputError(
                "student.redraw: expected a learning stage and no refinement, whose hard graphs cannot be drawn anew, "
                f"got learn.steps={self.learn.steps}, refine.steps={self.refine.steps}"
            )

    @property
    def search(self) -> RefineSettings:
        """The search's settings with the steps that it takes."""
        if not self.scale_steps:
            return self.refine
        mean = (self.prior.min_nodes + self.prior.max_nodes) / 2
        factor = min(max(mean / _NODES, 1.0), _LONGEST)
        return dataclasses.replace(self.refine, steps=round(factor * self.refine.steps))

    def kept_share(self, *, constrained: bool = False) -> float:
        """`start_share`, or where that is None a half where node features are degrees, and 0 elsewhere.

        Without a search it is 1. It is 0 after a learning stage, and where the user bounds degrees or states a
        constraint, which start graphs need not keep to.

        Args:
            constrained: whether the search has a constraint of the user's own.
        """
        if self.refine.steps == 0 and self.learn.steps == 0:
            return 1.0
        if self.start_share is not None:
            return self.start_share
        all_searched = self.prior.feature_kind != "degree" or self.learn.steps > 0 or self._is_bounded(constrained)
        return 0.0 if all_searched else _START_SHARE

    def _is_bounded(self, constrained: bool) -> bool:
        return constrained or self.refine.keep_degrees or self.refine.max_degree is not None

    def pool_perturbation(self, *, constrained: bool = False) -> float:
        """`perturbation`, or where that is None 0.2, and 0 for graphs that must stay as they are.

        Perturbed graphs need not keep what the search had to: neither degrees, nor a constraint, nor (by default)
        connectivity. Who bounds degrees or states a constraint gets a pool that keeps to it.

        Args:
            constrained: whether the search has a constraint of the user's own.
        """
        if self.perturbation is not None:
            return self.perturbation
        return 0.0 if self._is_bounded(constrained) else _PERTURBATION

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Build from nested dictionaries; missing settings keep their defaults.

        Raises:
            InputError: an unknown setting, or a value outside its range.
        """
        return _build(cls, values, "config", cls())

    @classmethod
    def from_file(cls, path: Path) -> RunConfig:
        """Read a JSON file: the settings alone, or the ``config.json`` of an earlier run.

        Raises:
            DataError: a missing file or one that is no JSON object.
        """
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise DataError(f"config: expected a JSON file, got no file at {path}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"config: expected JSON, got {path} ({error})") from error
        if not isinstance(values, dict):
            raise DataError(f"config: expected a JSON object, got {type(values).__name__} in {path}")
        return cls.from_dict(values.get("settings", values))

    def with_settings(self, changes: dict[str, Any]) -> RunConfig:
        """A copy with some settings changed, named by dotted path, such as ``{"refine.steps": 1000}``."""
        values = self.to_dict()
        for path, value in changes.items():
            *folders, last = path.split(".")
            target = values
            for name in folders:
                target = target[name]
            # A later path may lead into this value, which is the caller's.
            target[last] = copy.deepcopy(value)
        return self.from_dict(values)


def _build(cls: type[Any], values: dict[str, Any], where: str, defaults: Any) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise InputError(f"{where}: expected settings among {', '.join(fields)}, got {', '.join(unknown)}")
    arguments = {name: getattr(defaults, name) for name in fields}
    for name, value in values.items():
        nested = _NESTED.get(name)
        if nested and not isinstance(value, dict):
            raise InputError(f"{where}.{name}: expected an object of settings, got {value!r}")
        arguments[name] = _build(nested, value, f"{where}.{name}", arguments[name]) if nested else value
    try:
        return cls(**arguments)
    except TypeError as error:
        raise InputError(f"{where}: expected settings of the documented types, got {values} ({error})") from error


_NESTED: dict[str, type[Any]] = {
    "prior": GraphPrior,
    "learn": LearnSettings,
    "refine": RefineSettings,
    "student": StudentSettings,
    "curriculum": CurriculumSettings,
    "adversary": AdversarySettings,
}
