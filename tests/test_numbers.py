"""Numbers of tiny seeded fits, of the simulators and of the planner, within tolerances.

`same_numbers.py` compares two commits exactly, on one machine. Here the numbers are those of
`fixtures/numbers.json`, on any machine: another processor rounds otherwise, so the simulators and
the planner are compared to 1e-3 and 1e-6, and fits loosely. After a change that is meant,
`python tests/test_numbers.py` writes the file again.
"""

import json
import math
import os
import tempfile
import warnings
from pathlib import Path

import numpy
import pandas
import pytest
import same_numbers
import tiny_runs
from numeric_form import file_values

FILE = Path(__file__).resolve().parent / "fixtures" / "numbers.json"
TOLERANCES = {"planner": (1e-6, 1e-9), "simulator": (1e-3, 1e-6), "run": (2e-2, 1e-3)}

# Losses and other measures that do not jump when a single answer flips.
SMOOTH = ("loss", "nll", "brier", "rmse", "mae", "kl", "elbo", "psnr")


def statistics(array) -> list:
    """Return a few numbers that say what an array holds; nothing for text."""
    array = numpy.asarray(array)
    if array.dtype.kind not in "biuf" or not array.size:
        return []
    numbers = array.astype("float64").ravel()
    finite = numbers[numpy.isfinite(numbers)]
    middle = float(numpy.median(finite)) if len(finite) else 0.0
    norm = float(numpy.sqrt(numpy.square(finite).mean())) if len(finite) else 0.0
    return [len(finite), middle, norm]


def table_statistics(value) -> list:
    """Return the statistics of an array, or of the columns of a table."""
    if isinstance(value, pandas.DataFrame):
        columns = [value.iloc[:, k] for k in range(value.shape[1])]
        return [found for column in columns if (found := statistics(column.to_numpy()))]
    found = statistics(value)
    return [found] if found else []


def planner_numbers() -> dict:
    """Return the statistics of the planned motion of a small program."""
    samples = same_numbers.planner_values()["samples"]
    return {name: statistics(values) for name, values in samples.items()}


def simulator_numbers(target: str) -> dict:
    """Simulate the data of a domain below the current folder; return the statistics of a few."""
    words = tiny_runs.simulate_words(target)
    assert not tiny_runs.entry_point()([*words, "--quiet"])
    suffixes = (".parquet", ".npy", ".npz", ".gz")
    files = sorted(path for path in Path("data", target).rglob("*") if path.suffix in suffixes)
    chosen = files[:: max(1, len(files) // 4)]
    return {
        str(path.relative_to(Path("data", target))): [
            found for value in file_values(path) for found in table_statistics(value)
        ]
        for path in chosen
        if path.suffix != ".gz"
    }


def run_numbers(domain: str) -> dict:
    """Carry out the tiny run of a domain in this process; return its losses and measures."""
    assert not tiny_runs.entry_point()([*tiny_runs.run_words(domain), "--quiet"])
    run = Path("runs", domain, "tiny")
    history = pandas.read_csv(run / "history.csv")
    losses = {name: history[name].tolist() for name in history if "loss" in name}
    table = json.loads((run / "result.json").read_text(encoding="utf-8"))["table"]
    measures = {
        f"{row['measure']}, {row['name']}": row["value"]
        for row in table
        if any(word in row["measure"].lower() for word in SMOOTH) and row["value"] is not None
    }
    return dict(losses=losses, measures=measures, rows=len(table))


def close(found, expected, rtol: float, atol: float, where: str = ""):
    """Compare nested numbers."""
    if isinstance(expected, dict):
        assert sorted(found) == sorted(expected), where
        for key in expected:
            close(found[key], expected[key], rtol, atol, f"{where} {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for position, item in enumerate(expected):
            close(found[position], item, rtol, atol, f"{where} {position}")
    else:
        same = math.isclose(found, expected, rel_tol=rtol, abs_tol=atol)
        assert same or (found != found and expected != expected), (where, found, expected)


def compare(part: str, found: dict):
    """Compare a part with the recorded numbers."""
    recorded = json.loads(FILE.read_text(encoding="utf-8"))[part]
    close(json.loads(json.dumps(found)), recorded, *TOLERANCES[part.split()[0]], where=part)


def prepare(patch, folder: Path):
    """Make a folder the current one, without real data and without kernels."""
    import matplotlib
    import papermill

    matplotlib.use("Agg")
    patch.chdir(folder)
    patch.setenv("GCODE_ML_DATA", "")
    patch.setenv("GCODE_ML_RUNS", "runs")
    patch.setattr(papermill, "execute_notebook", tiny_runs.execute_here)
    warnings.simplefilter("ignore")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for the data and the runs of this file."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        prepare(patch, tmp_path_factory.mktemp("numbers"))
        yield Path(os.curdir)


def test_planner(place):
    """The planned motion of a small program."""
    compare("planner", planner_numbers())


@pytest.mark.parametrize("target", tiny_runs.DATA)
def test_simulators(target, place):
    """Simulated data of a domain."""
    compare(f"simulator {target}", simulator_numbers(target))


@pytest.mark.parametrize("domain", tiny_runs.RUNS)
def test_fits(domain, place):
    """Losses and measures of a tiny run."""
    data = tiny_runs.RUNS[domain].get("data", "")
    if data.startswith("data/") and not Path(data).exists():
        simulator_numbers(domain)
    compare(f"run {domain}", run_numbers(domain))


def write():
    """Write the file of numbers again."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        prepare(patch, Path(folder))
        found = {"planner": planner_numbers()}
        for target in tiny_runs.DATA:
            found[f"simulator {target}"] = simulator_numbers(target)
        for domain in tiny_runs.RUNS:
            found[f"run {domain}"] = run_numbers(domain)
    FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
