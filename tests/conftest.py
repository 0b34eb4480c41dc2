"""What every test module shares: a report of what is being tested, and memory that betrays unwritten entries."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import without_hypothesis

import acgkd_fast.propagate  # noqa: F401  declares the operators that the report names
from acgkd_fast import _library

if importlib.util.find_spec("hypothesis") is None:
    without_hypothesis.install()

_outcomes: dict[str, Any] = {"passed": [], "failed": [], "skipped": {}}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json-summary", metavar="FILE", help="write what passed, failed and was skipped, and why")


def pytest_report_header() -> list[str]:
    plain = [name for name in _library.operators() if _library.backend(name, "cpu") == "reference"]
    backend = "native" if not plain else f"plain torch for {', '.join(plain)} ({_library.why_missing('cpu')})"
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    threads = torch.get_num_threads()
    return [f"acgkd_fast: cpu backend {backend}; torch {torch.__version__}, {threads} threads; GPU {cuda}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _outcomes["failed"].append(f"{report.nodeid} ({report.when})")
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _outcomes["skipped"][report.nodeid] = reason.removeprefix("Skipped: ")
    elif report.when == "call":
        _outcomes["passed"].append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--json-summary")
    if path is not None:
        Path(path).write_text(json.dumps(_outcomes, indent=1) + "\n")


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
