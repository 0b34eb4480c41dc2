"""Miniatures of CMI's, Fast-Datafree's, NAYER's and DFAD's loops, written from their contracts."""

from __future__ import annotations

import torch
from host_loops import StatisticsHook
from torch import nn

import acgkd_fast as af
from acgkd_fast.edges.dense import dense_uniforms


def kl(student, teacher):
    return nn.functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")


class DenseGenerator(nn.Module):
    """The maths of `af.Generator`, relaxed, as dense generators have it: all n x n logits of every graph."""

    def __init__(self, like: af.Generator):
        super().__init__()
        self.like = like

    def forward(self, z=None, y=None):
        like, n = self.like, max(self.like.sizes)
        z = like.draw_z(len(y)) if z is None else z
        graphs = len(z)
        if y is not None:
            z = z + like.classes(y)
        hidden = like.body(z)
        nodes = like.nodes(hidden).view(graphs, n, -1)
        factors, x = nodes[..., : like.rank], nodes[..., like.rank :].softmax(-1)
        sizes = torch.tensor([like.sizes[i % like.batch_size] for i in range(graphs)])
        start = (like.prior.expected_degree / (sizes - 1)).clamp(max=0.9).logit() + like.density(hidden).squeeze(1)
        theta = factors @ factors.mT + start[:, None, None]
        u = dense_uniforms(graphs, n, torch.stack([torch.tensor(like.seed), like.calls]), directed=False)
        adjacency = torch.sigmoid((theta + u.log() - (1 - u).log()) / like.temperature)
        mask = torch.arange(n) < sizes[:, None]
        off_diagonal = ~torch.eye(n, dtype=torch.bool)
        adjacency = adjacency * (mask[:, :, None] & mask[:, None, :] & off_diagonal)
        like.calls += 1
        return af.GraphBatch.from_dense(x * mask[..., None], adjacency, mask, y)

    def clone(self):
        return DenseGenerator(self.like.clone())


class GenerativeHost:
    """CMI's GenerativeSynthesizer: hooks for life, one loss, a fresh draw per sample."""

    def __init__(self, teacher, student, generator, *, iterations, batch_size, lr_g, adv, bn, oh):
        self.teacher, self.student, self.generator = teacher, student, generator
        self.iterations, self.batch_size, self.weights = iterations, batch_size, (adv, bn, oh)
        self.optimizer = torch.optim.Adam(generator.parameters(), lr=lr_g, betas=(0.5, 0.999))
        self.hooks = [StatisticsHook(m) for m in teacher.modules() if isinstance(m, nn.BatchNorm1d)]

    def synthesize(self, targets=None):
        self.student.eval()
        adv, bn, oh = self.weights
        y = torch.arange(self.batch_size) % 2
        for _ in range(self.iterations):
            graphs = self.generator(y=y)
            t_out = self.teacher(graphs)
            s_out = self.student(graphs)
            loss = bn * sum(h.r_feature for h in self.hooks) + oh * nn.functional.cross_entropy(t_out, y)
            loss = loss - adv * kl(s_out, t_out)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        with torch.no_grad():
            return {"synthetic": self.generator(y=y)}

    @torch.no_grad()
    def sample(self):
        return self.generator(y=torch.arange(self.batch_size) % 2)


def distil(synthesizer, student, teacher, steps, optimizer):
    """CMI's train(): fetch a batch, ask the teacher for logits and features, teach."""
    losses = []
    student.train()
    teacher.eval()
    for _ in range(steps):
        batch = synthesizer.sample()
        with torch.no_grad():
            t_out, t_feat = teacher(batch, return_features=True)
            assert t_feat.shape[0] == t_out.shape[0]
        loss = kl(student(batch.detach()), t_out.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def cmi_driver(synthesizer, student, teacher, *, epochs=2, kd_steps=3, unpack=lambda result: result):
    """Epochs of synthesis and teaching; `unpack` is the one line that differs between the hosts."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(epochs):
        results = unpack(synthesizer.synthesize())
        losses += distil(synthesizer, student, teacher, kd_steps, optimizer)
        assert all(hasattr(value, "detach") for value in results.values())
    return losses


def meta_loop(generator, teacher, *, rounds=3, inner=2, nz=32, graphs=6):
    """Fast-Datafree: a clone of the generator and the latent code are trained, FOMAML moves the original."""
    meta = torch.optim.Adam(generator.parameters(), lr=1e-2)
    rng, losses = torch.Generator().manual_seed(0), []
    y = torch.arange(graphs) % 2
    for _ in range(rounds):
        z = torch.randn(graphs, nz, generator=rng).requires_grad_()
        fast = generator.clone()
        optimizer = torch.optim.Adam([{"params": fast.parameters()}, {"params": [z]}], lr=1e-2)
        for _ in range(inner):
            loss = nn.functional.cross_entropy(teacher(fast(z)), y)
            optimizer.zero_grad()
            loss.backward()
            assert z.grad.any()
            optimizer.step()
            losses.append(loss.item())
        meta.zero_grad()
        for own, cloned in zip(generator.parameters(), fast.parameters(), strict=True):
            own.grad = None if cloned.grad is None else cloned.grad.clone()
        meta.step()
    return losses


def dfad(generator, teacher, student, *, rounds=3, student_steps=5, nz=32, graphs=6):
    """DFAD: five student steps on detached fakes, one generator step against the L1 distance."""
    to_student = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9)
    to_generator = torch.optim.Adam(generator.parameters(), lr=1e-2)
    rng, losses = torch.Generator().manual_seed(0), []

    def noise():
        return torch.randn(graphs, nz, generator=rng)

    for _ in range(rounds):
        student.train()
        for _ in range(student_steps):
            fake = generator(noise()).detach()
            loss = nn.functional.l1_loss(student(fake), teacher(fake).detach())
            to_student.zero_grad()
            loss.backward()
            to_student.step()
            losses.append(loss.item())
        fake = generator(noise())
        loss = -nn.functional.l1_loss(student(fake), teacher(fake))
        to_generator.zero_grad()
        loss.backward()
        to_generator.step()
        losses.append(loss.item())
    return losses


class DeepInversionHost:
    """CMI's DeepInversion: free inputs, one Adam, hooks for life; its pool is the last batch.

    Inputs are padded logits [B, n, n] and features [B, n, F], drawn relaxed, cut at the end.
    """

    def __init__(self, teacher, student, *, iterations, rates, start, uniforms, adv, bn, oh):
        self.teacher, self.student, self.iterations, self.uniforms = teacher, student, iterations, uniforms
        self.weights = adv, bn, oh
        self.logits, self.features, self.mask, self.y = start
        self.optimizer = torch.optim.Adam(
            [{"params": [self.logits], "lr": rates[0]}, {"params": [self.features], "lr": rates[1]}]
        )
        self.hooks = [StatisticsHook(m) for m in teacher.modules() if isinstance(m, nn.BatchNorm1d)]

    def draw(self, step, hard):
        n, u = self.logits.shape[1], self.uniforms(step)
        theta = (self.logits + self.logits.mT) / 2 + u.log() - (1 - u).log()
        theta = theta.masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
        kept = self.mask[:, :, None] & self.mask[:, None, :]
        adjacency = (theta > 0).float() if hard else torch.sigmoid(theta)
        soft = self.features.softmax(-1)
        x = nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).float() if hard else soft
        return af.GraphBatch.from_dense(x * self.mask[..., None], adjacency * kept, self.mask, self.y)

    def synthesize(self, targets=None):
        self.student.eval()
        adv, bn, oh = self.weights
        for step in range(self.iterations):
            graphs = self.draw(step, hard=False)
            t_out, s_out = self.teacher(graphs), self.student(graphs)
            loss = oh * nn.functional.cross_entropy(t_out, self.y) + bn * sum(h.r_feature for h in self.hooks)
            loss = loss - adv * kl(s_out, t_out)
            self.optimizer.zero_grad()
            loss.backward()
            assert self.logits.grad.any() and self.features.grad.any()
            self.optimizer.step()
        with torch.no_grad():
            self.pool = self.draw(self.iterations, hard=True)
        return {"synthetic": self.pool}

    def sample(self):
        return self.pool
