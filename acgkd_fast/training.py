"""One epoch loop for teachers and students: shuffled mini-batches, Adam, linear decay, exact resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import check
from .files import load_state, save_state
from .graphs import GraphBatch

BatchLoss = Callable[[GraphBatch, torch.Tensor], torch.Tensor]
Progress = Callable[[int, dict[str, float]], None]


def shuffled_batches(num_graphs: int, batch_size: int, seed: int, epoch: int) -> Iterator[torch.Tensor]:
    """Positions of the graphs of each mini-batch; the order depends on (seed, epoch) alone."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(num_graphs, generator=generator)
    yield from order.split(batch_size)


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

    Raises:
        InputError: epochs, lr or batch_size out of range.
    """
    check(epochs >= 0, "epochs", "0 or more", epochs)
    check(lr > 0, "lr", "a number above 0", lr)
    check(batch_size >= 1, "batch_size", "at least 1", batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first = _restore(load_state(checkpoint), model, optimizer)
    model.train()
    for epoch in range(first, epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1.0 - epoch / epochs)
        graphs = pool(epoch) if callable(pool) else pool
        mean_loss = _run_epoch(model, graphs, loss, optimizer, batch_size, seed, epoch)
        if progress is not None:
            progress(epoch + 1, {"loss": mean_loss})
        if checkpoint is not None and (epoch + 1) % checkpoint_every == 0:
            save_state(checkpoint, {"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
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
    total = torch.zeros((), device=graphs.x.device)
    # Dropout draws from torch's global stream; the caller's stream is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed << 20) + epoch)
        for positions in shuffled_batches(graphs.num_graphs, batch_size, seed, epoch):
            value = loss(graphs.select(positions), positions)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            total += value.detach() * positions.numel()
    return float(total) / max(graphs.num_graphs, 1)


def _restore(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])
