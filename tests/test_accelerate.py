"""`accelerate`: same model, same answers, other code; what it leaves alone; and the way back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import normal
from torch import nn

import acgkd_fast as af
from acgkd_fast.errors import InputError
from acgkd_fast.nn import swapped
from acgkd_fast.nn.accelerate import is_accelerated

pyg = pytest.importorskip("torch_geometric.nn")
from torch_geometric.nn.models import GAT, GCN, GIN, MLP, GraphSAGE  # noqa: E402

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EDGE_INDEX = torch.randint(20, (2, 60), generator=torch.Generator().manual_seed(0))


class Handwritten(nn.Module):
    """A classifier as people write them: every layer, BatchNorm, pooling by function and by module, a shared layer."""

    def __init__(self):
        super().__init__()
        self.first = pyg.GCNConv(5, 8)
        self.inner = nn.ModuleDict({"gin": pyg.GINConv(MLP([8, 8, 8])), "sage": pyg.SAGEConv(8, 8)})
        self.again = self.inner["sage"]
        self.gat = pyg.GATConv(8, 4, heads=2, dropout=0.3)
        self.gine = pyg.GINEConv(nn.Linear(8, 8), edge_dim=3)
        self.graph_conv = pyg.GraphConv(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.sum, self.max = pyg.SumAggregation(), pyg.MaxAggregation()
        self.out = nn.Linear(24, 3)

    def forward(self, x, edge_index, edge_attr, batch):
        x = self.norm(self.first(x, edge_index)).relu()
        x = self.again(self.inner["gin"](x, edge_index), edge_index).relu()
        x = self.gine(self.gat(x, edge_index), edge_index, edge_attr)
        x = self.graph_conv(self.inner["sage"](x, edge_index), edge_index)
        pooled = [self.sum(x, batch), self.max(x, batch), pyg.global_mean_pool(x, batch)]
        return self.out(torch.cat(pooled, 1))


def inputs(model):
    x = normal((20, 5), 0, torch.float32)
    if isinstance(model, Handwritten):
        batch = torch.arange(4).repeat_interleave(5)
        return x, EDGE_INDEX, normal((60, 3), 1, torch.float32), batch
    return x, EDGE_INDEX


def answers(model, args):
    x = args[0].clone().requires_grad_()
    torch.manual_seed(7)
    out = model(x, *args[1:])
    upstream = normal(out.shape, 3, torch.float32)
    return [
        out,
        *torch.autograd.grad(out, [x, *model.parameters()], upstream, allow_unused=True, materialize_grads=True),
    ]


MODELS = {
    "GCN": lambda: GCN(5, 8, 3, out_channels=4, norm="batch_norm"),
    "GCN-cached": lambda: GCN(5, 8, 2, cached=True),
    "GIN": lambda: GIN(5, 8, 3, norm="batch_norm", jk="cat"),
    "GraphSAGE": lambda: GraphSAGE(5, 8, 3, out_channels=4),
    "GraphSAGE-max": lambda: GraphSAGE(5, 8, 2, aggr="max"),
    "GAT": lambda: GAT(5, 8, 3, out_channels=4, heads=2, dropout=0.2),
    "lazy GCN": lambda: GCN(-1, 8, 2),
    "handwritten": Handwritten,
    "a layer": lambda: pyg.GCNConv(5, 3),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_same_model_same_answers_and_back(name, training):
    torch.manual_seed(0)
    model = MODELS[name]()
    args = inputs(model)
    model.eval()(*args)  # settles lazy widths and caches
    model.train(training)
    text, keys, parts = str(model), list(model.state_dict()), list(model.named_modules())
    parameters, kinds = dict(model.named_parameters()), [type(module) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    expected = answers(model, args)
    running = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)

    assert af.accelerate(model) is model and is_accelerated(model)
    assert str(model) == text and list(model.state_dict()) == keys and model.training is training
    assert all(new is old for (_, new), (_, old) in zip(model.named_modules(), parts, strict=True))
    assert all(new is parameters[name] for name, new in model.named_parameters())
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
    for actual, wanted in zip(answers(model, args), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, running[key], **CLOSE, msg=key)
    model.load_state_dict(state)

    once = [type(module) for module in model.modules()]
    assert [type(module) for module in af.accelerate(model).modules()] == once
    assert af.restore(model) is model and af.restore(model) is model
    assert [type(module) for module in model.modules()] == kinds and not is_accelerated(model)
    for actual, wanted in zip(answers(model, args), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["GCN", "GIN", "GraphSAGE", "GraphSAGE-max", "GAT"])
def test_accelerated_models_take_a_sample_for_edge_index(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    x = inputs(model)[0]
    expected = model(x, EDGE_INDEX)
    edges = af.EdgeSample.from_edge_index(EDGE_INDEX, torch.tensor([0, 20]), torch.ones(60).requires_grad_())
    out = af.accelerate(model)(x, edges)
    torch.testing.assert_close(out, expected, **CLOSE)
    (grad,) = torch.autograd.grad(out.square().sum(), edges.value)
    assert (grad != 0).any()


def test_our_forward_really_runs(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("PyTorch Geometric's forward")

    models = [af.accelerate(MODELS[name]().eval()) for name in ("GCN", "GIN", "GraphSAGE", "GAT")]
    for model in models:
        for kind in (pyg.GCNConv, pyg.GINConv, pyg.SAGEConv, pyg.GATConv):
            monkeypatch.setattr(kind, "forward", fail)
        model(*inputs(model))
    with pytest.raises(AssertionError, match="PyTorch Geometric's forward"):
        af.restore(models[0])(*inputs(models[0]))


def test_pooling_modules():
    x, ascending = normal((6, 3), 0, torch.float32), torch.tensor([0, 0, 1, 1, 1, 3])
    calls = [
        {"index": ascending},
        {"index": ascending, "dim_size": 5},
        {"index": torch.tensor([2, 0, 1, 1, 0, 2])},
        {"ptr": torch.tensor([0, 2, 2, 6])},
        {"index": ascending, "dim": 0},
        {},
    ]
    for kind in (pyg.SumAggregation, pyg.MeanAggregation):
        plain, fast = kind(), af.accelerate(kind())
        for call in calls:
            torch.testing.assert_close(fast(x, **call), plain(x, **call), **CLOSE)
        torch.testing.assert_close(fast(x.t(), ascending, dim=1), plain(x.t(), ascending, dim=1), **CLOSE)


class OwnMessage(pyg.GCNConv):
    def message(self, x_j, edge_weight):
        return 2 * super().message(x_j, edge_weight)


class OwnForward(pyg.SAGEConv):
    def forward(self, x, edge_index, size=None):
        return 2 * super().forward(x, edge_index, size)


class OwnWidths(pyg.GCNConv):
    """Nothing of its own but the constructor."""

    def __init__(self, width):
        super().__init__(width, width)


def test_what_stays_as_it_is_is_listed_with_the_reason():
    patched = pyg.GINConv(nn.Linear(5, 5))
    patched.message = lambda x_j: 2 * x_j
    model = nn.ModuleDict(
        {
            "message": OwnMessage(5, 5),
            "changed": OwnForward(5, 5),
            "widths": OwnWidths(5),
            "patched": patched,
            "aggr": pyg.GCNConv(5, 5, aggr="max"),
            "other": pyg.GraphConv(5, 5),
            "norm": nn.BatchNorm1d(5),
            "max": pyg.MaxAggregation(),
            "ours": af.nn.GINConv(nn.Linear(5, 5)),
            "plain": nn.Linear(5, 5),
        }
    )
    x = normal((20, 5), 0, torch.float32)
    convs = [model[name] for name in ("message", "changed", "widths", "patched", "aggr", "other")]
    expected = [conv(x, EDGE_INDEX) for conv in convs]
    before = af.acceleration_report(model)
    af.accelerate(model)
    report = af.acceleration_report(model)
    assert report == before
    assert report.swapped == {"widths": "OwnWidths"}
    assert report.kept == {
        "message": "OwnMessage has its own message",
        "changed": "OwnForward has its own forward",
        "patched": "GINConv has its own message",
        "aggr": "aggr='max'; ours are sums",
        "other": "no GraphConv of ours",
        "norm": "torch's BatchNorm1d is as fast as ours",
        "max": "MaxAggregation shares gradients among equal maxima, ours gives them to the first",
        "ours": "GINConv of acgkd_fast already",
    }
    assert "widths   OwnWidths: ours" in str(report) and "other    no GraphConv of ours" in str(report)
    for conv, wanted in zip(convs, expected, strict=True):
        torch.testing.assert_close(conv(x, EDGE_INDEX), wanted, **CLOSE)
    assert str(af.acceleration_report(nn.Linear(2, 2))) == "nothing to swap"


def test_hooks_stay_and_run():
    model, seen = GCN(5, 8, 2), []
    handle = model.convs[0].register_forward_hook(lambda *_: seen.append("layer"))
    model.convs[0].lin.register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape)))
    af.accelerate(model)(*inputs(model))
    assert seen == [(20, 5), "layer"]
    handle.remove()
    seen.clear()
    model.convs[0].register_message_forward_hook(lambda module, given, out: seen.append("message"))
    model(*inputs(model))
    assert seen == [(20, 5), "message"]


def test_explanations_work_on_accelerated_models():
    """The mask of PyTorch Geometric's explainers, which needs messages."""
    model = GIN(5, 8, 2).eval()
    mask = torch.rand(60)

    def explained(model):
        for conv in model.convs:
            conv.explain, conv._edge_mask, conv._apply_sigmoid = True, mask, False
            conv._loop_mask = EDGE_INDEX[0] != EDGE_INDEX[1]
        out = model(*inputs(model))
        for conv in model.convs:
            conv.explain, conv._edge_mask = False, None
        return out

    expected, plain = explained(model), model(*inputs(model))
    af.accelerate(model)
    torch.testing.assert_close(explained(model), expected, **CLOSE)
    torch.testing.assert_close(model(*inputs(model)), plain, **CLOSE)
    assert not torch.allclose(expected, plain)


@pytest.mark.parametrize("name", ["GCN", "GAT", "handwritten"])
def test_copies_and_pickles(name):
    torch.manual_seed(0)
    model = af.accelerate(MODELS[name]().eval())
    expected = model(*inputs(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        torch.testing.assert_close(other(*inputs(model)), expected, **CLOSE)
        assert not is_accelerated(af.restore(other)) and is_accelerated(model)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_calls_that_are_not_ours_go_to_pytorch_geometric():
    x = normal((20, 5), 0, torch.float32)
    conv = pyg.GCNConv(5, 4)
    ones = torch.sparse_coo_tensor(EDGE_INDEX.flip(0), torch.ones(60), (20, 20)).coalesce().to_sparse_csr()
    calls = [(x, ones), (x.expand(2, -1, -1), EDGE_INDEX), (x, EDGE_INDEX, torch.ones(60, 1).squeeze(1))]
    expected = [conv(*call) for call in calls]
    with torch.autocast("cpu", torch.bfloat16):
        expected.append(conv(x, EDGE_INDEX))
    af.accelerate(conv)
    for call, wanted in zip(calls, expected, strict=False):
        torch.testing.assert_close(conv(*call), wanted, **CLOSE)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(conv(x, EDGE_INDEX), expected[-1], rtol=0, atol=0)
    half = af.accelerate(copy.deepcopy(conv).half())
    assert half(x.half(), EDGE_INDEX).dtype == torch.float16
    jacobian = torch.func.jacrev(lambda x: conv(x, EDGE_INDEX).sum(0))(x)
    assert jacobian.shape == (4, 20, 5)
    with pytest.raises((ValueError, IndexError)):
        conv(x, EDGE_INDEX + 15)
    with pytest.raises(ValueError, match="received a tuple"):
        conv((x, x), EDGE_INDEX)


def test_every_kind_has_its_mixin_and_modules_are_checked():
    assert set(swapped.layers()) >= {pyg.GCNConv, pyg.GINConv, pyg.GINEConv, pyg.SAGEConv, pyg.GATConv}
    for call in (af.accelerate, af.restore, af.acceleration_report):
        with pytest.raises(InputError, match=r"model: expected a torch\.nn\.Module, got 3"):
            call(3)
