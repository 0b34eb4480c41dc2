"""What Python costs in the operations of a learning step at MUTAG's size: each through its public function, and bare.

An operation is called forward and backward through autograd, as the step does. The operators that ran meanwhile, ours
and torch's, are recorded with their arguments and then called one after the other without autograd and without our
Python code. The difference is overhead: checks, dispatch to Python, autograd's bookkeeping. What it takes to start
autograd's engine, once in a step, is measured on a single multiplication and left out. Calls are timed in turn, so that
load meets all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import facts
import torch
from step_peers import SHAPES, make_learner, make_pseudo_graphs, make_teacher
from torch.utils._python_dispatch import TorchDispatchMode

import acgkd_fast as af
from acgkd_fast.distill.objectives import one_hot_entropy
from acgkd_fast.normalize import frozen_norm_relu

ROUNDS, REPEATS = 25, 10
SHAPE = SHAPES["MUTAG"]
Call = Callable[[], object]


class Recorder(TorchDispatchMode):
    """Every operator that does work: those that only look at a tensor in another way are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.calls.append((func, args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def bare(call: Call) -> Call:
    """The operators of a call, without what is around them."""
    with Recorder() as recorder:
        call()
    calls = recorder.calls

    def run() -> None:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for operator, args, kwargs in calls:
                operator(*args, **kwargs)

    return run


def there_and_back(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Call:
    grad = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, grad)


def operations() -> dict[str, tuple[int, Call]]:
    """How often a step does each, and the call."""
    pseudo, teacher = make_pseudo_graphs(SHAPE), make_teacher(SHAPE)
    settings: dict[str, Any] = {"seed": 0, "estimator": "sparse_straight_through"}
    edges = pseudo.sample(**settings)
    value = edges.value.detach().requires_grad_()
    weighted = edges.with_value(value, symmetric=True)
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(edges.num_nodes, 64, generator=generator).requires_grad_() for _ in range(2))
    norm = next(layer for layer in teacher.modules() if isinstance(layer, torch.nn.BatchNorm1d))
    mean, variance, weight, bias = (t.detach() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    blocks = len(teacher.blocks)

    def normalised() -> torch.Tensor:
        return frozen_norm_relu(x, mean, variance, weight, bias, residual=residual, moments=True)[0]

    soft = pseudo.soft_features().detach().requires_grad_()
    return {
        "draw of the edges": (1, there_and_back(lambda: pseudo.sample(**settings).value, [pseudo.logits])),
        "GCN message passing": (blocks, there_and_back(lambda: af.gcn_propagate(x, weighted), [x, value])),
        "BatchNorm, ReLU, residual, moments": (blocks, there_and_back(normalised, [x, residual])),
        "linear map of a layer": (
            blocks - 1,
            there_and_back(lambda: torch.nn.functional.linear(x, norm.weight.new_ones(64, 64)), [x]),
        ),
        "readout": (1, there_and_back(lambda: af.readout(x, edges.ptr), [x])),
        "softmax of the features": (1, there_and_back(pseudo.soft_features, [pseudo.features])),
        "entropy of the features": (1, there_and_back(lambda: one_hot_entropy(soft), [soft])),
    }


def fastest(*calls: Call) -> list[float]:
    """Seconds of each call, timed in turn: the least of all rounds, since load only adds."""
    found = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for position, call in enumerate(calls):
            begin = time.perf_counter()
            for _ in range(REPEATS):
                call()
            found[position] = min(found[position], (time.perf_counter() - begin) / REPEATS)
    return found


def measure() -> tuple[Call, dict[str, Any]]:
    """A step, and what it and its operations spend."""
    step = make_learner(SHAPE, "sparse_straight_through").advance
    whole, inside = fastest(step, bare(step))
    rows: dict[str, dict[str, float]] = {}
    one = torch.ones(1, requires_grad=True)
    start = there_and_back(lambda: one * 1.0, [one])
    for name, (count, call) in operations().items():
        whole_call, kernels, engine = fastest(call, bare(call), start)
        public = whole_call - engine
        overhead = max(public - kernels, 0.0)
        rows[name] = {
            "per_step": count,
            "public_us": 1e6 * public,
            "operators_us": 1e6 * kernels,
            "share_of_operation": overhead / public,
            "share_of_step": count * overhead / whole,
        }
    found = {"step_us": 1e6 * whole, "operators_us": 1e6 * inside, "share_of_step": max(whole - inside, 0.0) / whole}
    return step, facts.rounded({"step": found, "operations": rows})


def test_overhead(benchmark: Any) -> None:
    step, found = measure()
    seconds = {"ours": [1e-6 * found["step"]["step_us"]]}
    benchmark.extra_info.update({**facts.report(seconds, operator="overhead of Python", shape=SHAPE.name), **found})
    benchmark.pedantic(step, rounds=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure()[1], indent=1))
