"""GFKD (IJCAI 2021, arXiv 2105.07519): threshold sampler, ARM pair, and the two losses around them.

GFKD builds its graphs node by node, three times per iteration. Here all of them go from logits to CSR in one
operator. Entry (j, k) of GFKD's matrices is an edge from j to k.

>>> inversion = Inversion(seed=args.dataseed)
>>> norm_loss, bernulli_fastgrad = inversion.norm_loss, inversion.bernulli_fastgrad
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoints import load_gfkd_checkpoint
from ..distill.objectives import one_hot_entropy
from ..edges import arm_gradient, sample_edges
from ..errors import check, fail
from ..formats.gfkd import Matrices, matrices_from_pairs, pairs_from_matrices
from ..graphs import EdgeSample, GraphBatch
from ..layout import PairLayout
from ..nn.models import GraphClassifier
from ..teachers import Teacher, as_teacher

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# No noise of the stream reaches it: |L| < 17.
_CERTAIN = 1e4


def load_teacher(path: str, name: str) -> GraphClassifier:
    """A checkpoint of GFKD under GFKD's own name of the model, such as "GCN5_64", in eval mode."""
    return load_gfkd_checkpoint(path, name.lower().replace("_", "-"))[0]


def threshold_sample(params: Sequence[torch.Tensor]) -> Matrices:
    """1 where sigmoid(theta) >= 0.5: int32 matrices, one per matrix of logits."""
    return [(theta >= 0.0).int() for theta in params]


class Inversion:
    """GFKD's inversion step with its functions' own names and arguments.

    Args:
        seed: key of the random stream; step t draws with step word t.

    Attributes:
        step: ARM pairs drawn so far; set it to resume.
    """

    def __init__(self, *, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self._teacher: Teacher | None = None

    def generate_b(self, param: Sequence[torch.Tensor]) -> tuple[Matrices, Matrices, Matrices]:
        """An ARM pair: 1[u > sigmoid(-theta)], 1[u < sigmoid(theta)] and u, n x n each.

        The diagonal, which the graphs leave out, has u = 1/2.
        """
        sample, layout = self._draw(param)
        u = torch.ops.acgkd_fast.pair_uniforms(layout.table, sample.rng, layout.kind, 0, layout.num_pairs)
        noise = matrices_from_pairs(u.to(param[0].dtype), layout, 0.5)
        first = [(n > torch.sigmoid(-theta)).int() for n, theta in zip(noise, param, strict=True)]
        second = [(n < torch.sigmoid(theta)).int() for n, theta in zip(noise, param, strict=True)]
        return first, second, noise

    def norm_loss(
        self,
        n: int,
        params: Sequence[torch.Tensor],
        feature_paras: Sequence[torch.Tensor],
        targets: Sequence[int],
        criterion: Criterion,
        self_loop: bool,
        degree_as_label: bool,
        net: nn.Module | Teacher,
        loss_r_feature_layers: Sequence[Any],
        bn_reg_scale: float,
        batch_size: int,
        gpu: int,
        onehot: int,
        onehot_cof: float,
    ) -> tuple[torch.Tensor, Matrices]:
        """Loss of the feature step on the thresholded graphs, and these.

        Args:
            n: samples; the threshold gives the same graphs each time, so they are seen once.
            params: structure logits, n_g x n_g each.
            feature_paras: feature logits (`onehot`) or features, n_g x d each.
            targets: labels.
            criterion: of (logits, labels), a mean.
            self_loop: whether every node gets a self-loop.
            net: a Teacher or any module that `as_teacher` accepts.
            loss_r_feature_layers: hooks with the attribute ``r_feature``, registered on the net's BatchNorm layers.
            bn_reg_scale, onehot_cof: weights.
            degree_as_label, batch_size, gpu: not used; the graphs make one batch, where the parameters are.

        Returns:
            The loss, a scalar with gradients for the features, and int32 structures.

        Raises:
            InputError: matrices that do not fit together, or a net whose layers add self-loops with `self_loop` off.
        """
        teacher = self._check(net, params, feature_paras, self_loop)
        layout, theta = pairs_from_matrices(params)
        certain = torch.where(theta >= 0.0, _CERTAIN, -_CERTAIN)
        edges = sample_edges(certain, layout, seed=0)
        x = _features(feature_paras, onehot)
        losses = _teacher_loss(teacher, x, edges, targets, criterion, loss_r_feature_layers, bn_reg_scale, self_loop)
        loss = losses + (onehot_cof * one_hot_entropy(x) if onehot else 0.0)
        return loss, threshold_sample(params)

    def bernulli_fastgrad(
        self,
        params: Sequence[torch.Tensor],
        feature_paras: Sequence[torch.Tensor],
        targets: Sequence[int],
        criterion_stru: Criterion,
        self_loop: bool,
        degree_as_label: bool,
        net: nn.Module | Teacher,
        batch_size: int,
        gpu: int,
        onehot: int,
        loss_r_feature_layers: Sequence[Any],
        bn_reg_scale: float,
    ) -> Matrices:
        """Gradients of the structure logits, (l(A1) - l(A2)) (u - 1/2), by two forward passes without autograd.

        Arguments as in :meth:`norm_loss`; `criterion_stru` gives one loss per graph.
        """
        teacher = self._check(net, params, feature_paras, self_loop)
        with torch.no_grad():
            sample, layout = self._draw(params)
            assert sample.antithetic is not None
            x = _features(feature_paras, onehot)
            rest = (targets, criterion_stru, loss_r_feature_layers, bn_reg_scale, self_loop)
            first, second = (_teacher_loss(teacher, x, edges, *rest) for edges in (sample, sample.antithetic))
            return matrices_from_pairs(arm_gradient(sample, first, second), layout, 0.0)

    def _draw(self, params: Sequence[torch.Tensor]) -> tuple[EdgeSample, PairLayout]:
        layout, theta = pairs_from_matrices(params)
        sample = sample_edges(theta.detach(), layout, seed=self.seed, step=self.step, estimator="arm")
        self.step += 1
        return sample, layout

    def _check(
        self,
        net: nn.Module | Teacher,
        params: Sequence[torch.Tensor],
        features: Sequence[torch.Tensor],
        self_loop: bool,
    ) -> Teacher:
        nodes, wanted = [len(x) for x in features], [len(theta) for theta in params]
        check(nodes == wanted, "feature_paras", f"as many rows as the structures have nodes, {wanted}", nodes)
        if self._teacher is None or net not in (self._teacher, self._teacher.module):
            self._teacher = as_teacher(net)
        if not self_loop and _adds_self_loops(self._teacher.module):
            raise fail("self_loop", "True for a net whose layers add self-loops", self_loop)
        return self._teacher


def _teacher_loss(
    teacher: Teacher,
    x: torch.Tensor,
    edges: EdgeSample,
    targets: Sequence[int],
    criterion: Criterion,
    hooks: Sequence[Any],
    bn_reg_scale: float,
    self_loop: bool,
) -> torch.Tensor:
    if self_loop and not _adds_self_loops(teacher.module):
        edges = _with_self_loops(edges)
    labels = torch.as_tensor(targets, device=x.device)
    loss = criterion(teacher(GraphBatch(x, edges)), labels)
    return loss + bn_reg_scale * sum(hook.r_feature for hook in hooks)


def _adds_self_loops(module: nn.Module) -> bool:
    return any(getattr(layer, "add_self_loops", False) for layer in module.modules())


def _with_self_loops(edges: EdgeSample) -> EdgeSample:
    edge_index, weight = edges.to_edge_index()
    loops = torch.arange(edges.num_nodes, device=weight.device).expand(2, -1)
    both = torch.cat([weight, weight.new_ones(edges.num_nodes)])
    return EdgeSample.from_edge_index(torch.cat([edge_index, loops], 1), edges.ptr, both)


def _features(feature_paras: Sequence[torch.Tensor], onehot: int) -> torch.Tensor:
    x = torch.cat(list(feature_paras))
    return x.softmax(1) if onehot else x
