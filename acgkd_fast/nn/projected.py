"""A student raised to its teacher's width, in front of the teacher's own classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import InputError, check, check_choice
from ..graphs import EdgeSample
from ..propagate import readout
from .adjacency import Edges
from .gat_conv import GATConv
from .models import READOUTS, GraphClassifier, batch_edges, build_model
from .norm import BatchNormReLU

PROJECTORS = ("gat", "linear", "none")


class Projector(nn.Module):
    """Node features of the student's width -> the teacher's.

    Args:
        kind: "gat" (graph attention), "linear", or "none" (the features as they are).
        in_width, out_width: the student's and the teacher's width; equal for "none".
        heads: of each attention layer; they share `out_width`.
        layers: attention layers, the first of which changes the width.
        relu: BatchNorm and ReLU after every attention layer; without, none after the last one. The
            teachers of the lineage have node features of 0 and above.

    Raises:
        InputError: a number out of range, widths that differ for "none", or heads that do not share `out_width`.
    """

    def __init__(
        self, kind: str, in_width: int, out_width: int, *, heads: int = 1, layers: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        check_choice("projector", kind, PROJECTORS)
        check(heads >= 1, "projector_heads", "at least 1", heads)
        check(layers >= 1, "projector_layers", "at least 1", layers)
        if kind == "none" and in_width != out_width:
            raise InputError(
                f"projector: expected 'gat' or 'linear' between a student of width {in_width} and a teacher of "
                f"width {out_width}, got 'none' (or name a student of width {out_width})"
            )
        if kind == "gat" and out_width % heads:
            raise InputError(f"projector_heads: expected a divisor of the teacher's width {out_width}, got {heads}")
        self.kind, self.heads, self.layers, self.relu = kind, heads, layers, relu
        self.linear = nn.Linear(in_width, out_width) if kind == "linear" else None
        count = layers if kind == "gat" else 0
        self.convs = nn.ModuleList(
            GATConv(out_width if i else in_width, out_width // heads, heads=heads) for i in range(count)
        )
        self.norms = nn.ModuleList(BatchNormReLU(out_width) for _ in range(count if relu else max(count - 1, 0)))

    def forward(self, h: torch.Tensor, edges: EdgeSample) -> torch.Tensor:
        """[N, in_width] -> [N, out_width]; gradients reach features, parameters and stored edges' weights."""
        if self.linear is not None:
            h = self.linear(h)
        for i, conv in enumerate(self.convs):
            h = conv(h, edges)
            if i < len(self.norms):
                h = self.norms[i](h)
        return h

    def description(self) -> dict[str, Any]:
        """The arguments but the widths."""
        return {"kind": self.kind, "heads": self.heads, "layers": self.layers, "relu": self.relu}


class LinearHead(nn.Module):
    """Readout and linear classifier, as :class:`GraphClassifier` has them: ([N, width], ptr) -> [B, classes]."""

    def __init__(self, width: int, num_classes: int, readout: str) -> None:
        super().__init__()
        check_choice("readout", readout, READOUTS)
        self.readout = readout
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, h: torch.Tensor, ptr: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.classifier(readout(h, ptr, self.readout))
        return out


class ProjectedClassifier(nn.Module):
    """Blocks of an architecture, a projector, and a frozen head that classifies the projected node features.

    Args:
        arch: of the blocks, such as "gcn3-32"; its own classifier is left out.
        num_features: width of the node features.
        num_classes: number of logits.
        projector: from the architecture's width to the head's.
        head: (node features [N, width], node offsets int64 [B + 1]) -> logits [B, num_classes]. It gets no
            gradients of its own and stays in eval mode.
        head_width: width of the node features that `head` takes.
        dropout: on the logits, in training mode.

    Raises:
        InputError: an unknown architecture or a number out of range.

    Source: SimKD, arXiv 2203.14001, and by its abstract ACGKD, arXiv 2504.00540.
    """

    def __init__(
        self,
        arch: str,
        num_features: int,
        num_classes: int,
        *,
        projector: Projector,
        head: nn.Module,
        head_width: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check(0.0 <= dropout < 1.0, "dropout", "a number in [0, 1)", dropout)
        self.arch = arch
        self.num_features = num_features
        self.num_classes = num_classes
        self.head_width = head_width
        self.blocks = build_model(arch, num_features, num_classes).blocks
        self.projector = projector
        self.head = head.requires_grad_(False).eval()
        self.dropout = nn.Dropout(dropout)

    def train(self, mode: bool = True) -> ProjectedClassifier:
        super().train(mode)
        # BatchNorm or dropout in a reused head must go on as the teacher has them.
        self.head.eval()
        return self

    def forward(
        self,
        x: torch.Tensor,
        edges: Edges,
        edge_weight: torch.Tensor | None = None,
        batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, num_classes]; arguments, gradients and errors as :meth:`GraphClassifier.forward`."""
        sample = batch_edges(x, edges, edge_weight, batch, self.num_features)
        return self.classify(self.node_features(x, sample), sample.ptr)

    def node_features(self, x: torch.Tensor, edges: EdgeSample) -> torch.Tensor:
        """Projected node features, [N, head_width]."""
        for block in self.blocks:
            x = block(x, edges)
        out: torch.Tensor = self.projector(x, edges)
        return out

    def classify(self, h: torch.Tensor, ptr: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes] from projected node features and node offsets int64 [B + 1]."""
        logits: torch.Tensor = self.dropout(self.head(h, ptr))
        return logits


Classifier = GraphClassifier | ProjectedClassifier
