"""Miniatures of other code bases' samplers, written from their formulas, for tests and benchmarks.

Each takes its uniforms from the caller, who can so give it the numbers that our shims draw.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from acgkd_fast.edges.dense import dense_uniforms


class Uniforms:
    """The uniforms [G, n, n] of call 0, 1, ... of a shim with this seed."""

    def __init__(self, seed: int, *, directed: bool = False, self_loops: bool = False) -> None:
        self.seed, self.calls = seed, 0
        self.options = {"directed": directed, "self_loops": self_loops}

    def __call__(self, graphs: int, nodes: int) -> torch.Tensor:
        self.calls += 1
        return dense_uniforms(graphs, nodes, torch.tensor([self.seed, self.calls - 1]), **self.options)


def torch_uniforms(graphs: int, nodes: int) -> torch.Tensor:
    return torch.rand(graphs, nodes, nodes)


def symmetric_logistic(uniforms, adj):
    """Noise of the upper triangle, written to both triangles, as DosCond and KiDD do."""
    graphs, n, _ = adj.shape
    i, j = torch.triu_indices(n, n)
    values = uniforms(graphs, n)[:, i, j].to(adj.dtype)
    noise = torch.zeros_like(adj)
    noise[:, i, j] = values
    noise.transpose(1, 2)[:, i, j] = values
    return torch.log(noise) - torch.log(1 - noise)


class DosCondHost:
    def __init__(self, uniforms):
        self.uniforms, self.cnt = uniforms, 0

    def get_discrete_graphs(self, adj, inference):
        adj = (adj + adj.transpose(1, 2)) / 2
        off_diagonal = 1 - torch.eye(adj.shape[1])
        if inference:
            return ((torch.sigmoid(adj) * off_diagonal) > 0.5).float()
        adj = adj + symmetric_logistic(self.uniforms, adj)
        temperature = max(0.01 ** (self.cnt / 200), 0.01)
        self.cnt += 1
        return torch.sigmoid(adj / temperature) * off_diagonal


def kidd_host(uniforms, tau):
    def discretize(adj, train=True, epoch=0):
        if not train:
            return (torch.sigmoid(adj) > 0.5).float()
        temperature = max(tau * (0.01 / tau) ** (epoch / 200), 0.01)
        return torch.sigmoid((symmetric_logistic(uniforms, adj) + adj) / temperature)

    return discretize


class GFKDHost:
    """Graphs built node by node in Python, three times per iteration."""

    def __init__(self, uniforms):
        self.uniforms = uniforms

    def generate_b(self, params):
        noise = [self.uniforms(g, len(theta)) for g, theta in enumerate(params)]
        first = [(u > torch.sigmoid(-theta)).int() for u, theta in zip(noise, params, strict=True)]
        second = [(u < 1 - torch.sigmoid(-theta)).int() for u, theta in zip(noise, params, strict=True)]
        return first, second, noise

    @staticmethod
    def edge_list(structures):
        """The edges of all graphs, and the graph of each node."""
        sources, targets, batch, first = [], [], [], 0
        for g, matrix in enumerate(structures):
            for j in range(len(matrix)):
                neighbours = (matrix[j] == 1).nonzero().flatten()
                neighbours = neighbours[neighbours != j]
                sources += [first + j] * len(neighbours)
                targets += (first + neighbours).tolist()
            batch += [g] * len(matrix)
            first += len(matrix)
        return torch.tensor([sources, targets], dtype=torch.int64), torch.tensor(batch)

    def losses(self, structures, x, targets, criterion, net, hooks, bn_reg_scale):
        edge_index, batch = self.edge_list(structures)
        outputs = net(x, edge_index, None, batch)
        return criterion(outputs, torch.tensor(targets)) + bn_reg_scale * sum(h.r_feature for h in hooks)

    def norm_loss(self, params, feature_paras, targets, criterion, net, hooks, bn_reg_scale, onehot_cof):
        structures = [(torch.sigmoid(theta) >= 0.5).int() for theta in params]
        x = torch.cat([f.softmax(1) for f in feature_paras])
        loss = self.losses(structures, x, targets, criterion, net, hooks, bn_reg_scale)
        return loss + onehot_cof * -(x * x.log()).sum() / len(x), structures

    def bernulli_fastgrad(self, params, feature_paras, targets, criterion_stru, net, hooks, bn_reg_scale):
        first, second, noise = self.generate_b(params)
        x = torch.cat([f.softmax(1) for f in feature_paras])
        rest = (x, targets, criterion_stru, net, hooks, bn_reg_scale)
        difference = self.losses(first, *rest) - self.losses(second, *rest)
        return [d.detach() * (u - 0.5) for d, u in zip(difference, noise, strict=True)]


class StatisticsHook:
    """The hook that GFKD and DeepInversion register on every BatchNorm layer."""

    def __init__(self, layer):
        self.handle = layer.register_forward_hook(self.see)

    def see(self, layer, inputs, _):
        mean, variance = inputs[0].mean(0), inputs[0].var(0, unbiased=False)
        self.r_feature = torch.norm(layer.running_var - variance) + torch.norm(layer.running_mean - mean)

    def close(self):
        self.handle.remove()


def ogmm_host(generator, uniforms):
    """One call of an OGMM-style generator with the parameters of ours: a Cartesian product per graph."""
    matrices = []
    noise = uniforms(len(generator.sizes), max(generator.sizes))
    for g, n in enumerate(generator.sizes):
        x = generator.features[g, :n]
        pairs = torch.stack([torch.cat([x[i], x[j]]) for i, j in itertools.product(range(n), repeat=2)])
        p = torch.sigmoid(generator.last(torch.relu(generator.first(pairs)))).view(n, n)
        p = (p + p.T) / 2
        kept = (p >= generator.cut).float() + p - p.detach()
        u = noise[g, :n, :n]
        soft = torch.sigmoid(((kept - (1 - kept)) + torch.log(u) - torch.log(1 - u)) / generator.tau)
        matrices.append((soft > 0.5).float() + soft - soft.detach())
    return generator.labels, matrices, [x[:n] for x, n in zip(generator.features, generator.sizes, strict=True)]


class StealHost(nn.Module):
    """STEALGNN's generator: tanh features, cut cosine or symmetric sigmoid, rows normalised, no gradient of the cut."""

    def __init__(self, noise_dim, num_nodes, feature_dim, generator_type="cosine", threshold=0.1):
        super().__init__()
        self.shape, self.kind, self.threshold = (num_nodes, feature_dim), generator_type, threshold

        def mlp(outputs, last):
            widths = [noise_dim, 128, 256]
            layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
            return nn.Sequential(*layers, nn.Linear(256, outputs), last)

        self.feature_gen = mlp(num_nodes * feature_dim, nn.Tanh())
        if generator_type == "full_param":
            self.structure_gen = mlp(num_nodes * num_nodes, nn.Sigmoid())

    def forward(self, z):
        n = self.shape[0]
        x = self.feature_gen(z).view(self.shape)
        if self.kind == "cosine":
            unit = x / x.norm(dim=1, keepdim=True)
            adj = (unit @ unit.T > self.threshold).float()
        else:
            adj = self.structure_gen(z).view(n, n)
            adj = (adj + adj.T) / 2
        adj = adj * (1 - torch.eye(n))
        return x, adj / adj.sum(1, keepdim=True).clamp(min=1)


class PGEHost(nn.Module):
    """GCond's network on the concatenated features of all n^2 pairs."""

    def __init__(self, nfeat, nnodes, nhid=128, nlayers=3):
        super().__init__()
        widths = [2 * nfeat] + [nhid] * (nlayers - 1) + [1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.bns = nn.ModuleList(nn.BatchNorm1d(nhid) for _ in range(nlayers - 1))
        self.pairs = torch.cartesian_prod(torch.arange(nnodes), torch.arange(nnodes)).T

    def forward(self, x, inference=False):
        h = torch.cat([x[self.pairs[0]], x[self.pairs[1]]], 1)
        for layer, norm in zip(self.layers, self.bns, strict=False):
            h = norm(layer(h)).relu()
        logits = self.layers[-1](h).view(len(x), len(x))
        adj = torch.sigmoid((logits + logits.T) / 2)
        return adj - torch.diag(torch.diag(adj))

    @torch.no_grad()
    def inference(self, x):
        return self.forward(x, inference=True)


def fedtad_host(node_logits, adj_logits, k):
    """FedTAD's edge list: k best columns of every row, row by row, made symmetric, with self-loops twice."""
    adjacency = torch.zeros_like(adj_logits)
    best = adj_logits.topk(k, dim=1).indices
    for i in range(len(node_logits)):
        adjacency[i, best[i]] = 1
    adjacency = ((adjacency + adjacency.T) > 0).long().fill_diagonal_(1)
    loops = torch.arange(len(node_logits)).expand(2, -1)
    return node_logits, torch.cat([adjacency.nonzero().T, loops], 1)


def gammagl_host(batch_size, edges_logits, nodes_logits):
    """GammaGL's batches: logits to integers, one-hot rows entry by entry, one edge list per graph."""
    best = nodes_logits.softmax(-1).argmax(-1)
    features = torch.zeros_like(nodes_logits)
    for g, nodes in enumerate(best):
        for j, index in enumerate(nodes):
            features[g, j, index] = 1
    adjacency = torch.sigmoid(edges_logits.long().float()) > 0.3
    graphs, n = best.shape
    for first in range(0, graphs, batch_size):
        chosen = range(first, min(first + batch_size, graphs))
        edges = torch.cat([adjacency[g].nonzero().T + i * n for i, g in enumerate(chosen)], 1)
        batch = torch.arange(len(chosen)).repeat_interleave(n)
        yield features[list(chosen)].flatten(0, 1), edges, batch
