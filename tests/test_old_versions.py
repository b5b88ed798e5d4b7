"""What version 0.1.0 wrote still loads, answers the same, and can be carried on."""

import io
import json
import shlex
import shutil
from pathlib import Path

import numpy
import pandas
import papermill
import pytest
import tiny_runs

import gcode_ml
from gcode_ml.core.renamed import RENAMED, expired

ROOT = Path(__file__).resolve().parents[1]
OLD = Path(__file__).resolve().parent / "fixtures" / "0.1.0"
EXPECTED = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))
RUNS = sorted(f"{path.parent.parent.name}/tiny" for path in OLD.glob("runs/*/tiny/result.json"))


class KernelAskedFor(Exception):
    """Raised in the place of a kernel's start."""


def recorded_commands() -> list:
    """Return every `gcode_ml` command that a result of a write-up was made by."""
    found = set()
    for file in sorted(ROOT.glob("papers/*/results/provenance.json")):
        for table in json.loads(file.read_text(encoding="utf-8")).values():
            found |= {made["command"] for made in table["made_by"] if made.get("command")}
    return sorted(command for command in found if command.startswith("gcode_ml "))


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the old files as the current folder, with its runs."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GCODE_ML_DATA", "")
    monkeypatch.setenv("GCODE_ML_RUNS", str(folder / "runs"))
    return folder


def said(capsys, *words) -> str:
    """Carry out a command in this process and return what it printed."""
    capsys.readouterr()
    assert tiny_runs.entry_point()([*map(str, words), "--quiet"]) in (0, None)
    return capsys.readouterr().out


def compare_columns(found: list, expected: list, rtol: float, atol: float = 1e-6):
    """Compare two columns: numbers within tolerances, everything else as text."""
    numbers = pandas.to_numeric(pandas.Series(expected), errors="coerce")
    if numbers.notna().any():
        values = pandas.to_numeric(pandas.Series(found), errors="coerce")
        numpy.testing.assert_allclose(values, numbers, rtol=rtol, atol=atol)
    else:
        texts = [str(item) if item == item else "" for item in found]
        assert texts == [str(item or "") if item == item else "" for item in expected]


@pytest.mark.parametrize("domain", sorted(EXPECTED["predictions"]))
def test_bundles_predict(domain, old, capsys):
    """A bundle answers what the version that wrote it answers."""
    about = EXPECTED["predictions"][domain]
    text = said(capsys, "predict", about["bundle"], about["input"])
    table = pandas.read_csv(io.StringIO(text), dtype=str)
    assert len(table) == about["rows"]
    table = table.iloc[:: max(1, len(table) // 40)]
    assert len(table.columns) >= len(about["table"])
    for position, expected in enumerate(about["table"].values()):
        compare_columns(table.iloc[:, position].tolist(), expected, rtol=1e-4)


def test_runs_are_listed(old, capsys):
    """Finished and interrupted runs are in the table of all runs."""
    lines = said(capsys, "runs").splitlines()
    status = {line.split()[0]: line.split()[1] for line in lines[1:]}
    assert all(status[run] == "finished" for run in RUNS) and len(RUNS) == 5
    assert all(status[f"{domain}/killed"] == "interrupted" for domain in EXPECTED["resumed"])


@pytest.mark.parametrize("run", RUNS)
def test_runs_are_reported(run, old, capsys, monkeypatch):
    """A page about a run is computed."""
    said(capsys, "report", run, "-o", old / "page.html")
    page = (old / "page.html").read_text(encoding="utf-8")
    result = json.loads((old / "runs" / run / "result.json").read_text(encoding="utf-8"))
    assert all(row["measure"] in page for row in result["table"] if row["measure"].isalnum())
    assert "Traceback (most" not in page


@pytest.mark.parametrize("domain", sorted(EXPECTED["resumed"]))
def test_interrupted_runs_resume(domain, old, capsys):
    """An interrupted run goes on from its snapshot and ends as it would have with 0.1.0."""
    if tiny_runs.RUNS[domain]["data"].startswith("data/"):
        said(capsys, *tiny_runs.simulate_words(domain))
    run = old / "runs" / domain / "killed"
    kept = pandas.read_csv(run / "history.csv")
    said(capsys, "run", domain, "--resume", "killed")
    history = pandas.read_csv(run / "history.csv")
    pandas.testing.assert_frame_equal(history.iloc[: len(kept)], kept, check_dtype=False)
    expected = EXPECTED["resumed"][domain]
    history = history.drop(columns="seconds")
    for position, column in enumerate(zip(*expected["history"]["data"])):
        compare_columns(history.iloc[:, position].tolist(), list(column), rtol=2e-2, atol=1e-3)
    table = json.loads((run / "result.json").read_text(encoding="utf-8"))["table"]
    assert len(table) == len(expected["table"])
    values = [row["value"] for row in table]
    compare_columns(values, [row["value"] for row in expected["table"]], rtol=0.05, atol=0.06)


def test_sweep_continues(old, capsys):
    """A sweep whose driver died in its third trial ends; its first two trials are only read."""
    runs = old / "runs" / "binary_vae"
    before = [(runs / f"small-000{trial}" / "result.json").read_bytes() for trial in (0, 1)]
    said(capsys, "agent", "small")
    after = [(runs / f"small-000{trial}" / "result.json").read_bytes() for trial in (0, 1)]
    assert before == after and (runs / "small-0002" / "result.json").exists()
    table = pandas.read_csv(old / "runs/sweeps/small/sweep.csv")
    expected = pandas.DataFrame(**EXPECTED["sweep"])
    assert (table.state == "complete").all() and len(table) == len(expected)
    for column in ("learning_rate", "valid_loss"):
        numpy.testing.assert_allclose(table[column], expected[column], rtol=1e-2)
    shared = tiny_runs.options(tiny_runs.SHARED)
    said(capsys, "sweep", "binary_vae", "--space", "space.yaml", "--name", "small", *shared)
    assert len(list(runs.glob("small-*"))) == 3  # it is the same sweep, with nothing left to do


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    """Tiny files in the layout of the real sets that commands ask for before they start."""
    folder = tmp_path_factory.mktemp("data")
    assert not tiny_runs.entry_point()(["simulate", "binary_vae", "-o", str(folder), "--quiet"])
    return folder


def given_names(words: list) -> list:
    """Return the parameters that a command names itself."""
    return [words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "-p"]


@pytest.mark.parametrize("command", recorded_commands())
def test_recorded_commands(command, tmp_path, monkeypatch, data_sets):
    """A command that made a result is accepted as it was recorded, up to its kernel's start."""
    asked = []

    def no_kernel(notebook, output, parameters=None, **more):
        asked.append(parameters)
        raise KernelAskedFor(str(notebook))

    monkeypatch.setattr(papermill, "execute_notebook", no_kernel)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GCODE_ML_DATA", str(data_sets))
    monkeypatch.setenv("GCODE_ML_RUNS", str(tmp_path))
    words = shlex.split(command)[1:]
    with pytest.raises(KernelAskedFor):
        tiny_runs.entry_point()([*words, "--quiet"])
    assert len(asked) == 1 and len(asked[0]) > len(given_names(words))


def test_there_are_commands():
    """The record of the write-ups names commands."""
    assert len(recorded_commands()) >= 20


def test_old_names_expire():
    """A row of the table of old names is removed in the version in which it expires."""
    assert expired(gcode_ml.__version__) == []


def test_deprecation_table_is_complete():
    """The changelog lists every renamed value, parameter, column and argument."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    kinds = ("value", "parameter", "column", "argument")
    assert [row for row in RENAMED if row.kind in kinds and row.new not in text] == []
