"""What `import acgkd_fast` costs beyond torch, each import in a process of its own, peers' beside it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import facts
import pytest

IMPORTS = {
    "ours": "import acgkd_fast",
    "ours, every public name": "import acgkd_fast; [getattr(acgkd_fast, name) for name in acgkd_fast.__all__]",
    "ours, the command line": "import acgkd_fast.cli",
    "torch-geometric": "import torch_geometric",
}
ROUNDS = 3
_CHILD = """
import json, sys, time
before = time.perf_counter()
import torch
between = time.perf_counter()
exec(sys.argv[1])
print(json.dumps([between - before, time.perf_counter() - between]))
"""


def seconds_of(statement: str) -> tuple[float, float]:
    """(torch, the statement after it), in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", _CHILD, statement], capture_output=True, text=True, check=True)
    first, second = json.loads(done.stdout.splitlines()[-1])
    return first, second


def test_import(benchmark: Any) -> None:
    wanted, absent = {}, {}
    for label, statement in IMPORTS.items():
        module = statement.split(";")[0].removeprefix("import ").split(".")[0]
        if importlib.util.find_spec(module) is None:
            absent[label] = "not installed"
        else:
            wanted[label] = statement
    seconds: dict[str, list[float]] = {label: [] for label in wanted}
    torch_seconds = []
    for _ in range(ROUNDS):
        for label, statement in wanted.items():
            first, second = seconds_of(statement)
            torch_seconds.append(first)
            seconds[label].append(second)
    torch_median = sorted(torch_seconds)[len(torch_seconds) // 2]
    info = {"operator": "import", "shape": "beyond torch", "torch_import_us": 1e6 * torch_median}
    benchmark.extra_info.update(facts.report(seconds, absent=absent, **info))
    benchmark.pedantic(lambda: seconds_of(IMPORTS["ours"]), rounds=1)


@pytest.mark.parametrize("heavy", ["triton", "torch_geometric", "networkx", "matplotlib", "torch._inductor"])
def test_nothing_heavy_is_loaded(heavy: str) -> None:
    """Optional packages arrive with their first use, not with the import."""
    code = f"import sys, torch; had = set(sys.modules); import acgkd_fast; print({heavy!r} in set(sys.modules) - had)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
