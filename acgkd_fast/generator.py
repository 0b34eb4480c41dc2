"""A network that makes graphs from noise, for adversarial and meta-learning loops."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from .distill.starts import balanced_labels, prior_sizes
from .edges import ESTIMATORS, NOISES, FactorLogits, sample_edges
from .edges.dense import harden
from .edges.estimators import FACTOR_ESTIMATORS
from .errors import check, check_choice, check_tensor
from .graphs import EdgeSample, GraphBatch
from .layout import PairLayout
from .philox import Stream, graph_uniforms
from .pseudo_graphs import GraphPrior, edge_logit


class Generator(nn.Module):
    """z (or nothing) -> GraphBatch, with gradients from edges and features to z and to every parameter.

    A network gives every node a factor e_i and features, and every graph a density; the logit of an edge is
    e_i . e_j + b, never stored as a matrix for the sparse estimators.

    Args:
        num_features: width F of the node features.
        prior: node counts, mean degree at the start, and kind of features; hubs and growing degrees are not for a
            network that learns where its edges are.
        batch_size: graphs per call without z; graph i of any batch has ``sizes[i % batch_size]`` nodes.
        num_classes: make the generator conditional: labels are embedded and added to z, and batches carry them.
        nz: width of z.
        rank: width of the factors.
        widths: hidden layers.
        estimator, temperature, noise: of :func:`sample_edges`.
        hard_features: one-hot features forward, gradient of the softmax backward; otherwise the softmax.
        seed: of sizes, initial values, z and edges. Call t draws with step t.

    Attributes:
        sizes: nodes of each graph of a batch.
        calls: int64 buffer, calls so far; part of the state dict, so that a restored generator goes on exactly.

    Raises:
        InputError: a number out of range, naming it.
    """

    def __init__(
        self,
        num_features: int,
        prior: GraphPrior | None = None,
        *,
        batch_size: int = 64,
        num_classes: int | None = None,
        nz: int = 32,
        rank: int = 8,
        widths: Sequence[int] = (64, 128),
        estimator: str = "sparse_straight_through",
        temperature: float = 1.0,
        noise: str = "logistic",
        hard_features: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("num_features", num_features), ("batch_size", batch_size), ("nz", nz), ("rank", rank)):
            check(value >= 1, name, "at least 1", value)
        check_choice("estimator", estimator, [name for name in ESTIMATORS if name != "arm"])
        check_choice("noise", noise, NOISES)
        self.prior = prior or GraphPrior()
        self.num_features, self.num_classes, self.nz, self.rank = num_features, num_classes, nz, rank
        self.estimator, self.temperature, self.noise = estimator, temperature, noise
        self.hard_features, self.seed = hard_features, seed
        self.sizes = prior_sizes(self.prior, batch_size, seed)
        layers: list[nn.Module] = []
        for before, width in zip((nz, *widths), widths, strict=False):
            layers += [nn.Linear(before, width), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        hidden = widths[-1] if len(widths) else nz
        self.nodes = nn.Linear(hidden, max(self.sizes) * (rank + num_features))
        self.density = nn.Linear(hidden, 1)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, nz)
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self._shapes: dict[tuple[int, torch.device], tuple[PairLayout, torch.Tensor, torch.Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """Initial values and counter as at the start, from `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for layer in self.modules():
                if isinstance(layer, (nn.Linear, nn.Embedding)):
                    fresh = copy.deepcopy(layer).cpu()
                    fresh.reset_parameters()
                    layer.load_state_dict(fresh.state_dict())
        self.calls.zero_()

    def clone(self) -> Generator:
        """A copy with parameters of its own, for inner loops (FOMAML, Reptile); draws go on alike in both."""
        return copy.deepcopy(self)

    @property
    def batch_size(self) -> int:
        return len(self.sizes)

    def draw_z(self, num_graphs: int | None = None) -> torch.Tensor:
        """Standard normal z [B, nz] of the call to come, on the device of the parameters."""
        ids = torch.arange(self.batch_size if num_graphs is None else num_graphs, device=self.calls.device)
        u = graph_uniforms(ids, self.calls, self.nz, stream=Stream.LATENT, seed=self.seed)
        return torch.special.ndtri(u).to(self.density.weight.dtype)

    def forward(self, z: torch.Tensor | None = None, y: torch.Tensor | None = None) -> GraphBatch:
        """A batch of graphs.

        Args:
            z: [B, nz]; default :meth:`draw_z`.
            y: int64 [B] classes, for a conditional generator only; default the classes in turn.

        Returns:
            B graphs with labels if conditional. Gradients reach z, the parameters and the class embedding.

        Raises:
            InputError: z or y of another form.
        """
        if z is None:
            z = self.draw_z(None if y is None else y.numel())
        check_tensor("z", z, shape=(None, self.nz), device=self.calls.device)
        graphs = len(z)
        if self.classes is not None:
            if y is None:
                y = balanced_labels(graphs, self.classes.num_embeddings, self.seed).to(z.device)
            check_tensor("y", y, shape=(graphs,), dtypes=(torch.int64,), device=z.device)
            z = z + self.classes(y)
        else:
            check(y is None, "y", "None for a generator without num_classes", y)
        layout, rows, base = self._shape(graphs)
        hidden = self.body(z)
        nodes = self.nodes(hidden).view(-1, self.rank + self.num_features).index_select(0, rows)
        factors = FactorLogits(nodes[:, : self.rank].contiguous(), base + self.density(hidden).squeeze(1))
        edges = self._draw(factors, layout)
        self.calls += 1
        return GraphBatch(self._features(nodes[:, self.rank :]), edges, y)

    def _draw(self, factors: FactorLogits, layout: PairLayout) -> EdgeSample:
        logits = factors if self.estimator in FACTOR_ESTIMATORS else factors.to_dense(layout)
        return sample_edges(
            logits,
            layout,
            seed=self.seed,
            step=self.calls,
            temperature=self.temperature,
            estimator=self.estimator,
            noise=self.noise,
        )

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        kind = self.prior.feature_kind
        if kind == "constant":
            return torch.ones_like(x)
        if kind == "continuous":
            return x
        soft = x.softmax(1)
        if not self.hard_features:
            return soft
        return harden(soft, nn.functional.one_hot(x.argmax(1), x.shape[1]).bool())

    def _shape(self, graphs: int) -> tuple[PairLayout, torch.Tensor, torch.Tensor]:
        """Layout of a batch, which rows of the network's output are nodes, and the density logits at the start."""
        key = graphs, self.calls.device
        if key not in self._shapes:
            sizes = [self.sizes[i % self.batch_size] for i in range(graphs)]
            n = torch.tensor(sizes, device=self.calls.device)
            slots = torch.arange(max(self.sizes), device=n.device)
            rows = (slots < n[:, None]).flatten().nonzero().squeeze(1)
            chance = (self.prior.expected_degree / (n - 1).clamp(min=1)).clamp(max=0.9)
            base = edge_logit(chance, self.noise).to(self.density.weight.dtype)
            self._shapes[key] = PairLayout.complete(sizes, device=n.device), rows, base
        return self._shapes[key]
