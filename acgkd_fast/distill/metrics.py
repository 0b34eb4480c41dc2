"""The run's measurements as JSON lines, written as they come and trimmed when a run resumes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..files import write_text


class MetricsLog:
    """Append measurements to ``metrics.jsonl``: one object per line with ``stage``, ``step`` and ``time``.

    Args:
        path: the file; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        if not path.read_bytes().endswith(b"\n") and path.stat().st_size:
            # A crash cut the last line short; the next one must not continue it.
            self._rewrite(self.read())

    def write(self, stage: str, step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"stage": stage, "step": step, "time": round(time.time(), 3), **values})
        with self.path.open("a") as file:
            file.write(line + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Drop what an interrupted process wrote about `stage` after `step`, which will be redone."""
        rows = self.read()
        kept = [row for row in rows if row["stage"] != stage or row["step"] <= step]
        if len(kept) < len(rows):
            self._rewrite(kept)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; a line cut short by a crash is left out."""
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows
