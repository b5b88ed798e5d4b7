"Two processes fit as one does with batches twice as large; a process that dies or hangs ends the run with a sentence, and the fit goes on from its snapshot bit for bit."

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from fastai.callback.core import Callback
from fastai.metrics import accuracy
from safetensors.torch import load_file, save_file

from gcode_ml.data.batch import BatchLoader
from gcode_ml.training.callbacks import epoch_table
from gcode_ml.training.learner import set_seed
from gcode_ml.training.tiny import TinyClassifier, TinySequences, tiny_learner

pytest.importorskip("accelerate")
pytestmark = pytest.mark.xdist_group("distributed")
from gcode_ml.lab import distributed
from gcode_ml.lab.cli import main
from gcode_ml.lab.distributed import BatchShare, SharedSnapshot, fit_processes

EPOCHS = 4

# What the processes are told by name.


def plain(batch_size=7):
    return tiny_learner(batch_size=batch_size, metrics=accuracy)


def dropout():
    set_seed(0)
    return tiny_learner(batch_size=8, model=TinyClassifier(dropout=0.3))


class Keep(Callback):
    "Keep the items that a process trains on in each epoch, and its last weights."

    order = 1500

    def __init__(self, folder):
        self.seen = lambda text: (
            (Path(folder) / f"seen_{os.environ['RANK']}.txt").open("a").write(text)
        )
        self.folder = folder

    def after_batch(self):
        if self.training:
            self.seen("".join(f"{self.epoch} {x.double().sum():.6f}\n" for x in self.xb[0]))

    def after_fit(self):
        save_file(
            {k.removeprefix("module."): v for k, v in self.model.state_dict().items()},
            Path(self.folder) / f"weights_{os.environ['RANK']}.safetensors",
        )


class Stop(Callback):
    "Kill the second process, or let it sleep, in the middle of the third epoch; only once."

    order = 1600

    def __init__(self, folder, sleep=False):
        self.act = lambda: self.stop(Path(folder), sleep)

    def after_batch(self):
        if self.training and os.environ["RANK"] == "1" and (self.epoch, self.iter) == (2, 3):
            self.act()

    def stop(self, folder, sleep):
        if (folder / "stopped").exists():
            return
        (folder / "stopped").touch()
        if sleep:
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def fit(tmp_path, monkeypatch):
    "Fit a recipe of this file on two processes."
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    )

    def call(recipe, name="fit", callbacks=(), **kwargs):
        return fit_processes(
            f"test_distributed.{recipe}",
            {},
            EPOCHS,
            tmp_path,
            name,
            callbacks=[
                (f"test_distributed.{c.__name__}", dict(folder=str(tmp_path), **values))
                for c, values in callbacks
            ],
            **kwargs,
        )

    return call


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("bucket", [0, 2])
def test_shares(processes, bucket):
    "The batches of all processes together are those of one loader with larger batches, sorted by length or not; items of the beginning fill the last one."

    def loader(batch_size):
        return BatchLoader(
            TinySequences(46, seed=3), batch_size, shuffle=True, bucket=bucket, seed=1
        )

    whole = loader(4 * processes).get_idxs()
    shares = [BatchShare(loader(4), rank=r, world_size=processes) for r in range(processes)]
    index = [s.get_idxs() for s in shares]
    assert {len(i) for i in index} == {-(-46 // processes)}
    assert {len(s) for s in shares} == {-(-46 // (4 * processes))}
    together = [j for k in range(0, len(index[0]), 4) for i in index for j in i[k : k + 4]]
    assert together[:46] == whole
    assert together[46:] == whole[: len(together) - 46]


def test_drop_last():
    "Without the last batch where it is short, in all processes alike."
    shares = [
        BatchShare(BatchLoader(TinySequences(21), 4, drop_last=True), rank=r, world_size=2)
        for r in (0, 1)
    ]
    assert [[len(y) for *_, y in s] for s in shares] == [[4, 4]] * 2
    assert [len(s) for s in shares] == [2, 2]


def test_same_curve(fit, tmp_path):
    "Losses, accuracies and weights of two processes are those of one with batches twice as large; each sees its own half, and both end in the same weights."
    weights = fit("plain", callbacks=[(Keep, {})])
    alone = plain(14)
    with alone.no_bar(), alone.no_logging():
        alone.fit(EPOCHS)
    history = pd.read_csv(tmp_path / "history.csv")
    expected = epoch_table(alone)
    assert expected.valid_loss.iloc[-1] < 0.8 * expected.valid_loss.iloc[0]  # it does learn
    for column in ("train_loss", "valid_loss", "accuracy"):
        np.testing.assert_allclose(history[column], expected[column], rtol=1e-4)
    kept = [load_file(tmp_path / f"weights_{r}.safetensors") for r in (0, 1)]
    assert all(torch.equal(kept[0][k], kept[1][k]) for k in kept[0])
    for k, v in load_file(weights).items():
        assert torch.equal(v, kept[0][k])
        assert torch.allclose(v, alone.model.state_dict()[k], atol=1e-4)
    seen = [
        pd.read_csv(tmp_path / f"seen_{r}.txt", sep=" ", names=["epoch", "item"]) for r in (0, 1)
    ]
    for epoch in range(EPOCHS):
        a, b = (set(s[s.epoch == epoch].item) for s in seen)
        assert len(a) == len(b) == 48
        assert not a & b


def test_dead_process(fit, tmp_path, monkeypatch, capsys):
    "A killed process ends the command at once with exit code 1 and a sentence; the fit goes on in the same weights, dropout included."
    unbroken = load_file(fit("dropout", "unbroken", snapshot_batches=2))
    began = time.time()
    monkeypatch.setattr(
        "gcode_ml.lab.experiment.run_experiment",
        lambda *args: fit("dropout", "killed", [(Stop, {})], snapshot_batches=2),
    )
    assert main(["run", "tiny"]) == 1
    assert (
        "gcode_ml: process 1 of 2 was killed by signal 9; the others were stopped"
        in capsys.readouterr().err
    )
    assert time.time() - began < 120  # not the ten minutes that the others would wait
    continued = load_file(fit("dropout", "killed", [(Stop, {})], snapshot_batches=2))
    assert all(torch.equal(continued[k], unbroken[k]) for k in unbroken)
    history = pd.read_csv(tmp_path / "history.csv").drop(columns="seconds")
    a, b = (
        history[history.fit == f].drop(columns="fit").reset_index(drop=True)
        for f in ("unbroken", "killed")
    )
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_other_number_of_processes(monkeypatch, refused):
    "A snapshot of two processes is not taken for one of a single process, nor one of a plain fit."
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    snapshot = SharedSnapshot("fit.safetensors")
    assert "processes: expected 2, as before the interruption, found 1" in refused(
        snapshot._restore, dict(state=dict(everyone={"list": [{"dict": []}] * 2})), {}, True
    )
    assert "found 1" in refused(snapshot._restore, dict(state={}), {}, True)


def test_hanging_process(fit, tmp_path):
    "A process that does not answer is waited for no longer than the time-out."
    began = time.time()
    with pytest.raises(
        RuntimeError, match="process 0 of 2 failed with .*; the others were stopped"
    ):
        fit("plain", callbacks=[(Stop, dict(sleep=True))], timeout=5)
    assert (tmp_path / "stopped").exists()
    assert time.time() - began < 120


def test_bad_parameter(tmp_path, refused):
    "What a recipe refuses comes back as the same sentence."
    assert "d_model: expected an even number" in refused(
        fit_processes,
        "gcode_ml.fingerprint.recipe.recipe",
        dict(d_model=3),
        1,
        tmp_path,
        processes=1,
    )
    assert "expected cpu or cuda for several processes, found mps" in refused(
        distributed._join, SimpleNamespace(dls=SimpleNamespace(device="mps")), tmp_path, 0, 2, 1
    )


def test_orphans_end(tmp_path):
    "The processes end with the one that started them, even when that is killed."
    program = f"from gcode_ml.lab.distributed import fit_processes; fit_processes('gcode_ml.training.tiny.tiny_learner', {{}}, 100000, {str(tmp_path)!r})"
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        began = time.time()
        while not (tmp_path / "history.csv").exists() and time.time() - began < 60:
            time.sleep(0.1)
        children = psutil.Process(parent.pid).children()
        assert len(children) == 2
    finally:
        parent.kill()
        parent.wait()
    assert psutil.wait_procs(children, timeout=5)[1] == []
