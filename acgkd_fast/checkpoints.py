"""Models and graphs in safetensors files, and the teachers that GFKD published."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import __version__
from .errors import DataError, InputError, check
from .files import load_tensors, save_tensors
from .formats.pickles import load_pickle, save_pickle
from .graphs import EdgeSample, GraphBatch
from .nn.models import GraphClassifier, build_model, parse_arch
from .nn.projected import Classifier, LinearHead, ProjectedClassifier, Projector

_MODEL, _GRAPHS = "model", "graphs"
_FLOATS = (torch.float32, torch.float64, torch.bfloat16)
_GRAPH_TENSORS = {
    "x": (2, _FLOATS),
    "rowptr": (1, (torch.int32,)),
    "col": (1, (torch.int32,)),
    "value": (1, _FLOATS),
    "ptr": (1, (torch.int64,)),
}


def save_model(path: str | Path, model: Classifier, extra: dict[str, Any] | None = None) -> None:
    """Write a model with all that is needed to build it again.

    Args:
        path: the file; replaced atomically.
        model: a graph classifier of this package, or a student with a projector and the linear
            classifier of such a teacher; all of its parts go into the file.
        extra: JSON-able facts to keep beside it, such as ``feature_kind`` or the training settings.

    Raises:
        InputError: another kind of module, or a key of `extra` that the format uses itself.
        DataError: the file cannot be written.
    """
    linear = isinstance(model, ProjectedClassifier) and isinstance(model.head, LinearHead)
    if not (isinstance(model, GraphClassifier) or linear):
        got = type(model).__name__ + (
            " with the head of another module" if isinstance(model, ProjectedClassifier) else ""
        )
        raise InputError(
            f"model: expected a GraphClassifier or a ProjectedClassifier with a linear head, got {got} (torch.save "
            "keeps modules of other classes)"
        )
    description = {
        "arch": model.arch,
        "num_features": model.num_features,
        "num_classes": model.num_classes,
        "readout": model.readout if isinstance(model, GraphClassifier) else model.head.readout,
        "dropout": model.dropout.p,
    }
    if isinstance(model, ProjectedClassifier):
        description["projector"] = {"width": model.head_width, **model.projector.description()}
    save_tensors(path, model.state_dict(), _metadata(_MODEL, description, extra))


def load_model(path: str | Path) -> tuple[Classifier, dict[str, Any]]:
    """Read what :func:`save_model` wrote.

    Returns:
        The model in eval mode on the CPU, and the metadata: ``arch``, ``num_features``, ``num_classes``,
        ``readout``, ``dropout``, ``versions``, for a projected student ``projector``, and everything given as `extra`.

    Raises:
        DataError: no file, not a model, or tensors that do not fit or are not finite; it names them.
    """
    tensors, metadata = _load(path, _MODEL)
    try:
        model = _described(metadata)
    except (KeyError, TypeError, InputError) as error:
        raise DataError(f"{path}: expected the description of a model, got a damaged one ({error})") from error
    _fill(path, model, tensors)
    return model.eval(), metadata


def _described(metadata: Mapping[str, Any]) -> Classifier:
    arch, num_features, num_classes, dropout, readout = (
        metadata[name] for name in ("arch", "num_features", "num_classes", "dropout", "readout")
    )
    if "projector" not in metadata:
        return build_model(arch, num_features, num_classes, readout=readout, dropout=dropout)
    options = dict(metadata["projector"])
    width = options.pop("width")
    return ProjectedClassifier(
        arch,
        num_features,
        num_classes,
        projector=Projector(options.pop("kind"), parse_arch(arch)[2], width, **options),
        head=LinearHead(width, num_classes, readout),
        head_width=width,
        dropout=dropout,
    )


def save_graphs(path: str | Path, graphs: GraphBatch, extra: dict[str, Any] | None = None) -> None:
    """Write graphs, edge weights and labels, without the logits that they were drawn from.

    Args:
        path: the file; replaced atomically.
        graphs: the graphs.
        extra: JSON-able facts to keep beside them.

    Raises:
        InputError: a key of `extra` that the format uses itself.
        DataError: the file cannot be written.
    """
    edges, count = graphs.edges, graphs.edges.num_edges
    tensors = {
        "x": graphs.x,
        "rowptr": edges.rowptr,
        "col": edges.col[:count],
        "value": edges.value[:count],
        "ptr": edges.ptr,
    }
    if graphs.y is not None:
        tensors["y"] = graphs.y
    save_tensors(path, tensors, _metadata(_GRAPHS, {"symmetric": edges.symmetric}, extra))


def load_graphs(path: str | Path) -> tuple[GraphBatch, dict[str, Any]]:
    """Read what :func:`save_graphs` wrote.

    Returns:
        The graphs on the CPU and the metadata: ``versions`` and everything given as `extra`.

    Raises:
        DataError: no file, no graphs in it, or tensors that make no graphs.
    """
    tensors, metadata = _load(path, _GRAPHS)
    for name, (dims, dtypes) in _GRAPH_TENSORS.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dim() != dims or tensor.dtype not in dtypes:
            raise DataError(
                f"{path}: expected tensor {name} of {dtypes[0]} and {dims} dimensions, got {_shape(tensor)}"
            )
    x, rowptr, col, value, ptr = (tensors[name] for name in _GRAPH_TENSORS)
    for name, offsets, total in (("rowptr", rowptr, col.numel()), ("ptr", ptr, rowptr.numel() - 1)):
        ascending = offsets.numel() > 0 and int(offsets[0]) == 0 and bool((offsets[1:] >= offsets[:-1]).all())
        if not ascending or int(offsets[-1]) != total:
            raise DataError(f"{path}: expected {name} to ascend from 0 to {total}, got other offsets")
    edges = EdgeSample(rowptr, col, value, ptr, bool(metadata.get("symmetric", False)))
    try:
        graphs = GraphBatch(x, edges, tensors.get("y"))
        first, last = (ptr[graphs.batch() + shift] for shift in (0, 1))
    except InputError as error:
        raise DataError(f"{path}: expected tensors of one batch of graphs, got others ({error})") from error
    row = edges.row()
    if value.numel() != col.numel() or not bool(((col >= first[row]) & (col < last[row])).all()):
        raise DataError(f"{path}: expected edges with a value and both ends in one graph, got others")
    for name in ("x", "value"):
        _check_finite(path, name, tensors[name])
    return graphs, metadata


def load_gfkd_checkpoint(
    path: str | Path,
    arch: str,
    *,
    feature_order: Sequence[int] | None = None,
    class_order: Sequence[int] | None = None,
    self_loops: bool = False,
) -> tuple[GraphClassifier, dict[str, Any]]:
    """Read a teacher or student of the public GFKD code (a legacy or zip file of ``torch.save``).

    GFKD numbers node labels and classes in the order in which its own data file has them, which need not be that of
    other files of the same data set.

    Args:
        path: a state dict, or a dictionary that holds one under ``model``.
        arch: what the file holds, such as "gcn5-64".
        feature_order: for each of our node labels its number in the file; default the same.
        class_order: for each of our classes its number in the file; default the same.
        self_loops: GFKD adds a self-loop to every node before a model sees a graph. GCN layers of this package do so
            themselves; for a GIN, True takes the loop into eps, so that graphs without loops give GFKD's answers.

    Returns:
        The model in eval mode on the CPU, and the other plain values of the file, such as ``epoch``
        and ``accuracy``.

    Raises:
        InputError: an unknown architecture.
        DataError: no file, not a checkpoint, another architecture, or tensors that do not fit or
            are not finite; it names them.

    Format: :data:`_GFKD_NAMES`; GCN weights are stored input by output.
    """
    kind, depth, width = parse_arch(arch)
    holder = _load_mapping(path)
    state = holder.get("model", holder)
    if not isinstance(state, Mapping) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise DataError(f"{path}: expected a state dict (or one under 'model'), got {type(state).__name__}")
    tensors = {}
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            ours = _own_name(name)
            tensors[ours] = tensor.t() if ours.endswith("conv.lin.weight") and tensor.dim() == 2 else tensor
    entry = tensors.get("blocks.0.conv.lin.weight" if kind == "gcn" else "blocks.0.conv.nn.0.weight")
    classifier = tensors.get("classifier.weight")
    if entry is None or classifier is None or entry.dim() != 2 or classifier.dim() != 2:
        raise DataError(f"{path}: expected the tensors of a {arch} of GFKD, got {', '.join(list(state)[:4])}, ...")
    if entry.shape[0] != width:
        raise DataError(f"{path}: expected width {width} ({arch}), got width {entry.shape[0]}")
    model = build_model(arch, entry.shape[1], classifier.shape[0])
    _fill(path, model, tensors)
    _reorder(model, kind, feature_order, class_order)
    if kind == "gin" and self_loops:
        for i in range(depth):
            model.get_buffer(f"blocks.{i}.conv.eps").add_(1.0)
    facts = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in holder.items()
        if isinstance(value, (int, float, str, np.generic))
    }
    return model.eval(), facts


def save_gfkd_checkpoint(path: str | Path, model: GraphClassifier, facts: dict[str, Any] | None = None) -> None:
    """Write a model as the public GFKD code does: ``{"model": state dict under its names, **facts}``.

    Args:
        path: the file; replaced atomically.
        model: a graph classifier of this package.
        facts: plain values such as ``epoch`` and ``accuracy``.

    Raises:
        InputError: another kind of module, or facts under the name "model".
        DataError: the file cannot be written.
    """
    check(isinstance(model, GraphClassifier), "model", "a GraphClassifier", type(model).__name__)
    check("model" not in (facts or {}), "facts", "other names than 'model'", facts)
    state = {}
    for name, tensor in model.state_dict().items():
        stored = tensor.t() if name.endswith("conv.lin.weight") else tensor
        state[_gfkd_name(name, parse_arch(model.arch)[0])] = stored.detach().cpu().clone()
    save_pickle(path, {**(facts or {}), "model": state})


def _reorder(
    model: GraphClassifier, kind: str, feature_order: Sequence[int] | None, class_order: Sequence[int] | None
) -> None:
    entry = model.get_parameter("blocks.0.conv.lin.weight" if kind == "gcn" else "blocks.0.conv.nn.0.weight")
    with torch.no_grad():
        if feature_order is not None:
            entry.copy_(entry[:, _permutation("feature_order", feature_order, model.num_features)])
        if class_order is not None:
            rows = _permutation("class_order", class_order, model.num_classes)
            model.classifier.weight.copy_(model.classifier.weight[rows])
            model.classifier.bias.copy_(model.classifier.bias[rows])


def _permutation(name: str, order: Sequence[int], count: int) -> torch.Tensor:
    check(sorted(order) == list(range(count)), name, f"each of 0..{count - 1} once", list(order))
    return torch.tensor(list(order))


_GFKD_NAMES = (
    (r"gcnlayers\.(\d+)\.weight", r"blocks.\1.conv.lin.weight"),
    (r"gcnlayers\.(\d+)\.bias", r"blocks.\1.conv.bias"),
    (r"norms\.(\d+)\.", r"blocks.\1.norm."),
    (r"ginlayers\.(\d+)\.eps", r"blocks.\1.conv.eps"),
    (r"ginlayers\.(\d+)\.apply_func\.mlp\.linears\.0\.", r"blocks.\1.conv.nn.0."),
    (r"ginlayers\.(\d+)\.apply_func\.mlp\.(?:norm_list|batch_norms)\.0\.", r"blocks.\1.conv.nn.1."),
    (r"ginlayers\.(\d+)\.apply_func\.mlp\.linears\.1\.", r"blocks.\1.conv.nn.2."),
    (r"ginlayers\.(\d+)\.apply_func\.(?:norm|bn)\.", r"blocks.\1.norm."),
    (r"linears_prediction\.", r"classifier."),
)


def _own_name(name: str) -> str:
    for pattern, replacement in _GFKD_NAMES:
        renamed, hits = re.subn(rf"^(?:module\.)?{pattern}", replacement, name)
        if hits:
            return renamed
    return name


_OWN_NAMES = {
    "gcn": (
        (r"blocks\.(\d+)\.conv\.lin\.weight", r"gcnlayers.\1.weight"),
        (r"blocks\.(\d+)\.conv\.bias", r"gcnlayers.\1.bias"),
        (r"blocks\.(\d+)\.norm\.", r"norms.\1."),
    ),
    "gin": (
        (r"blocks\.(\d+)\.conv\.eps", r"ginlayers.\1.eps"),
        (r"blocks\.(\d+)\.conv\.nn\.0\.", r"ginlayers.\1.apply_func.mlp.linears.0."),
        (r"blocks\.(\d+)\.conv\.nn\.1\.", r"ginlayers.\1.apply_func.mlp.norm_list.0."),
        (r"blocks\.(\d+)\.conv\.nn\.2\.", r"ginlayers.\1.apply_func.mlp.linears.1."),
        (r"blocks\.(\d+)\.norm\.", r"ginlayers.\1.apply_func.norm."),
    ),
}


def _gfkd_name(name: str, kind: str) -> str:
    for pattern, replacement in (*_OWN_NAMES[kind], (r"classifier\.", r"linears_prediction.")):
        renamed, hits = re.subn(rf"^{pattern}", replacement, name)
        if hits:
            return renamed
    raise AssertionError(f"no name of GFKD for {name}")


def _load_mapping(path: str | Path) -> Mapping[str, Any]:
    holder = load_pickle(path, "a checkpoint of torch.save")
    if not isinstance(holder, Mapping):
        raise DataError(f"{path}: expected a dictionary of tensors, got {type(holder).__name__}")
    return holder


def _metadata(kind: str, description: dict[str, Any], extra: dict[str, Any] | None) -> dict[str, Any]:
    versions = {"acgkd-fast": __version__, "torch": torch.__version__}
    metadata = {"kind": kind, **description, "versions": versions}
    taken = sorted(set(metadata) & set(extra or {}))
    if taken:
        raise InputError(f"extra: expected other keys than {', '.join(metadata)}, got {', '.join(taken)}")
    return {**metadata, **(extra or {})}


def _load(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != kind:
        raise DataError(f"{path}: expected a file of kind '{kind}', got kind {metadata.get('kind')!r}")
    return tensors, metadata


def _fill(path: str | Path, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load tensors into a model, naming the first that is missing, too many, misshapen or not finite."""
    expected = model.state_dict()
    for name, ours in expected.items():
        if name not in tensors and name.endswith("num_batches_tracked"):
            continue  # files older than torch 0.4.1 have no such counter, and eval mode does not read it
        if name not in tensors or tensors[name].shape != ours.shape:
            raise DataError(
                f"{path}: expected tensor {name} of shape {tuple(ours.shape)}, got {_shape(tensors.get(name))}"
            )
        _check_finite(path, name, tensors[name])
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise DataError(f"{path}: expected only tensors of {type(model).__name__}, got {', '.join(unknown[:4])} too")
    model.load_state_dict({**expected, **tensors})


def _check_finite(path: str | Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise DataError(f"{path}: expected finite numbers in tensor {name}, got NaN or infinity")


def _shape(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else f"shape {tuple(tensor.shape)} of {tensor.dtype}"
