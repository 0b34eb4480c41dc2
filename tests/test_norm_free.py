"""Teachers without BatchNorm, of any layers, norms and readouts, with three classes: every stage works and says what it
lacks."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from search_helpers import assert_simple
from torch import nn

import acgkd_fast as af
from acgkd_fast.distill.config import RunConfig
from acgkd_fast.distill.refine import Refiner
from acgkd_fast.distill.run import Evaluation, Run
from acgkd_fast.distill.starts import balanced_labels, random_features, random_trees
from acgkd_fast.distill.student import pool_agreement
from acgkd_fast.nn import GATConv, GCNConv, GINConv, SAGEConv
from acgkd_fast.teachers import as_teacher

FEATURES, CLASSES, WIDTH = 4, 3, 8
NO_K = "teacher: no BatchNorm layer with running statistics, so K is undefined"
CONVS = {
    "gcn": GCNConv,
    "gin": lambda before, width: GINConv(nn.Sequential(nn.Linear(before, width), nn.ReLU(), nn.Linear(width, width))),
    "sage": SAGEConv,
    "sage-max": lambda before, width: SAGEConv(before, width, aggr="max"),
    "gat": lambda before, width: GATConv(before, width, heads=2, concat=False),
}


class Ours(nn.Module):
    """Two layers of this package, a norm after each, any readout."""

    num_features = FEATURES

    def __init__(self, conv: str, norm: str | None, readout: str):
        super().__init__()
        self.convs = nn.ModuleList([CONVS[conv](FEATURES, WIDTH), CONVS[conv](WIDTH, WIDTH)])
        self.norms = nn.ModuleList(make_norm(norm) for _ in self.convs)
        self.readout = readout
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def node_features(self, x, edge_index, batch):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = conv(x, edge_index)
            x = torch.relu(norm(h, batch) if type(norm).__name__ == "GraphNorm" else norm(h))
        return x

    def forward(self, x, edges):
        batch = af.GraphBatch(x, edges).batch()
        return self.classifier(af.readout(self.node_features(x, edges, batch), edges.ptr, self.readout))


class Theirs(nn.Module):
    """A model of torch-geometric whose norm is told the graph of each node, and one of its poolings."""

    def __init__(self, kind: str, norm: str | None, pool: str, told: bool = True):
        super().__init__()
        pyg = pytest.importorskip("torch_geometric.nn")
        self.gnn = getattr(pyg, kind)(FEATURES, WIDTH, 2, norm=norm)
        self.pool, self.told = getattr(pyg, pool), told
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x, edge_index, batch):
        told = {"batch": batch, "batch_size": int(batch[-1]) + 1} if self.told else {}
        return self.head(self.pool(self.gnn(x, edge_index, **told), batch))


def make_norm(name: str | None) -> nn.Module:
    if name == "graph":
        return pytest.importorskip("torch_geometric.nn").GraphNorm(WIDTH)
    return nn.LayerNorm(WIDTH) if name == "layer" else nn.Identity()


OURS = [
    (Ours, "gcn", None, "mean"),
    (Ours, "gcn", "graph", "max"),
    (Ours, "gin", None, "max"),
    (Ours, "gin", "layer", "sum"),
    (Ours, "sage", "layer", "max"),
    (Ours, "sage-max", None, "mean"),
    (Ours, "gat", "layer", "mean"),
    (Ours, "gat", None, "max"),
]
THEIRS = [
    (Theirs, "GCN", "layer_norm", "global_max_pool"),
    (Theirs, "GIN", None, "global_mean_pool"),
    (Theirs, "GraphSAGE", "graph_norm", "global_max_pool"),
    (Theirs, "GAT", "layer_norm", "global_mean_pool"),
]


def make_teacher(form, *arguments) -> af.Teacher:
    torch.manual_seed(0)
    teacher = as_teacher(form(*arguments), feature_kind="one-hot")
    last = teacher.module.head if form is Theirs else teacher.module.classifier
    logits = teacher(make_graphs(48))
    # Random weights prefer one class; shifted and stretched, they name all three and are sure of some.
    scale = 2.0 / logits.std(0)
    last.weight.mul_(scale[:, None])
    last.bias.copy_(scale * (last.bias - logits.mean(0)))
    return teacher


@pytest.fixture(params=OURS + THEIRS, ids=lambda case: "-".join(map(str, case[1:])))
def teacher(request) -> af.Teacher:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make_teacher(*request.param)


def make_graphs(count: int = 18) -> af.GraphBatch:
    edges = random_trees([5 + g % 4 for g in range(count)], seed=1)
    x = random_features("one-hot", FEATURES, edges.num_nodes, seed=1)
    return af.GraphBatch(x, edges, balanced_labels(count, CLASSES, 0))


def test_the_search_follows_cross_entropy_and_says_so(teacher):
    graphs = make_graphs()
    with pytest.warns(RuntimeWarning, match=NO_K) as caught:
        result = af.refine(graphs, teacher, steps=80, share=0.6, rewire=0.5, seed=2)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert result.k is None and result.warning is None
    assert result.energy.diff().max() <= 1e-12 and result.energy[-1] < 0.9 * result.energy[0]
    assert torch.equal(result.graphs.y, graphs.y) and result.graphs.y.unique().tolist() == [0, 1, 2]
    assert_simple(result.graphs.edges, graphs.sizes.tolist())
    fresh = nn.functional.cross_entropy(teacher(result.graphs), graphs.y)
    assert result.cross_entropy == pytest.approx(float(fresh), rel=1e-5)
    # What each graph scored when it was last edited is what it scores among all others.
    excess = (nn.functional.cross_entropy(teacher(result.graphs), graphs.y, reduction="none") - 0.1).clamp(min=0)
    assert float(result.energy[-1]) == pytest.approx(float(excess.mean()), rel=1e-4, abs=1e-6)


def test_without_the_weight_of_k_there_is_nothing_to_warn_of(teacher):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert af.refine(make_graphs(6), teacher, steps=2, lam_k=0.0).k is None


@pytest.mark.filterwarnings("ignore:teacher. no BatchNorm")
@pytest.mark.parametrize("options", [{"keep_degrees": True, "connected": True}, {"max_degree": 3, "two_hop": 0.5}])
def test_a_stated_degree_law_holds(options):
    graphs = make_graphs()
    result = af.refine(graphs, make_teacher(*OURS[2]), steps=60, share=0.6, **options)
    degree = result.graphs.edges.rowptr.diff()
    assert result.accepted > 0
    if "keep_degrees" in options:
        assert torch.equal(degree, graphs.edges.rowptr.diff())
    else:
        assert degree.max() <= max(3, graphs.edges.rowptr.diff().max())


@pytest.mark.filterwarnings("ignore:teacher. no BatchNorm")
def test_a_search_without_k_goes_on_where_it_was_saved():
    teacher, graphs = make_teacher(*OURS[4]), make_graphs()
    settings = af.RefineSettings(steps=30, unlabelled=0.5, stop_k=0.01, min_steps=0)
    straight, first, second = (Refiner(teacher, graphs, settings, seed=1) for _ in range(3))
    straight.advance(30)
    first.advance(11)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.advance(19)
    # Neither labels dealt by K nor an end by K: there is none.
    assert straight.step == 30 and torch.equal(straight.graphs().y, graphs.y)
    assert torch.equal(straight.graphs().x, second.graphs().x) and "k" not in second.metrics()
    assert torch.equal(straight.graphs().edges.col, second.graphs().edges.col)


@pytest.mark.parametrize("case", OURS, ids=lambda case: "-".join(map(str, case[1:])))
@pytest.mark.parametrize("estimator", ["relaxed", "arm"])
def test_learning_leaves_the_batch_norm_term_out_and_says_so(case, estimator):
    teacher = make_teacher(*case)
    pseudo = af.PseudoGraphs.from_graphs(make_graphs(), feature_kind="one-hot")
    before, seen = pseudo.logits.detach().clone(), []
    with pytest.warns(RuntimeWarning, match="no BatchNorm layer .*, so the BatchNorm term is left out") as caught:
        settings = af.LearnSettings(steps=25, estimator=estimator)
        af.learn(teacher, pseudo, settings, progress=lambda _, terms: seen.append(terms), report_every=1)
    assert len(caught) == 1
    assert all(terms["batch_norm"] == 0.0 for terms in seen)
    assert pseudo.logits.isfinite().all() and not torch.equal(pseudo.logits, before)
    if estimator != "arm":
        assert seen[-1]["cross_entropy"] < seen[0]["cross_entropy"]
    hard = pseudo.harden(seed=0)
    assert teacher(hard).shape == (18, CLASSES) and teacher(hard).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        af.learn(teacher, pseudo, af.LearnSettings(steps=1, c_bn=0.0))


def test_learning_reaches_accelerated_models_of_torch_geometric():
    torch.manual_seed(0)
    module = Theirs("GraphSAGE", None, "global_max_pool")
    module.told = False
    teacher = as_teacher(af.accelerate(module))
    assert teacher.accepts_edge_weight
    pseudo = af.PseudoGraphs.from_graphs(make_graphs(), feature_kind="one-hot")
    before = pseudo.logits.detach().clone()
    with pytest.warns(RuntimeWarning, match="BatchNorm term is left out"):
        af.learn(teacher, pseudo, af.LearnSettings(steps=5))
    assert not torch.equal(pseudo.logits, before)


def test_no_density_is_found_and_the_assumption_is_said(teacher):
    with pytest.warns(RuntimeWarning, match=r"a mean degree of 2\.05 is assumed; state mean_degree") as caught:
        assert af.find_prior(teacher, af.GraphPrior(5, 9)).prior.mean_degree == 2.05
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert af.find_prior(teacher, af.GraphPrior(5, 9, mean_degree=3.0)).prior.mean_degree == 3.0


def test_students_learn_three_classes(teacher):
    pool = make_graphs(48)
    assert teacher(pool).argmax(1).unique().numel() == CLASSES
    settings = af.StudentSettings(epochs=40, batch_size=8)
    student = af.distill_student(teacher, pool, "gcn3-16", settings)
    assert student(pool.x, pool.edges).shape == (48, CLASSES)
    largest = float(teacher(pool).argmax(1).bincount().max() / 48)
    found = pool_agreement(teacher, student, pool)["agreement"]
    assert found > largest or found >= 0.9


@pytest.mark.parametrize("form", ["norm-free student", "curriculum and adversary"])
def test_every_kind_of_student(form):
    teacher, pool = make_teacher(*OURS[5]), make_graphs(30)
    settings, student = af.StudentSettings(epochs=4), "gin3-8"
    if form == "norm-free student":
        torch.manual_seed(1)
        student = Ours("sage", "graph", "max")
        before = copy.deepcopy(student.state_dict())
    else:
        settings = af.StudentSettings(
            epochs=4,
            curriculum=af.CurriculumSettings(difficulty="disagreement"),
            adversary=af.AdversarySettings(mode="graph"),
        )
    taught = af.distill_student(teacher, pool, student, settings)
    if form == "norm-free student":
        assert taught is student and any(not torch.equal(v, before[n]) for n, v in student.state_dict().items())
    assert 0.0 <= pool_agreement(teacher, taught, pool)["agreement"] <= 1.0


class Parts(Ours):
    """Exposes its parts, so that its classifier can be reused; GraphNorm and max readout, three classes."""

    def node_features(self, x, edges):
        return super().node_features(x, edges, af.GraphBatch(x, edges).batch())

    def classify(self, h, ptr):
        return self.classifier(af.readout(h, ptr, self.readout))

    def forward(self, x, edges):
        return self.classify(self.node_features(x, edges), edges.ptr)


def test_the_classifier_of_a_norm_free_teacher_is_reused():
    teacher, pool = make_teacher(Parts, "gat", "graph", "max"), make_graphs(12)
    settings = af.StudentSettings(epochs=3, reuse_classifier=True, feature_weight=1.0)
    student = af.distill_student(teacher, pool, "gcn3-6", settings)
    assert student(pool.x, pool.edges).shape == (12, CLASSES)


def test_batch_norm_in_models_of_torch_geometric_is_found_with_any_readout():
    teacher = make_teacher(Theirs, "GraphSAGE", "batch_norm", "global_max_pool")
    with pytest.warns(RuntimeWarning, match="k: expected at most"):
        result = af.refine(make_graphs(), teacher, steps=20)
    assert result.k > 0.05 and result.energy[-1] < result.energy[0]


MIXING = {
    "norm not told": lambda: Theirs("GCN", "graph_norm", "global_max_pool", told=False),
    # Theirs again: the perceptron inside GINConv is not told either.
    "norm inside GIN": lambda: Theirs("GIN", "layer_norm", "global_max_pool"),
    "no running statistics": lambda: Theirs("GCN", None, "global_max_pool"),
}


@pytest.mark.parametrize("case", MIXING)
def test_a_teacher_that_mixes_the_graphs_of_a_batch_is_reported(case):
    torch.manual_seed(0)
    module = MIXING[case]()
    if case == "no running statistics":
        module.head = nn.Sequential(nn.BatchNorm1d(WIDTH, track_running_stats=False), module.head)
    with pytest.warns(RuntimeWarning, match="Theirs answers differently on the same graph in another batch") as caught:
        as_teacher(module)
    assert len(caught) == 1 and caught[0].filename == __file__


class NormsFirst(nn.Module):
    """Declares its norms before its layers, as many models do."""

    def __init__(self):
        super().__init__()
        self.norm = make_norm("graph")
        self.inner = nn.InstanceNorm1d(WIDTH)
        self.conv, self.head = GCNConv(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x, edge_index, batch):
        pyg = pytest.importorskip("torch_geometric.nn")
        return self.head(pyg.global_mean_pool(self.norm(self.conv(x, edge_index), batch), batch))


def test_no_norms_width_is_taken_for_that_of_the_features():
    assert as_teacher(NormsFirst()).num_features == FEATURES


@pytest.mark.filterwarnings("ignore:student. expected the")
def test_a_run_without_batch_norm(tmp_path):
    config = RunConfig().with_settings(
        {
            "num_graphs": 12,
            "prior.min_nodes": 5,
            "prior.max_nodes": 8,
            "learn.steps": 3,
            "refine.steps": 20,
            "student.epochs": 2,
        }
    )
    test = make_graphs()
    with pytest.warns(RuntimeWarning) as caught:
        run = Run(tmp_path / "run", make_teacher(*OURS[1]), config, student="gcn3-6")
        results = run.execute(Evaluation("trees", test, test))
    messages = [str(warning.message) for warning in caught if "no BatchNorm" in str(warning.message)]
    assert len(messages) == 3, "density, learning, search"
    assert len(results) == 5
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (pool,) = (line for line in lines if line["stage"] == "pool")
    assert "k" not in pool and pool["cross_entropy"] > 0.0
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()


def test_stated_label_shares_reach_pools_runs_and_stay_without_relabelling(tmp_path):
    shares = (0.6, 0.3, 0.1, 0.0)
    prior = af.GraphPrior(5, 9, label_shares=list(shares))
    assert prior.label_shares == shares
    teacher = make_teacher(*OURS[3])
    for make in (af.start_graphs, af.random_pool):
        torch.testing.assert_close(make(teacher, prior, 300).x.mean(0), torch.tensor(shares), atol=0.04, rtol=0.0)
    start = af.start_graphs(teacher, prior, 9)
    found = af.refine(start, teacher, steps=20, relabel=0.0, lam_k=0.0)
    assert found.accepted > 0 and torch.equal(found.graphs.x, start.x)
    settings = {"prior.label_shares": list(shares), "num_graphs": 6, "refine.steps": 5, "refine.relabel": 0.0}
    config = RunConfig.from_dict(json.loads(json.dumps(RunConfig().with_settings(settings).to_dict())))
    assert config.prior.label_shares == shares
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        graphs = Run(tmp_path / "run", teacher, config).make_graphs()
    assert graphs.x[:, 3].sum() == 0 and graphs.x[:, 0].mean() > 0.4


@pytest.mark.parametrize("shares", [(0.5, 0.4), (1.5, -0.5), (), "half", (float("nan"), 1.0), 1.0])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(af.InputError, match="label_shares: expected a share of each node label, adding up to 1"):
        af.GraphPrior(label_shares=shares)


def test_shares_are_for_node_labels():
    with pytest.raises(af.InputError, match="label_shares: expected None unless feature_kind is one-hot"):
        af.GraphPrior(feature_kind="degree", label_shares=(0.5, 0.5))
