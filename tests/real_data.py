"""Where the real data sets of some tests are; those tests are skipped where they are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """``$ACGKD_FAST_TEST_DATA``, or ``shared/data`` in or beside the checkout."""
    named = os.environ.get("ACGKD_FAST_TEST_DATA")
    places = [Path(named)] if named else [_CHECKOUT / "shared" / "data", _CHECKOUT.parent / "shared" / "data"]
    for place in places:
        if (place / "TUDataset" / "MUTAG").is_dir():
            return place
    pytest.skip("no TUDataset/MUTAG in " + " or ".join(map(str, places)) + " (set ACGKD_FAST_TEST_DATA)")
