"""What every test module shares: a report of what is being tested, and memory that betrays unwritten entries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import acgkd_fast.propagate  # noqa: F401  declares the operators that the report names
from acgkd_fast import _library, _native


def pytest_report_header() -> list[str]:
    kinds = {_library.backend(name, "cpu") for name in _library.operators()}
    backend = "native" if kinds == {"native"} else f"{' and '.join(sorted(kinds))} ({_native.why_missing('cpu')})"
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    threads = torch.get_num_threads()
    return [f"acgkd_fast: cpu backend {backend}; torch {torch.__version__}, {threads} threads; GPU {cuda}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def poison() -> Iterator[None]:
    """Fill uninitialised memory with NaN (integers: the largest value).

    It reaches the outputs of native kernels too, which allocate through the dispatcher.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
