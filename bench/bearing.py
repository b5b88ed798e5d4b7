"The bearing domain: simulator, transforms and features in batches beside the plain loops, and the fit of the physics."

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import scipy.signal as ss
import torch
from scipy.io import loadmat, savemat
from scipy.stats import kurtosis, skew

from bench import benchmark
from gcode_ml.bearing.data import JOURNAL_FAULTS, RecordWindows, read_cwru, read_records
from gcode_ml.bearing.features import baseline_probabilities, order_features, tabular_features
from gcode_ml.bearing.recipe import preprocessing, recipe
from gcode_ml.bearing.simulate import journal_record, rolling_set
from gcode_ml.bearing.transforms import BANDS
from gcode_ml.core.errors import InputError
from gcode_ml.lab.bundle import load_bundle, save_bundle
from gcode_ml.signals.spectra import Cwt, Stft, wigner_ville
from gcode_ml.training.fit import fit

ORDERS = np.array([3.5848, 5.4152, 4.7135, 0.39828])


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def one_window(x, shaft, rate, orders):
    "The order features of a window, line by line, with NumPy."
    n = len(x)
    X = np.fft.rfft(x - x.mean())
    X = np.fft.fft(np.fft.irfft(X / (np.abs(X) + 1e-9), n))
    f = np.fft.fftfreq(n, 1 / rate)
    columns = []
    for low, high in BANDS:
        e = np.abs(np.fft.ifft(2 * X * ((f >= low) & (f < high)))) ** 2
        E = np.abs(np.fft.rfft((e - e.mean()) * np.hanning(n), 4 * n))
        F = np.arange(len(E)) * rate / (4 * n)

        def q(order, E=E, F=F):
            f0 = order * shaft
            return np.log(
                E[np.abs(F - f0) < max(0.012 * f0, 0.75 * rate / n)].max()
                / np.median(E[np.abs(F - f0) < max(25, 8 * rate / n)])
            )

        o, i, b, c = orders
        columns.append(
            [
                q(o),
                q(i),
                q(b),
                *(np.mean([q(h * k) for h in range(1, 5)]) for k in (o, i, b)),
                np.mean([q(i - 1), q(i + 1)]),
                np.mean([q(b - c), q(b + c)]),
                np.mean([q(0.5 * b), q(1.5 * b)]),
                q(1),
                q(c),
            ]
        )
    columns = np.array(columns)
    return np.r_[(columns[:, :6] - columns[:, :6].mean(1, keepdims=True)).ravel(), columns.ravel()]


def order_pair(quick, points):
    x = noise(2 if quick else 40, 12000)
    shaft = np.full(len(x), 29.5)
    return lambda: order_features(x, shaft, 12000.0, ORDERS, points=points), lambda: [
        one_window(w, 29.5, 12000.0, ORDERS) for w in x
    ]


@benchmark(
    "85 order features of 40 windows of 12,000 samples, equal to 1e-9",
    "one window and one line at a time in NumPy",
    1 / 3,
)
def order_features_batch(quick):
    return order_pair(quick, None)


@benchmark(
    "the same on an envelope of 2 kHz, equal to 1e-2",
    "one window and one line at a time in NumPy",
    1 / 5,
)
def order_features_decimated(quick):
    return order_pair(quick, 2000)


def wavelet_pair(quick, method):
    import pywt

    n, count = (4096, 1) if quick else (20480, 1 if method == "conv" else 16)
    x = noise(count, n)
    layer = Cwt(20480.0, scales=64)
    t = torch.tensor(x, dtype=torch.float32)
    scales = 6 / (2 * np.pi) * 20480 / layer.frequency.numpy()
    return lambda: layer(t), lambda: [
        pywt.cwt(w, scales, f"cmor2.0-{6 / (2 * np.pi):.6f}", method=method) for w in x
    ]


@benchmark(
    "Morlet transform of 16 signals of 20,480 samples, 64 scales",
    "pywt.cwt, method='fft', signal by signal",
    1 / 5,
)
def wavelets_fft(quick):
    return wavelet_pair(quick, "fft")


@benchmark(
    "Morlet transform of a signal of 20,480 samples, 64 scales",
    "pywt.cwt, method='conv', signal by signal",
    1 / 30,
)
def wavelets_conv(quick):
    return wavelet_pair(quick, "conv")


@benchmark(
    "log power of the short-time Fourier transform, 256 signals of 20,480 samples in batches of 16",
    "scipy.signal.stft, logarithm and standardisation, signal by signal",
    1 / 5,
)
def short_time(quick):
    x = noise(4 if quick else 256, 20480)
    t = torch.tensor(x, dtype=torch.float32)
    layer = Stft()

    def one(w):
        image = np.log(1e-6 + np.abs(ss.stft(w, nperseg=256, noverlap=128)[2]) ** 2)
        return (image - image.mean()) / image.std()

    return lambda: [layer(c) for c in t.split(16)], lambda: [one(w) for w in x]


@benchmark(
    "pseudo Wigner-Ville of 64 signals of 2,048 samples, hop 16, equal to 1e-10",
    "a loop over moments and distances with an FFT a moment",
    1 / 50,
)
def wigner(quick):
    x = noise(1 if quick else 64, 512 if quick else 2048)
    t = torch.tensor(x)
    L = 127
    K = 256
    window = ss.windows.hamming(255)

    def one(x):
        z = ss.hilbert(x)
        n = len(z)
        columns = []
        for i in range(0, n, 16):
            r = np.zeros(K, complex)
            for m in range(-L, L + 1):
                if 0 <= i - m < n and 0 <= i + m < n:
                    r[m % K] = window[L + m] * z[i + m] * np.conj(z[i - m])
            columns.append(np.fft.fft(r).real)
        return np.array(columns).T

    return lambda: wigner_ville(t), lambda: [one(w) for w in x]


def sample_by_sample(rate=20480, seconds=5, seed=0):
    "An imbalance record as the formulae read, one sample after the other."
    import math
    import random

    r = random.Random(seed)
    n = rate * seconds
    d = 1 + 0.1 * (2 * r.random() - 1)
    load = 30 + 70 * r.random()
    T = 40 + 40 * r.random()
    LF, TF = 0.3 + 0.7 * load / 100, 0.9 + 0.2 * (T - 40) / 40
    A = (0.2 + 0.1 * r.random()) * LF * TF
    w = 2 * math.pi * 60 * d
    s = r.uniform(0.7, 0.9)
    phi = r.uniform(0, 6.283)
    a = 1 + 0.5 * r.random()
    f = 50 + 10 * r.random()
    p = r.uniform(0, 6.283)
    x = []
    walk = 0.0
    sums = []
    for _ in range(n):
        walk += r.gauss(0, 1)
        sums.append(walk)
    mean = sum(sums) / n
    std = math.sqrt(sum((v - mean) ** 2 for v in sums) / n)
    for i in range(n):
        t = i / rate
        v = (
            0.05 * A * r.gauss(0, 1)
            + 0.03 * r.gauss(0, 1)
            + 0.01 * a * math.sin(2 * math.pi * f * t + p)
            + 0.02 * sums[i] / std
            + 0.015 * math.sin(2 * math.pi * t / 1.5)
        )
        x.append(
            round(v / 0.001) * 0.001
            + 0.001 * t / seconds
            + s * 0.5 * LF * d * d * math.sin(w * t + phi)
        )
    return np.array(x, "float32")


@benchmark(
    "5 journal records of 102,400 samples", "the same formulae sample by sample in Python", 1 / 20
)
def journal_samples(quick):
    seconds = 1 if quick else 5
    return lambda: [
        journal_record("imbalance", seed=i, seconds=seconds) for i in range(5)
    ], lambda: [sample_by_sample(seconds=seconds, seed=i) for i in range(5)]


@benchmark(
    "36 statistics of 25 windows of 20,480 samples",
    "scipy.stats, scipy.signal and numpy.fft, one window at a time",
    1 / 2,
)
def statistics(quick):
    import pywt

    x = np.concatenate(
        [
            journal_record(f, seed=1).signal.reshape(5, -1)
            for f in JOURNAL_FAULTS[: 1 if quick else 5]
        ]
    ).astype(float)

    def entropy(p):
        p = p / p.sum()
        return -(p * np.log(p + 1e-30)).sum()

    def one(w, rate=20480.0):
        s = np.abs(w)
        rms = np.sqrt((w**2).mean())
        mean = s.mean()
        P = np.abs(np.fft.rfft(w)) ** 2 / len(w)
        f = np.fft.rfftfreq(len(w), 1 / rate)
        top = P[1:].argmax() + 1
        c = (P * f).sum() / P.sum()
        e = np.abs(ss.hilbert(w))
        E = np.abs(np.fft.rfft(e - e.mean()))
        rest, *details = pywt.wavedec(w, "db4", level=5)
        energy = [(d**2).sum() for d in details[::-1]]
        q = np.abs(np.fft.irfft(np.log(np.abs(np.fft.rfft(w)) + 1e-12)))[1 : len(w) // 2]
        parts = w[: len(w) // 512 * 512].reshape(-1, 512)
        X = np.fft.rfft((parts - parts.mean(1, keepdims=True)) * np.hanning(512))
        k = np.arange(1, 128)
        b = np.abs((X[:, k] ** 2 * X[:, 2 * k].conj()).mean(0))
        full = np.sqrt((np.abs(X[:, k]) ** 4).mean(0) * (np.abs(X[:, 2 * k]) ** 2).mean(0))
        return [
            rms,
            kurtosis(w),
            skew(w),
            s.max() / rms,
            rms / mean,
            s.max() / mean,
            s.max() / np.sqrt(s).mean() ** 2,
            f[top],
            c,
            entropy(P),
            *(
                P[(f >= lo) & (f < hi)].sum()
                for lo, hi in ((0, 500), (500, 2000), (2000, 5000), (5000, 10000))
            ),
            P.sum(),
            np.sqrt((P * (f - c) ** 2).sum() / P.sum()),
            P[min(2 * top, len(P) - 1)] / P[top],
            P[min(3 * top, len(P) - 1)] / P[top],
            P[top] / P.mean(),
            np.sqrt((e**2).mean()),
            kurtosis(e),
            e.max(),
            f[E[2:].argmax() + 2],
            sum(energy) / (sum(energy) + (rest**2).sum()),
            np.mean([kurtosis(d) for d in details]),
            energy[0],
            energy[2],
            energy[4],
            q.max() / q.mean(),
            (q * np.arange(1, len(q) + 1)).sum() / q.sum(),
            b.max(),
            b.mean(),
            entropy(b),
            np.tanh((b / full).mean()),
            (b / full).max(),
            b.max() / b.mean(),
        ]

    return lambda: tabular_features(x, 20480.0), lambda: [one(w) for w in x]


def recordings(quick):
    "A folder of files named and laid out like those of CWRU, with simulated samples and two channels more."
    folder = tempfile.TemporaryDirectory()
    for i, r in enumerate(rolling_set(seconds=1 if quick else 10, snr=0)[: 3 if quick else 27]):
        fault = dict(inner="IR", outer="OR", ball="B")[r.fault]
        savemat(
            Path(folder.name) / f"{fault}{r.diameter}_{r.load}_{100 + i}.mat",
            {
                f"X{100 + i}_{k}_time": np.roll(r.signal, 99 * j)[:, None].astype(float)
                for j, k in enumerate(("DE", "FE", "BA"))
            }
            | {f"X{100 + i}RPM": [[r.rpm]]},
            do_compression=True,
        )
    return folder, sorted(Path(folder.name).glob("*.mat"))


@benchmark(
    "27 recordings of 10 s read from MATLAB files", "scipy.io.loadmat of all their variables", 0.8
)
def read_files(quick):
    folder, files = recordings(quick)
    return lambda: [read_cwru(f) for f in files], lambda: (folder, [loadmat(f) for f in files])


@benchmark(
    "27 recordings of 10 s from a copy that is mapped into memory",
    "scipy.io.loadmat of all their variables",
    1 / 20,
)
def read_mapped(quick):
    folder, files = recordings(quick)
    cache = Path(folder.name) / "copy"
    read_records(folder.name, cache=cache)
    return lambda: read_records(folder.name, cache=cache), lambda: (
        folder,
        [loadmat(f) for f in files],
    )


ROCKET = """
import sys, time, json, numpy as np
from aeon.transformations.collection.convolution_based import MiniRocket
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
d = np.load(sys.argv[1])
def fit(i):
    before = time.process_time(); make_pipeline(MiniRocket(random_state=0, n_jobs=1), StandardScaler(with_mean=False), RidgeClassifierCV(alphas=np.logspace(-3, 3, 7))).fit(d[f'x{i}'], d[f'y{i}']); return time.process_time()-before
print(json.dumps(dict(first=fit(0), warm=[fit(i) for i in range(len(d.files)//2)])))
"""  # the first fit compiles, unless an earlier process has left its code in the cache


def rocket_seconds(windows, *parts):
    "Processor seconds of MiniRocket and a ridge on parts of windows, a fit each, and of the first fit, which compiles; by the interpreter that `ROCKET_PYTHON` names, where aeon is installed there."
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "windows.npz"
        np.savez(
            file,
            **{f"x{i}": windows.signals(p)[0].numpy()[:, None] for i, p in enumerate(parts)},
            **{f"y{i}": windows.labels[p] for i, p in enumerate(parts)},
        )
        done = subprocess.run(
            [os.environ.get("ROCKET_PYTHON", sys.executable), "-c", ROCKET, str(file)],
            capture_output=True,
            text=True,
            env=dict(os.environ, NUMBA_NUM_THREADS="1", OMP_NUM_THREADS="1"),
        )
    if "No module named" in done.stderr:
        raise InputError(
            "minirocket",
            "package",
            "aeon",
            "it is not installed",
            "ROCKET_PYTHON may name an interpreter that has it",
        )
    return json.loads(done.stdout.splitlines()[-1])


def spin(seconds):
    "Use so much processor time."
    import time

    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


@benchmark(
    "physics features of 27 simulated records and three fits of logistic regression with their answers, one size left out each",
    "three fits of MiniRocket and a ridge on the same windows, in a process of its own: its processor time, spent again",
    1.0,
    repetitions=3,
)
def physics_fit(quick):
    records = rolling_set(seconds=1 if quick else 5, snr=-5)
    size = 6000 if quick else 12000

    def folds():
        windows = RecordWindows(
            records, size
        )  # anew each time, because features are kept with the windows
        return windows, [
            (np.flatnonzero(windows.diameters != d), np.flatnonzero(windows.diameters == d))
            for d in ("007", "014", "021")
        ]

    def physics():
        windows, parts = folds()
        for train, test in parts:
            baseline_probabilities("physics_lr", windows, train, test)

    windows, parts = folds()
    rocket = rocket_seconds(windows, *(train for train, _ in parts))
    return (
        physics,
        lambda: spin(sum(rocket["warm"])),
        dict(minirocket_first_fit=rocket["first"], minirocket_fits=rocket["warm"]),
    )


@benchmark(
    "training of the order net to its final score, evidence of its windows included, one defect size left out of 27 simulated records",
    "the fit of MiniRocket and a ridge on the same windows, in a process of its own: its processor time, spent again",
    2.0,
)
def front_end_fit(quick):
    records = rolling_set(seconds=1 if quick else 10, snr=-5)
    size = 6000 if quick else 12000
    windows = RecordWindows(records, size)
    train = np.flatnonzero(windows.diameters != "007")
    rocket = rocket_seconds(windows, train)

    def net():
        learn = recipe(
            records, fold=0, window=size, device="cpu", workers=0, max_epochs=2 if quick else 20
        )
        with learn.no_bar(), learn.no_logging():
            fit(learn)

    return (
        net,
        lambda: spin(rocket["warm"][0]),
        dict(
            training_windows=len(train),
            minirocket_first_fit=rocket["first"],
            minirocket_fit=rocket["warm"][0],
        ),
    )


@benchmark(
    "a bundle names the fault of 20 windows of one second at 12 kHz, one at a time",
    "2 ms of processor time for each",
    1.0,
)
def bundle_windows(quick):
    learn = recipe(
        rolling_set(seconds=2, snr=-5), window=12000, device="cpu", workers=0, max_epochs=1
    )
    with learn.no_bar(), learn.no_logging():
        fit(learn)
    folder = tempfile.TemporaryDirectory()
    save_bundle(
        folder.name,
        learn.model,
        learn.arguments,
        preprocessing(learn),
        dict(domain="bearing", data={}, trained_on=[], metrics={}),
    )
    model = load_bundle(folder.name).model.eval()
    folder.cleanup()
    batches = [learn.windows.batch([i])[:2] for i in range(20)]

    def ours():
        with torch.inference_mode():
            for inputs, mask in batches:
                model(inputs, mask)

    return ours, lambda: spin(0.04)
