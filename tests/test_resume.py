"Killed anywhere and as often as you like, a fit ends in the same weights, bit for bit."

import json
import time
from itertools import count

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.metrics import accuracy
from safetensors.torch import load_file, save_file

from gcode_ml.lab import snapshot
from gcode_ml.lab.snapshot import Snapshot
from gcode_ml.training.callbacks import History
from gcode_ml.training.schedules import schedule
from gcode_ml.training.tiny import TinyClassifier, tiny_learner

EPOCHS, BATCHES, PAUSE = 15, 12, 0.01  # 180 batches: about two seconds


class Witness(Callback):
    "Note the epoch and the batch that a process begins with, and tell the killer when it has done `patience` batches."

    order = 2000

    def __init__(self, *args):
        self.steps = self.witness(*args)  # a generator, so that no snapshot keeps it

    def witness(self, file, patience, begun):
        with open(file, "a") as f:
            f.write(f"{self.epoch} {self.iter}\n")
        for n in count():
            if n == patience:
                begun.set()
            yield time.sleep(PAUSE)

    def before_batch(self):
        if self.training:
            next(self.steps)


def fit(folder, batches, generators, patience, begun):
    "Fit with dropout, shuffling, gradients of two batches a step and a one-cycle schedule; without a snapshot where `batches` is `None`."
    torch.set_num_threads(1)
    if not generators:
        snapshot.set_generator_states = lambda states, dls: None
    kept = (
        []
        if batches is None
        else [Snapshot(folder / "fit.safetensors", seconds=1e9, batches=batches)]
    )
    learn = tiny_learner(
        model=TinyClassifier(dropout=0.3),
        batch_size=8,
        metrics=accuracy,
        cbs=[
            *kept,
            GradientAccumulation(16),
            schedule("one_cycle", 1e-2),
            History(folder / "history.csv"),
            Witness(folder / "begun.txt", patience, begun),
        ],
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(EPOCHS)
    save_file(learn.model.state_dict(), folder / "weights.safetensors")
    (folder / "recorder.json").write_text(
        json.dumps(
            [
                list(map(list, learn.recorder.values)),
                learn.recorder.lrs,
                [l.item() for l in learn.recorder.losses],
            ]
        )
    )


def begun_at(folder):
    return np.loadtxt(folder / "begun.txt", int, ndmin=2)


def killed_often(fork, folder, batches, kills, seed, generators=True):
    "Kill a fit at random moments, all of them before it can be done, and let it go to its end."
    rng = np.random.default_rng(seed)
    folder.mkdir()
    patience = rng.uniform(0.2, 2, kills)
    patience = (0.75 * EPOCHS * BATCHES * patience / patience.sum()).astype(int)
    delays = rng.uniform(0, 3 * PAUSE, kills)
    print(f"{seed=} batches={patience.tolist()} and then seconds={delays.round(3).tolist()}")
    for n, delay in zip(patience.tolist(), delays):
        assert fork.kill(fit, folder, batches, generators, n, after=delay)
    assert fork.finish(fit, folder, batches, generators, -1) == 0
    return folder


@pytest.fixture(scope="module")
def unbroken(fork, tmp_path_factory):
    "A fit that nothing interrupts and that writes no snapshot."
    folder = tmp_path_factory.mktemp("unbroken")
    assert fork.finish(fit, folder, None, True, -1) == 0
    return folder


def same_weights(a, b):
    a, b = (load_file(f / "weights.safetensors") for f in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_same_fit(a, b):
    "Weights, recorded values, learning rates and losses, and the CSV file but for its seconds."
    assert same_weights(a, b)
    assert (a / "recorder.json").read_text() == (b / "recorder.json").read_text()
    a, b = (pd.read_csv(f / "history.csv").drop(columns="seconds") for f in (a, b))
    assert len(a) == EPOCHS
    assert "accuracy" in a
    pd.testing.assert_frame_equal(a, b, check_exact=True)


@pytest.mark.parametrize("batches,seed", [(3, 1), (0, 2)])
def test_ten_kills(fork, unbroken, tmp_path, batches, seed):
    "With snapshots every three batches, and with those after each epoch alone."
    folder = killed_often(fork, tmp_path / "fit", batches, 10, seed)
    begun = begun_at(folder)
    assert len(begun) == 11
    assert begun[-1, 0] > 0
    assert (begun[:, 1] > 0).any() if batches else (begun[:, 1] == 0).all()
    assert_same_fit(folder, unbroken)


def test_generators_matter(fork, unbroken, tmp_path):
    "Without the generators' states the weights differ: the comparison above can fail."
    folder = killed_often(fork, tmp_path / "fit", 3, 3, 3, generators=False)
    assert begun_at(folder)[-1].sum() > 0
    assert not same_weights(folder, unbroken)


def test_killed_after_the_last_epoch(fork, unbroken, tmp_path):
    "A fit that was done but for its end has its weights and records all the same."
    assert fork.finish(fit, tmp_path, 3, True, -1) == 0
    for f in ("weights.safetensors", "recorder.json"):
        (tmp_path / f).unlink()
    assert fork.finish(fit, tmp_path, 3, True, -1) == 0
    assert len(begun_at(tmp_path)) == 1  # the second process had no batch left
    assert_same_fit(tmp_path, unbroken)


def test_other_number_of_epochs(tmp_path, refused):
    "A snapshot of a longer fit is not taken for one of a shorter."

    def fit(epochs):
        learn = tiny_learner(cbs=Snapshot(tmp_path / "fit.safetensors"))
        with learn.no_bar(), learn.no_logging():
            learn.fit(epochs)

    fit(1)
    assert "n_epoch: expected 2, found 1" in refused(fit, 2)
