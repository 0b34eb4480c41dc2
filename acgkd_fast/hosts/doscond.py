"""DosCond (KDD 2022, arXiv 2206.07746): its method ``get_discrete_graphs(adj, inference)``.

>>> agent.get_discrete_graphs = DiscreteGraphs(seed=args.seed).get_discrete_graphs
"""

from __future__ import annotations

import torch

from ..edges import sample_dense_edges
from .annealing import annealed


class DiscreteGraphs:
    """Binary Concrete graphs with DosCond's temperature, 1 to 0.01 over the first 200 calls.

    Args:
        seed: key of the random stream; call t draws with step t.
        symmetrise: average the logits with their transpose, which DosCond does for all data sets but CIFAR10.

    Attributes:
        cnt: draws made so far; set it to resume.
    """

    def __init__(self, *, seed: int, symmetrise: bool = True) -> None:
        self.seed = seed
        self.symmetric = "average" if symmetrise else "noise"
        self.cnt = 0

    def get_discrete_graphs(self, adj: torch.Tensor, inference: bool) -> torch.Tensor:
        """Relaxed graphs while condensing, graphs cut at 0.5 for use.

        Args:
            adj: logits [G, n, n].
            inference: cut instead of drawing; neither counts as a call nor anneals.

        Returns:
            [G, n, n] with a zero diagonal, on the device of `adj`.

        Gradients:
            Every logit. At inference with the slope of the sigmoid, where DosCond's has none.
        """
        if inference:
            return sample_dense_edges(adj, noise="none", symmetric=self.symmetric)
        temperature = annealed(1.0, self.cnt)
        self.cnt += 1
        return sample_dense_edges(
            adj,
            seed=self.seed,
            step=self.cnt - 1,
            temperature=temperature,
            estimator="relaxed",
            symmetric=self.symmetric,
        )
