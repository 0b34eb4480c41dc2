"""The command line that the accuracy studies share: groups of cells, each a JSON line, begun within a given time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def read(file: Path) -> list[dict[str, Any]]:
    """Finished cells."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def study_options(doc: str | None, groups: Iterable[str], results: Path, begun: str) -> argparse.Namespace:
    """The parsed command; unless it only prints, its folders are there and torch has one thread.

    Args:
        doc: the script's docstring.
        groups: names of the groups of tasks.
        results: default file of the cells.
        begun: what is not begun after the given time, such as "pool".
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seconds", type=float, default=280.0, help=f"begin no {begun} after this time")
    parser.add_argument("--group", choices=(*groups, "all"), default="all")
    parser.add_argument("--rows", default="", help="names, separated by semicolons; default all")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    given = parser.parse_args()
    if given.table:
        return given
    if given.data_root is None or given.work is None:
        parser.error("--data-root and --work are needed to train")
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    return given
