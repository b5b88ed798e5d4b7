"The copy of all recordings in one parquet file against the separate files; clock texts."

import numpy as np
import pandas as pd
import pytest

from gcode_ml.core.errors import InputError
from gcode_ml.fingerprint.data import (
    elapsed_seconds,
    read_recordings,
    recording_files,
    stored_recordings,
)
from gcode_ml.fingerprint.recipe import load_recordings
from gcode_ml.fingerprint.simulate import simulate_recordings
from gcode_ml.lab.settings import data_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return simulate_recordings(tmp_path_factory.mktemp("runs"), runs=2, seed=0)


@pytest.fixture
def folder(source, tmp_path):
    "A fresh folder with four recordings for each test."
    (tmp_path / "runs").mkdir()
    for f in recording_files(source)[::2][:4]:
        (tmp_path / "runs" / f.name).write_bytes(f.read_bytes())
    return tmp_path / "runs"


def same(a, b, types=True):
    "Assert that two lists of recordings are equal in all fields."
    assert [(r.name, r.operation, r.channels, list(r.controller)) for r in a] == [
        (r.name, r.operation, r.channels, list(r.controller)) for r in b
    ]
    for x, y in zip(a, b):
        for k in ("time", "lines", "texts", "sensors"):
            u = getattr(x, k)
            v = getattr(y, k)
            assert u.dtype == v.dtype, (x.name, k)
            assert u.shape == v.shape, (x.name, k)
            assert (u == v).all(), (x.name, k)
        pd.testing.assert_frame_equal(x.controller, y.controller, check_dtype=types)


def test_copy_equals_the_files(folder, tmp_path):
    for _ in range(2):
        same(read_recordings(folder, cache=tmp_path / "copy"), read_recordings(folder))
    assert len(list((tmp_path / "copy").iterdir())) == 1
    recordings, facts = load_recordings(folder, cache=tmp_path / "copy")
    same(recordings, read_recordings(folder))
    assert facts == load_recordings(folder)[1]


def test_any_change_of_the_files_is_noticed(folder, tmp_path):
    cache = tmp_path / "copy"
    files = recording_files(folder)
    before = read_recordings(folder, cache=cache)
    table = pd.read_parquet(files[0])
    changed = table.assign(
        x_motor=table.x_motor + np.where(np.arange(len(table)) == 60, 1, 0).astype("float32")
    )
    changed.to_parquet(files[0])
    after = read_recordings(folder, cache=cache)
    same(after, read_recordings(folder))
    assert (after[0].sensors != before[0].sensors).sum() == 1
    files[1].rename(files[1].with_name("face_077.parquet"))
    assert "face_077" in [r.name for r in read_recordings(folder, cache=cache)]
    files[2].unlink()
    assert len(read_recordings(folder, cache=cache)) == 3
    broken = table.copy()
    broken.loc[50, "x_motor"] = np.nan
    broken.to_parquet(files[0])
    with pytest.raises(InputError, match="column x_motor"):
        read_recordings(folder, cache=cache)


def test_missing_boards_and_columns_stay_missing(folder, tmp_path):
    files = recording_files(folder)
    table = pd.read_parquet(files[1])
    table.drop(columns=[c for c in table if c.startswith("frame_l2")] + ["coor"]).to_parquet(
        files[1]
    )
    pd.read_parquet(files[2]).astype({"stat": "int64", "momo": "float64"}).to_parquet(files[2])
    files[3].unlink()
    pd.read_parquet(files[0]).to_csv(folder / "adaptive_099_aligned.csv", index=False)
    copy = [read_recordings(folder, cache=tmp_path / "copy") for _ in range(2)][1]
    same(copy, read_recordings(folder), types=False)
    short = next(r for r in copy if r.name == files[1].stem)
    assert not any(c.startswith("frame_l2") for c in short.channels)
    assert "coor" not in short.controller


def test_warnings_are_repeated_and_a_broken_copy_is_rebuilt(folder, tmp_path, warnings_of):
    files = recording_files(folder)
    cache = tmp_path / "copy"
    table = pd.read_parquet(files[0])
    sensors = [c for c in table if "." in c or "_motor" in c or c.startswith("spindle")]
    table[sensors] = table[sensors].iloc[0].to_numpy()
    table.to_parquet(files[0])
    found, messages = warnings_of(read_recordings, folder, cache=cache)
    again, once_more = warnings_of(read_recordings, folder, cache=cache)
    same(found, again)
    assert len(found) == 3
    assert messages == once_more
    assert any("the same values in all" in m for m in messages)
    copy = next(cache.iterdir())
    copy.write_bytes(copy.read_bytes()[:5000])
    same(warnings_of(read_recordings, folder, cache=cache)[0], found)
    assert len(stored_recordings(copy)[0]) == 3


def test_cache_inside_the_recordings_is_refused(folder):
    with pytest.raises(
        InputError, match="expected a folder outside of the recordings, found one inside"
    ):
        read_recordings(folder, cache=folder / "copy")


@pytest.mark.parametrize(
    "clock", [["12:00:00.5", "12:00"], ["12:00:00", "x:00:01"], [""], ["nan:00:01"], [None]]
)
def test_invalid_clock_texts_are_refused(clock):
    with pytest.raises(InputError, match="HH:MM:SS.mmm"):
        elapsed_seconds(clock, "run")


def test_elapsed_seconds_of_random_times():
    random = np.random.default_rng(0)
    seconds = np.cumsum(random.uniform(0, 2000, 200)).round(3)
    texts = [f"{int(s // 3600) % 24:02d}:{int(s // 60) % 60:02d}:{s % 60:06.3f}" for s in seconds]
    np.testing.assert_allclose(elapsed_seconds(texts), seconds - seconds[0], atol=2e-3)


@pytest.mark.skipif(
    data_folder("cnc_fingerprint") is None, reason="no recordings in the data folder"
)
def test_copy_of_real_recordings(tmp_path, warnings_of):
    "A twelfth of them, and those with faults: one partly without sensors, two frozen."
    (tmp_path / "runs").mkdir()
    files = recording_files(data_folder("cnc_fingerprint"))
    for f in {
        *files[::12],
        *(f for f in files if f.stem in ("face150025_001", "face150025_009", "pocket150025_006")),
    }:
        (tmp_path / "runs" / f.name).symlink_to(f)
    runs = tmp_path / "runs"
    plain, messages = warnings_of(read_recordings, runs)
    warnings_of(read_recordings, runs, cache=tmp_path / "copy")
    copy, again = warnings_of(read_recordings, runs, cache=tmp_path / "copy")
    same(plain, copy, types=False)
    assert messages == again
    assert len(messages) == 2
    assert len(copy) > 8
