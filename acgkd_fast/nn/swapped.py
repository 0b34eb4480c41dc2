"""The subclasses that `accelerate` gives to PyTorch Geometric's layers: our forward where it serves, else theirs."""

from __future__ import annotations

import functools
import importlib
from typing import Any, ClassVar

import torch
from torch import nn

from ..graphs import EdgeSample
from ..propagate import readout
from .adjacency import DTYPES, offsets
from .attention import attend
from .gcn_conv import convolve
from .gin_conv import sum_of_rectified, sum_with_self
from .linear import is_transformed, know_linear
from .messages import Nodes, Size
from .sage_conv import LINEAR_AGGREGATIONS, sample_and_aggregate

_STEPS = ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update")
_HOOKS = tuple(f"_{step}_forward_{when}" for step in _STEPS for when in ("pre_hooks", "hooks"))
_INTEGERS = (torch.int64, torch.int32)


class Swapped(nn.Module):
    """A layer whose class stands in for `original`.

    Attributes:
        original: the class of the layer before.
        kind: the one of the classes below that was put in front of it.
    """

    original: ClassVar[type[nn.Module]]
    kind: ClassVar[type[Swapped]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was made at run time, so copies and pickles make it anew.
        return _rebuild, (type(self).original, type(self).kind), super().__reduce_ex__(protocol)[2]


def _rebuild(original: Any, kind: Any) -> Any:
    made = swapped_type(original, kind)
    return made.__new__(made)


_types: dict[tuple[Any, Any], Any] = {}


def swapped_type(original: Any, kind: Any) -> Any:
    """The subclass of a layer's class that takes its place; it goes by the same name."""
    if (original, kind) not in _types:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        made = type(original.__name__, (kind, original), {**names, "original": original, "kind": kind})
        _types[original, kind] = made
    return _types[original, kind]


class _GCN(Swapped):
    def forward(self, x: Any, edge_index: Any, edge_weight: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(x, torch.Tensor) and _serves(self, x, edge_index, edge_weight):
            return convolve(self, x, edge_index, edge_weight)
        out: torch.Tensor = super().forward(x, edge_index, edge_weight)
        return out


class _GIN(Swapped):
    nn: nn.Module

    def forward(self, x: Nodes, edge_index: Any, size: Size = None) -> torch.Tensor:
        if _serves(self, x, edge_index):
            out: torch.Tensor = self.nn(sum_with_self(self, x, edge_index, None, size))
        else:
            out = super().forward(x, edge_index, size)
        return out


class _GINE(Swapped):
    nn: nn.Module

    def forward(
        self, x: Nodes, edge_index: Any, edge_attr: torch.Tensor | None = None, size: Size = None
    ) -> torch.Tensor:
        if isinstance(edge_attr, torch.Tensor) and edge_attr.dim() == 2 and _serves(self, x, edge_index):
            summed = sum_of_rectified(self, x, edge_index, edge_attr, size)
            out: torch.Tensor = self.nn(summed)
        else:
            out = super().forward(x, edge_index, edge_attr, size)
        return out


class _SAGE(Swapped):
    def forward(self, x: Nodes, edge_index: Any, size: Size = None) -> torch.Tensor:
        # The other aggregations are PyTorch Geometric's own either way, and nothing is gained.
        known = isinstance(edge_index, EdgeSample) or self.aggr in LINEAR_AGGREGATIONS
        if known and _serves(self, x, edge_index):
            return sample_and_aggregate(self, x, edge_index, None, size)
        out: torch.Tensor = super().forward(x, edge_index, size)
        return out


class _GAT(Swapped):
    def forward(
        self,
        x: Nodes,
        edge_index: Any,
        edge_attr: torch.Tensor | None = None,
        size: Size = None,
        return_attention_weights: bool | None = None,
    ) -> Any:
        if _serves(self, x, edge_index):
            return attend(self, x, edge_index, edge_attr, size, return_attention_weights)
        return super().forward(x, edge_index, edge_attr, size, return_attention_weights)


class _Pool(Swapped):
    mode: ClassVar[str]

    def forward(
        self,
        x: torch.Tensor,
        index: torch.Tensor | None = None,
        ptr: torch.Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
    ) -> torch.Tensor:
        plain = index is not None and ptr is None and dim_size is not None and dim in (-2, 0)
        if plain and _is_matrix(x) and not is_transformed(x):
            assert index is not None and dim_size is not None
            found = offsets(index, dim_size) if index.dim() == 1 and index.numel() == len(x) else None
            if found is not None:
                return readout(x, found, self.mode)
        out: torch.Tensor = super().forward(x, index, ptr, dim_size, dim)
        return out


class _Sum(_Pool):
    mode = "sum"


class _Mean(_Pool):
    mode = "mean"


@functools.cache
def layers() -> dict[type[nn.Module], type[Swapped]]:
    """Class of PyTorch Geometric's -> what goes in front of it; empty where that package is not installed."""
    try:
        pyg: Any = importlib.import_module("torch_geometric.nn")
    except ImportError:
        return {}
    know_linear(pyg.Linear)
    return {
        pyg.GCNConv: _GCN,
        pyg.GINConv: _GIN,
        pyg.GINEConv: _GINE,
        pyg.SAGEConv: _SAGE,
        pyg.GATConv: _GAT,
        pyg.SumAggregation: _Sum,
        pyg.MeanAggregation: _Mean,
    }


@functools.cache
def other_layers() -> tuple[type[nn.Module], ...]:
    """Base classes of the layers that we have nothing for."""
    try:
        pyg: Any = importlib.import_module("torch_geometric.nn")
    except ImportError:
        return ()
    return pyg.MessagePassing, pyg.Aggregation


def _serves(layer: Any, x: Any, edges: Any, edge_weight: torch.Tensor | None = None) -> bool:
    """Whether our forward gives what PyTorch Geometric's would; an EdgeSample is ours in any case."""
    if isinstance(edges, EdgeSample):
        return True
    if type(edges) is not torch.Tensor or edges.layout != torch.strided or edges.dtype not in _INTEGERS:
        return False
    if edges.dim() != 2 or edges.shape[0] != 2:
        return False
    features = x if isinstance(x, (tuple, list)) else (x,)
    if not all(part is None or _is_matrix(part) for part in features) or features[0] is None:
        return False
    if len(features) == 2 and layer.flow != "source_to_target":
        return False
    if edge_weight is not None and not (_is_plain(edge_weight) and edge_weight.shape == edges.shape[1:]):
        return False
    return not _is_watched(layer) and not is_transformed(features[0])


def _is_plain(x: Any) -> bool:
    # Subclasses (fake tensors, PyTorch Geometric's own) do as they like when an operator meets them.
    return type(x) in (torch.Tensor, nn.Parameter) and x.layout == torch.strided and x.dtype in DTYPES


def _is_matrix(x: Any) -> bool:
    return _is_plain(x) and x.dim() == 2


def _is_watched(layer: Any) -> bool:
    """Whether an explainer or a hook wants to see messages, which our operators do not make."""
    return bool(layer.explain) or layer.decomposed_layers != 1 or any(getattr(layer, name, None) for name in _HOOKS)
