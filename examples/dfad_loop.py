"""Data-free adversarial distillation (DFAD's loop) on graphs: a generator against teacher and student.

    python examples/dfad_loop.py

The generator is a plain module, z -> graphs, and its structure trains: gradients reach it through the drawn edges. The
teacher's BatchNorm statistics, which DFAD does not use, keep its graphs from drifting too far; expect less than from
the search (examples/cmi_driver.py) all the same.
"""

from __future__ import annotations

import torch

import acgkd_fast as af
from acgkd_fast.data import house_or_cycle, stratified_split
from acgkd_fast.hosts.hooks import BatchNormHooks
from acgkd_fast.hosts.vision import OneBatch
from acgkd_fast.nn import build_model
from acgkd_fast.teachers import evaluate, train_classifier


def main(num_graphs: int = 300, teacher_epochs: int = 60, rounds: int = 80, batch_size: int = 32) -> dict[str, float]:
    torch.manual_seed(0)
    data = house_or_cycle(num_graphs)
    assert data.graphs.y is not None
    seen, held_out = (data.graphs.select(part) for part in stratified_split(data.graphs.y, seed=0))
    teacher = train_classifier("gcn5-64", seen, epochs=teacher_epochs).requires_grad_(False)

    # From here on no data.
    student = build_model("gcn3-32", teacher.num_features, teacher.num_classes, dropout=0.0)
    ask_teacher, ask_student = OneBatch(teacher), OneBatch(student)
    prior = af.GraphPrior(min_nodes=20, max_nodes=30, mean_degree=2.05, feature_kind="constant")
    generator = af.Generator(teacher.num_features, prior, batch_size=batch_size, nz=32)
    to_student = torch.optim.Adam(student.parameters(), lr=0.01)
    to_generator = torch.optim.Adam(generator.parameters(), lr=0.003)
    schedule = torch.optim.lr_scheduler.LinearLR(to_student, 1.0, 0.02, rounds)
    for _ in range(rounds):
        student.train()
        for _ in range(5):
            fake = generator(torch.randn(batch_size, 32)).detach()
            loss = torch.nn.functional.l1_loss(ask_student(fake), ask_teacher(fake))
            to_student.zero_grad()
            loss.backward()
            to_student.step()
        fake = generator(torch.randn(batch_size, 32))
        with BatchNormHooks(teacher) as hooks:
            answer = ask_teacher(fake)
            loss = 3.0 * hooks.loss() - torch.nn.functional.l1_loss(ask_student(fake), answer)
        to_generator.zero_grad()
        loss.backward()
        assert generator.nodes.weight.grad is not None and generator.nodes.weight.grad.any()
        to_generator.step()
        schedule.step()
    return {name: evaluate(net, held_out)["accuracy"] for name, net in (("teacher", teacher), ("student", student))}


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name}: {100 * accuracy:.1f} %")
