"""What `make gpu-check` runs with the python that is there: doctor, GPU tests, GPU benchmarks; JSON into a folder.

The package under test is the installed one, so the source tree is kept off the import path.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> int:
    print("+", " ".join(arguments), flush=True)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env={**os.environ, "PYTHONSAFEPATH": "1"}).returncode


def main(results: Path) -> int:
    results.mkdir(parents=True, exist_ok=True)
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    import torch

    from acgkd_fast.doctor import render, report

    found = report()
    (results / "doctor.json").write_text(json.dumps(found, indent=1) + "\n")
    print(render(found))
    if not torch.cuda.is_available():
        print("gpu-check: expected a CUDA device, got none", file=sys.stderr)
        return 2

    failures = run("-m", "pytest", "-q", "tests", "-m", "gpu", f"--json-summary={results / 'tests.json'}")
    benchmarks = ["-m", "pytest", "-q", "bench", "-m", "gpu"]
    if importlib.util.find_spec("pytest_benchmark") is None:
        print("gpu-check: pytest-benchmark is not installed; the benchmarks only say what they skip")
    else:
        benchmarks.append(f"--benchmark-json={results / 'benchmarks.json'}")
    return run(*benchmarks) or failures


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
