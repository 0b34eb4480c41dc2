"""The driver of CMI, KamalEngine, Fast-Datafree and NAYER with graphs: synthesize, then teach on samples.

    python examples/cmi_driver.py

What differs from their image version: the two models take one batch, and nothing is saved as a picture.
"""

from __future__ import annotations

import torch

import acgkd_fast as af
from acgkd_fast.data import house_or_cycle, stratified_split
from acgkd_fast.hosts.vision import OneBatch
from acgkd_fast.nn import build_model
from acgkd_fast.teachers import evaluate, train_classifier


def train(synthesizer: af.GraphSynthesizer, student: OneBatch, teacher: OneBatch, optimizer, kd_steps: int) -> None:
    student.train()
    teacher.eval()
    for _ in range(kd_steps):
        batch = synthesizer.sample()
        with torch.no_grad():
            t_out, _t_feat = teacher(batch, return_features=True)
        s_out = student(batch.detach())
        loss = torch.nn.functional.kl_div(
            torch.log_softmax(s_out / 2.0, 1), torch.softmax(t_out / 2.0, 1), reduction="batchmean"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(
    num_graphs: int = 300, teacher_epochs: int = 60, epochs: int = 6, steps: int = 600, kd_steps: int = 150
) -> dict[str, float]:
    torch.manual_seed(0)
    data = house_or_cycle(num_graphs)
    assert data.graphs.y is not None
    seen, held_out = (data.graphs.select(part) for part in stratified_split(data.graphs.y, seed=0))
    model = train_classifier("gcn5-64", seen, epochs=teacher_epochs)

    # From here on no data.
    teacher, student = OneBatch(model), OneBatch(build_model("gcn3-32", model.num_features, 2, dropout=0.0))
    synthesizer = af.GraphSynthesizer(
        teacher,
        student,
        prior=af.GraphPrior(min_nodes=20, max_nodes=30, mean_degree=2.05, feature_kind="constant"),
        iterations=steps,
        synthesis_batch_size=100,
        sample_batch_size=16,
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, max(epochs - 1, 1))
    for _ in range(epochs):
        synthesizer.synthesize()
        train(synthesizer, student, teacher, optimizer, kd_steps)
        schedule.step()
    scores = {"teacher": model, "student": student.model}
    return {name: evaluate(net, held_out)["accuracy"] for name, net in scores.items()}


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name}: {100 * accuracy:.1f} %")
