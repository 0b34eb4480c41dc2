"""Instructions per call of every native CPU operator, counted by valgrind: they repeat exactly where time does not.

    python bench/instructions.py --out bench/results/instructions.json

Operators are recorded with their arguments while small fixed jobs run (learning steps of both kinds of layer, a
search, a factorised draw, attention), then called again one by one under callgrind. Counted are instructions in our
library and in the mathematical and OpenMP libraries it calls; Python's and torch's own are listed beside them.
valgrind knows no AVX-512, so the AVX2 kernels are counted. Needs valgrind, its headers and a C compiler: one minute.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

REPEATS = 5
# The step takes this way on CUDA only; its CPU kernel serves factors that a user hands over.
NOT_RECORDED = {"candidate_backward"}
NATIVE = re.compile(r"_C\.abi3\.so|libm[-.]|libgomp|libmvec")
_CLIENT = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void stop(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""

Call = Callable[[], object]


class Recorder(TorchDispatchMode):
    """Keeps the first call of every operator of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "acgkd_fast":
            keep = [arg.clone() if isinstance(arg, torch.Tensor) and arg.stride() != (0,) else arg for arg in args]
            self.calls.setdefault(func._opname, (func, tuple(keep), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def record() -> dict[str, Call]:
    """Every operator that the jobs call, as a function without arguments."""
    from step_peers import Shape, make_pseudo_graphs, make_teacher

    import acgkd_fast as af
    from acgkd_fast.distill.inversion import Learner, LearnSettings
    from acgkd_fast.linear import frozen_linear
    from acgkd_fast.normalize import column_moments
    from acgkd_fast.optim import Adam

    shape = Shape("small", 16, (10, 29), 0.13)
    found: dict[str, Call] = {}

    def note(job: str, run: Call) -> None:
        with Recorder() as recorder:
            run()
        for name, (func, args, kwargs) in recorder.calls.items():
            found.setdefault(f"{name} ({job})", lambda f=func, a=args, k=kwargs: f(*a, **k))

    for arch, estimator in (
        ("gcn5-64", "sparse_straight_through"),
        ("gin3-32", "straight_through"),
        ("gcn3-32", "arm"),
    ):
        settings = LearnSettings(estimator=estimator)
        learner = Learner(make_teacher(shape, arch), make_pseudo_graphs(shape), settings)
        note(f"{arch}, {estimator}", learner.advance)
    for estimator in ("relaxed", "hard_concrete"):
        pseudo = make_pseudo_graphs(shape)
        note(estimator, lambda p=pseudo, e=estimator: p.sample(seed=0, estimator=e).value.sum().backward())
    pseudo = make_pseudo_graphs(shape)
    optimizer = Adam([pseudo.logits])

    def sparse_step() -> None:
        pseudo.sample(seed=0, estimator="sparse_straight_through", sparse_grad=True).value.sum().backward()
        optimizer.step()

    note("sparse gradient", sparse_step)
    features = torch.randn(320, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rows, weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)), torch.ones(64, 64)
    note("frozen layer", lambda: frozen_linear(rows, weight))
    note("statistics", lambda: torch.stack(column_moments(features)).sum().backward())
    edges = pseudo.sample(seed=0, estimator="sparse_straight_through").detach()
    sent, scores = (torch.ones(edges.num_nodes, width).requires_grad_() for width in (64, 1))
    note("attention", lambda: af.gat_propagate(sent, scores, scores, edges).sum().backward())
    teacher = af.as_teacher(make_teacher(shape))
    start = af.start_graphs(teacher, af.GraphPrior(), 8)
    note("search", lambda: af.refine(start, teacher, steps=20, report_every=20))
    layout = af.PairLayout.complete([200])
    z = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    factors = af.FactorLogits(z, torch.full((1,), -3.0))
    note(
        "factors",
        lambda: af.sample_edges(factors, layout, seed=0, estimator="sparse_straight_through").value.sum().backward(),
    )
    return found


def inside(client: Path) -> None:
    """Runs under valgrind: calls each operator a few times with instrumentation on."""
    torch.set_num_threads(1)
    valgrind = ctypes.CDLL(str(client))
    operators = record()
    with torch.no_grad():
        for name, call in operators.items():
            call()
            valgrind.start()
            for _ in range(REPEATS):
                call()
            valgrind.stop(name.encode())


def parse(dump: str) -> tuple[str, dict[str, int]]:
    """(trigger, own instructions by object file) of one callgrind dump."""
    trigger = re.search(r"^desc: Trigger: Client Request: (.*)$", dump, re.MULTILINE)
    names: dict[str, str] = {}
    cost: collections.Counter[str] = collections.Counter()
    current, of_a_call = "", False
    for line in dump.splitlines():
        if match := re.match(r"ob=\((\d+)\)(?: (.*))?$", line):
            current = names.setdefault(match[1], match[2] or "")
        elif match := re.match(r"cob=\((\d+)\)(?: (.*))?$", line):
            names.setdefault(match[1], match[2] or "")
        elif line.startswith("calls="):
            # The next line is the inclusive cost of the callee, counted where it is spent.
            of_a_call = True
        elif match := re.match(r"(?:[+-]?\d+|\*|0x[0-9a-f]+) (\d+)$", line):
            if not of_a_call:
                cost[current] += int(match[1])
            of_a_call = False
    return (trigger[1] if trigger else ""), dict(cost)


def count() -> dict[str, dict[str, int]]:
    """Instructions per call: ``native`` and ``other``, by operator and job."""
    for program in ("valgrind", "cc"):
        if shutil.which(program) is None:
            raise SystemExit(f"instructions: expected {program} on PATH, got none")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, client = folder / "client.c", folder / "client.so"
        source.write_text(_CLIENT)
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", source, "-o", client], check=True)
        # Hash seeds and environment move addresses and with them a few instructions.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                "--instr-atstart=no",
                f"--callgrind-out-file={folder}/dump",
                sys.executable,
                __file__,
                "--inside",
                client,
            ],
            check=True,
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        dumps = [parse(path.read_text()) for path in folder.glob("dump.*")]
    counts = {}
    for operator, cost in sorted(dumps):
        native = sum(value for path, value in cost.items() if NATIVE.search(path))
        if operator:
            counts[operator] = {
                "native": native // REPEATS,
                "other": (sum(cost.values()) - native) // REPEATS,
            }
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/instructions.json"))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside is not None:
        inside(arguments.inside)
        return
    from facts import commit

    from acgkd_fast.files import write_text

    counts = count()
    facts = {"commit": commit(), "torch": str(torch.__version__), "repeats": REPEATS}
    write_text(arguments.out, json.dumps({**facts, "instructions": counts}, indent=1) + "\n")
    for operator, numbers in counts.items():
        print(f"{operator}: {numbers['native']:,} native, {numbers['other']:,} other")


if __name__ == "__main__":
    main()
