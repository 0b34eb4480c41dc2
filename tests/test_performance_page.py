"""docs/performance.md is what bench/results say, and says so when it is not; the runner keeps only sound results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import performance  # noqa: E402
import pictures  # noqa: E402
import run  # noqa: E402
import verdicts  # noqa: E402


def test_page_and_pictures_are_what_the_results_say():
    assert performance.stale() == []


@pytest.fixture
def copied_results(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    shutil.copytree(verdicts.RESULTS, folder)
    for module in (performance, verdicts):
        monkeypatch.setattr(module, "RESULTS", folder)
    return folder


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_another_result_makes_the_page_stale(copied_results):
    newest, _ = performance.newest_run()
    assert newest.parent == copied_results and performance.stale() == []

    def slow_down(content):
        for entry in content["benchmarks"]:
            entry["extra_info"]["times_slower_than_ours"] = {"PyG": 0.5}
            entry["extra_info"]["median_us"]["ours"] *= 100

    edit(newest / "step.json", slow_down)
    assert performance.stale() == ["performance.md"]
    assert "0.5x (PyG)" in performance.page() and "**missed**" in performance.page()
    edit(newest / "scaling.json", slow_down)
    assert performance.stale() == ["growth.svg", "performance.md"]


def test_the_newest_run_counts(copied_results):
    newest, _ = performance.newest_run()
    shutil.copytree(newest, copied_results / "later")
    for path in (copied_results / "later").glob("*.json"):
        edit(path, lambda content: content.update(datetime="9999-01-01T00:00:00"))
    assert performance.newest_run()[0].name == "later"


def test_every_gpu_target_waits_for_a_gpu():
    waiting = [t for t in [*verdicts.edges(), *verdicts.gpu_step(), *verdicts.search()] if "H200" in t.group]
    assert len(waiting) == 9
    assert {t.verdict for t in waiting} == {verdicts.NO_GPU}


def test_gpu_results_get_a_verdict(copied_results):
    row = {"batch": 1, "nodes": 14_142, "forward_share_of_copy_bandwidth": 0.5}
    row["peers"] = {
        "acgkd_fast": {"forward": {"cold_us": 10.0, "peak_bytes": 100}},
        "eager torch": {"forward": {"cold_us": 90.0, "peak_bytes": 500}},
        "torch.compile": {"refused": "no compiler"},
    }
    small = {"batch": 128, "nodes": 20, "peers": {"acgkd_fast": {"forward": {"graph_us": 3.0}}}}
    (copied_results / "edges_gpu.jsonl").write_text("\n".join(json.dumps(r) for r in (row, small)))
    found = {t.wanted: (t.measured, t.verdict) for t in verdicts.edges()}
    assert list(found.values()) == [
        ("50 %", "missed"),
        ("9.0x faster, 5.0x leaner", "held"),
        ("torch.compile: no compiler", "not measured"),
        ("captured without a synchronisation: yes; kernels counted by a test", "held"),
    ]


def test_pictures_carry_the_digest_of_their_data(tmp_path):
    pytest.importorskip("matplotlib")
    for path, (data, draw) in performance.pictures().items():
        copy = tmp_path / path.name
        draw(copy)
        assert pictures.drawn_from(copy) == pictures.digest(data) != pictures.digest([data])
    assert pictures.drawn_from(tmp_path / "none.svg") == "nothing"


def test_growth_is_read_off_the_last_two_sizes():
    assert performance.slope([(1, 5.0), (10, 1.0), (100, 100.0)]) == pytest.approx(2.0)


@pytest.fixture
def small_bench(tmp_path, monkeypatch):
    pytest.importorskip("pytest_benchmark")
    for shared in ("conftest.py", "facts.py"):
        shutil.copy(BENCH / shared, tmp_path)
    good = "def test_it(contest):\n    contest({'ours': lambda: 1, 'peer': lambda: sum(range(1000))})\n"
    (tmp_path / "bench_good.py").write_text(good)
    (tmp_path / "bench_bad.py").write_text(good + "    assert False\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\naddopts = -p no:xdist\n")
    # pytest-benchmark measures nothing in a process that it takes for a worker of pytest-xdist.
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run, "BENCH", tmp_path)
    return tmp_path


def test_a_failed_benchmark_leaves_no_results(small_bench, capfd):
    out = small_bench / "out"
    assert run.names() == ["bad", "good"]
    assert run.main(["--out", str(out)]) == 1
    assert "failed: bad\n" in capfd.readouterr().err
    assert [path.name for path in out.iterdir()] == ["good.json"]
    found = json.loads((out / "good.json").read_text())
    assert found["seconds"] > 0
    assert found["benchmarks"][0]["extra_info"]["times_slower_than_ours"]["peer"] > 1
    assert "data" not in found["benchmarks"][0]["stats"] and "node" not in found["machine_info"]


def test_only_results_of_the_same_unchanged_sources_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "good.json"
    assert not run.is_current(path)
    for here, there, current in (("abc", "abc", True), ("abc", "abd", False), ("abc-dirty", "abc-dirty", False)):
        monkeypatch.setattr(run.facts, "commit", lambda here=here: here)
        path.write_text(json.dumps({"commit_info": {"id": there}}))
        assert run.is_current(path) == current


def test_the_command_checks(tmp_path):
    done = subprocess.run([sys.executable, str(BENCH / "performance.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
