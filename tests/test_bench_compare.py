"""The tracking of speed works: a slowed kernel is flagged, a slowed machine is not. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import compare  # noqa: E402
import instructions  # noqa: E402


def results(**ratios: dict[str, float]) -> dict:
    return {
        "benchmarks": [{"fullname": name, "extra_info": {"times_slower_than_ours": r}} for name, r in ratios.items()]
    }


def files(tmp_path, *contents):
    paths = [tmp_path / f"{position}.json" for position in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    return [str(path) for path in paths]


def test_what_lost_ground_to_every_peer_is_flagged(tmp_path, capsys):
    base = results(a={"pyg": 4.0, "dense": 2.0}, b={"pyg": 3.0})
    slow = results(a={"pyg": 2.0, "dense": 1.0}, b={"pyg": 2.9})
    assert compare.main(files(tmp_path, base, slow)) == 1
    said = capsys.readouterr().out
    assert "SLOWER  2.00" in said and "1 of 2 became slower" in said and "pyg: b" in said


def test_one_peer_that_became_faster_flags_nothing(tmp_path):
    base = results(a={"pyg": 4.0, "dense": 2.0})
    assert compare.main(files(tmp_path, base, results(a={"pyg": 2.0, "dense": 2.0}))) == 0


def test_the_tolerance_is_the_callers(tmp_path):
    given = files(tmp_path, results(a={"pyg": 4.0}), results(a={"pyg": 3.5}))
    assert compare.main(given) == 0
    assert compare.main([*given, "--tolerance", "0.1"]) == 1


def test_instructions_are_compared_as_they_are(tmp_path):
    base, more = ({"instructions": {"op (job)": {"native": n, "other": 5}}} for n in (1000, 1030))
    assert compare.main(files(tmp_path, base, more)) == 1
    assert compare.main(files(tmp_path, more, base)) == 0


def test_a_folder_counts_as_all_of_its_files(tmp_path):
    for run, ratio in (("base", 4.0), ("new", 2.0)):
        (tmp_path / run).mkdir()
        for name in ("a", "b"):
            content = results(**{name: {"pyg": ratio if name == "a" else 3.0}})
            (tmp_path / run / f"{name}.json").write_text(json.dumps(content))
    base, new = (compare.load(tmp_path / run) for run in ("base", "new"))
    changes, tolerance = compare.compare(base, new)
    assert {change.name: change.slower(tolerance) for change in changes} == {"a": True, "b": False}


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="expected two files"):
        compare.main(files(tmp_path, results(a={"pyg": 1.0}), {"instructions": {}}))
    with pytest.raises(SystemExit, match="expected benchmarks that both files hold"):
        compare.main(files(tmp_path, results(a={"pyg": 1.0}), results(b={"pyg": 1.0})))
    with pytest.raises(SystemExit, match="expected one result for 'nowhere'"):
        compare.main(["nowhere", "nowhere"])


SLOWED = """
import torch, pytest
import acgkd_fast as af

@pytest.mark.parametrize("times", [TIMES])
def test_op(times, contest, request):
    layout = af.PairLayout.complete([20] * 50)
    x, logits = torch.randn(1000, 64), torch.full((layout.num_pairs,), -2.0)
    edges = af.sample_edges(logits, layout, seed=0)
    ours = lambda: [af.gcn_propagate(x, edges) for _ in range(times)]
    contest({"ours": ours, "matmul": lambda: x @ x.T})
    request.node._nodeid = "test_op"
"""


def test_a_deliberately_slowed_operator_is_caught(tmp_path):
    """Through the real fixture: the operator called 20 times where it was called once."""
    pytest.importorskip("pytest_benchmark")
    # Benchmarks are switched off wherever an xdist worker is announced.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = []
    for times in (1, 20):
        folder = tmp_path / str(times)
        folder.mkdir()
        for shared in ("conftest.py", "facts.py"):
            (folder / shared).write_text((BENCH / shared).read_text())
        (folder / "bench_slowed.py").write_text(SLOWED.replace("[TIMES]", f"[pytest.param({times}, id='x')]"))
        out = folder / "out.json"
        command = [sys.executable, "-m", "pytest", "-q", "bench_slowed.py", f"--benchmark-json={out}"]
        command += ["-o", "python_files=bench_*.py", "-p", "no:cacheprovider", "-p", "no:xdist"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        paths.append(str(out))
    assert compare.main(paths) == 1
    assert compare.main(paths[::-1]) == 0


DUMP = """# callgrind format
desc: Trigger: Client Request: gcn_propagate (job)
ob=(1) /x/acgkd_fast/_C.abi3.so
fl=(1)
fn=(1) acgkd::gcn
10 100
+5 20
cfn=(2)
cob=(2) /lib/libm.so.6
calls=1 0
11 7
ob=(2)
fn=(2) exp
3 7
ob=(3) /x/libpython3.11.so
fn=(3)
* 900
"""


def test_a_dump_is_read_by_object_without_counting_callees_twice():
    trigger, cost = instructions.parse(DUMP)
    assert trigger == "gcn_propagate (job)"
    assert cost == {"/x/acgkd_fast/_C.abi3.so": 120, "/lib/libm.so.6": 7, "/x/libpython3.11.so": 900}


def test_the_jobs_reach_every_operator_with_a_native_kernel():
    from acgkd_fast import _library

    if _library.backend("gcn_propagate", "cpu") != "native":
        pytest.skip("no native kernels are built")
    recorded = {name.split(" (")[0] for name in instructions.record()}
    native = {name for name in _library.operators() if _library.backend(name, "cpu") == "native"}
    assert native - recorded <= instructions.NOT_RECORDED
