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

    def write(self, stage: str, step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"stage": stage, "step": step, "time": round(time.time(), 3), **values})
        with self.path.open("a") as file:
            file.write(line + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Drop what an interrupted process wrote about `stage` after `step`, which will be redone."""
        kept = [row for row in self.read() if row["stage"] != stage or row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; a line cut short by a crash is left out."""
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows
