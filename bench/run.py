"""All CPU benchmarks, each file in a process of its own; one JSON file per benchmark file.

    python bench/run.py --out bench/results/COMMIT [--only NAME ...]

Files of the same unchanged commit are not measured again, so the same command continues a run that was cut off. One
process at a time, on one thread: two at once would share caches and memory bandwidth. Leaves with status 1 if a
benchmark failed; results of a file with a failure are not kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import facts

from acgkd_fast.files import write_text

BENCH = Path(__file__).parent


def names() -> list[str]:
    """Benchmark files of the CPU, in alphabetical order."""
    found = sorted(path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py"))
    return [name for name in found if not name.endswith("_gpu")]


def is_current(path: Path) -> bool:
    """Whether the file holds results of the sources as they are, with every change committed."""
    if not path.exists() or facts.commit().endswith("-dirty"):
        return False
    return bool(json.loads(path.read_text())["commit_info"]["id"] == facts.commit())


def measure(name: str, out: Path) -> bool:
    """Run one file; its results appear only if all went well."""
    part, begin = out / f".{name}.part", time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(BENCH / f"bench_{name}.py")]
    done = subprocess.run([*command, "--benchmark-columns=median,iqr,rounds", f"--benchmark-json={part}"])
    # Nothing to measure here (an optional package is missing) is no failure.
    fine = done.returncode in (0, 5)
    if fine and part.exists() and part.stat().st_size:
        found = {"seconds": round(time.monotonic() - begin, 1), **json.loads(part.read_text())}
        write_text(out / f"{name}.json", json.dumps(found, indent=1) + "\n")
    part.unlink(missing_ok=True)
    return fine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), metavar="NAME")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    begin, failed = time.monotonic(), []
    for position, name in enumerate(given.only, 1):
        if is_current(given.out / f"{name}.json"):
            print(f"[{position}/{len(given.only)}] {name}: there already", flush=True)
            continue
        print(f"[{position}/{len(given.only)}] {name}, after {time.monotonic() - begin:.0f} s", flush=True)
        if not measure(name, given.out):
            failed.append(name)
    print(f"{len(given.only)} files in {time.monotonic() - begin:.0f} s, results in {given.out}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
