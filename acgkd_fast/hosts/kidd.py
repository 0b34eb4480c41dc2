"""KiDD (KDD 2023): its function ``discretize(adj, train, epoch)``.

>>> discretize = Discretizer(seed=1234, tau=args.tau)
"""

from __future__ import annotations

import torch

from ..edges import sample_dense_edges
from .annealing import annealed


class Discretizer:
    """Binary Concrete graphs with KiDD's temperature, tau to 0.01 over 200 epochs.

    Noise is shared by both directions of a pair, the logits are taken as they are, the diagonal is drawn too.

    Args:
        seed: key of the random stream; call t draws with step t, so that an epoch's batches differ.
        tau: temperature of epoch 0.
        self_loops: False leaves the diagonal out, which KiDD does not.

    Attributes:
        calls: draws made so far; set it to resume.
    """

    def __init__(self, *, seed: int, tau: float = 1.0, self_loops: bool = True) -> None:
        self.seed = seed
        self.tau = tau
        self.self_loops = self_loops
        self.calls = 0

    def __call__(self, adj: torch.Tensor, train: bool = True, epoch: int = 0) -> torch.Tensor:
        """Relaxed graphs while distilling, graphs cut at 0.5 for use.

        Args:
            adj: logits [G, n, n].
            train: draw; otherwise cut.
            epoch: position in the schedule.

        Returns:
            [G, n, n] on the device of `adj`.

        Gradients:
            Every logit. Where it cuts with the slope of the sigmoid, where KiDD's has none.
        """
        if not train:
            return sample_dense_edges(adj, noise="none", symmetric="noise", self_loops=self.self_loops)
        self.calls += 1
        return sample_dense_edges(
            adj,
            seed=self.seed,
            step=self.calls - 1,
            temperature=annealed(self.tau, epoch),
            estimator="relaxed",
            symmetric="noise",
            self_loops=self.self_loops,
        )
