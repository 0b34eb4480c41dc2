"""Graph attention in plain torch: the oracle of the fused kernel, with the signatures of the operators in ``ops.py``.

The matrix is given as in ``reference.py``. A node has H heads of F channels each, side by side in `sent` [N, H F]; its
score as a neighbour is leaky_relu(source_j + target_i), both [N, H].
"""

from __future__ import annotations

import torch

from ..edges.reference import compute_dtype
from .reference import rows_of

# Scores of absent edges may lie above the largest of those that are there; beyond this e^x is of no use.
STEEPEST = 30.0


def _before_slope(
    source: torch.Tensor, target: torch.Tensor, receiver: torch.Tensor, sender: torch.Tensor
) -> torch.Tensor:
    wide = compute_dtype(source.dtype)
    return source.to(wide)[sender] + target.to(wide)[receiver]


def _score(before: torch.Tensor, negative_slope: float) -> torch.Tensor:
    return torch.where(before > 0, before, negative_slope * before)


def _slope(before: torch.Tensor, negative_slope: float) -> torch.Tensor:
    return torch.where(before > 0, torch.ones_like(before), negative_slope)


def _share(score: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    return (score - highest).clamp(max=STEEPEST).exp()


def gat_propagate(
    sent: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    value: torch.Tensor,
    rowptr: torch.Tensor,
    col: torch.Tensor,
    t_rowptr: torch.Tensor | None,
    t_col: torch.Tensor | None,
    t_edge: torch.Tensor | None,
    negative_slope: float,
    add_self_loops: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out_i = sum_j alpha_ij sent_j by heads; also the largest score and the sum of shares of every row, [N, H]."""
    wide = compute_dtype(sent.dtype)
    row, heads = rows_of(rowptr), source.shape[1]
    sender, weight = col[: row.numel()].long(), value[: row.numel()].to(wide)
    nodes = torch.arange(len(sent), device=sent.device)
    score = _score(_before_slope(source, target, row, sender), negative_slope)
    own = _score(_before_slope(source, target, nodes, nodes), negative_slope)

    def largest(scores: torch.Tensor) -> torch.Tensor:
        start = own.clone() if add_self_loops else torch.full_like(own, -torch.inf)
        return start.scatter_reduce_(0, row[:, None].expand_as(scores), scores, "amax")

    highest = largest(score.masked_fill((weight == 0)[:, None], -torch.inf))
    highest = torch.where(highest == -torch.inf, largest(score), highest)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    share = weight[:, None] * _share(score, highest[row])
    total = torch.zeros_like(highest).index_add_(0, row, share)
    messages = sent.to(wide).view(len(sent), heads, sent.shape[1] // heads)
    out = torch.zeros_like(messages).index_add_(0, row, share[..., None] * messages[sender])
    if add_self_loops:
        own = _share(own, highest)
        total, out = total + own, out + own[..., None] * messages
    # Where nothing is, an edge of weight 1 would have all the attention: its slope there is that step.
    total = torch.where(total == 0, 1.0, total)
    return (out / total[..., None]).view(sent.shape).to(sent.dtype), highest, total


def gat_propagate_backward(
    grad_out: torch.Tensor,
    sent: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    highest: torch.Tensor,
    total: torch.Tensor,
    rowptr: torch.Tensor,
    col: torch.Tensor,
    t_rowptr: torch.Tensor | None,
    t_col: torch.Tensor | None,
    t_edge: torch.Tensor | None,
    negative_slope: float,
    add_self_loops: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of sent [N, H F], of both terms of the scores [N, H] and of the entries of A [E].

    With step_ij the attention that an edge of weight 1 has, d loss / d A_ij = step_ij <grad_out_i, sent_j - out_i>,
    summed over heads, and d loss / d score_ij = A_ij times that.
    """
    wide = compute_dtype(sent.dtype)
    row, heads = rows_of(rowptr), source.shape[1]
    sender, weight = col[: row.numel()].long(), value[: row.numel()].to(wide)
    g, x, mean = (h.to(wide).view(len(sent), heads, sent.shape[1] // heads) for h in (grad_out, sent, out))
    before = _before_slope(source, target, row, sender)
    step = _share(_score(before, negative_slope), highest[row]) / total[row]
    slope = step * (g[row] * (x[sender] - mean[row])).sum(-1)
    grad_value = torch.nn.functional.pad(slope.sum(1), (0, value.shape[0] - row.numel()))
    grad_score = weight[:, None] * slope * _slope(before, negative_slope)
    grad_sent = torch.zeros_like(x).index_add_(0, sender, (weight[:, None] * step)[..., None] * g[row])
    grad_source = torch.zeros_like(highest).index_add_(0, sender, grad_score)
    grad_target = torch.zeros_like(highest).index_add_(0, row, grad_score)
    if add_self_loops:
        nodes = torch.arange(len(sent), device=sent.device)
        before = _before_slope(source, target, nodes, nodes)
        own = _share(_score(before, negative_slope), highest) / total
        grad_own = own * (g * (x - mean)).sum(-1) * _slope(before, negative_slope)
        grad_sent = grad_sent + own[..., None] * g
        grad_source, grad_target = grad_source + grad_own, grad_target + grad_own
    dtype = sent.dtype
    grad_sent = grad_sent.view(sent.shape).to(dtype)
    return grad_sent, grad_source.to(dtype), grad_target.to(dtype), grad_value.to(dtype)
