"""DosCond's condensed graphs: logits and features in one list, and hard graphs by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..edges import sample_dense_edges
from ..errors import DataError, InputError, check_tensor
from ..graphs import EdgeSample, GraphBatch
from .pickles import load_pickle, save_pickle


def read_condensed(path: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read DosCond's ``[adj_syn, feat_syn]``.

    Returns:
        Structure logits [G, n, n] and features [G, n, d].

    Raises:
        DataError: no file, or other contents.
    """
    pair = load_pickle(path, "a list of two tensors of torch.save")
    fits = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(t, torch.Tensor) for t in pair)
    fits = fits and pair[0].dim() == 3 and pair[1].dim() == 3
    if not fits or pair[0].shape != (*pair[1].shape[:2], pair[1].shape[1]):
        raise DataError(f"{path}: expected [logits G x n x n, features G x n x d], got other things")
    if not all(t.is_floating_point() and bool(t.isfinite().all()) for t in pair):
        raise DataError(f"{path}: expected finite floating-point numbers, got others")
    return pair[0].detach(), pair[1].detach()


def write_condensed(path: str | Path, logits: torch.Tensor, features: torch.Tensor) -> None:
    """Write what :func:`read_condensed` and DosCond read, atomically.

    Raises:
        InputError: tensors that do not fit together.
        DataError: the file cannot be written.
    """
    check_tensor("features", features, shape=(None, None, None))
    graphs, nodes, _ = features.shape
    check_tensor("logits", logits, shape=(graphs, nodes, nodes))
    save_pickle(path, [t.detach().cpu().clone() for t in (logits, features)])


def to_graphs(logits: torch.Tensor, features: torch.Tensor, y: torch.Tensor | None = None) -> GraphBatch:
    """Hard graphs as DosCond tests them: logits averaged with their transpose and cut at 0, no self-loops.

    Args:
        logits, features: as :func:`read_condensed` returns them.
        y: int64 [G], labels, which the file does not hold; with `ipc` graphs per class they are
            ``torch.arange(classes).repeat_interleave(ipc)``.
    """
    return GraphBatch.from_dense(features, sample_dense_edges(logits.detach(), noise="none"), None, y)


def read_memory(path: str | Path) -> GraphBatch:
    """Read DosCond's graphs by class, ``{class: ({x, edge_index, y}, slices)}``.

    Returns:
        The graphs, class by class in the order of the file.

    Raises:
        DataError: no file, or other contents.
    """
    memory = load_pickle(path, "a dictionary of graphs by class of torch.save")
    if not isinstance(memory, dict) or not memory:
        raise DataError(f"{path}: expected a dictionary of graphs by class, got {type(memory).__name__}")
    try:
        return GraphBatch.concatenate([_class_graphs(*entry) for entry in memory.values()])
    except (InputError, KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path}: expected (x, edge_index and y, slices) of every class, got others ({reason})") from (
            error
        )


def _class_graphs(tensors: dict[str, torch.Tensor], slices: dict[str, torch.Tensor]) -> GraphBatch:
    ptr, edge_ptr = slices["x"].long(), slices["edge_index"].long()
    # Collated edges are numbered inside their graph.
    shift = ptr[:-1].repeat_interleave(edge_ptr[1:] - edge_ptr[:-1])
    edges = EdgeSample.from_edge_index(tensors["edge_index"].long() + shift, ptr)
    return GraphBatch(tensors["x"].float(), edges, tensors["y"].reshape(-1).long())


def write_memory(path: str | Path, graphs: GraphBatch) -> None:
    """Write what :func:`read_memory` and DosCond's readers take, atomically.

    Args:
        path: the file.
        graphs: labelled graphs with edge values 0 (left out) or 1, which the format does not hold.

    Raises:
        InputError: graphs without labels, or with other weights.
        DataError: the file cannot be written.
    """
    if graphs.y is None:
        raise InputError("graphs: expected labels y, got none")
    value = graphs.edges.value[: graphs.edges.num_edges].detach()
    if not bool(((value == 0) | (value == 1)).all()):
        raise InputError("graphs: expected edge values 0 or 1, got others")
    plain = GraphBatch(graphs.x.detach().cpu(), graphs.edges.drop_zeros().to("cpu"), graphs.y.cpu())
    assert plain.y is not None
    memory: dict[int, Any] = {}
    for label in plain.y.unique().tolist():
        part = plain.select((plain.y == label).nonzero().squeeze(1))
        edge_index, _ = part.to_edge_index()
        edge_ptr = part.edges.rowptr.long()[part.ptr]
        local = edge_index - part.ptr[:-1].repeat_interleave(edge_ptr[1:] - edge_ptr[:-1])
        tensors = {"x": part.x, "edge_index": local, "y": part.y}
        slices = {"x": part.ptr, "edge_index": edge_ptr, "y": torch.arange(part.num_graphs + 1)}
        memory[label] = (tensors, slices)
    save_pickle(path, memory)
