"""What the student of a run learns from: the pool, changed a little in every epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..graphs import GraphBatch
from ..teachers import Teacher, call_convention
from .config import RunConfig
from .perturbed import perturbed_pool
from .student import Pool, new_student
from .twins import tells_twins, twinned_pool

# Chosen on MUTAG, house or cycle and patches of labels (docs/research.md, section 18).
_TWINS = 0.3
_ASKED = 16


@dataclass(frozen=True)
class PoolChanges:
    """How the graphs of a pool differ from epoch to epoch.

    Attributes:
        perturbation: see :func:`~.perturbed.perturbed_pool`.
        twins: see :func:`~.twins.twinned_pool`.
    """

    perturbation: float
    twins: float

    @classmethod
    def decided(
        cls, teacher: Teacher, graphs: GraphBatch, config: RunConfig, student: str, *, constrained: bool = False
    ) -> PoolChanges:
        """What the settings say, and where they leave it open, what :class:`~.config.RunConfig` says of None.

        Args:
            teacher: frozen.
            graphs: the pool, some of which both models are asked about.
            config: `perturbation` and `twins` count.
            student: architecture, by name.
            constrained: whether the search had a constraint of the user's own.
        """
        share, twins = config.pool_perturbation(constrained=constrained), config.twins
        if twins is None:
            twins = _TWINS if share > 0.0 and _density_is_hidden(teacher, graphs, config, student) else 0.0
        return cls(share, twins)

    def pool(self, graphs: GraphBatch, seed: int) -> Pool:
        """The graphs so changed, anew in every epoch, or as they are."""
        return twinned_pool(perturbed_pool(graphs, self.perturbation, seed=seed), self.twins, seed=seed)


def _density_is_hidden(teacher: Teacher, graphs: GraphBatch, config: RunConfig, student: str) -> bool:
    """Whether the student sees a density that the teacher does not, and that nothing else tells."""
    # Where features are degrees start graphs tell the density, and a twin would have features that are not its degree.
    if config.prior.feature_kind == "degree":
        return False
    few = graphs.select(torch.arange(min(graphs.num_graphs, _ASKED), device=graphs.x.device))
    if tells_twins(teacher.module, teacher, few):
        return False
    fresh = new_student(teacher, student, config.seed, config.student).eval()
    return tells_twins(fresh, call_convention(fresh), few)
