"""What start graphs should look like, found without data: the density and shape that are closest to K = 0, after a
short search or, if node features are degrees and nothing has to be searched, as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import check, is_integer
from ..pseudo_graphs import GraphPrior
from ..teachers import Teacher, as_teacher
from .pool import start_graphs
from .refine_settings import RefineSettings
from .refiner import K_WARNING, Refiner
from .statistics import BatchNormProbe, warn_without_batch_norm
from .witness import pool_witness

# Mean degrees to try, as multiples of a tree's with a few rings, up to this share of complete graphs.
_RATIO = 1.4
_FULLEST = 0.8
# K only grows from here on: graphs far too dense are the slowest to search.
_HOPELESS = 10.0
# A factor between the K of two short searches that says nothing once both have come near.
_TIE = 2.0
# Nodes and directed edges of all start graphs whose own K is asked, and how many graphs they are.
_START_NODES = 8192
_START_EDGES = 2**20
_FEWEST_STARTS, _MOST_STARTS = 8, 400
# K of other graphs drawn alike is 1.4 times as large or small (IMDB-BINARY's GIN teachers, one standard deviation), as
# a few extreme ones decide it. So this many kinds of least K are drawn so often, and an average may err by a factor.
_CONTENDERS = 6
_DRAWS = 8
_ERROR = 1.25
# From plain to special: molecules, discussion threads, and networks of collaborators of less or more unequal sizes.
_SHAPES: tuple[dict[str, Any], ...] = (
    {"hub_share": 0.0, "size_spread": 0.0, "degree_growth": 0.0, "ego_networks": False},
    {"hub_share": 0.5, "size_spread": 0.0, "degree_growth": 0.0, "ego_networks": False},
    {"hub_share": 0.0, "size_spread": 0.5, "degree_growth": 1.0, "ego_networks": True},
    {"hub_share": 0.0, "size_spread": 1.0, "degree_growth": 1.0, "ego_networks": True},
)
# Nothing is searched where features are degrees, so that more can be compared: twice as many densities, and threads of
# more or less unequal sizes.
_START_RATIO = _RATIO**0.5
_START_SHAPES = (
    *_SHAPES[:2],
    {"hub_share": 0.5, "size_spread": 0.5, "degree_growth": 0.0, "ego_networks": False},
    {"hub_share": 0.5, "size_spread": 1.0, "degree_growth": 0.0, "ego_networks": False},
    *_SHAPES[2:],
)

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Trial:
    """Start graphs of one kind, fields as in :class:`~acgkd_fast.GraphPrior`, how often they were drawn, and their K,
    searched or as they are; of several draws its geometric mean."""

    mean_degree: float
    hub_share: float
    size_spread: float
    degree_growth: float
    ego_networks: bool
    draws: int
    k: float


@dataclass(frozen=True)
class FoundPrior:
    """What was tried and what was best.

    Attributes:
        prior: the prior that was given, with nothing left unknown.
        alike: mean degrees of the plain shape that K does not tell from the best, from sparse to dense; empty where a
            mean degree was stated or features are degrees. Graphs of all of them
            (``dataclasses.replace(prior, mean_degree=alike)``) can teach a student better that sees degrees where its
            teacher does not (docs/research.md).
        tried: all trials in their order; empty where nothing was tried.
    """

    prior: GraphPrior
    tried: tuple[Trial, ...] = ()
    alike: tuple[float, ...] = ()


def find_prior(
    teacher: Teacher | nn.Module,
    prior: GraphPrior,
    *,
    num_graphs: int = 64,
    steps: int = 2000,
    seed: int = 0,
    tried: Sequence[Trial] = (),
    progress: Progress | None = None,
) -> FoundPrior:
    """Compare start graphs of several kinds by K alone, after a short search from each.

    The search proper adds and deletes few edges and no nodes, so that it ends near the density, the hubs and the sizes
    that it set out from. First come mean degrees (2.05, 2.9, 4.0 and so on, 1.4 times the last, up to 0.8 of a complete
    graph's or to ten times the least K), then shapes at the density found: plain, half of the nodes joined to a hub,
    and ego networks with sizes that spread and degrees that grow with them. Of each the one with the least K is taken;
    where that is below 0.05, the first in this order whose K is at most twice as much.

    If node features are degrees, nothing is searched: the features of start graphs are their own degrees, as those of
    the teacher's graphs were, so that K tells all densities of all shapes from each other, those that a teacher's
    normalisation by degree would hide too. Densities then are 1.18 times the last, and graphs with hubs also come with
    sizes that spread. The six kinds of least K are drawn eight times each. The best on the (geometric) average is
    taken, or, where one of a plainer shape has at most 1.25 times its K, that one.

    Args:
        teacher: a Teacher or any module that `as_teacher` accepts; stays frozen.
        prior: sizes and features. What it states stays; what is None is looked for. Stated hubs leave no room for ego
            networks, nor these for hubs.
        num_graphs, steps: of each search. With the defaults all of them together cost about a third of a search for 400
            graphs. Where nothing is searched, up to 400 graphs tell K, and at least `num_graphs` unless they have more
            than 2^20 directed edges.
        seed: of starts and searches.
        tried: trials of an earlier call with the same arguments that was cut off, which are not run again.
        progress: called after every trial with its number, how many there are at most, and the trial's fields.

    Returns:
        FoundPrior: without trials where nothing is unknown, or where the teacher has no BatchNorm; then a mean degree
        of 2.05 is assumed, and the plain shape.

    Raises:
        InputError: num_graphs or steps below 1, trials of other arguments, or a teacher whose K is never finite.

    Warns:
        RuntimeWarning: neither a stated mean degree nor BatchNorm.
    """
    check(is_integer(num_graphs) and num_graphs >= 1, "num_graphs", "at least 1", num_graphs)
    check(is_integer(steps) and steps >= 1, "steps", "at least 1", steps)
    teacher = as_teacher(teacher)
    stated = {name: getattr(prior, name) for name in _SHAPES[0] if getattr(prior, name) is not None}
    degree = prior.expected_degree if prior.mean_degree is None else prior.mean_degree
    plain = replace(prior, mean_degree=degree, **{**_SHAPES[0], **stated})
    if BatchNormProbe(teacher.module).num_layers == 0:
        if prior.mean_degree is None:
            warn_without_batch_norm(
                f"nothing tells one density from another and a mean degree of {prior.expected_degree} is assumed; "
                "state mean_degree if you know it",
                stacklevel=2,
            )
        return FoundPrior(plain)
    most = _FULLEST * ((prior.min_nodes + prior.max_nodes) / 2 - 1)
    by_starts = prior.feature_kind == "degree"
    ratio = _START_RATIO if by_starts else _RATIO
    degrees: list[Any] = [degree]
    while prior.mean_degree is None and degrees[-1] * ratio <= most:
        degrees.append(degrees[-1] * ratio)
    # A stated hub or ego network decides which of the two it is: neither means anything beside the other.
    stated = {**({"ego_networks": False} if prior.hub_share else {}), **stated}
    stated = {**stated, **({"hub_share": 0.0} if prior.ego_networks else {})}
    shapes = []
    for shape in _START_SHAPES if by_starts else _SHAPES:
        shapes += [s for s in [{**shape, **stated}] if s not in shapes]
    if len(degrees) == len(shapes) == 1:
        return FoundPrior(plain)
    kinds = len(degrees) * len(shapes)
    at_most = kinds + min(kinds, _CONTENDERS) if by_starts else len(degrees) + len(shapes)
    trials = _Trials(teacher, num_graphs, steps, seed, tried, progress, at_most)

    found, alike = plain, []
    if by_starts:
        scored: list[_Scored] = []
        for shape in shapes:
            scored += trials.sparse_to_dense(replace(plain, **shape), degrees)
        return FoundPrior(trials.best_start(scored), tuple(trials.done))
    if prior.mean_degree is None:
        alike = _nearest(trials.sparse_to_dense(plain, degrees))
        found = alike[0]
    if len(shapes) > 1:
        found = _nearest([trials.of(replace(found, **shape)) for shape in shapes])[0]
    return FoundPrior(found, tuple(trials.done), tuple(one.expected_degree for one in alike))


_Scored = tuple[GraphPrior, float]


def _nearest(scored: Sequence[_Scored]) -> list[GraphPrior]:
    """The prior of least K, or, where that is near 0, all whose K does not tell them from it."""
    least = _least(scored)
    near = _TIE * least if least <= K_WARNING else least
    return [prior for prior, k in scored if k <= near]


def _least(scored: Sequence[_Scored]) -> float:
    finite = [k for _, k in scored if math.isfinite(k)]
    check(bool(finite), "teacher", "statistics and weights that give a finite K", [k for _, k in scored])
    return min(finite)


class _Trials:
    """Start graphs and their K, each kind once, those of an earlier call not again."""

    def __init__(
        self,
        teacher: Teacher,
        num_graphs: int,
        steps: int,
        seed: int,
        tried: Sequence[Trial],
        progress: Progress | None,
        at_most: int,
    ) -> None:
        self.teacher, self.num_graphs, self.steps, self.seed = teacher, num_graphs, steps, seed
        self.done: list[Trial] = []
        self._earlier, self._progress, self._at_most = list(tried), progress, at_most

    def of(self, prior: GraphPrior, draws: int = 1) -> _Scored:
        """A prior and the K of its trial."""
        kind: dict[str, Any] = {name: getattr(prior, name) for name in _SHAPES[0]} | {"draws": draws}
        kind["mean_degree"] = round(prior.expected_degree, 2)
        for trial in self.done:
            if all(getattr(trial, name) == value for name, value in kind.items()):
                return prior, trial.k
        number = len(self.done)
        if number < len(self._earlier):
            earlier = self._earlier[number]
            same = all(getattr(earlier, name) == value for name, value in kind.items())
            check(same, "tried", f"trial {number + 1} of an earlier call with the same arguments ({kind})", earlier)
            self.done.append(earlier)
            return prior, earlier.k
        k = self._k_of_starts(prior, draws) if prior.feature_kind == "degree" else self._k_of_search(prior)
        self.done.append(Trial(**kind, k=k))
        if self._progress is not None:
            self._progress(number + 1, self._at_most, asdict(self.done[-1]))
        return prior, k

    def sparse_to_dense(self, prior: GraphPrior, degrees: Sequence[Any]) -> list[_Scored]:
        scored: list[_Scored] = []
        for degree in degrees:
            if scored and scored[-1][1] > _HOPELESS * min(k for _, k in scored):
                break
            scored.append(self.of(replace(prior, mean_degree=degree)))
        return scored

    def best_start(self, scored: Sequence[_Scored]) -> GraphPrior:
        """Those of least K are drawn again and again; of the plainest shape that is near the least, the nearest."""
        _least(scored)
        finite = [place for place, (_, k) in enumerate(scored) if math.isfinite(k)]
        contenders = sorted(sorted(finite, key=lambda place: scored[place][1])[:_CONTENDERS])
        again = [self.of(scored[place][0], _DRAWS) for place in contenders]
        least = _least(again)
        plainest = next(replace(prior, mean_degree=None) for prior, k in again if k <= _ERROR * least)
        alike = [one for one in again if replace(one[0], mean_degree=None) == plainest]
        return min(alike, key=lambda one: one[1])[0]

    def _k_of_starts(self, prior: GraphPrior, draws: int) -> float:
        mean = (prior.min_nodes + prior.max_nodes) // 2
        count = max(self.num_graphs, min(_START_NODES // mean, _MOST_STARTS))
        count = min(count, max(int(_START_EDGES / (mean * prior.expected_degree)), _FEWEST_STARTS))
        drawn = (start_graphs(self.teacher, prior, count, seed=self.seed + draw) for draw in range(draws))
        ks = torch.tensor([pool_witness(self.teacher, graphs)["k"] for graphs in drawn], dtype=torch.float64)
        return float(ks.log().mean().exp())

    def _k_of_search(self, prior: GraphPrior) -> float:
        start = start_graphs(self.teacher, prior, self.num_graphs, seed=self.seed)
        settings = RefineSettings(steps=self.steps, w_ce=0.0)
        refiner = Refiner(self.teacher, start, settings, seed=self.seed, feature_kind=prior.feature_kind)
        refiner.advance(self.steps)
        k = refiner.result().k
        assert k is not None
        return k
