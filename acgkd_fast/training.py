"""One epoch loop for teachers and students: shuffled mini-batches, Adam, linear decay, exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import DataError, InputError, check
from .files import load_state, save_state
from .graphs import GraphBatch

BatchLoss = Callable[[GraphBatch, torch.Tensor], torch.Tensor]
EpochPlan = Callable[[int, GraphBatch], "torch.Tensor | None"]
Progress = Callable[[int, dict[str, float]], None]


def shuffled_batches(sizes: torch.Tensor, batch_size: int, seed: int, epoch: int) -> list[torch.Tensor]:
    """Positions of the graphs of each mini-batch; the order depends on (seed, epoch) alone.

    A mini-batch of fewer than two nodes joins its neighbour: BatchNorm finds no variance in one row.

    Args:
        sizes: nodes of each graph, int64 [B].
        batch_size: graphs per mini-batch; joined ones have more.
        seed, epoch: key of the order.

    Raises:
        InputError: fewer than two nodes in all.
    """
    if int(sizes.sum()) < 2:
        raise InputError(f"graphs: expected at least 2 nodes in all, got {int(sizes.sum())}")
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(sizes.numel(), generator=generator)
    nodes = sizes.cpu()[order]
    batches: list[torch.Tensor] = []
    lacking = False
    for positions, counts in zip(order.split(batch_size), nodes.split(batch_size), strict=True):
        small = int(counts.sum()) < 2
        if batches and (small or lacking):
            batches[-1] = torch.cat([batches[-1], positions])
            lacking = lacking and int(sizes.cpu()[batches[-1]].sum()) < 2
        else:
            batches.append(positions)
            lacking = small
    return batches


def fit(
    model: nn.Module,
    pool: GraphBatch | Callable[[int], GraphBatch],
    loss: BatchLoss,
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 0.0,
    batch_size: int = 32,
    clip_norm: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 10,
    stamp: dict[str, Any] | None = None,
    companion: nn.Module | None = None,
    begin_epoch: EpochPlan | None = None,
    measure: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Train a module in place; the last epoch stands, nothing is selected.

    Args:
        model: put into training mode while it learns, into eval mode at the end.
        pool: the graphs, or a function of the epoch that draws them anew.
        loss: of one mini-batch, given the graphs and their positions in the pool.
        epochs, lr, weight_decay, batch_size: Adam; lr falls linearly to 0 over the epochs.
        clip_norm: the gradient of all parameters together is shortened to this length; 0 leaves it as it is.
        seed: order of the mini-batches and dropout.
        progress: called with (epoch, {"loss": mean}) after every epoch, and with what `measure` returns.
        checkpoint: file that holds the state every `checkpoint_every` epochs; when it is there
            already, training goes on from it and ends with the very same weights.
        stamp: JSON-able facts that a checkpoint must agree on to be continued; the numbers above
            always count among them.
        companion: parameters that learn beside the model's, by the same optimizer, such as a temperature's;
            part of the checkpoint.
        begin_epoch: called with (epoch from 0, graphs) before every epoch; returns the positions of the
            graphs that the epoch visits, int64, or None for all.
        measure: called after every epoch.

    Raises:
        InputError: epochs, lr, batch_size or seed out of range, or fewer than two nodes to learn from.
        DataError: a checkpoint of another training, or one that cannot be read or written.
    """
    check(epochs >= 0, "epochs", "0 or more", epochs)
    check(lr > 0, "lr", "a number above 0", lr)
    check(batch_size >= 1, "batch_size", "at least 1", batch_size)
    check(0 <= seed < 2**40, "seed", "a number in 0..2^40-1", seed)
    check(clip_norm >= 0, "clip_norm", "a number of 0 or more", clip_norm)
    learners = nn.ModuleList([model] if companion is None else [model, companion])
    learned = [parameter for parameter in learners.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=lr, weight_decay=weight_decay, fused=True)
    numbers = {"epochs": epochs, "lr": lr, "weight_decay": weight_decay, "batch_size": batch_size, "seed": seed}
    stamp = {**numbers, "clip_norm": clip_norm, **(stamp or {})}
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first = _restore(checkpoint, stamp, learners, optimizer)
    model.train()
    for epoch in range(first, epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1.0 - epoch / epochs)
        graphs = pool(epoch) if callable(pool) else pool
        visited = None if begin_epoch is None else begin_epoch(epoch, graphs)
        mean_loss = _run_epoch(graphs, visited, loss, optimizer, learned, batch_size, clip_norm, seed, epoch)
        figures = {} if measure is None else measure()
        if progress is not None:
            progress(epoch + 1, {"loss": mean_loss, **figures})
        if checkpoint is not None and (epoch + 1) % checkpoint_every == 0:
            state = {"model": learners.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(checkpoint, {"epoch": epoch + 1, "stamp": stamp, **state})
    model.eval()


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, graphs: GraphBatch, call: Callable[[GraphBatch], Any]) -> None:
    """Set the statistics of every BatchNorm that learns to those of all the graphs together.

    Running averages lag behind the weights and are those of mini-batches, each with its own noise; a sum over
    the nodes of a graph turns a small shift of them into a large one of the logits.

    Args:
        model: in eval mode; stays in it.
        graphs: those of one epoch, all of them; one pass holds them at once.
        call: runs the model on them.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d) and layer.running_mean is not None]
    norms = [layer for layer in norms if layer.weight is None or layer.weight.requires_grad]
    momenta = [layer.momentum for layer in norms]
    try:
        for layer in norms:
            layer.train()
            layer.momentum = 1.0
        call(graphs)
    finally:
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.eval()
            layer.momentum = momentum


def _run_epoch(
    graphs: GraphBatch,
    visited: torch.Tensor | None,
    loss: BatchLoss,
    optimizer: torch.optim.Optimizer,
    learned: list[nn.Parameter],
    batch_size: int,
    clip_norm: float,
    seed: int,
    epoch: int,
) -> float:
    device = graphs.x.device
    positions = torch.arange(graphs.num_graphs) if visited is None else visited.cpu()
    total = torch.zeros((), device=device)
    # Dropout draws from torch's global stream; the caller's stream is put back afterwards.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed << 20) + epoch)
        for part in shuffled_batches(graphs.sizes.cpu()[positions], batch_size, seed, epoch):
            chosen = positions[part]
            value = loss(graphs.select(chosen), chosen)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            if clip_norm:
                nn.utils.clip_grad_norm_(learned, clip_norm)
            optimizer.step()
            total += value.detach() * chosen.numel()
    return float(total) / max(positions.numel(), 1)


def _restore(checkpoint: Path, stamp: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    state = load_state(checkpoint)
    earlier = state.get("stamp", {})
    for name, value in stamp.items():
        if earlier.get(name) != value:
            raise DataError(
                f"{checkpoint}: expected the state of a training with {name} {value}, got {earlier.get(name)}"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])
