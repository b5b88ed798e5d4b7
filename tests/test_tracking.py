"What a run tells TensorBoard, MLflow and Weights & Biases can be read back with their own readers, is continued after an interruption, and reaches no network."

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pandas as pd
import pytest
from fastai.callback.core import Callback
from fastai.metrics import accuracy
from matplotlib.figure import Figure

from gcode_ml.core.files import read_json
from gcode_ml.lab.snapshot import Snapshot
from gcode_ml.lab.tracking import TRACKERS, Tracking, tracker
from gcode_ml.training.callbacks import History
from gcode_ml.training.tiny import tiny_learner

EPOCHS, EVERY = 4, 5  # six batches an epoch
PARAMETERS = dict(learning_rate=0.01, model="tiny", deep=True, sizes=[1, 2])
TOOLS = [name for name in TRACKERS if name != "none"]


class PowerCut(Callback):
    order = 2000

    def __init__(self, at, kill):
        self.due = lambda now: (
            now == at and (kill and os.kill(os.getpid(), signal.SIGKILL) or True)
        )  # a function, so that no snapshot keeps it

    def after_batch(self):
        if self.training and self.due((self.epoch, self.iter)):
            raise SystemError("power cut")


def fit(folder, name, cut=None, kill=False):
    "A tracked fit of a run; the snapshot is always some batches behind a power cut, so that batches are repeated."
    writer = tracker(name, folder, PARAMETERS, "tests")
    cbs = [
        History(folder / "history.csv"),
        Snapshot(folder / "snapshot" / "fit.safetensors", seconds=1e9),
        Tracking(writer, EVERY, "fold-0"),
    ]
    learn = tiny_learner(metrics=accuracy, cbs=cbs + ([PowerCut(cut, kill)] if cut else []))
    with learn.no_bar(), learn.no_logging():
        learn.fit(EPOCHS)
    return writer


def picture():
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])
    return figure


def fit_and_die(folder, name, begun):
    fit(folder, name, (1, 4), kill=True)


def fitted(fork, home, name):
    "A run that was cut twice, by SIGKILL and by an error; returns its folder."
    folder = home / "runs" / "tiny" / "cut"
    assert fork.finish(fit_and_die, folder, name) == -9
    with pytest.raises(SystemError):
        fit(folder, name, (2, 5))  # in the last batch of an epoch, after a gradient was told
    writer = fit(folder, name)
    writer.figures({"fold-0/line": picture()}, 3)
    writer.close()
    return folder


def read_tensorboard(folder):
    "Steps and values of the scalars, steps and numbers of the histograms, steps of the pictures, parameters."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(
        str(folder / "tracking" / "tensorboard"), dict(scalars=0, histograms=0, images=0)
    ).Reload()
    start = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info.hparams
    parameters = {k: getattr(v, v.WhichOneof("kind")) for k, v in start.items()}
    return (
        {k: [(e.step, e.value) for e in events.Scalars(k)] for k in events.Tags()["scalars"]},
        {k: [e.step for e in events.Histograms(k)] for k in events.Tags()["histograms"]},
        {k: [e.step for e in events.Images(k)] for k in events.Tags()["images"]},
        parameters,
    )


def read_mlflow(folder):
    from mlflow import MlflowClient

    runs = folder.parents[1]
    client = MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")
    (run,) = client.search_runs(
        [client.get_experiment_by_name("tests").experiment_id]
    )  # one run, however often it was cut
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny/cut")
    rows = {
        k: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, k)]
        for k in run.data.metrics
    }
    assert all(len({s for s, _ in v}) == len(v) for v in rows.values())
    quantiles = {k: [s for s, _ in v] for k, v in rows.items() if "gradients" in k}
    pictures = {
        f.path: [int(f.path[-8:-4])]
        for f in client.list_artifacts(run.info.run_id, "figures/fold-0")
    }
    assert all(
        (runs / "mlflow" / run.info.run_id / "artifacts" / p).read_bytes().startswith(b"\x89PNG")
        for p in pictures
    )
    return (
        {k: v for k, v in rows.items() if "gradients" not in k},
        {k.removesuffix("/q50"): v for k, v in quantiles.items() if k.endswith("/q50")},
        pictures,
        run.data.params,
    )


def read_wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (file,) = (folder / "tracking" / "wandb").glob(
        "offline-run-*/run-*.wandb"
    )  # one run, however often it was cut
    assert read_json(folder / "tracking" / "weightsandbiases.json")["id"] in file.name
    rows, config = [], {}
    store = DataStore()
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            rows.append(row := {})
        for i in record.history.item:  # a picture or a histogram comes in parts
            first, *rest = i.nested_key or [i.key]
            if rest:
                row.setdefault(first, {})[rest[0]] = json.loads(i.value_json)
            else:
                row[first] = json.loads(i.value_json)
        config |= {
            i.key: json.loads(i.value_json)
            for r in (record.config, record.run.config)
            for i in r.update
        }
    assert [r["_step"] for r in rows] == list(range(len(rows)))  # rows are counted through

    def steps(key):
        return [r[key.rpartition("/")[0] + "/step"] for r in rows if key in r]

    scalars = {
        k: list(zip(steps(k), (r[k] for r in rows if k in r)))
        for k in {k for r in rows for k, v in r.items() if isinstance(v, (int, float))}
        if k.startswith("fold-0/") and not k.endswith("/step")
    }

    def kind(name):
        return {
            k: steps(k)
            for k in {
                k
                for r in rows
                for k, v in r.items()
                if isinstance(v, dict) and v.get("_type") == name
            }
        }

    media = {r[k]["path"] for k in kind("image-file") for r in rows if k in r}
    assert media
    assert all((file.parent / "files" / p).is_file() for p in media)
    return (
        scalars,
        kind("histogram"),
        kind("image-file"),
        {k: v for k, v in config.items() if not k.startswith("_")},
    )


READ = dict(tensorboard=read_tensorboard, mlflow=read_mlflow, wandb=read_wandb)


@pytest.mark.xdist_group("tracking")
@pytest.mark.parametrize("name", TOOLS)
def test_read_back(fork, name, tmp_path):
    "A fit that was cut twice has each epoch once, with the values of its history, each gradient once, the picture and the parameters."
    pytest.importorskip(dict(tensorboard="tensorboard", mlflow="mlflow", wandb="wandb")[name])
    folder = fitted(fork, tmp_path, name)
    scalars, histograms, pictures, parameters = READ[name](folder)
    history = pd.read_csv(folder / "history.csv")
    assert sorted(scalars) == [
        f"fold-0/{k}" for k in ("accuracy", "lr", "train_loss", "valid_loss")
    ]
    for k, rows in scalars.items():
        steps, values = zip(*sorted(rows))
        assert steps == tuple(range(EPOCHS))
        np.testing.assert_allclose(values, history[k.removeprefix("fold-0/")], rtol=1e-5)
    assert len(histograms) == 6
    assert all(
        sorted(steps) == list(range(0, 6 * EPOCHS, EVERY)) for k, steps in histograms.items()
    )
    assert all(k.startswith("fold-0/gradients/") for k in histograms)
    assert list(pictures.values()) == [[3]]
    assert {k: str(v) for k, v in parameters.items()} == {k: str(v) for k, v in PARAMETERS.items()}


def test_two_fits_and_two_runs(tmp_path):
    "Two fits of a run have steps of their own; a second run in the same store is another run."
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    for run in "ab":
        writer = tracker("mlflow", tmp_path / "tiny" / run, dict(run=run))
        for part in ("fold-0", "fold-1"):
            for step in range(2):
                writer.scalars({f"{part}/loss": step}, step)
        writer.close()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("gcode_ml").experiment_id])
    assert {r.info.run_name: r.data.params["run"] for r in runs} == {"tiny/a": "a", "tiny/b": "b"}
    assert [
        [m.step for m in client.get_metric_history(r.info.run_id, f"fold-{i}/loss")]
        for r in runs
        for i in (0, 1)
    ] == [[0, 1]] * 4


def run_python(text, **env):
    "Run a small program on its own and return what it prints last."
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_nothing_is_imported_unless_chosen():
    "Without a tool, none of the three is loaded."
    assert (
        run_python("""
        import sys
        from gcode_ml.training.tiny import tiny_learner
        from gcode_ml.lab.tracking import Tracking, tracker
        learn = tiny_learner(cbs=Tracking(tracker(), 1))
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        print(sorted({m.split('.')[0] for m in sys.modules} & {'tensorboard', 'mlflow', 'wandb', 'alembic', 'sqlalchemy'}))
    """)
        == "[]"
    )


class Listener:
    "A proxy and server that answers nobody and counts who calls."

    def __init__(self):
        self.calls = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            connection.settimeout(2)
            try:
                self.calls.append(connection.recv(200))
            except OSError:
                self.calls.append(b"")
            connection.close()


GUARD = """
    import socket, sys
    local = {'127.0.0.1', '::1', 'localhost'}
    connect,lookup = socket.socket.connect,socket.getaddrinfo
    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in local: raise SystemExit(f'connection to {address}')
        return connect(self, address)
    def looked_up(host, *args, **kwargs):
        if host not in (*local, None, ''): raise SystemExit(f'look-up of {host}')
        return lookup(host, *args, **kwargs)
    socket.socket.connect,socket.getaddrinfo = guarded,looked_up
"""


@pytest.mark.xdist_group("tracking")
@pytest.mark.parametrize("name", TOOLS)
def test_no_network(name, tmp_path):
    "Neither Python nor a process that the tool starts calls anybody: not directly, not through the proxies, not its own server."
    pytest.importorskip(dict(tensorboard="tensorboard", mlflow="mlflow", wandb="wandb")[name])
    listener = Listener()
    here = f"http://127.0.0.1:{listener.port}"
    proxies = dict.fromkeys(
        (
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "WANDB_BASE_URL",
            "MLFLOW_TRACKING_URI",
        ),
        here,
    )
    program = (
        GUARD
        + """
    from gcode_ml.lab.tracking import tracker
    writer = tracker(sys.argv[1] if len(sys.argv) > 1 else NAME, FOLDER, dict(seed=1))
    writer.scalars(dict(loss=.5), 0); writer.close()
    print('done')
    """.replace("NAME", repr(name)).replace("FOLDER", repr(str(tmp_path / "runs" / "tiny" / "one")))
    )
    assert (
        run_python(
            program,
            **proxies,
            NO_PROXY="",
            no_proxy="",
            WANDB_MODE="online",
            WANDB_API_KEY="0" * 40,
        )
        == "done"
    )
    assert listener.calls == []
    listener.socket.close()


def test_the_network_would_be_seen():
    "The guard and the listener notice a call."
    listener = Listener()
    with pytest.raises(AssertionError, match="look-up of"):
        run_python(GUARD + "    socket.create_connection(('example.org', 80))")
    run_python(
        """
        import urllib.request
        try: urllib.request.urlopen('http://example.org')
        except OSError: pass
        print('done')
    """,
        http_proxy=f"http://127.0.0.1:{listener.port}",
        no_proxy="",
    )
    assert len(listener.calls) == 1
    listener.socket.close()
