"The benchmarks can be run, and what they write is whole; no time is tested."

import json

import pytest

import bench
from bench.__main__ import main


@pytest.fixture
def tiny(monkeypatch):
    "Two benchmarks of a made-up topic, and one that cannot run."
    monkeypatch.setattr(bench, "topics", lambda: [])
    monkeypatch.setattr(bench, "FOUND", {})
    calls = []

    @bench.benchmark("a sum", "another sum", goal=1e9)
    def sums(quick):
        calls.append(quick)
        return lambda: sum(range(100)), lambda: sum(range(1000)), dict(numbers=100)

    @bench.benchmark("nothing", "nothing")
    def nothing(quick):
        return lambda: None, lambda: None

    @bench.benchmark("a fault", "nothing")
    def fault(quick):
        raise RuntimeError("out of order")

    monkeypatch.setattr(bench, "topics", lambda: ["test_bench"])
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: None)
    return calls


def test_rows(tiny, tmp_path, capsys):
    "What a row has; one that fails is told and does not stop the others."
    file = tmp_path / "results.json"
    assert main(["--quick", "--output", str(file)]) == 1
    assert tiny == [True]
    assert "fault: RuntimeError: out of order" in capsys.readouterr().out
    found = json.loads(file.read_text())
    rows = {r["name"].split(".")[-1]: r for r in found["benchmarks"]}
    assert set(rows) == {"sums", "nothing"}
    assert found["machine"]["cpus"] > 0
    assert found["machine"]["threads"] == 1
    assert found["machine"]["quick"] is True
    assert found["machine"]["torch"]
    row = rows["sums"]
    assert (row["what"], row["alternative"], row["goal"], row["met"], row["numbers"]) == (
        "a sum",
        "another sum",
        1e9,
        True,
        100,
    )
    assert row["ratio"] == pytest.approx(
        row["seconds"]["ours"]["cpu"] / row["seconds"]["alternative"]["cpu"]
    )
    assert row["ratio_wall"] > 0
    assert row["repetitions"] == 2
    assert rows["nothing"]["met"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_only(tiny, tmp_path):
    "The other rows of the same machine stay; an unknown name is said."
    file = tmp_path / "results.json"
    main(["--quick", "--output", str(file)])
    first = json.loads(file.read_text())["benchmarks"]
    assert main(["--quick", "--only", "*.nothing", "--output", str(file)]) == 0
    again = json.loads(file.read_text())["benchmarks"]
    assert len(tiny) == 1
    assert [r["name"] for r in again] == [r["name"] for r in first]
    assert [r for r in again if r["name"].endswith("sums")][0] == [
        r for r in first if r["name"].endswith("sums")
    ][0]
    assert main(["--only", "nobody"]) == 2


def test_real_one(tmp_path):
    "A benchmark of the shared pages, found by its name."
    file = tmp_path / "results.json"
    assert main(["--quick", "--only", "toolkit.noise", "--output", str(file)]) == 0
    (row,) = json.loads(file.read_text())["benchmarks"]
    assert row["name"] == "toolkit.noise"
    assert row["goal"] == 1.0
    assert row["seconds"]["ours"]["wall"] > 0
