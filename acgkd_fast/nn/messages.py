"""Senders, receivers and what passes between them: shared by the layers that take pairs of node features."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..errors import InputError, check, check_tensor, fail
from ..graphs import EdgeSample
from ..propagate import gin_propagate
from .adjacency import EdgeList, Edges, check_range, check_sample, edge_list, entry_rows, matrix_rows, sorted_edges

Size = tuple[int | None, int | None] | None
Nodes = torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]


class Ends(NamedTuple):
    """Node features of both ends of the edges.

    Attributes:
        senders: [..., N_s, F_s].
        receivers: [..., N_r, F_r], or None.
        num_receivers: N_r.
    """

    senders: torch.Tensor
    receivers: torch.Tensor | None
    num_receivers: int


class Entries(NamedTuple):
    """Messages to be sent: int64 [E] senders and receivers, weights [E] or None for ones, features or None."""

    sender: torch.Tensor
    receiver: torch.Tensor
    weight: torch.Tensor | None
    attr: torch.Tensor | None


def both_ends(x: Nodes, size: Size, flow: str, edges: Edges = None) -> Ends:
    """One tensor for all nodes, or (senders, receivers or None), checked against `size`.

    Receivers without features are as many as `size` says, else as many as a sparse matrix has rows.

    Raises:
        InputError: no such thing, sizes that disagree, or a pair beside a reversed flow.
    """
    if isinstance(x, torch.Tensor):
        check(x.dim() >= 2, "x", "a tensor of shape (..., any, any)", x)
        ends = Ends(x, x, x.shape[-2])
    else:
        pair = isinstance(x, (tuple, list)) and len(x) == 2 and isinstance(x[0], torch.Tensor)
        check(pair, "x", "a tensor, or a pair of tensors of which the second may be None", x)
        senders, receivers = x
        check(flow == "source_to_target", "x", "one tensor where flow is target_to_source", "a pair")
        if receivers is not None:
            check(isinstance(receivers, torch.Tensor), "x", "a tensor or None as second of the pair", receivers)
            ends = Ends(senders, receivers, receivers.shape[-2])
        else:
            given = matrix_rows(edges) if size is None else size[1]
            ends = Ends(senders, None, senders.shape[-2] if given is None else given)
    have = ends.senders.shape[-2], ends.num_receivers
    if size is not None:
        fits = len(size) == 2 and all(want is None or want == got for want, got in zip(size, have, strict=True))
        check(fits, "size", f"{have}, as x has it", size)
    return ends


def handed_out(out: torch.Tensor) -> torch.Tensor:
    """The result of an operator that keeps it for backward, as a tensor that may be written to."""
    return out.clone() if out.requires_grad else out


def check_widths(x: Nodes, in_channels: int | tuple[int, int]) -> None:
    """Raise InputError unless features have a layer's widths; -1 stands for any."""
    widths = in_channels if isinstance(in_channels, (tuple, list)) else (in_channels, in_channels)
    for part, width in zip(x if isinstance(x, (tuple, list)) else (x, x), widths, strict=False):
        if part is not None:
            check_features("x", part, width)


def check_features(name: str, x: Any, width: int) -> None:
    """Raise InputError unless `x` is [..., N, width]; a width of -1 stands for any."""
    check(isinstance(x, torch.Tensor), name, "a torch.Tensor", x)
    if x.dim() <= 2:
        check_tensor(name, x, shape=(None, None if width == -1 else width))
    else:
        check(width in (-1, x.shape[-1]), name, f"a tensor of shape (..., any, {width})", x)


def split_size(edge_weight: Any, size: Size) -> tuple[torch.Tensor | None, Size]:
    """PyTorch Geometric has the size where we have the edge weight; a tuple can only be the former."""
    if isinstance(edge_weight, (tuple, list)):
        return None, tuple(edge_weight)
    return edge_weight, size


def matrix(ends: Ends, edges: Edges, edge_weight: torch.Tensor | None, flow: str) -> tuple[EdgeSample, bool]:
    """The edges as a square CSR matrix over max(N_s, N_r) nodes, and whether they came with weights."""
    if isinstance(edges, EdgeSample):
        check_square(ends, edges, edge_weight)
        return edges, True
    given = edge_list(edges, edge_weight)
    check_weights_only(given)
    made = sorted_edges(given.ends, ends.senders.shape[-2], ends.num_receivers, flow=flow)
    return made.sample(given.weight, ends.senders.dtype), given.weight is not None


def check_weights_only(given: EdgeList) -> None:
    if given.attr is not None:
        raise InputError(f"edge_index: expected one weight per entry, got values of shape {tuple(given.attr.shape)}")


def check_square(ends: Ends, edges: EdgeSample, edge_weight: torch.Tensor | None) -> None:
    check_sample(ends.senders.movedim(-2, 0), edges, edge_weight)
    if ends.num_receivers != edges.num_nodes:
        raise fail("x", f"{edges.num_nodes} receivers (the EdgeSample's)", ends.receivers)


def neighbour_sum(x: torch.Tensor, edges: EdgeSample, num_receivers: int) -> torch.Tensor:
    """A x for x [..., N_s, F], with the receivers' rows alone: [..., N_r, F]."""
    if x.dim() > 2:
        nodes_first = x.movedim(-2, 0)
        out = neighbour_sum(nodes_first.flatten(1), edges, num_receivers)
        return out.view(num_receivers, *nodes_first.shape[1:]).movedim(0, -2)
    missing = edges.num_nodes - x.shape[0]
    if missing > 0:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    out = gin_propagate(x, edges, eps=-1.0)
    return out if num_receivers == edges.num_nodes else out[:num_receivers]


def entries_of(
    ends: Ends, edges: Edges, edge_attr: torch.Tensor | None, edge_weight: torch.Tensor | None, flow: str
) -> Entries:
    """Edges of any form as messages, in the order in which they were given.

    Raises:
        InputError: edges, weights or features of the wrong form, or features beside a matrix that holds some.
    """
    if isinstance(edges, EdgeSample):
        check_square(ends, edges, edge_weight)
        found = Entries(edges.col.long(), entry_rows(edges), edges.value, edge_attr)
    else:
        given = edge_list(edges, edge_weight)
        check(given.attr is None or edge_attr is None, "edge_attr", "None beside a matrix with features", edge_attr)
        index = given.ends.long()
        sender, receiver = index if flow == "source_to_target" else index.flip(0)
        found = Entries(sender, receiver, given.weight, given.attr if edge_attr is None else edge_attr)
    if found.attr is not None:
        check_tensor("edge_attr", found.attr, device=found.sender.device)
        rows = len(found.sender)
        if found.attr.dim() < 1 or found.attr.shape[0] != rows:
            raise fail("edge_attr", f"{rows} rows", found.attr)
    return found


def gather(x: torch.Tensor, ends: Ends, entries: Entries) -> torch.Tensor:
    """Features of the sender of each message, [..., E, F]."""
    try:
        return x.index_select(-2, entries.sender)
    except (IndexError, RuntimeError):
        check_range("senders (first row)", entries.sender, ends.senders.shape[-2])
        raise


def reduce_messages(messages: torch.Tensor, ends: Ends, entries: Entries, how: str) -> torch.Tensor:
    """Sum, "max" or "min" of the messages [..., E, F] to each receiver, [..., N_r, F]; 0 where there are none.

    Sums weigh the messages; the others multiply them by their weight, and leave out those of weight 0.
    """
    weight = entries.weight
    if weight is not None:
        messages = messages * weight.to(messages.dtype)[:, None]
    shape = (*messages.shape[:-2], ends.num_receivers, messages.shape[-1])
    check_range("receivers (second row)", entries.receiver, ends.num_receivers)
    if how == "sum":
        return messages.new_zeros(shape).index_add(-2, entries.receiver, messages)
    if weight is not None:
        absent = weight.detach() == 0
        messages = messages.masked_fill(absent[:, None], -torch.inf if how == "max" else torch.inf)
    index = entries.receiver[:, None].expand(messages.shape)
    best = messages.new_zeros(shape).scatter_reduce(-2, index, messages, f"a{how}", include_self=False)
    if weight is None:
        return best
    present = best.new_zeros(ends.num_receivers).index_add(0, entries.receiver, (~absent).to(best.dtype))
    return best.masked_fill((present == 0)[:, None], 0.0)


def neighbour_mean(x: torch.Tensor, edges: EdgeSample, num_receivers: int, weighted: bool) -> torch.Tensor:
    """sum_j w_ij x_j / sum_j w_ij for x [..., N_s, F]; the sum itself where the weights sum to 0.

    Where nothing is, the step to one edge of weight 1 changes the mean by x_j, and that is the slope which
    an absent edge gets there.
    """
    if not weighted:
        degree = (edges.rowptr[1:] - edges.rowptr[:-1])[:num_receivers].clamp(min=1)
        return neighbour_sum(x, edges, num_receivers) / degree[:, None].to(x.dtype)
    # One pass for both sums; and so the divisor, too, has a gradient for absent candidates.
    both = neighbour_sum(torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1), edges, num_receivers)
    total = both[..., -1:]
    return both[..., :-1] / torch.where(total == 0, 1.0, total)
