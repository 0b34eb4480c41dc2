"""DeepInversion (CVPR 2020, arXiv 1912.08795): the interface of its public code; graphs instead of pictures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import save_graphs
from ..distill.inversion import LearnSettings
from ..errors import check
from ..graphs import GraphBatch
from ..pseudo_graphs import GraphPrior
from ..synthesizer import GraphSynthesizer
from ..teachers import Teacher

# Weights that have a meaning for graphs, and where they go.
_KNOWN = {"r_feature": "bn", "main_loss_multiplier": "oh", "adi_scale": "adv"}


class DeepInversionClass:
    """``generate_batch(net_student, targets)`` with the host's constructor; nothing is returned, graphs are written.

    Args:
        bs: graphs per batch.
        net_teacher: a Teacher or any module that `as_teacher` accepts.
        final_data_path: folder of the files ``batch_00000.safetensors``, which `load_graphs` reads.
        coefficients: the host's ``r_feature``, ``main_loss_multiplier``, ``adi_scale`` and ``lr`` (of the structure;
            the features' keeps its ratio in `learn`). Others that are not 0 concern pixels and are named in a warning.
        prior: sizes, mean degree and kind of features; default GFKD's sizes.
        iterations: steps per batch; default those of `learn`.
        learn: further settings.
        seed: of everything drawn.
        use_fp16, path, parameters, setting_id, jitter, criterion, network_output_function, hook_for_display: taken for
            the sake of the signature.

    Attributes:
        num_generations: batches written so far; set it to resume.
        graphs: the last batch, on the teacher's device.

    Warns:
        RuntimeWarning: coefficients without a meaning for graphs.
    """

    def __init__(
        self,
        bs: int = 84,
        use_fp16: bool = True,
        net_teacher: Teacher | nn.Module | None = None,
        path: str = "./gen_images/",
        final_data_path: str | Path = "./gen_graphs_final/",
        parameters: Mapping[str, Any] | None = None,
        setting_id: int = 0,
        jitter: int = 30,
        criterion: Any = None,
        coefficients: Mapping[str, float] | None = None,
        network_output_function: Any = None,
        hook_for_display: Any = None,
        *,
        prior: GraphPrior | None = None,
        iterations: int | None = None,
        learn: LearnSettings | None = None,
        seed: int = 0,
    ) -> None:
        check(net_teacher is not None, "net_teacher", "a Teacher or a torch.nn.Module", net_teacher)
        assert net_teacher is not None
        given = dict(coefficients or {})
        learn = learn or LearnSettings()
        rate = given.pop("lr", learn.lr_structure)
        learn = replace(learn, lr_structure=rate, lr_features=rate * learn.lr_features / learn.lr_structure)
        weights = {own: given.pop(name) for name, own in _KNOWN.items() if name in given}
        idle = sorted(name for name, value in given.items() if value != 0)
        if idle:
            warnings.warn(f"coefficients: {', '.join(idle)} have no meaning for graphs", RuntimeWarning, stacklevel=2)
        self.folder = Path(final_data_path)
        self.num_generations = 0
        self.graphs: GraphBatch | None = None
        self._options: dict[str, Any] = {
            **weights,
            "prior": prior,
            "engine": "learn",
            "iterations": iterations,
            "synthesis_batch_size": bs,
            "learn": learn,
            "seed": seed,
        }
        self.net_teacher = net_teacher

    def generate_batch(self, net_student: nn.Module | None = None, targets: torch.Tensor | None = None) -> None:
        """Learn one batch and write it.

        Args:
            net_student: the model being taught; needed where ``adi_scale`` is above 0, as in the host.
            targets: int64 [n], the classes wanted; default all equally often.

        Raises:
            InputError: no student beside ``adi_scale``, or labels outside the teacher's classes.
            DataError: a file that cannot be written.
        """
        synthesizer = GraphSynthesizer(self.net_teacher, net_student, **self._options)
        synthesizer.calls = self.num_generations
        self.graphs = synthesizer.synthesize(targets)["synthetic"]
        save_graphs(self.folder / f"batch_{self.num_generations:05d}.safetensors", self.graphs)
        self.num_generations += 1
