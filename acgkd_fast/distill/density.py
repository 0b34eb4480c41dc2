"""The density of the pseudo-graphs, found without data: where a short search comes closest to K = 0, and, if the
features are degrees, what the labels say that a longer one needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..errors import check, is_integer
from ..pseudo_graphs import GraphPrior
from ..teachers import Teacher, as_teacher
from .pool import start_graphs
from .refine_settings import RefineResult, RefineSettings
from .refiner import K_WARNING, Refiner
from .statistics import BatchNormProbe, warn_without_batch_norm

# Mean degrees to try, as multiples of a tree's with a few rings, up to this share of complete graphs.
_RATIO = 1.4
_FULLEST = 0.8
# K only grows from here on: graphs far too dense are the slowest to search.
_HOPELESS = 10.0
# A factor between the K of two short searches that says nothing once both have come near.
_TIE = 2.0
# Labels settle long after K has told one density from another.
_LABEL_STEPS = 3


@dataclass(frozen=True)
class Density:
    """What was tried and what was best.

    Attributes:
        mean_degree: of the sparsest start graphs whose short search came as near to K = 0 as any, or `label_degree` if
            that is more.
        tried: (mean degree, K) of each trial, from sparse to dense; empty where nothing was tried.
        label_degree: median of the labels after a longer search, where labels are degrees; None where they are not,
            or where K stayed so high that they mean little.
    """

    mean_degree: float
    tried: tuple[tuple[float, float], ...]
    label_degree: float | None = None


def find_density(
    teacher: Teacher | nn.Module,
    prior: GraphPrior,
    *,
    num_graphs: int = 64,
    steps: int = 2000,
    seed: int = 0,
    tried: Sequence[tuple[float, float]] = (),
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Density:
    """Search from start graphs of several densities, by K alone, and compare how far each comes.

    The search proper adds and deletes few edges, so that it ends near the density it set out from. A teacher whose
    layers normalise by degree hides density from K. If its features are one-hot degrees, it still tells them: K fixes
    how often each label occurs, whatever the edges, and the median of a pool's labels is a degree of the graphs that
    the teacher learned from. (Its mean is none: labels that the teacher never saw cost little and occur too often.)

    Args:
        teacher: a Teacher or any module that `as_teacher` accepts; stays frozen.
        prior: sizes and features. Where it states a mean degree, that is the answer.
        num_graphs, steps: of each search; the one for labels takes three times as many steps. With the defaults all of
            them together cost about a quarter of a search for 400 graphs.
        seed: of starts and searches.
        tried: trials of an earlier call that was cut off, which are not run again.
        progress: called after every trial with its number, how many there are at most, and ``tried`` (the mean degree)
            and ``k``.

    Returns:
        Density: of mean degrees 2.05, 2.9, 4.0 and so on, 1.4 times the last, up to 0.8 of a complete graph's or to
        ten times the least K, the one with the least K; where that is below 0.05, the first whose K is at most twice as
        much. The labels' (at most 0.8 of a complete graph's, too) if that is more. The first where the teacher has no
        BatchNorm.

    Raises:
        InputError: num_graphs or steps below 1.

    Warns:
        RuntimeWarning: neither a stated mean degree nor BatchNorm.
    """
    check(is_integer(num_graphs) and num_graphs >= 1, "num_graphs", "at least 1", num_graphs)
    check(is_integer(steps) and steps >= 1, "steps", "at least 1", steps)
    teacher = as_teacher(teacher)
    if prior.mean_degree is not None or BatchNormProbe(teacher.module).num_layers == 0:
        if prior.mean_degree is None:
            warn_without_batch_norm(
                f"nothing tells one density from another and a mean degree of {prior.expected_degree} is assumed; "
                "state mean_degree if you know it",
                stacklevel=2,
            )
        return Density(prior.expected_degree, ())
    most = _FULLEST * ((prior.min_nodes + prior.max_nodes) / 2 - 1)
    degrees = [prior.expected_degree]
    while degrees[-1] * _RATIO <= most:
        degrees.append(degrees[-1] * _RATIO)

    def search(degree: float, steps: int) -> RefineResult:
        start = start_graphs(teacher, replace(prior, mean_degree=degree), num_graphs, seed=seed)
        settings = RefineSettings(steps=steps, w_ce=0.0)
        refiner = Refiner(teacher, start, settings, seed=seed, feature_kind=prior.feature_kind)
        refiner.advance(steps)
        return refiner.result()

    trials: list[tuple[float, float]] = []
    for number, degree in enumerate(degrees):
        if trials and trials[-1][1] > _HOPELESS * min(k for _, k in trials):
            break
        if number < len(tried):
            trials.append(tried[number])
            continue
        found = search(degree, steps).k
        assert found is not None
        trials.append((round(degree, 2), found))
        if progress is not None:
            progress(number + 1, len(degrees), {"tried": trials[-1][0], "k": found})
    least = min(k for _, k in trials)
    near = least * _TIE if least <= K_WARNING else least
    best = next(degree for degree, k in trials if k <= near)
    if prior.feature_kind != "degree":
        return Density(best, tuple(trials))
    longer = search(best, _LABEL_STEPS * steps)
    if longer.k is None or longer.k > K_WARNING:
        return Density(best, tuple(trials))
    labelled = float(longer.graphs.x.argmax(1).median())
    return Density(max(best, min(labelled, most)), tuple(trials), labelled)
