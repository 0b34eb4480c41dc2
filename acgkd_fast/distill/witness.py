"""What a pool of pseudo-graphs tells about itself: how convincing the teacher finds it, and what it costs."""

from __future__ import annotations

import resource
import sys

import torch

from ..graphs import GraphBatch
from ..layout import PairLayout
from ..teachers import Teacher
from .energy import Energy


def pool_witness(teacher: Teacher, graphs: GraphBatch) -> dict[str, float]:
    """All that can be said about a pool without real graphs.

    Args:
        teacher: frozen.
        graphs: with labels y.

    Returns:
        ``k`` (where the teacher has BatchNorm), the divergence of the pool's statistics from the running ones;
        ``cross_entropy`` with the labels, in nats, mean over graphs; ``agreement``, the share of graphs to which the
        teacher gives their label.

    Raises:
        InputError: NaN or infinity in the teacher's logits or BatchNorm inputs.
    """
    energy, scores = Energy.start(1.0, 0.0, 0.0, teacher, graphs)
    found = {
        "cross_entropy": float(scores.loss.mean()),
        "agreement": float(scores.hit.double().mean()),
    }
    if energy.running is not None:
        found["k"] = float(energy.k(scores.sums.sum(0)))
    return found


def pool_size(graphs: GraphBatch, layout: PairLayout | None) -> dict[str, float]:
    """Size of a pool and of the way to it.

    Args:
        graphs: the pool.
        layout: candidates of the learning stage, None where there was none.

    Returns:
        ``graphs``, ``nodes``, ``edges`` (undirected), ``mean_degree``, ``density`` (edges over pairs of nodes of the
        same graph), ``candidates`` (learned logits) and ``peak_memory_mib`` (of the process so far, or of the device
        that the pool lives on).
    """
    nodes, edges = graphs.num_nodes, graphs.edges.num_edges // 2
    sizes = graphs.sizes
    pairs = int((sizes * (sizes - 1) // 2).sum())
    return {
        "graphs": graphs.num_graphs,
        "nodes": nodes,
        "edges": edges,
        "mean_degree": 2 * edges / max(nodes, 1),
        "density": edges / max(pairs, 1),
        "candidates": 0 if layout is None else layout.num_pairs,
        "peak_memory_mib": peak_memory(graphs.x.device) / 2**20,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: allocated by torch on a CUDA device, resident in this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
