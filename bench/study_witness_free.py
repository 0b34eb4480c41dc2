"""What takes K's place where a teacher has no BatchNorm: one JSON line per pool, finished ones skipped.

    python bench/study_witness_free.py --data-root DIR --work FOLDER --seconds 280 [--rows "start;nothing"]

Call it again until it says "all done"; --table prints what is there. Teachers (three convolutions of width 32, residual
sums, sum readout; no norm, LayerNorm or GraphNorm) are trained on 70 % of the graphs and kept in the work folder.
House or cycle has one-hot degrees for GCN, which learns nothing from its constant feature without BatchNorm. Each row
makes a pool of 200 graphs, which teaches two gcn3-32 students. Candidates are compared on the group "choose"; "confirm"
only checks, and was cut short. CPU, one thread.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from study import read, study_options
from torch import nn

import acgkd_fast as af
from acgkd_fast.data import degree_features, gfkd_split, house_or_cycle, load_dataset
from acgkd_fast.distill.labels import deal_labels
from acgkd_fast.distill.statistics import BatchNormProbe
from acgkd_fast.distill.student import distill_student, pool_agreement, teacher_logits
from acgkd_fast.files import load_state, save_state
from acgkd_fast.graphs import EdgeSample, GraphBatch
from acgkd_fast.nn import GCNConv, GINConv
from acgkd_fast.pseudo_graphs import GraphPrior
from acgkd_fast.teachers import Teacher, as_teacher, evaluate
from acgkd_fast.training import fit

RESULTS = Path(__file__).parent / "results" / "study_witness_free.jsonl"
GRAPHS, STEPS, SEEDS = 200, 1000, range(2)
WIDTH, DEPTH = 32, 3
COPIES, DROPPED, NOISE = 3, 0.2, 0.2
# (data set, convolution, norm, split seed); the split's seed is the teacher's as well.
_DATA = ("house-or-cycle", "MUTAG")
GROUPS = {
    "choose": [
        (data, *kind, 29)
        for kind in (("gcn", "none"), ("gcn", "layer"), ("gin", "none"), ("gin", "graph"))
        for data in _DATA
    ],
    # House or cycle with degrees is solved by every pool of the other group.
    "confirm": [
        ("house-or-cycle", "gin", "none", 1),
        ("house-or-cycle", "gin", "layer", 2),
        ("MUTAG", "gcn", "none", 1),
        ("MUTAG", "gcn", "graph", 1),
        ("MUTAG", "gin", "none", 2),
        ("MUTAG", "gin", "layer", 2),
    ],
}
_MAX_DEGREE = 6


class Block(nn.Module):
    """conv -> norm -> ReLU, and + input where the widths agree; `watch` sees what the rectifier gets."""

    def __init__(self, kind: str, norm: str, before: int) -> None:
        super().__init__()
        mlp = nn.Sequential(nn.Linear(before, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.conv = GCNConv(before, WIDTH) if kind == "gcn" else GINConv(mlp)
        self.norm = _NORMS[norm]()
        self.by_graph = norm == "graph"
        self.watch: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor, edges: EdgeSample, graph: torch.Tensor) -> torch.Tensor:
        h = self.conv(x, edges)
        h = self.norm(h, graph, edges.ptr.numel() - 1) if self.by_graph else self.norm(h)
        h = torch.relu(self.watch(h))
        return h + x if x.shape == h.shape else h


def _graph_norm() -> nn.Module:
    from torch_geometric.nn import GraphNorm

    layer: nn.Module = GraphNorm(WIDTH)
    return layer


_NORMS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "layer": lambda: nn.LayerNorm(WIDTH),
    "graph": _graph_norm,
}


class NormFree(nn.Module):
    """A graph classifier without BatchNorm."""

    def __init__(self, kind: str, norm: str, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features, self.num_classes = num_features, num_classes
        widths = [num_features] + [WIDTH] * (DEPTH - 1)
        self.blocks = nn.ModuleList(Block(kind, norm, before) for before in widths)
        self.classifier = nn.Linear(WIDTH, num_classes)

    def forward(self, x: torch.Tensor, edges: EdgeSample) -> torch.Tensor:
        graph = torch.arange(edges.ptr.numel() - 1).repeat_interleave(edges.ptr.diff())
        for block in self.blocks:
            x = block(x, edges, graph)
        logits: torch.Tensor = self.classifier(af.readout(x, edges.ptr))
        return logits


class Gauge(nn.Module):
    """Passes x on; lets a BatchNorm1d see a function of it, whose statistics are then a target like any teacher's."""

    def __init__(self, look: Callable[[torch.Tensor], torch.Tensor], mean: torch.Tensor, var: torch.Tensor) -> None:
        super().__init__()
        self.look = look
        self.target = nn.BatchNorm1d(WIDTH, affine=False)
        self.target.running_mean, self.target.running_var = mean.clone(), var.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.target(self.look(x))
        return x


class Perturbed(nn.Module):
    """The geometric mean of the answers of a teacher and of copies of it."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.num_features = members[0].num_features

    def forward(self, x: torch.Tensor, edges: EdgeSample) -> torch.Tensor:
        return torch.stack([member(x, edges).log_softmax(1) for member in self.members]).mean(0)


@dataclass(frozen=True, eq=False)
class Task:
    teacher: Teacher
    train: GraphBatch
    test: GraphBatch
    prior: GraphPrior

    def start(self, pools: int = 1) -> GraphBatch:
        return af.start_graphs(self.teacher, self.prior, pools * GRAPHS)


@functools.cache
def make_task(name: str, kind: str, norm: str, split: int, data_root: Path, work: Path) -> Task:
    data = house_or_cycle() if name == "house-or-cycle" else load_dataset(name, data_root, cache_dir=work / "cache")
    graphs, feature_kind = data.graphs, data.feature_kind
    if feature_kind == "constant" and kind == "gcn":
        graphs = GraphBatch(degree_features(graphs.edges, _MAX_DEGREE), graphs.edges, graphs.y)
        feature_kind = "degree"
    train, test = (graphs.select(part) for part in gfkd_split(graphs.num_graphs, split))
    torch.manual_seed(split)
    model = NormFree(kind, norm, graphs.x.shape[1], data.num_classes)
    file = work / f"{name}-{kind}-{norm}-{split}.state"
    if file.exists():
        model.load_state_dict(load_state(file))
    else:

        def loss(batch: GraphBatch, _: torch.Tensor) -> torch.Tensor:
            assert batch.y is not None
            return nn.functional.cross_entropy(model(batch.x, batch.edges), batch.y)

        epochs = 800 * 32 // train.num_graphs
        fit(model, train, loss, epochs=epochs, lr=0.01, batch_size=32, clip_norm=1.0, seed=split)
        save_state(file, model.state_dict())
    sizes = (20, 30) if name == "house-or-cycle" else (10, 29)
    teacher = as_teacher(model, feature_kind=feature_kind)
    return Task(teacher, train, test, GraphPrior(*sizes, feature_kind=feature_kind))


def search(task: Task, start: GraphBatch, teacher: nn.Module | Teacher | None = None, **options: Any) -> GraphBatch:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="teacher. no BatchNorm|k. expected at most")
        kind = task.prior.feature_kind
        # The study is older than connected graphs by default.
        options = {"connected": False, **options}
        return af.refine(start, teacher or task.teacher, steps=STEPS, feature_kind=kind, **options).graphs


def gauged(task: Task, graphs: GraphBatch | None, look: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """The teacher with a gauge before every rectifier: of half-active units, or of what `graphs` give."""
    model = copy.deepcopy(task.teacher.module)
    half, quarter = torch.full((WIDTH,), 0.5), torch.full((WIDTH,), 0.25)
    for block in model.blocks:
        block.watch = Gauge(look, half, quarter)
    if graphs is not None:
        with torch.no_grad(), BatchNormProbe(model.eval()) as probe:
            model(graphs.x, graphs.edges)
        for block, seen in zip(model.blocks, probe.inputs, strict=True):
            block.watch = Gauge(look, seen.mean(0), seen.var(0, unbiased=False))
    return model


def normalised(task: Task) -> nn.Module:
    """The teacher with a gauge that reads each LayerNorm as a BatchNorm: mean its shift, deviation its scale."""
    model = copy.deepcopy(task.teacher.module)
    for block in model.blocks:
        block.watch = Gauge(lambda x: x, block.norm.bias.detach(), block.norm.weight.detach().square())
    return model


def perturbed(task: Task, how: str) -> nn.Module:
    """The teacher beside copies with hidden channels dropped, or with noise on every weight matrix."""
    generator = torch.Generator().manual_seed(0)
    members = [task.teacher.module]
    for _ in range(COPIES):
        member = copy.deepcopy(task.teacher.module)
        for weight in (p for p in member.parameters() if p.dim() == 2):
            if how == "noise":
                weight.data += NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
            elif weight.shape[1] == WIDTH:
                kept = torch.rand(WIDTH, generator=generator) >= DROPPED
                weight.data *= kept / (1.0 - DROPPED)
        members.append(member)
    return Perturbed(members)


def with_shares(task: Task, graphs: GraphBatch) -> GraphBatch:
    """The same structures with node labels drawn by the shares that the user states (here the training graphs')."""
    generator = torch.Generator().manual_seed(1)
    label = torch.multinomial(task.train.x.mean(0), graphs.num_nodes, replacement=True, generator=generator)
    x = nn.functional.one_hot(label, graphs.x.shape[1]).to(graphs.x.dtype)
    return GraphBatch(x, graphs.edges, graphs.y)


def dealt(task: Task, graphs: GraphBatch) -> GraphBatch:
    counts = graphs.y.bincount(minlength=task.teacher.num_classes)
    return GraphBatch(graphs.x, graphs.edges, deal_labels(teacher_logits(task.teacher, graphs), counts))


def selected(task: Task, graphs: GraphBatch) -> GraphBatch:
    """Of many graphs, the ones most typical of each class, GRAPHS in all."""
    margin = teacher_logits(task.teacher, graphs).log_softmax(1)
    classes = margin.shape[1]
    rest = torch.ones(graphs.num_graphs, dtype=torch.bool)
    chosen = []
    for label in range(classes):
        score = torch.where(rest, margin[:, label], -torch.inf)
        chosen.append(score.topk(GRAPHS // classes).indices)
        rest[chosen[-1]] = False
    return graphs.select(torch.cat(chosen))


def _labelled(task: Task) -> bool:
    return task.prior.feature_kind == "one-hot"


_LAW = {"keep_degrees": True, "connected": True}
ROWS: dict[str, Callable[[Task], GraphBatch | None]] = {
    "real graphs": lambda t: t.train,
    "random graphs": lambda t: af.random_pool(t.teacher, t.prior, GRAPHS),
    "start": lambda t: t.start(),
    "nothing": lambda t: search(t, t.start()),
    "degrees kept, connected": lambda t: search(t, t.start(), **_LAW),
    "connected, degree at most 4": lambda t: search(t, t.start(), connected=True, max_degree=4, rewire=1.0),
    "units active half of the time": lambda t: search(t, t.start(), gauged(t, None, lambda x: (x > 0).to(x.dtype))),
    "activations of the start": lambda t: search(t, t.start(), gauged(t, t.start(), lambda x: x)),
    "LayerNorm read as BatchNorm": lambda t: (
        search(t, t.start(), normalised(t)) if isinstance(t.teacher.module.blocks[0].norm, nn.LayerNorm) else None
    ),
    "dropout agrees": lambda t: search(t, t.start(), perturbed(t, "dropout")),
    "weight noise agrees": lambda t: search(t, t.start(), perturbed(t, "noise")),
    "labels dealt": lambda t: search(t, dealt(t, t.start())),
    "selected, no search": lambda t: selected(t, t.start(10)),
    "label shares, start": lambda t: with_shares(t, t.start()) if _labelled(t) else None,
    "equal shares, edges searched": lambda t: (
        search(t, t.start(), relabel=0.0, rewire=1.0, connected=True) if _labelled(t) else None
    ),
    "label shares, edges searched": lambda t: (
        search(t, with_shares(t, t.start()), relabel=0.0, rewire=1.0, connected=True) if _labelled(t) else None
    ),
    "label shares, their activations": lambda t: (
        search(t, with_shares(t, t.start()), gauged(t, with_shares(t, t.start()), lambda x: x))
        if _labelled(t)
        else None
    ),
}


def measure(task: Task, row: str) -> dict[str, Any] | None:
    """What a row's pool teaches; None where the row means nothing for the task."""
    started = time.process_time()
    pool = ROWS[row](task)
    if pool is None:
        return None
    made = time.process_time() - started
    students = [distill_student(task.teacher, pool, "gcn3-32", seed=seed) for seed in SEEDS]
    answers = teacher_logits(task.teacher, pool)
    scores = evaluate(task.teacher, task.test)
    return {
        "accuracy": [evaluate(student, task.test)["accuracy"] for student in students],
        "fidelity": [pool_agreement(task.teacher, student, task.test)["agreement"] for student in students],
        "on_pool": [pool_agreement(task.teacher, student, pool)["agreement"] for student in students],
        "teacher_accuracy": scores["accuracy"],
        "majority": scores["majority"],
        "mean_degree": pool.edges.num_edges / pool.num_nodes,
        "cross_entropy": float(nn.functional.cross_entropy(answers, pool.y)),
        "largest_class": float(answers.argmax(1).bincount().max() / pool.num_graphs),
        "seconds_pool": round(made, 2),
        "seconds": round(time.process_time() - started, 2),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Mean accuracy and agreement with the teacher on held-out graphs in percent, by group, data set and row."""
    found: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for result in results:
        task = f"{result['kind']}-{result['norm']}-{result['split']}"
        found[result["group"], result["dataset"], result["row"]][task] = result
    lines = []
    for group in GROUPS:
        for data in _DATA:
            rows = {row: found[group, data, row] for row in ROWS if (group, data, row) in found}
            tasks = sorted({task for cells in rows.values() for task in cells})
            if not tasks:
                continue
            first = {task: next(cells[task] for cells in rows.values() if task in cells) for task in tasks}
            lines.append(f"\n{group}: {data}, accuracy (agreement with the teacher)")
            titles = [f"{t} ({100 * first[t]['teacher_accuracy']:.0f}/{100 * first[t]['majority']:.0f})" for t in tasks]
            lines.append(" | ".join([f"{'teacher/majority in brackets':32}", *titles, "mean"]))
            for row, cells in rows.items():
                parts = [
                    [100 * statistics.fmean(cells[task][name]) for name in ("accuracy", "fidelity")]
                    for task in tasks
                    if task in cells
                ]
                shown = iter(parts)
                texts = ["{:.1f} ({:.1f})".format(*next(shown)) if task in cells else "-" for task in tasks]
                mean = [statistics.fmean(column) for column in zip(*parts, strict=True)]
                lines.append(" | ".join([f"{row:32}", *texts, "{:.1f} ({:.1f})".format(*mean)]))
    return "\n".join(lines)


def main() -> None:
    options = study_options(__doc__, GROUPS, RESULTS, "pool")
    if options.table:
        print(table(read(options.results)))
        return
    rows = options.rows.split(";") if options.rows else list(ROWS)
    keys = ("group", "dataset", "kind", "norm", "split", "row")
    done = {tuple(result[key] for key in keys) for result in read(options.results)}
    started = time.monotonic()
    for group in GROUPS if options.group == "all" else [options.group]:
        for row in rows:
            for place in GROUPS[group]:
                cell = (group, *place, row)
                if cell in done:
                    continue
                if time.monotonic() - started > options.seconds:
                    print("not done yet: call again", file=sys.stderr)
                    return
                values = measure(make_task(*place, options.data_root, options.work), row)
                if values is not None:
                    with options.results.open("a") as file:
                        file.write(json.dumps({**dict(zip(keys, cell, strict=True)), **values}) + "\n")
    print("all done", file=sys.stderr)


if __name__ == "__main__":
    main()
