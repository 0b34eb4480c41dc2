"""The command line that the GPU tables share: JSON lines, of which finished ones are skipped, within a given time."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

S = TypeVar("S")


class GpuTable:
    """Options, device and finished rows of one script.

    Args:
        doc: the script's docstring; its first line describes the command.
        add: adds options of its own.
    """

    def __init__(self, doc: str, add: Callable[[argparse.ArgumentParser], object] | None = None) -> None:
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        parser.add_argument("--out", type=Path, required=True, help="JSON lines; finished sizes in it are skipped")
        parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
        parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further size after this long")
        if add is not None:
            add(parser)
        self.options = parser.parse_args()
        if self.options.device == "cuda" and not torch.cuda.is_available():
            sys.exit(f"{Path(sys.argv[0]).stem}: no CUDA device (try --device cpu for a dry run)")
        self.device = torch.device(self.options.device)
        self._begin = time.monotonic()
        self._out: Path = self.options.out
        self._out.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._out.read_text().splitlines()] if self._out.exists() else []

    def remaining(
        self, sizes: Iterable[S], key: Callable[[S], Hashable], row_key: Callable[[dict[str, Any]], Hashable]
    ) -> Iterator[S]:
        """The sizes without a row, until the time is up."""
        done = {row_key(row) for row in self.rows()}
        for size in sizes:
            if key(size) in done:
                continue
            if time.monotonic() - self._begin > self.options.seconds:
                print("out of time; the same command continues", flush=True)
                return
            yield size

    def write(self, row: dict[str, Any]) -> None:
        with self._out.open("a") as file:
            file.write(json.dumps(row) + "\n")
