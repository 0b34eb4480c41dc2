"""Learnable pseudo-graphs: edge logits, node features, labels and sizes in one module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .edges import sample_edges
from .errors import InputError, check, check_choice, check_tensor, is_integer, is_number
from .graphs import EdgeSample, GraphBatch
from .layout import PairLayout
from .normalize import softmax_rows
from .propagate import readout

FEATURE_KINDS = ("one-hot", "continuous", "degree", "constant")
# Fields of a prior that a run looks for where they are None.
SHAPE = ("mean_degree", "hub_share", "size_spread", "degree_growth", "ego_networks")
# Start of a learnable edge: present in nine draws of ten.
_PRESENT = 0.9
_UNKNOWN_DEGREE = 2.05
# Of lognormal sizes; beyond it their largest leave all bounds.
MOST_SPREAD = 10.0


@dataclass(frozen=True)
class GraphPrior:
    """What the user knows, or assumes, about the graphs that the teacher was trained on.

    Attributes:
        min_nodes, max_nodes: node counts are uniform on this range (GFKD uses 10..29). Where only the mean is known,
            see :meth:`around`.
        mean_degree: expected number of partners per node, or several that the graphs have in turn. Density is what
            neither learning nor refinement repairs by itself, so state it if you know it. None: unknown; a run then
            looks for it, and for whatever else of the shape is None
            (:func:`~acgkd_fast.distill.prior_search.find_prior`). Everything else takes `expected_degree`, and 0 for
            the rest.
        feature_kind: "one-hot" (node labels), "degree" (one-hot degrees, free while searching),
            "continuous" or "constant".
        label_shares: how often each node label occurs, one number per feature column, adding up to 1 (each number
            down to 0.001); "one-hot" only. Start graphs and random pools draw labels by it; None: all equally often.
            With ``relabel=0`` the search keeps to it, which helped students of GCN teachers without BatchNorm and
            none of GIN's (docs/research.md).
        hub_share: chance that a node of a start graph joins the graph's first node, as replies join a thread; the mean
            over the graphs, each of which has its own share between 0 and 1.
        size_spread: 0 for node counts uniform on the range. Above 0 they are lognormal with this standard deviation, as
            a share of their mean (min_nodes + max_nodes) / 2, and may lie outside the range.
        degree_growth: the mean degree of a graph grows with its number of nodes to this power; 0 in molecules, 1 where
            every pair is equally likely, as in networks of collaborators.
        ego_networks: whether start graphs are ego networks (:func:`~.distill.ego_networks.random_ego_networks`) in
            place of trees with rings; `hub_share` then means nothing.

    Raises:
        InputError: an empty or non-positive node range, a mean degree that is not above 0, an unknown kind, shares that
            are none, a hub share, spread or growth out of its range, or ego_networks neither None nor True or False.
    """

    min_nodes: int = 10
    max_nodes: int = 29
    mean_degree: float | tuple[float, ...] | None = None
    feature_kind: str = "one-hot"
    label_shares: tuple[float, ...] | None = None
    hub_share: float | None = None
    size_spread: float | None = 0.0
    degree_growth: float | None = None
    ego_networks: bool | None = None

    def __post_init__(self) -> None:
        nodes = (self.min_nodes, self.max_nodes)
        check(2 <= self.min_nodes <= self.max_nodes, "min_nodes, max_nodes", "2 <= min_nodes <= max_nodes", nodes)
        degree = self.mean_degree
        if isinstance(degree, (tuple, list)):
            # JSON knows lists alone.
            object.__setattr__(self, "mean_degree", tuple(degree))
        some = self.degrees != () and all(is_number(d) and 0.0 < d < float("inf") for d in self.degrees)
        check(degree is None or some, "mean_degree", "None, a number above 0 or several", degree)
        for name, most in (("hub_share", 1.0), ("size_spread", MOST_SPREAD), ("degree_growth", 2.0)):
            value = getattr(self, name)
            known = value is None or (is_number(value) and 0.0 <= value <= most)
            check(known, name, f"None or a number in [0, {most:g}]", value)
        egos = self.ego_networks
        check(egos is None or isinstance(egos, bool), "ego_networks", "None, True or False", egos)
        check_choice("feature_kind", self.feature_kind, FEATURE_KINDS)
        shares = self.label_shares
        if shares is not None:
            check(self.feature_kind == "one-hot", "label_shares", "None unless feature_kind is one-hot", shares)
            given = isinstance(shares, (tuple, list)) and all(is_number(s) and 0.0 <= s <= 1.0 for s in shares)
            whole = given and abs(sum(shares) - 1.0) <= 1e-3
            check(whole, "label_shares", "a share of each node label, adding up to 1", shares)
            # JSON knows lists alone.
            object.__setattr__(self, "label_shares", tuple(float(share) for share in shares))

    @classmethod
    def around(cls, mean_nodes: int, **known: Any) -> GraphPrior:
        """A prior for graphs of which the mean number of nodes is known, and what else is `known`.

        Counts are uniform from half to one and a half times the mean, unless a run finds that they must spread more
        widely (``size_spread`` is None).

        Raises:
            InputError: a mean below 2, or as in the constructor.
        """
        check(is_integer(mean_nodes) and mean_nodes >= 2, "mean_nodes", "2 or more", mean_nodes)
        return cls(max(mean_nodes // 2, 2), mean_nodes * 3 // 2, **{"size_spread": None, **known})

    @property
    def degrees(self) -> tuple[float, ...]:
        """The mean degrees that graphs have in turn, that of a molecule where none is known."""
        degree = _UNKNOWN_DEGREE if self.mean_degree is None else self.mean_degree
        return degree if isinstance(degree, tuple) else (degree,)

    @property
    def expected_degree(self) -> float:
        """The mean of :attr:`degrees`."""
        return sum(self.degrees) / len(self.degrees)


def edge_logit(probability: torch.Tensor, noise: str) -> torch.Tensor:
    """theta with P(edge) = probability: the logit (logistic noise) or log(-log(1 - p)) (Gumbel)."""
    p = probability.clamp(1e-6, 1.0 - 1e-6)
    return torch.log(-torch.log1p(-p)) if noise == "gumbel" else torch.logit(p)


def edge_probability(logits: torch.Tensor, noise: str) -> torch.Tensor:
    """P(edge) of each candidate, the inverse of :func:`edge_logit`."""
    return -torch.expm1(-logits.exp()) if noise == "gumbel" else torch.sigmoid(logits)


class PseudoGraphs(nn.Module):
    """A batch of B pseudo-graphs whose structure and features can be learned.

    Parameters of the module:
        logits: theta = log alpha of each candidate pair, [P].
        features: [N, F]; softmax logits for "one-hot" and "degree", values for "continuous";
            a buffer of ones for "constant".

    Attributes:
        layout: candidate pairs; its ``sizes`` are the node counts.
        y: int64 [B], the class that each graph stands for.
        feature_kind: one of :data:`FEATURE_KINDS`.
        noise: "logistic" or "gumbel", which fixes what a logit means.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        features: torch.Tensor,
        y: torch.Tensor,
        layout: PairLayout,
        *,
        feature_kind: str,
        noise: str = "logistic",
    ) -> None:
        super().__init__()
        check_tensor("logits", logits, shape=(layout.num_pairs,))
        check_tensor("features", features, shape=(layout.num_nodes, None))
        check_tensor("y", y, shape=(layout.num_graphs,), dtypes=(torch.int64,))
        check_choice("feature_kind", feature_kind, FEATURE_KINDS)
        self.layout = layout
        self.feature_kind = feature_kind
        self.noise = noise
        self.logits = nn.Parameter(logits.detach().clone())
        self.features: torch.Tensor
        if feature_kind == "constant":
            self.register_buffer("features", features.detach().clone())
        else:
            self.features = nn.Parameter(features.detach().clone())
        self.y: torch.Tensor
        self.register_buffer("y", y.clone())

    @classmethod
    def from_graphs(
        cls,
        graphs: GraphBatch,
        *,
        feature_kind: str,
        xi: float = 1.0,
        directed: bool = False,
        noise: str = "logistic",
        extra_degree: float = 0.2,
    ) -> PseudoGraphs:
        """Start at given graphs: their edges are likely, all other candidates rare.

        Args:
            graphs: hard graphs with labels.
            feature_kind: how to read ``graphs.x``.
            xi: spatial complexity parameter of the candidate set, in (0, 1].
            directed: learn (i, j) and (j, i) separately.
            noise: "logistic" or "gumbel".
            extra_degree: expected number of partners per node from the rare candidates together.

        Raises:
            InputError: graphs without labels.
        """
        if graphs.y is None:
            raise InputError("graphs: expected labels y, got none")
        layout = PairLayout.budget(graphs.sizes.tolist(), xi, directed=directed, device=graphs.x.device)
        counts = layout.pair_ptr[1:] - layout.pair_ptr[:-1]
        partners = counts / graphs.sizes * (1.0 if directed else 2.0)
        rare = (extra_degree / partners.clamp(min=1.0)).clamp(max=0.5)
        probability = rare.repeat_interleave(counts, output_size=layout.num_pairs)
        pair = layout.pair_index(graphs.edges.row(), graphs.edges.col[: graphs.edges.num_edges].long())
        # A budget cannot hold every edge of the start; those outside it are left out.
        probability[pair[pair >= 0]] = _PRESENT
        features = graphs.x
        if feature_kind in ("one-hot", "degree"):
            features = 4.0 * graphs.x
        return cls(edge_logit(probability, noise), features, graphs.y, layout, feature_kind=feature_kind, noise=noise)

    def soft_features(self) -> torch.Tensor:
        """Node features [N, F] as the teacher sees them while learning."""
        return softmax_rows(self.features) if self.feature_kind in ("one-hot", "degree") else self.features

    def hard_features(self) -> torch.Tensor:
        """Node features [N, F] for teaching: one-hot rows where the features are categorical. Detached."""
        features = self.features.detach()
        if self.feature_kind in ("one-hot", "degree"):
            return torch.nn.functional.one_hot(features.argmax(-1), features.shape[1]).to(features.dtype)
        return features.clone()

    def edge_probability(self) -> torch.Tensor:
        """P(edge) of each candidate, [P]."""
        return edge_probability(self.logits, self.noise)

    def expected_degree(self) -> torch.Tensor:
        """Expected partners per node of each graph, [B]; differentiable."""
        probability, ptr = self.edge_probability(), self.layout.pair_ptr
        if probability.is_cuda and self.layout.num_pairs < 2**31:
            # On CUDA segment_reduce goes backward with one thread per graph.
            per_graph = readout(probability[:, None], ptr).squeeze(1)
        else:
            per_graph = torch.segment_reduce(probability, "sum", offsets=ptr, unsafe=True)
        sizes = self.layout.node_ptr[1:] - self.layout.node_ptr[:-1]
        return per_graph * (1.0 if self.layout.directed else 2.0) / sizes

    def forward(
        self,
        *,
        seed: int | torch.Tensor,
        step: int | torch.Tensor = 0,
        temperature: float | torch.Tensor = 1.0,
        estimator: str = "sparse_straight_through",
        capacity: int | None = None,
        sparse_grad: bool = False,
    ) -> GraphBatch:
        """Draw edges and return the batch as the teacher sees it; see `sample_edges` for the arguments."""
        edges = self.sample(
            seed=seed,
            step=step,
            temperature=temperature,
            estimator=estimator,
            capacity=capacity,
            sparse_grad=sparse_grad,
        )
        return GraphBatch(self.soft_features(), edges, self.y)

    def sample(
        self,
        *,
        seed: int | torch.Tensor,
        step: int | torch.Tensor = 0,
        temperature: float | torch.Tensor = 1.0,
        estimator: str = "sparse_straight_through",
        capacity: int | None = None,
        sparse_grad: bool = False,
    ) -> EdgeSample:
        """Draw the edges alone."""
        return sample_edges(
            self.logits,
            self.layout,
            seed=seed,
            step=step,
            temperature=temperature,
            estimator=estimator,
            noise=self.noise,
            capacity=capacity,
            sparse_grad=sparse_grad,
        )

    @torch.no_grad()
    def harden(self, *, seed: int, step: int = 0) -> GraphBatch:
        """Hard graphs for teaching: one 0/1 draw of the edges, hard features. Another step, another draw."""
        edges = self.sample(seed=seed, step=step, estimator="straight_through")
        return GraphBatch(self.hard_features(), edges, self.y)
