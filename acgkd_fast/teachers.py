"""Teachers: frozen graph classifiers of any make behind one call, and the training of our own."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calling import (
    Call,
    call_convention,
    check_logits,
    input_width,
    mixes_graphs,
    probe,
    sample_convention,
    without_weights,
)
from .errors import InputError, check
from .graphs import GraphBatch
from .nn.accelerate import is_accelerated
from .nn.models import GraphClassifier, build_model
from .training import Progress, fit

__all__ = ["Teacher", "as_teacher", "call_convention", "default_epochs", "evaluate", "train_classifier"]

Adapter = Callable[[Any, GraphBatch], torch.Tensor]


class Teacher:
    """A frozen module that answers ``teacher(graphs) -> logits [B, C]``. Made by :func:`as_teacher`.

    Gradients reach node features and, where `accepts_edge_weight`, edge values; parameters get none.

    Attributes:
        module: the module, in eval mode, its parameters without gradients.
        num_features: width of the node features it takes.
        num_classes: number of its logits.
        accepts_edge_weight: whether its answer depends on edge weights. If not, entries of value 0
            are left out before it sees a graph, and other values than 1 are an error.
        batch_norms: its BatchNorm1d layers that track statistics, in the order of ``modules()``.
        feature_kind: "one-hot", "degree", "continuous", "constant", or None where unknown.
        has_adapter: whether a function of the user's stands between graphs and module, so that the
            module's own layers do not tell the whole answer.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Call,
        *,
        num_features: int,
        num_classes: int,
        accepts_edge_weight: bool,
        feature_kind: str | None = None,
        has_adapter: bool = False,
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.num_features = num_features
        self.num_classes = num_classes
        self.accepts_edge_weight = accepts_edge_weight
        self.feature_kind = feature_kind
        self.batch_norms = [
            layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d) and layer.running_mean is not None
        ]
        self.has_adapter = has_adapter
        self._call = call

    def __call__(self, graphs: GraphBatch) -> torch.Tensor:
        """Logits of every graph.

        Raises:
            InputError: no GraphBatch, features of another width, weights for a module that takes
                none, or an answer that is not [B, C].
        """
        check(isinstance(graphs, GraphBatch), "graphs", "a GraphBatch", graphs)
        width = graphs.x.shape[1]
        check(
            width == self.num_features, "graphs", f"node features of width {self.num_features} (the teacher's)", width
        )
        if self.module.training:
            self.module.eval()
        if not self.accepts_edge_weight:
            graphs = without_weights(graphs)
        logits = self._call(graphs)
        check_logits(logits, graphs.num_graphs)
        return logits

    def __repr__(self) -> str:
        return f"Teacher({type(self.module).__name__}, {self.num_features} features, {self.num_classes} classes)"


def as_teacher(
    module: nn.Module | Teacher,
    num_features: int | None = None,
    num_classes: int | None = None,
    *,
    call: Adapter | None = None,
    feature_kind: str | None = None,
) -> Teacher:
    """Freeze a trained module and find out how it is called.

    The module itself is put into eval mode and its parameters stop asking for gradients; pass a
    ``copy.deepcopy`` to go on training the original. Modules that are no GraphClassifier are run
    once on two small graphs, and once more with edge weights to see whether those count.

    Args:
        module: a GraphClassifier, a Teacher (returned as it is), or a module whose ``forward`` takes,
            by parameter name and in any order, (x, edge_index, batch) with an optional ``edge_weight`` or
            ``edge_attr``; (x, edges) with an EdgeSample; (graph, x) as DGL's models do, with the edge
            weights in ``graph.edata["weight"]`` and, where ``forward`` has it, in ``edge_weight``;
            (x, adj, mask), padded; or one PyTorch Geometric batch. Usual other names (features,
            batch_index, g, adjacency ...) count as these. A module of :func:`acgkd_fast.accelerate` that
            does no more than pass ``edge_index`` on gets an EdgeSample there, so that its edges have
            gradients whatever its layers are.
        num_features: width of the node features; default: the module's ``num_features`` or
            ``in_channels``, else the input width of its first layer.
        num_classes: number of logits; default: seen from the module's answer.
        call: for any other form: ``call(module, graphs)`` with a GraphBatch must return [B, C].
        feature_kind: what the features are, kept on the Teacher.

    Raises:
        InputError: a form of ``forward`` that is not known (the message shows an adapter), a module
            that fails on the two graphs, answers of the wrong shape, widths that disagree, or a
            parameter with NaN or infinity, which it names.

    Warns:
        RuntimeWarning: a module whose answer on a graph depends on the other graphs beside it, or one of
            :func:`acgkd_fast.accelerate` that does not pass an EdgeSample on.
    """
    if isinstance(module, Teacher):
        _check_width("num_features", num_features, module.num_features)
        _check_width("num_classes", num_classes, module.num_classes)
        return module
    check(isinstance(module, nn.Module), "teacher", "a torch.nn.Module or a Teacher", module)
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"teacher: expected finite numbers in every tensor, got NaN or infinity in {name}")
    if isinstance(module, GraphClassifier) and call is None:
        _check_width("num_features", num_features, module.num_features)
        _check_width("num_classes", num_classes, module.num_classes)
        return Teacher(
            module,
            call_convention(module),
            num_features=module.num_features,
            num_classes=module.num_classes,
            accepts_edge_weight=True,
            feature_kind=feature_kind,
        )
    bound = call_convention(module) if call is None else _bind(call, module)
    width = input_width(module) if num_features is None else num_features
    logits, weighted = probe(module, bound, width)
    _check_width("num_classes", num_classes, logits.shape[1])
    if mixes_graphs(module, bound, width, logits):
        warnings.warn(
            f"teacher: {type(module).__name__} answers differently on the same graph in another batch, so no score "
            "of a graph stays true while others change; give its norms the batch vector, or running statistics",
            RuntimeWarning,
            stacklevel=2,
        )
    if call is None and is_accelerated(module):
        passes = _passes_samples(module, width, logits)
        if passes is not None:
            bound, weighted = passes, True
    return Teacher(
        module,
        bound,
        num_features=width,
        num_classes=logits.shape[1],
        accepts_edge_weight=weighted,
        feature_kind=feature_kind,
        has_adapter=call is not None,
    )


def _passes_samples(module: nn.Module, width: int, expected: torch.Tensor) -> Call | None:
    """How to give an accelerated module its edges as an EdgeSample, if it can take them; a warning if not."""
    call = sample_convention(module)
    reason = "its forward has no place for one"
    if call is not None:
        try:
            logits, weighted = probe(module, call, width)
        except InputError as error:
            reason = str(error).split("; pass ")[0].split(", got ", 1)[-1]
        else:
            if weighted and torch.allclose(logits, expected, rtol=1e-4, atol=1e-5):
                return call
            reason = "its answer is another" if weighted else "edge weights do not change its answer"
    warnings.warn(
        f"teacher: {type(module).__name__} does not pass an EdgeSample on from edge_index to its layers ({reason}), "
        "so it is called as if it were not accelerated",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _bind(call: Adapter, module: nn.Module) -> Call:
    return lambda graphs: call(module, graphs)


def _check_width(name: str, wanted: int | None, have: int) -> None:
    check(wanted is None or wanted == have, name, f"{have} (the teacher's)", wanted)


def default_epochs(num_graphs: int) -> int:
    """Epochs that bring a gcn5-64 teacher's training loss to rest: about 1500 steps, 30 to 300 epochs."""
    return min(max(round(1500 * 32 / max(num_graphs, 1)), 30), 300)


def train_classifier(
    model: str | GraphClassifier,
    graphs: GraphBatch,
    *,
    epochs: int | None = None,
    lr: float = 0.01,
    weight_decay: float = 0.0,
    batch_size: int = 32,
    seed: int = 0,
    num_classes: int | None = None,
    progress: Progress | bool = False,
    checkpoint: str | Path | None = None,
) -> GraphClassifier:
    """Train a graph classifier on labelled graphs: Adam, cross-entropy, lr falling linearly to 0.

    The last epoch is taken; nothing is selected. Equal arguments give equal weights on one device,
    also after an interruption.

    Args:
        model: an architecture by name, initialised from `seed`, or a model trained in place.
        graphs: training graphs with labels.
        epochs: default :func:`default_epochs`.
        lr, weight_decay, batch_size: of Adam and the mini-batches.
        seed: initialisation, order of the mini-batches, dropout; global random streams are left alone.
        num_classes: for a model by name; default the largest label + 1.
        progress: called with (epoch, {"loss": mean}) after every epoch; True shows a tqdm bar.
        checkpoint: state file, written every few epochs; when it is there, training goes on from it.

    Returns:
        The model in eval mode.

    Raises:
        InputError: no labels, labels or features that do not fit the model, or a number out of range.
        DataError: a checkpoint of another training, or one that cannot be read or written.
    """
    y = _labels(graphs)
    epochs = default_epochs(graphs.num_graphs) if epochs is None else epochs
    if isinstance(model, str):
        classes = int(y.max()) + 1 if num_classes is None else num_classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_model(model, graphs.x.shape[1], classes).to(graphs.x.device)
    check(model.num_features == graphs.x.shape[1], "graphs", f"features of width {model.num_features}", graphs.x)
    check(int(y.max()) < model.num_classes, "graphs", f"labels below {model.num_classes}", int(y.max()))
    trained = model

    def loss(batch: GraphBatch, _: torch.Tensor) -> torch.Tensor:
        assert batch.y is not None
        return nn.functional.cross_entropy(trained(batch.x, batch.edges), batch.y)

    with _progress(progress, epochs) as callback:
        fit(
            model,
            graphs,
            loss,
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            batch_size=batch_size,
            seed=seed,
            progress=callback,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            stamp={} if checkpoint is None else {"arch": model.arch, "graphs": _digest(graphs)},
        )
    return model


@torch.no_grad()
def evaluate(model: nn.Module | Teacher, graphs: GraphBatch, *, batch_size: int = 256) -> dict[str, Any]:
    """Measure a classifier on labelled graphs.

    Args:
        model: a Teacher, or any module that :func:`call_convention` knows; it is run in eval mode
            and then left in the mode it was in.
        graphs: labelled graphs.
        batch_size: graphs per forward pass.

    Returns:
        ``accuracy`` (share of right answers, 0 to 1), ``num_graphs``, ``majority`` (share of the
        most frequent class in these graphs) and ``loss`` (mean cross-entropy).

    Raises:
        InputError: no graphs, no labels, or labels beyond the model's classes.
    """
    y = _labels(graphs)
    call = model if isinstance(model, Teacher) else call_convention(model)
    module = model.module if isinstance(model, Teacher) else model
    was_training = module.training
    module.eval()
    try:
        parts = torch.arange(graphs.num_graphs).split(batch_size)
        logits = torch.cat([call(graphs.select(part)) for part in parts])
    finally:
        module.train(was_training)
    check(int(y.max()) < logits.shape[1], "graphs", f"labels below {logits.shape[1]}", int(y.max()))
    return {
        "accuracy": float((logits.argmax(1) == y).double().mean()),
        "num_graphs": graphs.num_graphs,
        "majority": float(y.bincount().max() / y.numel()),
        "loss": float(nn.functional.cross_entropy(logits, y)),
    }


def _labels(graphs: GraphBatch) -> torch.Tensor:
    if graphs.y is None or graphs.num_graphs == 0:
        raise InputError(f"graphs: expected at least one graph with labels, got {graphs.num_graphs} without")
    check(int(graphs.y.min()) >= 0, "graphs", "labels from 0", int(graphs.y.min()))
    return graphs.y


def _digest(graphs: GraphBatch) -> str:
    """Fingerprint of the training graphs, so that a checkpoint is not continued on others."""
    edges, digest = graphs.edges, hashlib.sha256()
    for tensor in (graphs.x, edges.rowptr, edges.col, edges.value, graphs.y):
        assert tensor is not None
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _progress(progress: Progress | bool, epochs: int) -> Iterator[Progress | None]:
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=epochs, desc="train", unit="epoch") as bar:

        def advance(epoch: int, values: dict[str, float]) -> None:
            bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()}, refresh=False)
            bar.update(epoch - bar.n)

        yield advance
