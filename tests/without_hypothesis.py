"""Stands in for hypothesis where it is not installed, so that the other tests of a module still run.

Property tests are skipped with a reason; strategies are never drawn from.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest


class Strategy:
    """Any strategy, and any way to build one from others."""

    def __call__(self, *_args: Any, **_options: Any) -> Strategy:
        return self

    def __getattr__(self, name: str) -> Strategy:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __or__(self, other: object) -> Strategy:
        return self


def given(*_args: Any, **_options: Any) -> Callable[..., Any]:
    def decorate(test: Callable[..., Any]) -> Callable[[], None]:
        # Without the parameters that hypothesis would fill, which pytest would look for among the fixtures.
        def skipped() -> None:
            pytest.skip("hypothesis is not installed")

        skipped.__name__, skipped.__doc__ = test.__name__, test.__doc__
        return skipped

    return decorate


class settings:
    def __init__(self, *_args: Any, **_options: Any) -> None:
        pass

    def __call__(self, test: Callable[..., Any]) -> Callable[..., Any]:
        return test


def install() -> None:
    strategies = types.ModuleType("hypothesis.strategies")
    strategies.__getattr__ = lambda name: Strategy()  # type: ignore[method-assign]
    package = types.ModuleType("hypothesis")
    package.given, package.settings, package.strategies = given, settings, strategies  # type: ignore[attr-defined]
    package.example = lambda *_args, **_options: lambda test: test  # type: ignore[attr-defined]
    package.__getattr__ = lambda name: Strategy()  # type: ignore[method-assign]
    sys.modules.update({"hypothesis": package, "hypothesis.strategies": strategies})
