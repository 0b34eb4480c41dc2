"""DFAD-GNN (Zhuang et al., IJCAI 2022, arXiv 2205.03811): a generator against teacher and student.

In its manner: public code cuts the generator's gradient at the threshold of the edges and the argmax of the
nodes; here both are straight-through, so that the generator really trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..distill.student import new_student
from ..edges import sample_edges
from ..errors import check
from ..graphs import GraphBatch
from ..layout import PairLayout
from ..pseudo_graphs import GraphPrior
from ..teachers import Teacher

_LATENT = 32
_WIDTHS = (64, 128, 256)
_FACTOR = 16


@dataclass(frozen=True)
class DFADSettings:
    """Settings of the public code.

    Attributes:
        epochs: rounds of student and generator steps.
        student_steps, generator_steps: per epoch.
        batch_size: graphs per step.
        lr: of both Adams.
        dropout: in the generator.
    """

    epochs: int = 100
    student_steps: int = 5
    generator_steps: int = 5
    batch_size: int = 128
    lr: float = 5e-3
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        check(self.batch_size >= 2, "batch_size", "at least 2", self.batch_size)


class DFADGenerator(nn.Module):
    """z [B, 32] -> MLP of widths 64, 128, 256 with Tanh -> node logits and factors -> graphs of n nodes.

    Edges have the logit z_i . z_j + b of node factors; b is learned and starts at the prior's mean degree.

    Args:
        num_nodes: n, of every graph.
        num_features: width of the node features.
        feature_kind: "one-hot" and "degree" features are drawn by argmax with straight-through gradient,
            "continuous" ones are values, "constant" ones are ones.
        mean_degree: where the density starts.
        dropout: between the layers.
    """

    def __init__(
        self, num_nodes: int, num_features: int, feature_kind: str, *, mean_degree: float, dropout: float = 0.1
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = _LATENT
        for wider in _WIDTHS:
            layers += [nn.Linear(width, wider), nn.Tanh(), nn.Dropout(dropout)]
            width = wider
        self.body = nn.Sequential(*layers)
        self.nodes = nn.Linear(width, num_nodes * num_features)
        self.factors = nn.Linear(width, num_nodes * _FACTOR)
        density = min(mean_degree / max(num_nodes - 1, 1), 0.99)
        self.bias = nn.Parameter(torch.logit(torch.tensor(density)))
        self.num_nodes, self.num_features, self.feature_kind = num_nodes, num_features, feature_kind

    def forward(self, z: torch.Tensor, *, seed: int, step: int) -> GraphBatch:
        """Graphs for the latent points z [B, 32]; edges drawn with key `seed` and counter word `step`."""
        hidden = self.body(z)
        count, n = z.shape[0], self.num_nodes
        factors = self.factors(hidden).view(count, n, _FACTOR)
        layout = PairLayout.complete([n] * count, device=z.device)
        row, col = PairLayout.complete([n], device=z.device).pair_nodes()
        products = torch.bmm(factors, factors.transpose(1, 2)) / _FACTOR**0.5 + self.bias
        logits = products[:, row, col].reshape(-1)
        edges = sample_edges(logits, layout, seed=seed, step=step)
        return GraphBatch(self._features(hidden, count), edges)

    def _features(self, hidden: torch.Tensor, count: int) -> torch.Tensor:
        if self.feature_kind == "constant":
            return hidden.new_ones(count * self.num_nodes, self.num_features)
        raw = self.nodes(hidden).view(count * self.num_nodes, self.num_features)
        if self.feature_kind == "continuous":
            return raw
        soft = raw.softmax(-1)
        hard = nn.functional.one_hot(soft.argmax(-1), self.num_features).to(soft.dtype)
        return hard + soft - soft.detach()


def dfad(
    teacher: Teacher,
    prior: GraphPrior,
    student: str = "gcn3-32",
    settings: DFADSettings | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[nn.Module, DFADGenerator]:
    """Train a student against a generator that seeks graphs where it disagrees with the teacher.

    Student steps minimise the L1 distance of the logits, generator steps maximise that of the softmax outputs.

    Args:
        teacher: stays frozen; must take edge weights, through which the generator learns.
        prior: all graphs have `max_nodes` nodes (the public code has 40); mean degree and kind of features.
        student: architecture by name.
        settings: see :class:`DFADSettings`.
        seed: seed of everything drawn.
        progress: called with (epoch, losses).

    Returns:
        (student, generator), both in eval mode.

    Raises:
        InputError: a teacher that takes no edge weights.
    """
    settings = settings or DFADSettings()
    check(teacher.accepts_edge_weight, "teacher", "a module that takes edge weights", type(teacher.module).__name__)
    model = new_student(teacher, student, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = DFADGenerator(
            prior.max_nodes,
            teacher.num_features,
            prior.feature_kind,
            mean_degree=prior.expected_degree,
            dropout=settings.dropout,
        )
        student_optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
        generator_optimizer = torch.optim.Adam(generator.parameters(), lr=settings.lr)
        model.train()
        draw = 0
        for epoch in range(settings.epochs):
            for _ in range(settings.student_steps):
                with torch.no_grad():
                    graphs = generator(torch.randn(settings.batch_size, _LATENT), seed=seed, step=draw)
                    target = teacher(graphs)
                gap = nn.functional.l1_loss(model(graphs.x, graphs.edges), target)
                student_optimizer.zero_grad(set_to_none=True)
                gap.backward()
                student_optimizer.step()
                draw += 1
            for _ in range(settings.generator_steps):
                graphs = generator(torch.randn(settings.batch_size, _LATENT), seed=seed, step=draw)
                target, answer = teacher(graphs).softmax(-1), model(graphs.x, graphs.edges).softmax(-1)
                adversarial = -nn.functional.l1_loss(answer, target)
                generator_optimizer.zero_grad(set_to_none=True)
                adversarial.backward()
                generator_optimizer.step()
                draw += 1
            if progress is not None:
                progress(epoch + 1, {"student": float(gap.detach()), "generator": float(adversarial.detach())})
    return model.eval(), generator.eval()
