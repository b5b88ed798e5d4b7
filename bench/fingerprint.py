"Fingerprint domain: reading, locating and verifying recordings, and streams of rows against real time."

import functools
import json
import os
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd

from bench import benchmark
from gcode_ml.fingerprint.align import ProgramHMM, StreamAligner, build_library
from gcode_ml.fingerprint.clocks import on_sensor_clock
from gcode_ml.fingerprint.data import (
    CONTROLLER,
    align_channels,
    read_recordings,
    recording_files,
    recording_from_table,
)
from gcode_ml.fingerprint.emission import NetworkEmission, StateNetwork, row_features
from gcode_ml.fingerprint.machine import record_program
from gcode_ml.fingerprint.simulate import example_programs, simulate_recordings
from gcode_ml.fingerprint.templates import program_templates
from gcode_ml.fingerprint.verify import Verifier, fit_response, program_signals, verification_rows
from gcode_ml.lab.settings import data_folder


@functools.cache
def folder(quick):
    "Folder of the real recordings if present, else of simulated ones."
    found = data_folder("cnc_fingerprint")
    if found and not quick:
        return Path(found)
    home = tempfile.TemporaryDirectory()
    folder.homes.append(home)
    return simulate_recordings(home.name, runs=3, seed=0)


folder.homes = []

REPORT = (
    "mpox",
    "mpoy",
    "mpoz",
    "posx",
    "posy",
    "posz",
    "unit",
    "stat",
    "coor",
    "momo",
    "dist",
    "line",
    "feed",
)  # fields of the status report that also have columns


def original(table):
    "A recording in the original layout: the status report repeated as text, and interpolated numbers with all digits of a double."

    def digits(x):
        short = x.round(5)
        return np.where(np.float32(short) == np.float32(x), short, x)

    table = pd.DataFrame(
        {c: digits(v.to_numpy(float)) if v.dtype == "float32" else v for c, v in table.items()}
    )
    constants = dict(
        mpoa=0,
        posa=0,
        home=1,
        mots=0,
        plan=0,
        path=2,
        frmo=2,
        prbe=1,
        safe=0,
        estp=0,
        spc=0,
        hold=0,
        macs=5,
        cycs=1,
        sps=0,
        mark=811844304,
    )
    here = [c for c in REPORT if c in table]
    table.insert(
        len([c for c in CONTROLLER[:16] if c in table]),
        "raw_json",
        [
            json.dumps(dict(sr=dict(zip(here, v), **constants)), separators=(",", ":"))
            for v in zip(*(table[c].tolist() for c in here))
        ],
    )
    return table


@functools.cache
def twins(quick, every=6):
    "The same recordings as parquet and as CSV in the original layout: every sixth of the real ones, because CSV takes long to write."
    home = tempfile.TemporaryDirectory()
    folder.homes.append(home)
    parquet, text = (Path(home.name) / k for k in ("parquet", "csv"))
    parquet.mkdir()
    text.mkdir()
    for f in recording_files(folder(quick))[:: 1 if quick else every]:
        os.symlink(f.resolve(), parquet / f.name)
        original(pd.read_parquet(f)).to_csv(text / f"{f.stem}_aligned.csv", index=False)
    return parquet, text, Path(home.name) / "copy"


def seconds(function):
    "Duration of one call in seconds."
    began = time.perf_counter()
    function()
    return round(time.perf_counter() - began, 3)


@benchmark(
    "runs loaded and indexed from the one parquet file that `read_recordings(cache=...)` keeps of them, the checksum of all files included",
    "the same runs read, checked and indexed from the original comma-separated files",
    1 / 10,
)
def read_runs(quick):
    parquet, text, copy = twins(quick)
    read_recordings(parquet, cache=copy)
    read_recordings(folder(quick), cache=copy)
    facts = dict(
        runs=len(read_recordings(folder(quick), cache=copy)),
        seconds_all_runs=seconds(lambda: read_recordings(folder(quick), cache=copy)),
        seconds_all_runs_file_by_file=seconds(lambda: read_recordings(folder(quick))),
    )
    return lambda: read_recordings(parquet, cache=copy), lambda: read_recordings(text), facts


@benchmark(
    "runs read, checked and indexed from a parquet file each",
    "the same from the original comma-separated files",
)
def read_files(quick):
    parquet, text, _ = twins(quick)
    return lambda: read_recordings(parquet), lambda: read_recordings(text)


def stream_of(quick, lag=8):
    "A stream over the library of all recordings with an untrained network of the default size, and the rows of one recording."
    recordings = read_recordings(folder(quick))
    library = build_library(recordings)
    features = row_features(recordings)
    network = StateNetwork(
        features.levels,
        features.boards,
        3 * sum(features.motion),
        len(library),
        len({r.operation for r in recordings}),
    )
    emission = NetworkEmission(network, np.ones(len(library)))
    r = max(recordings, key=len)
    rows = features.scale.apply(align_channels(r, features.scale.channels))

    def begin():
        return StreamAligner(
            library,
            emission,
            ProgramHMM(library.lengths),
            features.width,
            lag,
            features.statistics,
        )

    return begin, rows, r.time, len(library)


def held(begin, rows, times, at):
    "Bytes allocated after each of the numbers of rows `at`."
    tracemalloc.start()
    stream = begin()
    found = []
    for i, (x, t) in enumerate(zip(rows, times)):
        stream.step(x, t)
        if i in at:
            found.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    return found


def spin(seconds):
    "Keep one core busy."
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@benchmark(
    "a stream of rows, answered with a lag of 8 rows, all programs in the library",
    "the seconds that the machine takes for them, spun on one core",
    1 / 50,
)
def stream(quick):
    begin, rows, times, states = stream_of(quick)
    n = 12 if quick else 24
    warm = begin()
    for x, t in zip(rows[:20], times[:20]):
        warm.step(x, t)
    seconds = float(times[20 + n] - times[20])
    shift = [0.0]

    def ours():
        shift[0] += seconds
        for x, t in zip(rows[20 : 20 + n], times[20 : 20 + n]):
            warm.step(x, t + shift[0])

    first, last = held(begin, rows[:200], times[:200], (60, 199))
    return (
        ours,
        lambda: spin(seconds),
        dict(states=states, rows=n, bytes_after_60_rows=first, bytes_after_200_rows=last),
    )


@benchmark(
    "a recording placed offline: features, network, forward and backward over all programs",
    "the same rows as a stream with a lag of 8 rows",
)
def placed_offline(quick):
    begin, rows, times, states = stream_of(quick)
    n = 40 if quick else 160
    rows, times = rows[:n], times[:n]
    fresh = begin()

    def offline():
        return fresh.chains.smooth(
            *fresh.emission.log_probabilities(fresh.features(rows, fresh.width)), times
        )

    def stream():
        s = begin()
        return [a for x, t in zip(rows, times) if (a := s.step(x, t)) is not None] + s.finish()

    took = seconds(offline)
    return (
        offline,
        stream,
        dict(states=states, rows=n, times_real_time=round(float(times[-1] - times[0]) / took)),
    )


@benchmark(
    "rows held against the program that they claim, as they come",
    "the seconds that the machine takes for them, spun on one core",
    1 / 50,
)
def verified_rows(quick):
    text = example_programs()["pocket"]
    signals = program_signals(text, "pocket")

    def record(seed):
        return verification_rows(
            recording_from_table(record_program(text, day=seed % 2, seed=seed), "pocket_001")
        )

    response = fit_response([(record(s), signals) for s in range(3)])
    judged = record(5)
    n = 12 if quick else 24
    warm = Verifier(response, signals, judged.channels)
    for x, t in zip(judged.values[:20], judged.time[:20]):
        warm.step(x, t)
    length = float(judged.time[20 + n] - judged.time[20])
    shift = [0.0]

    def ours():
        shift[0] += length
        for x, t in zip(judged.values[20 : 20 + n], judged.time[20 : 20 + n]):
            warm.step(x, t + shift[0])

    return (
        ours,
        lambda: spin(length),
        dict(
            rows=n,
            channels=len(judged.channels),
            seconds_of_the_program=round(float(judged.time[-1]), 1),
        ),
    )


@benchmark(
    "sixteen seconds held against every place of all programs by the Fourier transform",
    "the same correlations, place by place",
    1 / 5,
)
def matched_piece(quick):
    placed = on_sensor_clock(read_recordings(folder(quick)), step=0.25)
    library = build_library(placed)
    templates = program_templates(library, placed)
    r = max(placed, key=len)
    rows = align_channels(r, templates.channels)[40:104]
    times = r.time[40:104]
    there = np.isfinite(rows).all(0)
    grid = np.arange(times[0], times[-1] + 1e-6, library.step)
    before = min(int(round((times[32] - times[0]) / library.step)), len(grid) - 1)
    x = np.stack([np.interp(grid, times, c) for c in rows[:, there].T], 1)
    x = x - x.mean(0)
    size = (x**2).sum(0)

    def place_by_place():
        found = []
        for wave in templates.waves:
            known = np.isfinite(wave[:, there]).all(0) & (size > 0)
            w = wave[:, there][:, known].astype(float)
            y = x[:, known]
            n = size[known]
            for s in range(len(w)):
                piece = w[np.clip(np.arange(len(grid)) + s - before, 0, len(w) - 1)]
                piece = piece - piece.mean(0)
                power = n * (piece**2).sum(0)
                r = np.where(
                    power > 1e-12, (piece * y).sum(0) / np.sqrt(np.maximum(power, 1e-12)), 0.0
                ).clip(0, 0.99)
                found.append(-0.5 * len(grid) * np.log1p(-(r**2)).sum())
        return np.array(found)

    def ours():
        return templates.match(rows, times)

    a = ours()
    b = place_by_place()
    return (
        ours,
        place_by_place,
        dict(
            states=len(library),
            sensors=int(there.sum()),
            largest_difference=float(abs(a - b).max() / b.max()),
            times_real_time=round(float(times[-1] - times[0]) / seconds(ours)),
        ),
    )
