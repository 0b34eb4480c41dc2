"""Our message passing inside models made of PyTorch Geometric's layers, and out of them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from ..errors import check
from . import swapped
from .gat_conv import GATConv
from .gcn_conv import GCNConv
from .gin_conv import GINConv, GINEConv
from .models import GraphClassifier
from .sage_conv import SAGEConv

Model = TypeVar("Model", bound=nn.Module)

_OURS = (GCNConv, GINConv, GINEConv, SAGEConv, GATConv, GraphClassifier)
# What a subclass may redefine without changing what a layer computes is everything but these.
_COMPUTING = (
    *("forward", "message", "aggregate", "message_and_aggregate", "update", "edge_update", "reduce"),
    *("propagate", "edge_updater", "__call__"),
)


@dataclass
class AccelerationReport:
    """What :func:`accelerate` does to a model, by module name.

    Attributes:
        swapped: name of the module -> class of PyTorch Geometric's that it was.
        kept: name of the module -> why it stays as it is. Modules that pass no messages, pool nothing and
            normalise nothing are not listed.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [(name or "(model)", f"{kind}: ours") for name, kind in self.swapped.items()]
        rows += [(name or "(model)", why) for name, why in self.kept.items()]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows) or "nothing to swap"


def accelerate(model: Model) -> Model:
    """Let a model of PyTorch Geometric's layers compute with our operators. It stays the same model.

    GCNConv, GINConv, GINEConv, SAGEConv and GATConv, and the pooling modules SumAggregation and
    MeanAggregation, wherever they sit in the model, get a subclass of their own class with a faster
    ``forward``. Nothing is copied or replaced: modules and parameters stay the same objects, with their
    names, hooks, mode, device and dtype, and outputs and gradients agree. Calls that our operators do
    not serve (sparse matrices, static graphs, float16, autocast, torch.compile, explanations, hooks on the
    steps of message passing) go to PyTorch Geometric's own ``forward``.

    The layers then also take an :class:`EdgeSample` where ``edge_index`` goes, with gradients for its values,
    and so does a model that does no more than pass ``edge_index`` on.

    Args:
        model: changed in place; twice is as good as once. :func:`acceleration_report` says what was
            swapped and what was not, and why; :func:`restore` undoes it.

    Returns:
        The same model.

    Raises:
        InputError: no module.
    """
    for _, module, kind, reason in _candidates(model):
        if reason is None and not isinstance(module, swapped.Swapped):
            # A class of its own per class of the model's: of plain Python classes only, whose instances may change it.
            module.__class__ = swapped.swapped_type(type(module), kind)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`, in place. Returns the same model."""
    check(isinstance(model, nn.Module), "model", "a torch.nn.Module", model)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, swapped.Swapped)]
    for layer in layers:
        layer.__class__ = layer.original
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether a layer of the model computes with our operators by :func:`accelerate`."""
    return any(isinstance(module, swapped.Swapped) for module in model.modules())


def acceleration_report(model: nn.Module) -> AccelerationReport:
    """What :func:`accelerate` swaps or has swapped in a model, and why it leaves the rest.

    Pooling by function (``global_add_pool`` and its like) and anything else inside a ``forward`` is not a
    module, so it is neither swapped nor listed.

    Raises:
        InputError: no module.
    """
    report = AccelerationReport()
    for name, module, _, reason in _candidates(model):
        if reason is None:
            report.swapped[name] = type(module).__name__
        else:
            report.kept[name] = reason
    return report


def _candidates(model: Any) -> Iterator[tuple[str, nn.Module, Any, str | None]]:
    """(name, module, the mixin for it, None or why it stays) of every module worth a word."""
    check(isinstance(model, nn.Module), "model", "a torch.nn.Module", model)
    layers = swapped.layers()
    inner = {id(part.aggr_module) for part in model.modules() if hasattr(part, "aggr_module")}
    for name, module in model.named_modules():
        if id(module) in inner:
            continue
        if isinstance(module, swapped.Swapped):
            yield name, module, type(module).kind, None
            continue
        base = next((base for base in layers if isinstance(module, base)), None)
        if base is not None:
            yield name, module, layers[base], _why_kept(module, base)
        else:
            reason = _why_unknown(module)
            if reason is not None:
                yield name, module, None, reason


def _why_kept(module: nn.Module, base: type[nn.Module]) -> str | None:
    own = _redefined(type(module), base) or next((name for name in _COMPUTING if name in vars(module)), None)
    if own is not None:
        return f"{type(module).__name__} has its own {own}"
    aggr = getattr(module, "aggr", None)
    if base.__name__ in ("GCNConv", "GINConv", "GINEConv", "GATConv") and aggr not in ("add", "sum"):
        return f"aggr={aggr!r}; ours are sums"
    return None


def _redefined(kind: type, base: type) -> str | None:
    """The first method that computes and is defined between a class and its base."""
    for ancestor in kind.__mro__[: kind.__mro__.index(base)]:
        for name in _COMPUTING:
            # PyTorch Geometric writes a propagate of its own making into every class of layers.
            generated = ancestor.__dict__.get(f"_jinja_{name}")
            if name in ancestor.__dict__ and ancestor.__dict__[name] is not generated:
                return name
    return None


def _why_unknown(module: nn.Module) -> str | None:
    kind = type(module).__name__
    if isinstance(module, _OURS):
        return f"{kind} of acgkd_fast already"
    if isinstance(module, nn.BatchNorm1d):
        return f"torch's {kind} is as fast as ours"
    if kind == "MaxAggregation":
        return "MaxAggregation shares gradients among equal maxima, ours gives them to the first"
    if any(isinstance(module, other) for other in swapped.other_layers()):
        return f"no {kind} of ours"
    return None
