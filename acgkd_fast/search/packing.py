"""A teacher's weights as one flat tensor, in the order in which the search operator reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..nn.gcn_conv import GCNConv
from ..nn.gin_conv import GINConv
from ..nn.models import READOUTS, Block, GraphClassifier
from ..nn.norm import BatchNormReLU
from ..teachers import Teacher


@dataclass(frozen=True, eq=False)
class PackedTeacher:
    """Weights of a GraphClassifier.

    Attributes:
        parameters: float32, flat. Per block: W [in, width], b [width]; GIN also 1 + eps, scale and shift of the inner
            norm [width] each, W2 [width, width], b2 [width]; then scale and shift of the block's norm. Then the
            classifier's weight [classes, width] and bias [classes]. A norm is x * scale + shift.
        gin: GIN blocks, else GCN.
        depth, features, width, classes: number of blocks, and extents.
        readout: 0 sum, 1 mean, 2 max.
    """

    parameters: torch.Tensor
    gin: bool
    depth: int
    features: int
    width: int
    classes: int
    readout: int

    @property
    def channels(self) -> int:
        """Channels of all BatchNorm layers together."""
        return self.depth * self.width * (2 if self.gin else 1)


def why_not_packed(teacher: Teacher) -> str | None:
    """Why a teacher's weights cannot be packed, or None if they can."""
    model = teacher.module
    # A subclass may compute anything in the methods it overrides, and an adapter anything at all.
    if type(model) is not GraphClassifier:
        return f"a {type(model).__name__} is no plain GraphClassifier"
    if teacher.has_adapter:
        return "it is called through an adapter"
    if any(p.dtype != torch.float32 for p in model.parameters()):
        return "its parameters are not float32"
    if any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()):
        return "hooks are registered on it"
    if not all(_is_plain(block) for block in model.blocks) or type(model.classifier) is not nn.Linear:
        return "a layer of it was exchanged for another"
    return None


def why_too_wide(teacher: Teacher, shared_bytes: int) -> str | None:
    """Why a GPU's block has too little shared memory for a teacher that can be packed, or None if it has enough."""
    model = teacher.module
    assert isinstance(model, GraphClassifier)
    norms = sum(isinstance(part, nn.BatchNorm1d) for part in model.modules())
    stride = -(-model.width // 16) * 16
    # As `fixed_bytes` in csrc/cuda/search.h, which refuses what this lets through; a kilobyte is for small things.
    needed = 16 * norms * stride + 8 * model.num_classes + 4 * stride + 1024
    if needed <= shared_bytes:
        return None
    return f"its moment sums take {needed} bytes of shared memory, and a block of this GPU has {shared_bytes}"


def _is_plain(block: nn.Module) -> bool:
    if type(block) is not Block or not _is_frozen_norm(block.norm):
        return False
    conv = block.conv
    if type(conv) is GCNConv:
        return conv.normalize and conv.add_self_loops and not (conv.improved or conv.cached)
    if type(conv) is not GINConv or not isinstance(conv.nn, nn.Sequential):
        return False
    kinds = [type(part) for part in conv.nn]
    return kinds == [nn.Linear, BatchNormReLU, nn.Linear] and _is_frozen_norm(conv.nn[1])


def _is_frozen_norm(norm: nn.Module) -> bool:
    return type(norm) is BatchNormReLU and norm.running_mean is not None and norm.weight is not None


def pack_teacher(model: GraphClassifier) -> PackedTeacher:
    """Weights of a model for which :func:`why_not_packed` has nothing to say."""
    parts: list[torch.Tensor] = []
    for block in model.blocks:
        assert isinstance(block, Block)
        conv = block.conv
        if isinstance(conv, GCNConv):
            parts += _linear(conv.lin.weight, conv.bias)
        else:
            assert isinstance(conv.nn, nn.Sequential)
            first, inner, second = conv.nn
            assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and isinstance(inner, nn.BatchNorm1d)
            parts += _linear(first.weight, first.bias)
            parts += [1.0 + conv.eps.reshape(1), *_affine(inner), *_linear(second.weight, second.bias)]
        parts += _affine(block.norm)
    classifier = model.classifier
    bias = classifier.weight.new_zeros(model.num_classes) if classifier.bias is None else classifier.bias
    parts += [classifier.weight, bias]
    return PackedTeacher(
        torch.cat([part.detach().flatten() for part in parts]),
        any(isinstance(part, GINConv) for part in model.modules()),
        len(model.blocks),
        model.num_features,
        model.width,
        model.num_classes,
        READOUTS.index(model.readout),
    )


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> list[torch.Tensor]:
    return [weight.T, weight.new_zeros(weight.shape[0]) if bias is None else bias]


def _affine(norm: nn.BatchNorm1d) -> list[torch.Tensor]:
    """Scale and shift, folded in float64."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return [scale.float(), (norm.bias.double() - norm.running_mean.double() * scale).float()]
