"""Labels for graphs that have found their shape: the teacher says which graph fits which class best."""

from __future__ import annotations

import torch

from ..errors import check, check_tensor


def deal_labels(logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Give every graph a class, each class as often as asked, the clearest cases first.

    Going down the margins log p_k - max over j != k of log p_j of all graphs and classes, a graph gets the first class
    that still has room. With two classes this is a cut of the teacher's own ranking.

    Args:
        logits: the teacher's answers [B, C], C at least 2.
        counts: int64 [C], graphs per class; they add up to B.

    Returns:
        int64 [B] on the device of `logits`. Ties go to the lower graph, then the lower class.

    Raises:
        InputError: counts of another length or sum.
    """
    check_tensor("logits", logits, shape=(None, None))
    graphs, classes = logits.shape
    check_tensor("counts", counts, shape=(classes,), dtypes=(torch.int64,))
    left = counts.tolist()
    check(sum(left) == graphs, "counts", f"numbers that add up to {graphs}", left)
    check(classes >= 2, "logits", "2 classes or more", logits)
    best, second = logits.topk(2, dim=1).values.unbind(1)
    rival = torch.where(logits == best[:, None], second[:, None], best[:, None])
    order = (logits - rival).flatten().argsort(descending=True, stable=True)
    y = [-1] * graphs
    for position in order.tolist():
        graph, label = divmod(position, classes)
        if y[graph] < 0 and left[label] > 0:
            y[graph] = label
            left[label] -= 1
    return torch.tensor(y, dtype=torch.int64, device=logits.device)
