"Files are whole or absent, whatever is killed; and no file makes a reader run its code."

import os
import pickle
import signal
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from gcode_ml.core import files
from gcode_ml.core.files import atomic_path, read_arrays, read_json, write_json
from gcode_ml.fingerprint.data import read_recording, read_sequences, recording_files
from gcode_ml.lab.bundle import load_bundle, save_bundle
from gcode_ml.lab.runs import Run, find_run, new_run, runs_table
from gcode_ml.lab.snapshot import Snapshot
from gcode_ml.training.tiny import TinyClassifier, tiny_learner

SIZE = 100_000


def write_versions(kind, file, begun):
    "Write version after version of a file, each full of its own number."
    torch.set_num_threads(1)
    learn = tiny_learner() if kind == "snapshot" else None
    for version in range(1, 1_000_000):
        if kind == "json":
            write_json(file, [version] * SIZE)
        elif kind == "bytes":
            with atomic_path(file) as f, open(f, "wb") as h:
                for _ in range(40):
                    h.write(np.full(SIZE // 20, version).tobytes())
                    h.flush()
        else:
            learn.model.ballast = torch.nn.Parameter(
                torch.full((SIZE,), float(version)), requires_grad=False
            )
            learn.n_epoch = version
            learn.pct_train = 0.0
            learn.train_iter = 0
            learn.create_opt()
            snapshot = Snapshot(file)
            snapshot.learn, snapshot.epoch_start = learn, {}
            snapshot.save(version, 0)
        begun.set()


def versions(kind, file):
    "Every number in the file, read as its user reads it."
    if kind == "json":
        return np.array(read_json(file))
    if kind == "bytes":
        return np.fromfile(file, int)
    snapshot = Snapshot(file)
    snapshot.learn = learn = tiny_learner()
    learn.n_epoch = int(max(t.max() for t in load_file(file).values() if t.numel() == SIZE))
    snapshot.load()  # refuses another number of epochs than `n_epoch`
    return np.full(SIZE, learn.resume_from[0])


@pytest.mark.parametrize("kind", ["json", "bytes", "snapshot"])
def test_a_whole_version_survives(fork, tmp_path, kind):
    "Twenty kills while versions are written: the file is one of them, and what is left beside it is hidden."
    file = tmp_path / "x.safetensors"
    rng = np.random.default_rng(1)
    for _ in range(20):
        assert fork.kill(write_versions, kind, file, after=rng.uniform(0, 0.05))
        found = versions(kind, file)
        assert len(found) == SIZE * (2 if kind == "bytes" else 1)
        assert found.min() == found.max() > 0
    left = [f.name for f in tmp_path.iterdir() if f != file]
    # some kills came within a write
    assert left
    assert all(n.startswith(".") and "tmp" in n for n in left)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(names, begun):
    "Be killed in the middle of writing several files."
    with ExitStack() as writes:
        for f in [writes.enter_context(atomic_path(n)) for n in names]:
            f.write_bytes(b'{"half')
        die()


def test_no_reader_takes_a_temporary_file(fork, recordings, tmp_path, refused):
    "Recordings, runs, stages and figures that a kill left half written are seen by nobody."
    table = pd.read_parquet(recordings / "face_001.parquet")
    data, runs = tmp_path / "data", tmp_path / "runs"
    data.mkdir()
    table.to_parquet(data / "face_001.parquet")
    run = new_run("fingerprint", {}, "whole", runs)
    run.stage("one", lambda: 1)
    names = [
        data / "face_001.parquet",
        data / "face_002.parquet",
        data / "face_003_aligned.csv",
        runs / "fingerprint" / "half" / "params.json",
        run.path("params.json"),
        run.path("result.json"),
        run.path("stages", "two.json"),
        run.path("figures", "a.png"),
    ]
    assert fork.finish(half_written, names) == -9
    assert len(list(tmp_path.rglob("*.tmp"))) == len(names)
    assert [f.name for f in recording_files(data)] == ["face_001.parquet"]
    assert len(read_recording(data / "face_001.parquet"))
    assert runs_table(runs)[["run", "status"]].values.tolist() == [
        ["fingerprint/whole", "interrupted"]
    ]
    assert "found 0" in refused(find_run, "half", runs)
    assert run.stage("two", lambda: 2) == 2
    assert list(
        run.finish(pd.DataFrame([dict(measure="m", value=1.0)]))["durations"]["stages"]
    ) == ["one", "two"]
    assert (
        new_run("fingerprint", {}, "half", runs).status == "interrupted"
    )  # the name was still free


def test_failed_write_leaves_nothing(tmp_path):
    "An exception within the block, or a value that JSON does not know, leaves the old file and no other."
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    with pytest.raises(KeyError), atomic_path(tmp_path / "a.json") as f:
        f.write_text("half")
        raise KeyError
    assert read_json(tmp_path / "a.json") == 1
    assert len(list(tmp_path.iterdir())) == 1


def finish_killed(folder, begun):
    "Finish a run, but be killed at the moment when `result.json` gets its name."
    run = Run(folder).hold()
    run.stage("fit", lambda: 1)
    files.os.replace = die
    run.finish(pd.DataFrame([dict(measure="m", value=1.0)]))


def test_result_is_the_last_word(fork, tmp_path):
    "A run killed while it finishes is interrupted, not finished, and its lock is free."
    run = new_run("fingerprint", {}, "x", tmp_path)
    assert fork.finish(finish_killed, run.folder) == -9
    assert not run.path("result.json").exists()
    assert run.status == "interrupted"
    result = run.hold().finish(pd.DataFrame([dict(measure="m", value=1.0)]))
    assert run.status == "finished"
    assert read_json(run.path("result.json")) == result
    assert max(run.folder.rglob("*.*"), key=lambda f: f.stat().st_mtime_ns).name == "result.json"


class Hostile:
    "Its pickle makes a file when it is loaded."

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def object_array(*values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


HOSTILE = {
    "x.pt": lambda f, h: torch.save({"weights": h}, f),
    "module.pt": lambda f, h: torch.save([TinyClassifier(), h], f),
    "old.pt": lambda f, h: torch.save({"weights": h}, f, _use_new_zipfile_serialization=False),
    "raw.pt": lambda f, h: f.write_bytes(pickle.dumps(h)),
    "x.npz": lambda f, h: np.savez(f, ok=np.ones(3), x=object_array(h)),
    "raw.npz": lambda f, h: f.write_bytes(pickle.dumps(h)),
    "x.npy": lambda f, h: np.save(f, object_array(h)),
    "raw.npy": lambda f, h: f.write_bytes(pickle.dumps(h)),
    "x.pkl": lambda f, h: f.write_bytes(pickle.dumps(h)),
    "raw.safetensors": lambda f, h: f.write_bytes(pickle.dumps(h)),
}


def test_marker_works(tmp_path):
    "The pickle below does its harm when it is loaded, so its absence means something."
    pickle.loads(pickle.dumps(Hostile(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_pickles_are_refused(tmp_path, refused, name):
    "By the reader of arrays, the reader of windows, a snapshot and a bundle; nothing in them is executed."
    file, marker = tmp_path / name, tmp_path / "marker"
    HOSTILE[name](file, Hostile(marker))
    assert file.name in refused(read_arrays, file)
    assert file.name in refused(read_sequences, file)
    for skip in (True, False):
        with suppress(ValueError):
            read_arrays(file, skip_objects=skip)
    bundle = tmp_path / "bundle"
    tiny_bundle(bundle)
    (bundle / "model.safetensors").write_bytes(file.read_bytes())
    assert "model.safetensors: weights" in refused(load_bundle, bundle)
    (tmp_path / "fit.safetensors").write_bytes(file.read_bytes())
    assert "fit.safetensors: content: expected a snapshot" in refused(
        fit_from, tmp_path / "fit.safetensors"
    )
    assert not marker.exists()


def test_object_arrays_are_left_alone(tmp_path, refused):
    "Windows are read beside an object array, which is not."
    arrays = dict(
        sensor_data=np.ones((2, 3, 4)),
        gcode_tokens=np.ones((2, 5), int),
        metadata=object_array(Hostile(tmp_path / "marker")),
    )
    np.savez(tmp_path / "w.npz", **arrays)
    assert read_sequences(tmp_path / "w.npz").sensors.shape == (2, 3, 4)
    np.savez(tmp_path / "w.npz", **{**arrays, "gcode_tokens": arrays["metadata"]})
    assert "w.npz: arrays" in refused(read_sequences, tmp_path / "w.npz")
    assert not (tmp_path / "marker").exists()


def tiny_bundle(folder):
    save_bundle(
        folder, TinyClassifier(), {}, dict(scale=1), dict(domain="fingerprint", trained_on=["a"])
    )


def fit_from(file):
    "A fit that begins with a snapshot."
    learn = tiny_learner(cbs=Snapshot(file))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)


@pytest.mark.parametrize(
    "change",
    [
        dict(model="os.system"),
        dict(model="builtins.exec"),
        dict(model="gcode_ml.training.tiny.tiny_learner"),
        dict(model="gcode_ml.training.tiny.torch"),
        dict(model="gcode_ml.lab.cli.main"),
        dict(model="gcode_ml.no.models.X"),
        dict(model=7),
        dict(arguments=dict(width=8)),
        dict(arguments=dict(colour=1)),
        dict(arguments=[1]),
        dict(model=None),
    ],
)
def test_bundle_names_a_model_only(tmp_path, refused, change):
    "A bundle that names anything but a model of the package, or arguments that are not that model's, is refused."
    tiny_bundle(tmp_path)
    assert load_bundle(tmp_path).facts["domain"] == "fingerprint"
    about = read_json(tmp_path / "bundle.json")
    write_json(tmp_path / "bundle.json", about | change)
    assert str(tmp_path) in refused(load_bundle, tmp_path)


def whole_files(folder):
    "One whole file of each kind, with its reader."
    x = dict(
        sensor_data=np.random.default_rng(0).standard_normal((4, 8, 3)),
        gcode_tokens=np.ones((4, 5), int),
    )
    np.savez(folder / "w.npz", **x)
    np.savez_compressed(folder / "c.npz", **x)
    np.save(folder / "a.npy", x["sensor_data"])
    tensors = {k: torch.from_numpy(v) for k, v in x.items()}
    save_file(tensors, folder / "t.safetensors")
    torch.save(tensors, folder / "t.pt")
    write_json(folder / "j.json", dict(a=[*range(999)], b="text"))
    fit_from(folder / "fit.safetensors")
    tiny_bundle(folder / "bundle")
    pd.DataFrame(
        dict(t_console="00:00:01", gcode_line=1, gcode_string="G0 X1", x_motor=np.arange(50.0))
    ).to_parquet(folder / "face_001.parquet")
    return [
        (folder / "w.npz", read_sequences),
        (folder / "w.npz", read_arrays),
        (folder / "c.npz", read_arrays),
        (folder / "a.npy", read_arrays),
        (folder / "t.safetensors", read_arrays),
        (folder / "t.pt", read_arrays),
        (folder / "j.json", read_json),
        (folder / "fit.safetensors", fit_from),
        (folder / "face_001.parquet", read_recording),
        (folder / "bundle" / "bundle.json", lambda f: load_bundle(f.parent)),
        (folder / "bundle" / "model.safetensors", lambda f: load_bundle(f.parent)),
    ]


def test_truncated_files_are_refused(tmp_path, refused):
    "Cut off anywhere, a file is told to be broken, by its name and in one sentence."
    for file, read in whole_files(tmp_path):
        whole = file.read_bytes()
        read(file)
        for share in (0, 0.01, 0.3, 0.6, 0.95, 0.998):
            file.write_bytes(whole[: int(share * (len(whole) - 1))])
            sentence = refused(read, file)
            assert file.name in sentence and "\n" not in sentence, (file, share, sentence)
        file.write_bytes(whole)
