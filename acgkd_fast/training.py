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
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 10,
    stamp: dict[str, Any] | None = None,
) -> None:
    """Train a module in place; the last epoch stands, nothing is selected.

    Args:
        model: put into training mode while it learns, into eval mode at the end.
        pool: the graphs, or a function of the epoch that draws them anew.
        loss: of one mini-batch, given the graphs and their positions in the pool.
        epochs, lr, weight_decay, batch_size: Adam; lr falls linearly to 0 over the epochs.
        seed: order of the mini-batches and dropout.
        progress: called with (epoch, {"loss": mean}) after every epoch.
        checkpoint: file that holds the state every `checkpoint_every` epochs; when it is there
            already, training goes on from it and ends with the very same weights.
        stamp: JSON-able facts that a checkpoint must agree on to be continued; the numbers above
            always count among them.

    Raises:
        InputError: epochs, lr, batch_size or seed out of range, or fewer than two nodes to learn from.
        DataError: a checkpoint of another training, or one that cannot be read or written.
    """
    check(epochs >= 0, "epochs", "0 or more", epochs)
    check(lr > 0, "lr", "a number above 0", lr)
    check(batch_size >= 1, "batch_size", "at least 1", batch_size)
    check(0 <= seed < 2**40, "seed", "a number in 0..2^40-1", seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    numbers = {"epochs": epochs, "lr": lr, "weight_decay": weight_decay, "batch_size": batch_size, "seed": seed}
    stamp = {**numbers, **(stamp or {})}
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first = _restore(checkpoint, stamp, model, optimizer)
    model.train()
    for epoch in range(first, epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1.0 - epoch / epochs)
        graphs = pool(epoch) if callable(pool) else pool
        mean_loss = _run_epoch(model, graphs, loss, optimizer, batch_size, seed, epoch)
        if progress is not None:
            progress(epoch + 1, {"loss": mean_loss})
        if checkpoint is not None and (epoch + 1) % checkpoint_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(checkpoint, {"epoch": epoch + 1, "stamp": stamp, **state})
    model.eval()


def _run_epoch(
    model: nn.Module,
    graphs: GraphBatch,
    loss: BatchLoss,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    seed: int,
    epoch: int,
) -> float:
    device = graphs.x.device
    total = torch.zeros((), device=device)
    # Dropout draws from torch's global stream; the caller's stream is put back afterwards.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed << 20) + epoch)
        for positions in shuffled_batches(graphs.sizes, batch_size, seed, epoch):
            value = loss(graphs.select(positions), positions)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            total += value.detach() * positions.numel()
    return float(total) / max(graphs.num_graphs, 1)


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
