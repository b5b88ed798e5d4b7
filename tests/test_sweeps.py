"A sweep in which workers, kernels and the driver are killed ends with exactly the results it would have had."

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")
pytest.importorskip("distributed")
pytest.importorskip("psutil")
from bench._faults import COMMAND, TRIALS, killed_sweep, small_experiment
from gcode_ml.core.files import read_json
from gcode_ml.lab.sweeps import Sweep, Workers, find_sweep, new_sweep


@pytest.fixture
def notebook(tmp_path):
    "A small experiment: twelve epochs of a tenth of a second."
    return small_experiment(tmp_path)


def states_are_true(sweep):
    "No trial is told complete whose runs have no result; no result is told failed by an error."
    for t in sweep.study().get_trials(deepcopy=False):
        run = (
            sweep.folder.parent.parent
            / "tiny"
            / f"{sweep.name}-{t.user_attrs.get('run', t.number):04d}"
        )
        if t.state.name == "COMPLETE":
            assert (run / "result.json").exists(), t
        assert "error" not in t.user_attrs, t.user_attrs


def test_killed_at_random(notebook):
    "Three kills each of a worker, a kernel and the driver: twelve results, none lost, none computed twice, and as from one run."
    kills, _ = killed_sweep(
        notebook,
        "chaos",
        after_driver=lambda: states_are_true(find_sweep("chaos", notebook.parent / "runs")),
    )
    sweep = find_sweep("chaos", notebook.parent / "runs")
    states_are_true(sweep)
    complete = [t for t in sweep.study().get_trials() if t.state.name == "COMPLETE"]
    runs = {t.user_attrs.get("run", t.number) for t in complete}
    assert len(complete) == TRIALS
    assert len(runs) == TRIALS
    folders = list((notebook.parent / "runs" / "tiny").glob("chaos-*"))
    assert len([f for f in folders if (f / "result.json").exists()]) == TRIALS
    assert all(
        (f / "finished.txt").read_text() == "once\n"
        for f in folders
        if (f / "result.json").exists()
    )
    assert (
        len(
            {
                read_json(f / "result.json")["weights"]
                for f in folders
                if (f / "result.json").exists()
            }
        )
        == 1
    )  # the same seed: the same weights, however often it was killed
    assert len(kills) == 9, kills


@pytest.fixture
def quick(notebook):
    "A sweep of three trials that take no time."
    sweep = new_sweep(
        str(notebook),
        notebook.parent / "space.yaml",
        "quick",
        notebook.parent / "runs",
        trials=3,
        values=dict(epochs=1, pause=0.0),
    )
    sweep.drive(
        Workers(),
        work=lambda job: dict(
            value=(job["parameters"][0]["x"] - 2) ** 2, values=[0.0], seconds=0.0
        ),
    )
    return sweep


def test_journal_cut_at_every_byte(quick):
    "A journal that was cut anywhere opens, and the sweep can go on with it."
    file = quick.path("study.journal")
    whole = file.read_bytes()
    assert len(whole) > 1000
    for size in range(0, len(whole), max(1, len(whole) // 200)):
        file.write_bytes(whole[:size])
        study = Sweep(quick.folder).study()
        assert len(study.get_trials(deepcopy=False)) <= 3
        study.enqueue_trial(dict(x=1.0))  # what is appended next is not joined to half a line
        assert len(Sweep(quick.folder).study().get_trials(deepcopy=False)) >= 1
    file.write_bytes(whole[:300])
    again = Sweep(quick.folder)
    again.drive(Workers(), work=lambda job: dict(value=0.0, values=[0.0], seconds=0.0))
    assert sum(t.state.name == "COMPLETE" for t in again.study().get_trials()) == 3


def test_broken_studies_are_named(quick, refused):
    "A line that is no JSON, and a database that is none."
    file = quick.path("study.journal")
    lines = file.read_bytes().splitlines(True)
    file.write_bytes(b"".join([lines[0], b"{broken\n", *lines[1:]]))
    assert "line 2: expected a JSON object" in refused(Sweep(quick.folder).study)
    (quick.folder / "study.db").write_bytes(b"no database at all, not even a small one" * 50)
    quick.facts["storage"] = f"sqlite:///{quick.folder / 'study.db'}"
    assert "expected a database that answers" in refused(quick.study)


def test_several_owners_share_a_sweep(notebook):
    "Two agents in two processes: every trial once."
    new_sweep(
        str(notebook),
        notebook.parent / "space.yaml",
        "shared",
        notebook.parent / "runs",
        trials=4,
        values=dict(epochs=2, pause=0.05),
    )
    agents = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                COMMAND,
                "agent",
                "shared",
                "--runs",
                str(notebook.parent / "runs"),
                "--quiet",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [a.communicate(timeout=200)[0] for a in agents]
    assert [a.returncode for a in agents] == [0, 0], said
    trials = find_sweep("shared", notebook.parent / "runs").study().get_trials()
    assert [t.state.name for t in trials] == ["COMPLETE"] * 4


def test_pruning(notebook):
    "A trial that is behind is stopped before its end."
    (notebook.parent / "space.yaml").write_text(
        "method: grid\nmetric: {name: valid_loss, goal: minimize}\nparameters: {x: {values: [2.0, 1.5, 2.5, -5.0]}}\n"
    )
    sweep = new_sweep(
        str(notebook),
        notebook.parent / "space.yaml",
        "pruned",
        notebook.parent / "runs",
        values=dict(epochs=12, pause=0.25),
        prune="median",
    )

    sweep.space.metric = "valid_loss"
    sweep.drive(Workers(), every=0.05)
    states = [t.state.name for t in sweep.study().get_trials()]
    assert states == ["COMPLETE"] * 3 + ["PRUNED"]
    last = notebook.parent / "runs" / "tiny" / "pruned-0003"
    assert not (last / "result.json").exists()
    assert len((last / "epochs.txt").read_text().split()) < 12


def test_postgresql(notebook, tmp_path):
    "A study in a PostgreSQL database, on a real server that is started for the test."
    pytest.importorskip("psycopg2")
    tools = next(
        (
            p
            for p in [
                *Path("/usr/lib/postgresql").glob("*/bin"),
                *[Path(w).parent for w in [shutil.which("initdb")] if w],
            ]
            if (p / "initdb").exists()
        ),
        None,
    )
    if tools is None:
        pytest.skip("PostgreSQL is not installed (Debian package postgresql)")
    user = dict(user="postgres") if os.getuid() == 0 else {}  # the server refuses to run as root
    place = tmp_path / "server"
    place.mkdir()
    place.chmod(0o777)
    for p in [place, *place.parents]:
        if user and p.owner() == "root" and str(p).startswith("/tmp/"):
            p.chmod(p.stat().st_mode | 0o055)

    def call(tool, *words):
        subprocess.run(
            [tools / tool, *map(str, words)], check=True, capture_output=True, cwd="/", **user
        )

    call("initdb", "-D", place / "data", "-A", "trust", "-U", "gcode")
    call(
        "pg_ctl",
        "-D",
        place / "data",
        "-w",
        "-o",
        f'-k {place} -h ""',
        "-l",
        place / "log",
        "start",
    )
    try:
        sweep = new_sweep(
            str(notebook),
            notebook.parent / "space.yaml",
            "postgres",
            notebook.parent / "runs",
            trials=3,
            storage=f"postgresql+psycopg2://gcode@/postgres?host={place}",
        )
        sweep.drive(Workers(), work=lambda job: dict(value=0.0, values=[0.0], seconds=0.0))
        assert [t.state.name for t in Sweep(sweep.folder).study().get_trials()] == ["COMPLETE"] * 3
    finally:
        call("pg_ctl", "-D", place / "data", "-m", "immediate", "stop")


SPACES = sorted((Path(__file__).parent.parent / "nbs" / "experiments").glob("*.sweep.yaml"))


@pytest.mark.parametrize("file", SPACES, ids=lambda f: f.name.split(".")[0])
def test_shipped_spaces(file):
    "Every space file names parameters of its experiment, with values that it takes."
    from gcode_ml.lab.spaces import read_space
    from gcode_ml.lab.sweeps import sweep_parameters

    space = read_space(file)
    space.check(sweep_parameters(file.name.split(".")[0]), file)
    assert len(space.dimensions) >= 2
