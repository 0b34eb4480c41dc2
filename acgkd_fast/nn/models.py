"""The graph classifiers of the GFKD lineage: GCN and GIN blocks with residual sums, one linear classifier."""

from __future__ import annotations

import re

import torch
from torch import nn

from ..errors import InputError, check, check_choice, check_tensor
from ..graphs import EdgeSample
from ..propagate import readout
from .adjacency import Edges, as_edges
from .gcn_conv import GCNConv
from .gin_conv import GINConv
from .norm import BatchNormReLU

READOUTS = ("sum", "mean", "max")
_ARCH = re.compile(r"(gcn|gin)(\d+)-(\d+)")


class Block(nn.Module):
    """conv -> BatchNorm -> ReLU, and + input where `residual`."""

    def __init__(self, conv: GCNConv | GINConv, width: int, residual: bool) -> None:
        super().__init__()
        self.conv = conv
        self.norm = BatchNormReLU(width)
        self.residual = residual

    def forward(self, x: torch.Tensor, edges: EdgeSample) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.conv(x, edges), x if self.residual else None)
        return out


class GraphClassifier(nn.Module):
    """Blocks, readout of the last block's node features, linear classifier, dropout on the logits.

    Build one with :func:`build_model`.

    Attributes:
        arch: name such as "gcn5-64".
        num_features, num_classes, width: extents of the input, the logits and the node features.
        readout: "sum", "mean" or "max" over the nodes of a graph.
        blocks: the message-passing blocks.
        dropout: acts on the logits.
        classifier: linear, [width] -> [num_classes].

    Source: models of GFKD, arXiv 2105.07519.
    """

    def __init__(
        self, arch: str, num_features: int, num_classes: int, *, readout: str = "sum", dropout: float = 0.5
    ) -> None:
        super().__init__()
        kind, depth, width = parse_arch(arch)
        check(num_features >= 1, "num_features", "at least 1", num_features)
        check(num_classes >= 1, "num_classes", "at least 1", num_classes)
        check_choice("readout", readout, READOUTS)
        check(0.0 <= dropout < 1.0, "dropout", "a number in [0, 1)", dropout)
        self.arch = arch
        self.num_features = num_features
        self.num_classes = num_classes
        self.width = width
        self.readout = readout
        widths = [num_features] + [width] * (depth - 1)
        self.blocks = nn.ModuleList(
            Block(_convolution(kind, before, width), width, residual=i > 0) for i, before in enumerate(widths)
        )
        self.classifier = nn.Linear(width, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        edges: Edges,
        edge_weight: torch.Tensor | None = None,
        batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of every graph.

        Args:
            x: node features [N, num_features].
            edges: an EdgeSample, which knows its graphs and weights; or int64 [2, E] with sources first.
            edge_weight: [E], only with an edge list; default ones.
            batch: int64 [N], the graph of each node in ascending order, only with an edge list;
                default one graph.

        Returns:
            [B, num_classes].

        Gradients:
            Parameters, `x` and edge weights (absent candidates too, see :func:`acgkd_fast.sample_edges`).

        Raises:
            InputError: arguments of the wrong form, or `batch` not ascending.
        """
        sample = batch_edges(x, edges, edge_weight, batch, self.num_features)
        return self.classify(self.node_features(x, sample), sample.ptr)

    def node_features(self, x: torch.Tensor, edges: EdgeSample) -> torch.Tensor:
        """Output of the last block, [N, width]."""
        for block in self.blocks:
            x = block(x, edges)
        return x

    def classify(self, h: torch.Tensor, ptr: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes] from node features [N, width] and node offsets int64 [B + 1]."""
        logits: torch.Tensor = self.dropout(self.classifier(readout(h, ptr, self.readout)))
        return logits


def parse_arch(arch: str) -> tuple[str, int, int]:
    """(kind, number of convolutions, width) of a name such as "gcn5-64", which has 4 convolutions.

    Raises:
        InputError: not of this form.
    """
    match = _ARCH.fullmatch(arch) if isinstance(arch, str) else None
    fits = match is not None and int(match[2]) >= 2 and int(match[3]) >= 1
    check(fits, "arch", "gcn or gin, convolutions + 1 (2 or more), width, as in gcn5-64", arch)
    assert match is not None
    return match[1], int(match[2]) - 1, int(match[3])


def build_model(
    arch: str, num_features: int, num_classes: int, *, readout: str = "sum", dropout: float = 0.5
) -> GraphClassifier:
    """A graph classifier by name, with fresh weights from torch's global random stream.

    Args:
        arch: (gcn|gin)(number of convolutions + 1)-(width), such as gcn5-64 or gin3-32.
        num_features: width of the node features.
        num_classes: number of classes.
        readout: "sum" (as GFKD), "mean" or "max".
        dropout: on the logits, in training mode only.

    Raises:
        InputError: an unknown architecture or a number out of range.

    >>> sum(p.numel() for p in build_model("gcn5-64", 7, 2).parameters())
    13634
    """
    return GraphClassifier(arch, num_features, num_classes, readout=readout, dropout=dropout)


def _convolution(kind: str, before: int, width: int) -> GCNConv | GINConv:
    if kind == "gcn":
        return GCNConv(before, width)
    mlp = nn.Sequential(nn.Linear(before, width), BatchNormReLU(width), nn.Linear(width, width))
    return GINConv(mlp)


def batch_edges(
    x: torch.Tensor, edges: Edges, edge_weight: torch.Tensor | None, batch: torch.Tensor | None, num_features: int
) -> EdgeSample:
    """The edges that a classifier was called with, as an EdgeSample; arguments as its ``forward`` has them."""
    check_tensor("x", x, shape=(None, num_features))
    if not isinstance(edges, EdgeSample):
        return as_edges(x, edges, edge_weight, None if batch is None else _node_offsets(x, batch))
    if batch is not None:
        raise InputError("batch: expected None beside an EdgeSample, which knows its graphs")
    return as_edges(x, edges, edge_weight)


def _node_offsets(x: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    check_tensor("batch", batch, shape=(x.shape[0],), dtypes=(torch.int64,), device=x.device)
    ascending = batch.numel() == 0 or (int(batch[0]) >= 0 and bool((batch[1:] >= batch[:-1]).all()))
    check(ascending, "batch", "graph numbers from 0 in ascending order", batch)
    return torch.nn.functional.pad(torch.bincount(batch).cumsum(0), (1, 0))
