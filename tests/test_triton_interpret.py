"""The Triton kernels in Triton's interpreter, on tiny CPU tensors: the same edges as the oracle from the same seed.

The interpreter is chosen when Triton is imported, hence the process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SCRIPT = Path(__file__).with_name("triton_interpret.py")


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def case_names() -> list[str]:
    from triton_interpret import cases

    return [name for name, _ in cases()]


@pytest.mark.parametrize("name", case_names() if find_spec("triton") else [])
def test_interpreted_kernels_agree_with_the_oracle(results, name):
    if "refusal" in results:
        pytest.skip(results["refusal"])
    assert results[name] == "passed", results[name]
