"""The second half of a job as users would write it with PyTorch Geometric: learned logits to graphs, and a student.

Architecture (gcn3-32), epochs, batches, step size and loss (T^2 KL) are those of our job.
"""

from __future__ import annotations

from typing import Any

import torch
from step_peers import PyGTeacher

from acgkd_fast.nn.models import GraphClassifier, build_model

TEMPERATURE = 2.0


def thresholded(matrices: list[torch.Tensor], features: torch.Tensor) -> list[Any]:
    """PyTorch Geometric's graphs of logits [n, n] each, with features [N, d] in their order."""
    from torch_geometric.data import Data

    graphs, first = [], 0
    for logits in matrices:
        x, edge = features[first : first + len(logits)], (logits >= 0).fill_diagonal_(False)
        graphs.append(Data(x=x, edge_index=edge.nonzero().t()))
        first += len(logits)
    return graphs


def train_student(teacher: GraphClassifier, graphs: list[Any], epochs: int, batch_size: int) -> PyGTeacher:
    """The student's loop with DataLoader, Adam and linear decay; returns the student in eval mode."""
    from torch_geometric.loader import DataLoader

    torch.manual_seed(0)
    net, student = PyGTeacher(teacher), PyGTeacher(build_model("gcn3-32", graphs[0].x.shape[1], 2))
    student.train().requires_grad_()
    loader = DataLoader(graphs, batch_size=batch_size, shuffle=True)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs * len(loader))
    for _ in range(epochs):
        for data in loader:
            weight = torch.ones(data.edge_index.shape[1])
            with torch.no_grad():
                wanted = net(data.x, data.edge_index, weight, data.batch) / TEMPERATURE
            found = student(data.x, data.edge_index, weight, data.batch) / TEMPERATURE
            loss = TEMPERATURE**2 * torch.nn.functional.kl_div(
                found.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return student.eval().requires_grad_(False)
