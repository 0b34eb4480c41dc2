"""CMI, KamalEngine, Fast-Datafree, NAYER and DFAD: graph models called the way their loops call image models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..calling import call_convention
from ..errors import fail
from ..graphs import GraphBatch


class OneBatch(nn.Module):
    """``model(batch)`` and ``model(batch, return_features=True)`` -> (logits, features).

    Args:
        model: a graph classifier in any form that `call_convention` knows; its parameters are those of this module.
        feature_layer: the layer whose input are the features; default the last linear layer, which sees one row per
            graph in most classifiers.

    Raises:
        InputError: an unknown form of ``forward``, or a model without linear layers and none given.
    """

    def __init__(self, model: nn.Module, feature_layer: nn.Module | None = None) -> None:
        super().__init__()
        call_convention(model)
        linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        if feature_layer is None and not linear:
            raise fail("feature_layer", "the layer whose input are the features", feature_layer)
        self.model = model
        # In a list, so that a layer of the model is not registered as a second submodule.
        self._feature_layer = [linear[-1] if feature_layer is None else feature_layer]

    def forward(self, batch: Any, return_features: bool = False) -> Any:
        """Logits [B, C] of a GraphBatch or a PyTorch Geometric batch, and on request the features [B, F]."""
        graphs = batch if isinstance(batch, GraphBatch) else GraphBatch.from_pyg(batch)
        # Found anew, so that a copy of this module calls its own model.
        call = call_convention(self.model)
        if not return_features:
            return call(graphs)
        seen: list[torch.Tensor] = []
        handle = self._feature_layer[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = call(graphs)
        finally:
            handle.remove()
        return logits, seen[-1]
