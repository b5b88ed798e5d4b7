"One experiment from the command line to its pages, once in one go and once killed in the middle."

import io
import os
import re
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest

from gcode_ml.core.files import read_json
from gcode_ml.lab.bundle import load_bundle
from gcode_ml.lab.cli import main
from gcode_ml.lab.runs import find_run

GIVEN = dict(
    folds=2,
    test_folds=1,
    leaky="no",
    window=32,
    stride=64,
    d_model=8,
    nhead=1,
    num_layers=1,
    encoder_layers=1,
    dim_feedforward=8,
    max_epochs=12,
    batch_size=4,
    seed=7,
    device="cpu",
    tracking="tensorboard",
    augment="noise, time_warp",
    save_best="valid_loss",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def command(command, runs, monkeypatch):
    "A command line with the runs folder of this file."
    monkeypatch.setenv("GCODE_ML_RUNS", str(runs))
    return command


def words(recordings, name):
    return [
        "run",
        "fingerprint",
        "--name",
        name,
        "-p",
        f"data={recordings}",
        *(w for k, v in GIVEN.items() for w in ("-p", f"{k}={v}")),
    ]


def driver_and_kernel_killed(runs, *words):
    "Start a command in a process of its own and kill it, and its kernel, when the fit has a snapshot."
    driver = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from gcode_ml.lab.cli import main; sys.exit(main())",
            *words,
            "--quiet",
        ],
        env={**os.environ, "GCODE_ML_DATA": "", "GCODE_ML_RUNS": str(runs)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ends = time.time() + 60
    while (
        not [*runs.glob("*/killed/snapshot/*.safetensors")]
        and driver.poll() is None
        and time.time() < ends
    ):
        time.sleep(0.005)
    family = [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]
    for p in family:
        p.kill()
    driver.wait()
    psutil.wait_procs(family, 10)
    return family


@pytest.fixture(scope="module")
def whole(runs, recordings):
    "A run in one go, and what it printed."
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as m:
        m.setenv("GCODE_ML_DATA", "")
        m.setenv("GCODE_ML_RUNS", str(runs))
        m.setattr(sys, "stdout", out)
        assert main([*words(recordings, "whole"), "--quiet"]) == 0
    return find_run("whole", runs), out.getvalue()


def executed(run):
    return nbformat.read(run.path("run.ipynb"), as_version=4)


def test_result_is_complete_and_last(whole):
    "Everything that a result has to say; of the run's own files none is younger."
    run, _ = whole
    result = read_json(run.path("result.json"))
    assert run.status == "finished"
    assert {
        "status",
        "domain",
        "name",
        "parameters",
        "command",
        "created",
        "seed",
        "split",
        "metrics",
        "baselines",
        "audit",
        "data",
        "table",
        "durations",
        "peak_memory_mb",
        "versions",
        "machine",
        "finished",
    } <= set(result)
    assert (result["status"], result["domain"], result["name"]) == (
        "finished",
        "fingerprint",
        "whole",
    )
    assert result["data"]["recordings"] == 10
    assert len(result["data"]["checksum"]) == 16
    assert result["versions"]["gcode_ml"]
    assert result["durations"]["total"] > 0
    files = [
        f for f in run.folder.rglob("*") if f.is_file() and f.name not in ("run.ipynb", ".lock")
    ]
    assert max(files, key=lambda f: f.stat().st_mtime_ns).name == "result.json"
    assert {"params.json", "history.csv", "log.txt"} <= {f.name for f in files}
    assert not [f for f in files if f.suffix == ".tmp"]


def test_table_and_pictures(whole):
    "The table is printed with the model beside its baselines; the pictures are there."
    run, out = whole
    table = pd.DataFrame(read_json(run.path("result.json"))["table"])
    assert {"model", "lookup_time", "majority", "extra_trees"} <= set(table.name)
    assert {
        "line exact, free-running",
        "operation",
    } <= set(table.measure)
    assert all(word in out for word in {*table.name, *table.measure})
    pictures = sorted(run.path("figures").glob("*.png"))
    assert len(pictures) >= 4
    assert all(f.read_bytes().startswith(b"\x89PNG") and f.name in out for f in pictures)
    assert "result.json" in out


def test_parameters_are_honoured(whole):
    "What was given is in the record, in the executed notebook, and in what came of it."
    run, _ = whole
    result = read_json(run.path("result.json"))
    for k, v in GIVEN.items():
        assert result["parameters"][k] == (False if v == "no" else v)
    # `seed` as the notebook had it
    assert result["parameters"]["dropout"] == 0.2
    assert result["seed"] == 7
    assert result["split"]["computed"] == 1
    injected = next(
        c for c in executed(run).cells if "injected-parameters" in c.metadata.get("tags", [])
    )
    assert "seed = 7" in injected.source
    assert 'augment = "noise, time_warp"' in injected.source
    assert "clip = 1.0" in injected.source
    assert f'run_dir = "{run.folder}"' in injected.source
    bundle = load_bundle(run.folder)
    history = pd.read_csv(run.path("history.csv"))
    assert bundle.model.backbone.reconstruct.in_features == 8
    assert bundle.preprocessing["stride"] == 64
    assert len(history) == 12
    assert set(history.fit) == {"fold-0"}
    assert not [
        o for c in executed(run).cells for o in c.get("outputs", []) if o.output_type == "error"
    ]


def test_seed_matters(whole, recordings):
    "The first losses are those of the seed that was given, not of another."
    from gcode_ml.fingerprint.data import read_recordings
    from gcode_ml.fingerprint.recipe import recipe

    sizes = {
        k: v
        for k, v in GIVEN.items()
        if k not in ("test_folds", "leaky", "max_epochs", "tracking", "save_best")
    }

    def tested(seed):
        return sorted(
            set(
                (
                    learn := recipe(read_recordings(recordings), **{**sizes, "seed": seed})
                ).fold.windows.sources[learn.test]
            )
        )

    stage = read_json(whole[0].path("stages", "fold-0.json"))["value"]
    assert stage["test_recordings"] == tested(7) != tested(42)


def test_resumed_after_kill(whole, runs, recordings, command):
    "Driver and kernel killed in the middle of the fit, the run is interrupted; resumed, it ends in the very same table."
    family = driver_and_kernel_killed(runs, *words(recordings, "killed"))
    run = find_run("killed", runs)
    folder = run.folder
    assert len(family) > 1
    assert run.status == "interrupted"
    assert 0 < len(pd.read_csv(folder / "history.csv")) < GIVEN["max_epochs"]
    assert not (folder / "stages").exists()
    assert command("run", "fingerprint", "--resume", "killed")[0] == 0
    once, again = (read_json(r.path("result.json")) for r in (whole[0], run))
    for key in ("table", "metrics", "baselines", "audit", "split", "data", "seed", "parameters"):
        assert repr(again[key]) == repr(once[key]), key  # `repr`: NaN is not equal to itself
    a, b = (pd.read_csv(r.path("history.csv")).drop(columns="seconds") for r in (whole[0], run))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.name != ".lock"}
    code, out, _ = command("run", "fingerprint", "--resume", "killed")
    # a finished run is only read
    assert code == 0
    assert "lookup_time" in out
    assert {f: f.stat().st_mtime_ns for f in before} == before


def test_commands_on_runs(whole, command, recordings, runs, tmp_path):
    "The table of runs, the parameters, the score on other data, and a prediction."
    code, out, _ = command("runs")
    assert code == 0
    assert "fingerprint/whole" in out
    assert "finished" in out
    code, out, _ = command("runs", "no_such_domain")
    assert code == 0
    assert "whole" not in out
    code, out, _ = command("parameters", "fingerprint")
    assert code == 0
    assert "seed = 42" in out
    assert "max_epochs" in out
    assert "run_dir" not in out
    code, out, _ = command("evaluate", "whole", "--data", recordings, "-o", tmp_path / "score.json")
    assert code == 0
    assert "trained on" in out
    assert {r["split"] for r in read_json(tmp_path / "score.json")["table"]} == {
        "trained on",
        "new",
    }
    code, out, _ = command("predict", whole[0].folder, recordings / "face_001.parquet")
    said = pd.read_csv(io.StringIO(out))
    assert code == 0
    assert list(said) == ["run", "seconds", "operation", "probability", "line"]
    assert set(said.run) == {"face_001"}
    assert said.probability.between(0, 1).all()


def test_evaluation_repeats_the_run(whole, command, recordings, tmp_path):
    "The bundle, read again and applied to the recordings of the run's test fold, scores what the run says."
    command("evaluate", "whole", "--data", recordings, "-o", tmp_path / "score.json")

    def model(rows, split):
        return {
            r["measure"]: r["value"]
            for r in rows
            if r["name"] == "model"
            and r["split"] == split
            and not r["measure"].startswith("unique")
        }

    ran = model(read_json(whole[0].path("result.json"))["table"], "runs")
    scored = model(read_json(tmp_path / "score.json")["table"], "new")
    assert set(scored) <= set(ran)
    np.testing.assert_allclose([ran[m] for m in scored], list(scored.values()), atol=1e-6)


@pytest.mark.parametrize("kind", ["report", "compare"])
def test_pages(whole, command, tmp_path, kind):
    "A page is one file, with the run's numbers and pictures in it, and asks no other server for anything."
    code, out, _ = command(
        kind, "whole", *(["whole"] if kind == "compare" else []), "-o", tmp_path / "page.html"
    )
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert code == 0
    assert "page.html" in out
    assert "line exact, free-running" in page
    assert "data:image/png;base64," in page
    assert not re.findall(
        r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:http|//)[^>]*>|url\(["\']?(?:http|//)[^)]*\)|@import[^;]*;',
        page,
    )
    assert "Traceback (most" not in page


def test_options_of_every_fit(whole, command):
    "Options without a line in the cell reach the fit; the command tells them apart from the experiment's own."
    run, _ = whole
    assert run.path("checkpoints", "fold-0", "best.safetensors").exists()
    code, out, _ = command("parameters", "fingerprint")
    own, _, shared = out.partition("\noptions shared by all fits\n")
    assert code == 0
    assert "d_model = " in own
    assert "schedule = " in own
    assert "averaging = " in shared
    assert "tracking = " in shared
    assert "run_dir" not in out
    assert "checkpoint_folder" not in out


@pytest.mark.parametrize("name", ["whole", "killed"])
def test_tracker_is_told(whole, runs, name):
    "TensorBoard has each epoch of the fit once, killed or not, the parameters and the pictures."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = find_run(name, runs)
    history = pd.read_csv(run.path("history.csv"))
    events = EventAccumulator(
        str(run.path("tracking", "tensorboard")), dict(scalars=0, histograms=0, images=0)
    ).Reload()
    told = events.Scalars("fold-0/valid_loss")
    assert [e.step for e in told] == history.epoch.tolist()
    np.testing.assert_allclose([e.value for e in told], history.valid_loss, rtol=1e-6)
    assert {"history", "lines", "operation"} <= set(events.Tags()["images"])
    assert any(k.startswith("fold-0/gradients/") for k in events.Tags()["histograms"])


def test_processes(command, runs, recordings):
    "Two processes with the batches of one give its loss curve, but for what is drawn at random in each; half the batch gives another."
    from gcode_ml.fingerprint.recipe import recipe
    from gcode_ml.training.callbacks import epoch_table
    from gcode_ml.training.fit import fit

    pytest.importorskip("accelerate")
    sizes = dict(
        folds=2,
        window=48,
        stride=32,
        d_model=8,
        nhead=1,
        num_layers=1,
        encoder_layers=1,
        dim_feedforward=8,
        dropout=0.0,
        max_epochs=3,
        learning_rate=0.01,
        seed=7,
        device="cpu",
    )
    assert (
        command(
            "run",
            "fingerprint",
            "--name",
            "two",
            "--processes",
            2,
            *(
                w
                for k, v in dict(
                    sizes, data=recordings, test_folds=1, leaky="no", baselines="no", batch_size=8
                ).items()
                for w in ("-p", f"{k}={v}")
            ),
        )[0]
        == 0
    )
    run = find_run("two", runs)
    two = pd.read_csv(run.path("history.csv")).valid_loss

    def alone(batch_size):
        learn = recipe(recordings, **sizes, batch_size=batch_size)
        with learn.no_bar(), learn.no_logging():
            fit(learn)
        return epoch_table(learn).valid_loss

    np.testing.assert_allclose(two, alone(8), rtol=0.01)
    assert (two - alone(4)).abs().max() > 0.05 * two.max()
    assert read_json(run.path("result.json"))["parameters"]["processes"] == 2
    assert [*run.path("processes", "fold-0").glob("process_1.log")]


def test_processes_refused(command):
    "What several processes cannot do is said before they start."
    words = (
        "run",
        "fingerprint",
        "--processes",
        2,
        "-p",
        "max_epochs=1",
        "-p",
        "test_folds=1",
        "-p",
        "d_model=8",
        "-p",
        "nhead=1",
    )
    code, _, err = command(*words, "-p", "averaging=ema")
    assert code == 2
    assert "parameter: averaging: expected its default with several processes" in err


def test_simulate(command, tmp_path):
    "Simulated data of a domain, the same for the same seed; bad words end in a sentence."
    for name in "ab":
        assert (
            command(
                "simulate", "fingerprint", "-o", tmp_path / name, "-p", "runs=1", "-p", "seed=3"
            )[0]
            == 0
        )
    files = sorted((tmp_path / "a").rglob("*.parquet"))
    assert len(files) == 5
    assert all(
        f.read_bytes() == (tmp_path / "b" / f.relative_to(tmp_path / "a")).read_bytes()
        for f in files
    )
    for words, part in (
        (("weather", "-o", tmp_path), "simulate: target: expected one of"),
        (("fingerprint",), "--output: expected a folder"),
        (
            ("fingerprint", "-o", tmp_path, "-p", "machines=2"),
            "machines: expected one of runs, seed, operations",
        ),
        (("fingerprint", "-o", tmp_path, "-p", "runs=many"), "runs: expected int such as 4"),
    ):
        code, _, err = command("simulate", *words)
        assert code == 2
        assert part in err


def test_help_is_grouped(command):
    "Each command once, under its group."
    code, out, _ = command("--help")
    assert code == 0
    assert all(f"\n{group}:\n" in out for group in ("experiments", "results", "models", "data"))
    assert all(
        len(re.findall(rf"^  {c} ", out, re.M)) == 1
        for c in ("run", "simulate", "predict", "report")
    )
