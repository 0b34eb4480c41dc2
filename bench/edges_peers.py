"""Other ways to draw Binary Concrete edges: eager torch, compiled torch, and DosCond's. Most are dense, [B, n, n].

A way takes the problem, and uniforms only where its result is to be compared; else it draws its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import acgkd_fast as af
from acgkd_fast.edges import ops as _declares_the_operators  # noqa: F401


@dataclass(frozen=True, eq=False)
class Problem:
    """A batch of graphs of one size, logits [P] that require grad, and gradients to pull back."""

    batch: int
    nodes: int
    layout: af.PairLayout
    logits: torch.Tensor
    dense_logits: torch.Tensor
    capacity: int
    temperature: torch.Tensor
    rng: torch.Tensor

    @staticmethod
    def make(batch: int, nodes: int, density: float, device: torch.device, *, dense: bool) -> Problem:
        layout = af.PairLayout.complete([nodes] * batch, device=device)
        generator = torch.Generator(device).manual_seed(1)
        # Spread that leaves the mean probability near the density.
        logits = torch.randn(layout.num_pairs, generator=generator, device=device) * 0.5
        logits += torch.logit(torch.tensor(density, dtype=torch.float64)).item() - 0.125
        expected = 2 * float(torch.sigmoid(logits).sum(dtype=torch.float64))
        capacity = int(expected + 8 * (2 * expected) ** 0.5) + 16
        matrix = expand(logits, batch, nodes, fill=-torch.inf) if dense else logits[:0]
        rng = torch.tensor([3, 0], device=device)
        temperature = torch.ones(1, dtype=torch.float64, device=device)
        return Problem(
            batch, nodes, layout, logits.requires_grad_(), matrix.requires_grad_(), capacity, temperature, rng
        )


def expand(pairs: torch.Tensor, batch: int, nodes: int, fill: float) -> torch.Tensor:
    """[P] values of complete graphs as the strict lower triangle of [B, n, n], `fill` elsewhere."""
    matrix = pairs.new_full((batch, nodes, nodes), fill)
    row, col = torch.tril_indices(nodes, nodes, -1, device=pairs.device)
    matrix[:, row, col] = pairs.view(batch, -1)
    return matrix


def straight_through(u: torch.Tensor, logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Symmetric 0/1 adjacency with the relaxation's gradient, the usual eager formula."""
    noise = u.log() - (-u).log1p()
    soft = torch.sigmoid((logits + noise) / temperature)
    lower = (soft > 0.5).to(soft.dtype) + soft - soft.detach()
    return lower + lower.transpose(1, 2)


def eager(problem: Problem, u: torch.Tensor | None = None) -> torch.Tensor:
    logits = problem.dense_logits
    if u is None:
        u = torch.rand_like(logits).clamp_(2**-24, 1 - 2**-24)
    return straight_through(u, logits, problem.temperature.float())


_compiled = torch.compile(straight_through, dynamic=False)


def compiled(problem: Problem, u: torch.Tensor | None = None) -> torch.Tensor:
    """The same formula through torch.compile, which fuses it but for the two triangles."""
    if u is None:
        u = torch.rand_like(problem.dense_logits).clamp_(2**-24, 1 - 2**-24)
    return _compiled(u, problem.dense_logits, problem.temperature.float())


def doscond_style(problem: Problem, u: torch.Tensor | None = None) -> torch.Tensor:
    """DosCond's way (arXiv 2206.07746): uniforms of the upper triangle drawn on the CPU and written to both triangles
    of a dense matrix, which is copied over and added to dense symmetric logits; then the usual formula on all of it."""
    logits, n = problem.dense_logits, problem.nodes
    full = torch.maximum(logits, logits.mT)
    if u is None:
        row, col = torch.triu_indices(n, n)
        drawn = torch.rand(problem.batch, len(row)) * (1 - 2e-4) + 1e-4
        noise = torch.zeros(full.shape)
        noise[:, row, col] = drawn
        noise.mT[:, row, col] = drawn
        u = noise.to(logits.device)
    else:
        u = torch.where(torch.ones_like(u).tril(-1) > 0, u, u.mT)
    soft = torch.sigmoid((full + u.log() - (-u).log1p()) / problem.temperature.float())
    return (soft > 0.5).to(soft.dtype) + soft - soft.detach()


def eager_to_csr(problem: Problem, u: torch.Tensor | None = None) -> torch.Tensor:
    """Pairs instead of matrices, compacted and sorted into rows; returns the values [E]."""
    logits, layout = problem.logits, problem.layout
    if u is None:
        u = torch.rand_like(logits).clamp_(2**-24, 1 - 2**-24)
    soft = torch.sigmoid((logits + u.log() - (-u).log1p()) / problem.temperature.float())
    pair = (soft > 0.5).nonzero().squeeze(-1)
    low, high = layout.pair_nodes(pair)
    row, col = torch.cat([low, high]), torch.cat([high, low])
    order = torch.argsort(row * layout.num_nodes + col)
    torch.bincount(row, minlength=layout.num_nodes).cumsum(0)
    chosen = soft[torch.cat([pair, pair])[order]]
    return 1.0 + chosen - chosen.detach()


PEERS: dict[str, Callable[..., torch.Tensor]] = {
    "eager torch": eager,
    "eager torch to CSR": eager_to_csr,
    "torch.compile": compiled,
    "DosCond-style": doscond_style,
}


def ours(problem: Problem, estimator: str = "straight_through", capacity: int | None = None) -> af.EdgeSample:
    return af.sample_edges(
        problem.logits,
        problem.layout,
        seed=problem.rng[0],
        step=problem.rng[1],
        temperature=problem.temperature,
        estimator=estimator,
        capacity=problem.capacity if capacity is None else capacity,
    )
