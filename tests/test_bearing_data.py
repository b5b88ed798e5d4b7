"Records of bearings: what is refused, what is warned of, and windows that are what they say."

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.io import savemat

from gcode_ml.bearing.data import (
    BEARINGS,
    FAULTS,
    Geometry,
    Record,
    RecordWindows,
    check,
    check_record,
    comb_score,
    fault_name,
    low_pass,
    plausibility_warnings,
    read_cwru,
    read_labels,
    read_records,
    split_folds,
    split_windows,
    write_records,
)
from gcode_ml.bearing.simulate import rolling_record, rolling_set


@pytest.fixture(scope="module")
def records():
    return rolling_set(seconds=0.5, snr=0.0)


@pytest.fixture
def folder(tmp_path, records):
    "A folder of labelled records; its table can be changed by `folder.edit(column, value)`."
    write_records(tmp_path, records[:6])
    return tmp_path


def edit(folder, **columns):
    "Change the first row of the table."
    table = pd.read_csv(folder / "labels.csv", dtype=dict(diameter=str, load=str))
    for k, v in columns.items():
        table[k] = table[k].astype(object) if k in table else None
        table.loc[0, k] = v
    table.to_csv(folder / "labels.csv", index=False)


def said(function, *args):
    "What a call warns of."
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        function(*args)
    return [str(x.message) for x in w]


def test_orders_of_published_bearings():
    "Balls pass both races once a turn together; the ball's rate is that of a rolling contact."
    g = BEARINGS["6205"]
    outer, inner, ball, cage = g.orders
    np.testing.assert_allclose(
        [outer, inner, cage, ball], [3.5848, 5.4152, 0.39828, 4.7135], atol=1e-4
    )
    assert outer + inner == pytest.approx(g.balls)
    assert outer == pytest.approx(g.balls * cage)
    assert Geometry(9, 1, 5, 60).orders[0] > Geometry(9, 1, 5, 0).orders[0]


@pytest.mark.parametrize(
    "column,value,words",
    [
        ("rpm", "", "rpm of"),
        ("fs", "", "fs of"),
        ("rpm", 0, "rpm: expected a positive number"),
        ("fs", -1, "fs: expected a positive number"),
        ("fault", "gear", "one of outer, inner, ball"),
        ("rpm", "fast", "rpm of"),
        ("file", "nowhere.npy", "nothing there"),
        ("file", "../x.npy", "inside the folder"),
        ("file", "a.pickle", "file type"),
        ("balls", 9, None),
    ],
)
def test_bad_rows(folder, refused, column, value, words):
    "One sentence for each fault of a row; an incomplete geometry is no geometry, not an error."
    edit(folder, **{column: value if value != "" else np.nan})
    if words is None:
        assert len(read_records(folder)) == 6
        return
    assert words in refused(read_records, folder)
    assert sum(words in s for s in check(folder)) == 1


def test_bad_tables(folder, refused):
    table = pd.read_csv(folder / "labels.csv")
    table.drop(columns="fs").to_csv(folder / "labels.csv", index=False)
    assert "column fs" in refused(read_labels, folder)
    pd.concat([table, table]).to_csv(folder / "labels.csv", index=False)
    assert "each file once" in refused(read_labels, folder)
    table[:0].to_csv(folder / "labels.csv", index=False)
    assert "at least one record" in refused(read_labels, folder)
    (folder / "labels.csv").write_bytes(b"\xff\x00")
    assert "table" in refused(read_labels, folder)


@pytest.mark.parametrize(
    "signal,words",
    [
        (np.zeros(100), "the same value 0"),
        (np.full(100, 3.0), "the same value 3"),
        (np.r_[np.ones(9), np.nan], "nan at sample 9"),
        (np.r_[1.0, np.inf], "inf at sample 1"),
        (np.zeros((0,)), "one channel"),
        (np.ones((9, 2)), "one channel"),
    ],
)
def test_bad_signals(refused, signal, words):
    assert words in refused(check_record, Record("x", signal, 12000.0, 1800.0))


@pytest.mark.parametrize("suffix", ["csv", "npy", "parquet", "mat"])
def test_every_file_type_reads_the_same(tmp_path, suffix):
    "A record in four file types, with its geometry in numbers, is one record."
    x = rolling_record("inner", seed=3, seconds=0.2).signal
    file = tmp_path / f"r.{suffix}"
    dict(
        csv=lambda: pd.DataFrame(dict(x=x)).to_csv(file, index=False),
        npy=lambda: np.save(file, x),
        parquet=lambda: pd.DataFrame(dict(x=x)).to_parquet(file),
        mat=lambda: savemat(file, dict(x=x[:, None])),
    )[suffix]()
    pd.DataFrame(
        [
            dict(
                file=file.name,
                fault="IR",
                diameter="",
                rpm=1740,
                fs=12000,
                balls=9,
                ball_diameter=0.3126,
                pitch_diameter=1.537,
                contact_angle=0,
            )
        ]
    ).to_csv(tmp_path / "labels.csv", index=False)
    (r,) = read_records(tmp_path)
    np.testing.assert_allclose(r.signal, x, rtol=1e-6)
    np.testing.assert_allclose(r.orders, BEARINGS["6205"].orders)
    assert (r.fault, r.bearing) == ("inner", "inner")


def test_time_is_not_taken_for_a_signal(folder):
    "A column that rises evenly, before or behind the samples, in seconds or in samples; by name it is read."
    first = read_records(folder)[0]
    t = np.arange(len(first))
    for name, columns in {
        "a.csv": dict(time=t / first.rate, x=first.signal),
        "b.parquet": dict(number=t, x=first.signal, more=t),
    }.items():
        frame = pd.DataFrame(columns)
        frame.to_csv(folder / name, index=False) if name.endswith("csv") else frame.to_parquet(
            folder / name
        )
        edit(folder, file=name, channel="")
        assert np.allclose(read_records(folder)[0].signal, first.signal, atol=1e-6)
        edit(folder, channel=next(iter(columns)))
        assert (np.diff(read_records(folder)[0].signal) > 0).all()


def test_cwru_files(tmp_path, refused):
    "Variables by record number; nominal speed with a warning; healthy files are resampled, and left out unless asked for."
    x = rolling_record("outer", seed=1, seconds=0.5).signal
    savemat(
        tmp_path / "OR007@6_1_131.mat",
        {"X131_DE_time": x[:, None], "X130_DE_time": x[:9, None], "X131RPM": 1773.0},
    )
    r = read_cwru(tmp_path / "OR007@6_1_131.mat")
    assert (r.fault, r.diameter, r.load, r.rpm, len(r)) == ("outer", "007", "1", 1773.0, len(x))
    savemat(tmp_path / "B014_2_187.mat", {"X187_DE_time": x[:, None]})
    assert any("nominal 1750" in w for w in said(read_cwru, tmp_path / "B014_2_187.mat"))
    savemat(
        tmp_path / "normal_0_97.mat", {"X097_DE_time": np.repeat(x, 4)[:, None], "X097RPM": 1796.0}
    )
    assert len(read_cwru(tmp_path / "normal_0_97.mat")) == len(x)
    assert len(read_records(tmp_path)) == 2
    assert len(read_records(tmp_path, healthy=True)) == 3
    savemat(tmp_path / "IR007_0_105.mat", {"X106_DE_time": x})
    assert "X105_DE_time" in refused(read_cwru, tmp_path / "IR007_0_105.mat")
    assert "X106_DE_time" in refused(read_cwru, tmp_path / "IR007_0_105.mat")
    (tmp_path / "IR007_0_105.mat").write_bytes(
        b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(999)
    )
    assert "7.3" in refused(read_cwru, tmp_path / "IR007_0_105.mat")
    (tmp_path / "IR007_0_105.mat").write_bytes(b"junk")
    assert "whole MATLAB file" in refused(read_cwru, tmp_path / "IR007_0_105.mat")
    assert "file name" in refused(read_cwru, tmp_path / "x.mat")


def test_no_data(tmp_path, refused):
    assert "nothing there" in refused(read_records, tmp_path / "no")
    assert "neither" in refused(read_records, tmp_path)


def shaft_lines(rate, seconds=2.0, seed=0):
    t = np.arange(int(rate * seconds)) / rate
    random = np.random.default_rng(seed)
    return sum(
        np.sin(2 * np.pi * 29 * k * t + k) / k for k in range(1, 9)
    ) + 0.2 * random.standard_normal(len(t))


@pytest.mark.parametrize("true,declared", [(48000, 12000), (12000, 48000), (24000, 12000)])
def test_wrong_rate_is_doubted(true, declared):
    "The comb of the shaft tells a wrong sampling rate, with both scores; the right one raises no warning."
    x = shaft_lines(true)
    assert plausibility_warnings(Record("right", x, true, 1740.0)) == []
    (warning,) = plausibility_warnings(Record("wrong", x, declared, 1740.0))
    assert f"fit {true} Hz better than {declared} Hz" in warning
    assert "comb scores" in warning
    assert comb_score(x, true, 1740.0) > comb_score(x, declared, 1740.0) + 1


def test_plausibility_warnings_name_clipping_speed_in_hz_and_noise():
    x = shaft_lines(12000)
    assert "clipped" in plausibility_warnings(Record("x", x.clip(-1, 1), 12000.0, 1740.0))[0]
    assert (
        "is it Hz"
        in plausibility_warnings(Record("x", x, 12000.0, 29.0, orders=BEARINGS["6205"].orders))[0]
    )
    assert (
        plausibility_warnings(
            Record("noise", np.random.default_rng(0).standard_normal(12000), 12000.0, 1740.0)
        )
        == []
    )


def test_windows_are_views_and_standardised(records):
    "No window holds samples of two records; each has mean 0 and deviation 1; the table of samples is held once."
    w = RecordWindows(records, 2000)
    assert len(w) == sum(len(r) // 2000 for r in records)
    assert len(w.windows.table.values) == sum(map(len, records))
    inputs, mask, labels = w.batch(range(len(w)))
    x = inputs["signal"][..., 0]
    assert mask.all()
    assert x.mean(1).abs().max() < 1e-5
    assert (x.std(1, correction=0) - 1).abs().max() < 1e-4
    r = records[w.record[7]]
    part = r.signal[w.start[7] : w.start[7] + 2000]
    np.testing.assert_allclose(x[7], (part - part.mean()) / part.std(), atol=1e-4)
    assert [w.classes[i] for i in labels] == [records[i].fault for i in w.record]


def test_gain_and_offset_do_not_matter(records):
    "Amplitude tells the recording, not the fault: it is gone."
    other = [
        Record(
            r.name, 7 * r.signal + 3, r.rate, r.rpm, r.fault, r.diameter, r.load, orders=r.orders
        )
        for r in records[:3]
    ]
    a, b = (RecordWindows(rs, 2000).batch([0, 3])[0]["signal"] for rs in (records[:3], other))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_short_and_still_windows(records, refused):
    assert "at least a window of 99999 samples, found 6000" in refused(
        RecordWindows, records, 99999
    )
    still = Record(
        "still",
        np.r_[np.random.default_rng(0).standard_normal(1000), np.zeros(1000)],
        12000.0,
        1800.0,
        "ball",
    )
    assert "window at sample 1000" in refused(RecordWindows([still], 1000).batch, [0, 1])
    short = RecordWindows(
        [
            records[0],
            Record(
                "short", records[1].signal[:900], 12000.0, 1800.0, "ball", orders=records[1].orders
            ),
        ],
        2000,
        partial=True,
    )
    mask = short.batch([len(short) - 1, 0])[1]
    assert mask.sum(1).tolist() == [900, 2000]


def test_splits_keep_bearings_apart(records):
    "No bearing on both sides of the honest split, in any fold and any inner fold; each bearing is tested once."
    w = RecordWindows(records, 2000)
    tested = []
    for fold in range(split_folds(w)):
        train, valid, test = split_windows(w, "bearing", fold)
        assert not {*w.bearings[train]} & {*w.bearings[test]}
        assert {*valid} <= {*train}
        for inner in range(2):
            train, valid, again = split_windows(w, "bearing", fold, inner=inner)
            assert len({*w.diameters[train]} | {*w.diameters[valid]} | {*w.diameters[again]}) == 3
            assert not {*w.diameters[train]} & {*w.diameters[valid]}
        tested += [*test]
    assert sorted(tested) == list(range(len(w)))


def test_splits_refuse(records, refused):
    "One class, one size, one load, a bearing of two sizes, an unknown split."
    w = RecordWindows([r for r in records if r.fault == "ball"], 2000)
    assert "two or more classes" in refused(split_windows, w)
    w = RecordWindows([r for r in records if r.diameter == "007"], 2000)
    assert "two or more classes" in refused(
        split_windows,
        RecordWindows(
            [
                Record(r.name, r.signal, r.rate, r.rpm, r.fault, orders=r.orders, bearing=r.fault)
                for r in records
                if r.fault != "ball"
            ],
            2000,
        ),
    )
    w = RecordWindows([r for r in records if r.load == "0"], 2000)
    assert "loads" in refused(split_windows, w, "load")
    w = RecordWindows(records, 2000)
    assert "one of bearing, load, leak" in refused(split_windows, w, "random")
    assert "0 to 2" in refused(split_windows, w, "bearing", 5)
    same = [
        Record(r.name, r.signal, r.rate, r.rpm, r.fault, r.diameter, r.load, "one", r.orders)
        for r in records
    ]
    assert "one on both sides" in refused(split_windows, RecordWindows(same, 2000))


def test_low_pass():
    "What is above the limit is gone, what is below stays."
    t = np.arange(12000) / 12000
    low = np.sin(2 * np.pi * 100 * t)
    high = np.sin(2 * np.pi * 5500 * t)
    np.testing.assert_allclose(
        low_pass(Record("x", low + high, 12000.0, 1800.0), 5000.0).signal, low, atol=1e-5
    )


def test_names(refused):
    assert [fault_name(x) for x in ("IR", "or", "Ball", "normal", "usure")] == [
        "inner",
        "outer",
        "ball",
        "healthy",
        "wear",
    ]
    assert set(FAULTS) == {"outer", "inner", "ball"}


def test_mapped_copy_is_the_records(folder, tmp_path):
    "What is read from the copy is what the files say, plausibility warnings included; a file that changes, or a table, makes it anew."
    import os

    cache = tmp_path / "copy"
    plain = read_records(folder)
    for _ in range(2):
        mapped = read_records(folder, cache=cache)
        for a, b in zip(plain, mapped):
            assert np.array_equal(a.signal, b.signal)
            assert np.array_equal(a.orders, b.orders)
            assert all(
                getattr(a, k) == getattr(b, k)
                for k in ("name", "rate", "rpm", "fault", "diameter", "load", "bearing")
            )
    assert not mapped[0].signal.flags.owndata
    assert not mapped[0].signal.flags.writeable
    first = folder / plain[0].name
    np.save(first, plain[0].signal.clip(-0.5, 0.5))
    os.utime(first, ns=(1, 1))
    assert any("clipped" in w for w in said(lambda: read_records(folder, cache=cache)))
    assert any("clipped" in w for w in said(lambda: read_records(folder, cache=cache)))
    edit(folder, fault="ball")
    assert read_records(folder, cache=cache)[0].fault == "ball"
    assert (
        RecordWindows(read_records(folder, cache=cache), 1000)
        .batch([0])[0]["signal"]
        .isfinite()
        .all()
    )
