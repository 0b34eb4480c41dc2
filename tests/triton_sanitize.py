"""Every Triton kernel once on small inputs, for compute-sanitizer."""

from __future__ import annotations

import torch
from helpers import LAYOUT_KINDS, make_layout

import acgkd_fast as af
from acgkd_fast.edges import ESTIMATORS, FactorLogits

OPS = torch.ops.acgkd_fast


def main() -> None:
    torch.manual_seed(0)
    for kind in LAYOUT_KINDS:
        layout = make_layout(kind, [1, 5, 33, 2, 90], device="cuda")
        logits = torch.randn(layout.num_pairs, device="cuda", requires_grad=True)
        for estimator in ESTIMATORS:
            for capacity in (None, 4 * layout.num_pairs, 3):
                sample = af.sample_edges(logits, layout, seed=1, estimator=estimator, capacity=capacity)
                if sample.value.requires_grad and estimator != "arm":
                    sample.value.sum().backward()
                if sample.port is not None:
                    sample.port.sum().backward()
        factor = torch.randn(layout.num_nodes, 20, device="cuda")
        rng = torch.tensor([1, 2], device="cuda")
        temperature = torch.ones(1, dtype=torch.float64, device="cuda")
        shared = (logits.detach(), layout.table, rng, temperature, layout.kind)
        OPS.candidate_gradient(factor, factor, factor[:, 0].contiguous(), layout.table, layout.kind, layout.num_pairs)
        OPS.candidate_backward(factor, factor, factor[:, 0].contiguous(), *shared, 0)
        OPS.pair_uniforms(layout.table, rng, layout.kind, 0, layout.num_pairs)
    layout = make_layout("complete", [1, 5, 300, 2], device="cuda")
    z = torch.randn(layout.num_nodes, 20, device="cuda", requires_grad=True)
    bias = torch.zeros(1, device="cuda", requires_grad=True)
    sample = af.sample_edges(FactorLogits(z, bias), layout, seed=1, estimator="sparse_straight_through")
    sample.value.sum().backward()
    torch.cuda.synchronize()
    print("all kernels ran")
