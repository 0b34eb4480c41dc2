"""Batches named after the data sets whose mean node count and density they have.

Densities are those of the graphs within 20 % of the mean node count, measured on the TUDataset files (the mean over all
graphs is higher: small graphs are dense). Batches are whole training parts of the small sets, else 128 graphs or
what fills a step.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RealShape:
    """A batch of graphs of one size.

    Attributes:
        name: of the data set.
        graphs: in the batch.
        nodes: of each graph.
        density: share of node pairs that are joined.
        hubs: share of the edges that end in one of three nodes.
    """

    name: str
    graphs: int
    nodes: int
    density: float
    hubs: float = 0.0

    @property
    def pairs(self) -> int:
        return self.graphs * self.nodes * (self.nodes - 1) // 2

    @property
    def label(self) -> str:
        return f"{self.name}, {self.graphs} x {self.nodes}, density {self.density}"


REAL = {
    shape.name: shape
    for shape in (
        RealShape("MUTAG", 131, 18, 0.13),
        RealShape("PTC", 240, 14, 0.155),
        RealShape("PROTEINS", 128, 39, 0.106),
        RealShape("IMDB-B", 128, 20, 0.47),
        RealShape("COLLAB", 64, 75, 0.45),
        RealShape("REDDIT-B", 32, 430, 0.0057, hubs=0.3),
        RealShape("one big graph", 1, 3000, 0.003),
    )
}
