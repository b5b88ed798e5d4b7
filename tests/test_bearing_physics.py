"The physics of the bearing domain against written-out formulae, other libraries and a machine whose fault is known."

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.signal as ss
import torch
from sklearn.model_selection import KFold, StratifiedKFold

from bench.bearing import one_window  # the formulae as they read, one line at a time
from gcode_ml.bearing import features as ft
from gcode_ml.bearing import search as se
from gcode_ml.bearing import simulate as si
from gcode_ml.bearing import transforms as tr
from gcode_ml.bearing.data import (
    BEARINGS,
    FAULTS,
    JOURNAL_FAULTS,
    Geometry,
    RecordWindows,
    check,
    read_records,
)
from gcode_ml.core.errors import InputError
from gcode_ml.signals import spectra as sp

ORDERS = np.array([3.5848, 5.4152, 4.7135, 0.39828])


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_orders_follow_the_geometry():
    "The formulae of the four orders, the catalogue of the 6205, and that lines are sums of them."
    assert np.abs(BEARINGS["6205"].orders - ORDERS).max() < 1e-4
    n = 11
    d = 7.5
    D = 38.5
    phi = np.deg2rad(12)
    r = d / D * np.cos(phi)
    assert np.allclose(
        Geometry(n, d, D, 12.0).orders,
        [n * (1 - r) / 2, n * (1 + r) / 2, D / d * (1 - r * r), (1 - r) / 2],
        rtol=1e-12,
    )
    lines = dict(zip([name for name, _ in tr.LINES], tr.bearing_lines(ORDERS)))
    assert np.isclose(lines["inner + shaft"], ORDERS[1] + 1)
    assert np.isclose(lines["ball - cage"], ORDERS[2] - ORDERS[3])
    assert np.isclose(lines["3 ball / 2"], 1.5 * ORDERS[2])


# transforms


@pytest.mark.parametrize("n", [999, 1000])
def test_analytic_signal_is_scipys(n):
    "In both precisions, for odd and even lengths."
    x = noise(3, n)
    assert np.abs(sp.analytic(torch.tensor(x)).numpy() - ss.hilbert(x)).max() < 1e-12
    assert sp.analytic(torch.tensor(x, dtype=torch.float32)).dtype == torch.complex64


def test_stft_is_scipys():
    "The power, before logarithm and standardisation."
    x = noise(2, 6400)
    _, _, z = ss.stft(
        np.pad(x, ((0, 0), (128, 128)), "reflect"),
        nperseg=256,
        noverlap=128,
        window="hann",
        boundary=None,
        padded=False,
        scaling="spectrum",
    )
    assert np.allclose(
        sp.Stft(scale=False)(torch.tensor(x)),
        np.abs(z * ss.get_window("hann", 256).sum()) ** 2,
        rtol=1e-8,
    )
    image = sp.Stft()(torch.tensor(x))
    assert torch.allclose(image.mean((1, 2)), torch.zeros(2, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize(
    "n,hop,n_fft",
    [
        (6400, 128, 256),
        (6437, 128, 256),
        (300, 128, 256),
        (200, 128, 256),
        (3000, 50, 100),
        (3000, 64, 256),
    ],
)
def test_picture_of_stft_is_its_formula(n, hop, n_fft):
    "Logarithm of the power and standardisation, line by line, whatever way the frames are cut; a batch gives what its items give."
    x = noise(3, n) * np.array([[1], [50], [0.01]])
    half = n_fft // 2
    y = np.pad(x, ((0, 0), (half, half)), "reflect")
    w = ss.get_window("hann", n_fft)
    image = np.log(
        1e-6
        + np.abs(
            np.fft.rfft(
                np.stack([y[:, i * hop : i * hop + n_fft] for i in range(n // hop + 1)], 1) * w
            )
        )
        ** 2
    ).swapaxes(1, 2)
    image = (image - image.mean((1, 2), keepdims=True)) / image.std((1, 2), keepdims=True)
    layer = sp.Stft(n_fft, hop)
    ours = layer(torch.tensor(x))
    assert ours.shape == image.shape
    assert np.allclose(ours, image, atol=1e-9)
    assert np.allclose(layer(torch.tensor(x, dtype=torch.float32)), image, atol=2e-3)
    assert torch.equal(layer(torch.tensor(x[1:2])), ours[1:2])


@pytest.mark.parametrize(
    "layer",
    [
        sp.Stft(),
        sp.Stft(scale=False),
        sp.Cwt(1000.0),
        sp.Cwt(1000.0, hop=4),
        sp.Cwt(1000.0, hop=0, scale=True),
        sp.PseudoWigner(31),
    ],
)
def test_quick_way_is_the_way_with_gradients(layer):
    "To rounding."
    x = torch.tensor(noise(5, 1024))
    quick = layer(x)
    slow = layer(x.clone().requires_grad_()).detach()
    assert quick.shape == slow.shape
    assert torch.allclose(quick, slow, atol=1e-9, rtol=1e-9)


def test_wavelets_are_pywts():
    "To 1 % of the largest value, up to pywt's normalisation, its mean over each sample, and its rounding of the place by half a sample."
    pywt = pytest.importorskip("pywt")
    rate = 1000.0
    x = noise(1024)
    w0 = 6
    layer = sp.Cwt(rate, scales=6, low=20, high=80)
    scales = w0 / (2 * np.pi) * rate / layer.frequency.numpy()
    f = np.fft.rfftfreq(1024)
    theirs = (
        np.abs(
            pywt.cwt(x, scales, f"cmor2.0-{w0 / (2 * np.pi):.12f}", method="fft", precision=16)[0]
        )
        * 2
        / np.sqrt(scales)[:, None]
    )
    ours = [
        layer(
            torch.tensor(
                np.fft.irfft(np.fft.rfft(x) * np.sinc(f) * np.exp(2j * np.pi * f * shift))
            )[None]
        )[0].numpy()
        for shift in (-0.5, 0, 0.5)
    ]
    error = np.min(
        [np.abs(o - theirs)[:, 300:724].max(1) for o in ours], 0
    )  # pywt pads with zeros, the FFT is periodic: look at the middle
    assert error.max() < 0.01 * theirs.max()


def test_tones_have_height_one():
    "A wavelet image of a cosine of amplitude one, and of half the amplitude."
    t = torch.arange(2000, dtype=torch.float64) / 1000
    layer = sp.Cwt(1000.0, scales=16, low=20, high=200)
    y = layer(
        torch.stack(
            [
                torch.cos(2 * np.pi * layer.frequency[9] * t),
                0.5 * torch.cos(2 * np.pi * layer.frequency[9] * t),
            ]
        )
    )[:, 9, 1000]
    assert torch.allclose(y, torch.tensor([1.0, 0.5], dtype=torch.float64), atol=1e-3)


def test_wigner_ville_is_the_double_loop():
    "Every value, to 1e-10; and its sum over frequency is the power at that moment."
    x = noise(1, 96)
    z = ss.hilbert(x[0])
    L, K, hop = 15, 32, 8
    window = ss.windows.hamming(2 * L + 1)
    plain = np.array(
        [
            [
                sum(
                    (
                        window[L + m] * z[n + m] * z[n - m].conj() * np.exp(-2j * np.pi * k * m / K)
                    ).real
                    for m in range(-L, L + 1)
                    if n - abs(m) >= 0 and n + abs(m) < 96
                )
                for n in range(0, 96, hop)
            ]
            for k in range(K)
        ]
    )
    assert np.abs(sp.wigner_ville(torch.tensor(x), L, hop)[0].numpy() - plain).max() < 1e-10
    assert np.allclose(
        sp.wigner_ville(torch.tensor(x), None, 1)[0].mean(0), np.abs(z) ** 2, atol=1e-10
    )


def test_whole_distribution_of_a_long_signal_is_refused():
    "With what it would take."
    with pytest.raises(InputError, match="65,537 x 102,400 numbers, 54 GB"):
        sp.wigner_ville(torch.zeros(1, 102_400), None, 1)


def test_prewhitening_keeps_phases():
    "The magnitude is one, the phase as before; a constant offset does not matter."
    x = noise(1, 500) + 7
    y = sp.prewhiten(torch.tensor(x))
    X = np.fft.rfft(x[0])[1:-1]
    Y = np.fft.rfft(y[0].numpy())[1:-1]
    assert np.allclose(np.abs(Y), 1, atol=1e-7)
    assert np.allclose(np.angle(Y), np.angle(X), atol=1e-7)


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: sp.Stft()(x),
        lambda x: sp.Cwt(1000.0)(x),
        lambda x: sp.PseudoWigner(31)(x),
        lambda x: sp.prewhiten(x),
        lambda x: sp.LineScores([(100, 300)])(
            x, 1000.0, torch.tensor([7.0, 8.0]), torch.tensor([2.2, 3.3])
        ),
        lambda x: sp.OrderSpectrum([(100, 300)], top=5)(x, 1000.0, torch.tensor([7.0, 8.0])),
        lambda x: sp.angular_resample(x, 1000.0, torch.tensor([7.0, 8.0]), 32),
    ],
)
def test_transforms_let_gradients_through(layer):
    "Finite, and not zero everywhere."
    x = torch.tensor(noise(2, 1024), dtype=torch.float32, requires_grad=True)
    (layer(x) ** 2).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad != 0).any()


def test_padding_does_not_change_orders():
    "An item of a padded batch gives what it gives alone."
    x = torch.tensor(noise(2, 3000), dtype=torch.float32)
    mask = torch.ones(2, 3000, dtype=torch.bool)
    mask[1, 2000:] = False
    x[1, 2000:] = 0
    inputs = dict(
        signal=x[..., None],
        rate=torch.tensor([12000.0] * 2),
        shaft=torch.tensor([29.0, 31.0]),
        orders=torch.tensor(ORDERS, dtype=torch.float32).expand(2, 4),
    )
    alone = {k: v[1:, :2000] if k == "signal" else v[1:] for k, v in inputs.items()}
    for layer in (tr.BearingLines(), tr.PartSpectra()):
        assert torch.allclose(layer(inputs, mask)[1:], layer(alone), atol=1e-5)


def test_lines_stay_at_their_order():
    "One defect at two speeds, two rates and two geometries: the same points of the axis in units of the part."
    records = [
        si.rolling_record("outer", g, shaft, rate, 1.0, 15, 3000, 0.03, seed=i)
        for i, (g, shaft, rate) in enumerate(
            [
                (BEARINGS["6205"], 29.0, 12000.0),
                (BEARINGS["6205"], 35.0, 20480.0),
                (Geometry(13, 5.0, 40.0), 29.0, 12000.0),
            ]
        )
    ]
    for r in records:
        y = tr.PartSpectra(((2000, 4200),))(
            dict(
                signal=torch.tensor(r.signal)[None, :, None],
                rate=torch.tensor([r.rate]),
                shaft=torch.tensor([r.shaft]),
                orders=torch.tensor(r.orders)[None].float(),
            )
        )[0, :, 0]
        at_one = y[:, 48:51].amax(1)
        assert at_one.argmax() == 0
        assert at_one[0] > 2 > at_one[1:].max()


def test_speed_up_is_taken_out():
    "A line that smears over a run-up is one bin wide on the shaft's angle."
    n = 8000
    t = np.arange(n) / n
    shaft = 20 + 20 * t
    angle = np.cumsum(shaft) / n
    y = sp.angular_resample(
        torch.tensor(np.cos(2 * np.pi * 3 * angle))[None], float(n), torch.tensor(shaft)[None], 64
    )[0].numpy()
    Y = np.abs(np.fft.rfft(y))
    assert Y.argmax() * 64 / len(y) == pytest.approx(3, abs=0.05)
    assert Y.max() > 0.9 * len(y) / 2


# features


def test_batched_features_are_the_loop():
    "To 1e-9, with speeds, rates and geometries mixed; the decimated envelope to 1e-2 of the scores' range."
    x = noise(5, 6000) + 3 * np.cos(np.arange(6000) / 9)
    shaft = [29.9, 29.2, 29.9, 24.0, 29.9]
    rate = [12000.0, 12000.0, 12000.0, 12000.0, 12800.0]
    orders = np.stack([ORDERS, ORDERS, ORDERS, Geometry(8, 1, 5).orders, ORDERS])
    loop = np.stack([one_window(*a) for a in zip(x, shaft, rate, orders)])
    batch = ft.order_features(x, shaft, rate, orders)
    assert batch.shape == (5, 85) == (5, len(ft.FEATURE_NAMES))
    assert np.abs(batch - loop).max() < 1e-9
    assert np.abs(
        ft.order_features(x, shaft, rate, orders, points=1000) - loop
    ).max() < 1e-2 * np.ptp(loop)


@pytest.mark.parametrize("snr,least", [(10, 1.0), (0, 1.0), (-5, 1.0), (-10, 0.85)])
def test_rule_names_the_fault(snr, least):
    "Right on simulated bearings, never right with the orders of the parts exchanged."
    right, wrong = [], []
    for i, fault in enumerate(FAULTS):
        x = np.stack([si.rolling_record(fault, snr=snr, seed=s).signal for s in range(6)])
        right += [*(ft.fault_rule(ft.order_features(x, 29.0, 12000.0, ORDERS)) == i)]
        wrong += [*(ft.fault_rule(ft.order_features(x, 29.0, 12000.0, ORDERS[[1, 2, 0, 3]])) == i)]
    assert np.mean(right) >= least
    assert np.mean(wrong) == (0 if snr >= -5 else pytest.approx(0, abs=0.2))


def test_orders_beyond_the_spectrum_are_masked():
    "A shaft so fast that harmonics pass half the rate: no folded lines, no exception, finite numbers; bands are cut with a warning."
    with pytest.warns(UserWarning, match="half the sampling rate"):
        y = ft.order_features(noise(2, 2048), 150.0, 2000.0, ORDERS)
    assert np.isfinite(y).all()
    assert (y.reshape(2, -1)[:, 30:].reshape(2, 5, 11)[:, 2:4] == 0).all()


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(x=np.full((2, 500), 3.0)), "all the same"),
        (dict(x=np.r_[[noise(500)], [np.full(500, np.nan)]]), "signal of window 1"),
        (dict(shaft=0.0), "shaft"),
        (dict(orders=[1, 2, np.nan, 0.4]), "orders"),
    ],
)
def test_bad_windows_are_one_sentence(change, words):
    "Constant, missing, without speed, without geometry."
    with pytest.raises(InputError, match=words):
        ft.order_features(**dict(x=noise(2, 500), shaft=29.0, rate=12000.0, orders=ORDERS) | change)


def test_statistics_are_scipys():
    "The thirty-six against scipy, one window at a time, and Parseval."
    from scipy.stats import kurtosis, skew

    x = noise(3, 4096) * 2 + np.sin(np.arange(4096) * 0.3)
    y = pd.DataFrame(ft.tabular_features(x, 20480.0), columns=ft.TABULAR_NAMES)
    e = np.abs(ss.hilbert(x))
    assert np.allclose(y["kurtosis"], kurtosis(x, axis=1))
    assert np.allclose(y["skewness"], skew(x, axis=1))
    assert np.allclose(y["rms"], np.sqrt((x**2).mean(1)))
    assert np.allclose(y["clearance"], np.abs(x).max(1) / np.sqrt(np.abs(x)).mean(1) ** 2)
    assert np.allclose(y["envelope rms"], np.sqrt((e**2).mean(1)))
    assert np.allclose(y["envelope kurtosis"], kurtosis(e, axis=1))
    P = np.abs(np.fft.rfft(x)) ** 2 / 4096
    total = 2 * P.sum(1) - P[:, 0] - P[:, -1]
    assert np.allclose(total, (x**2).sum(1))
    assert np.allclose(y["power"], P.sum(1))
    assert np.allclose(
        y[["power 0-0.5", "power 0.5-2", "power 2-5", "power 5-10"]].sum(axis=1),
        P[:, np.fft.rfftfreq(4096, 1 / 20480) < 10000].sum(1),
    )
    assert np.allclose(np.concatenate([ft.tabular_features(w, 20480.0) for w in x]), y)


def test_wavelet_details_are_pywts():
    "All five levels."
    pywt = pytest.importorskip("pywt")
    x = noise(2, 1000)
    details, rest = ft._details(x)
    for a, b in zip([rest, *details[::-1]], pywt.wavedec(x, "db4", level=5)):
        assert np.allclose(a, b, atol=1e-9)


# the journal bearing


@pytest.mark.parametrize("fault", JOURNAL_FAULTS)
def test_conditions_have_their_lines(fault):
    "Ten severe records each: the mean spectrum rises over that of healthy records where the formula says."

    def power(f, kind):
        total = 0
        for s in range(6):
            r = si.journal_record(kind, "severe", seed=s, seconds=2)
            P = np.abs(np.fft.rfft(r.signal.astype(float))) ** 2 / len(r)
            F = np.fft.rfftfreq(len(r), 1 / r.rate) / (r.shaft if f[1] < 100 else 1)
            total += P[(f[0] < F) & (f[1] > F)].sum()
        return total

    place = dict(
        healthy=(0.9, 1.1),
        misalignment=(1.95, 3.05),
        imbalance=(0.95, 1.05),
        clearance=(0.42, 0.49),
        lubrication=(0.02, 0.1),
        cavitation=(1400, 2600),
        wear=(0.95, 1.05),
        oil_whirl=(0.41, 0.49),
        misalignment_imbalance=(0.95, 3.05),
        wear_lubrication=(0.95, 1.05),
        cavitation_clearance=(1400, 2600),
    )[fault]
    ratio = power(place, fault) / power(place, "healthy")
    assert ratio == 1 if fault == "healthy" else ratio > (1.25 if "cavitation" in fault else 2)


def test_records_are_drawn_as_written():
    "Ranges, shares, lengths, and that a seed gives the same record; optional effects change it."
    records = [si.journal_record("imbalance", "mild", seed=s, seconds=0.1) for s in range(300)]
    facts = pd.DataFrame([r.facts for r in records])
    assert len(si.journal_record("wear")) == 102_400
    assert si.journal_record("wear").signal.dtype == np.float32
    assert facts.turns.between(54, 66).all()
    assert facts.load.between(30, 100).all()
    assert facts.sommerfeld.between(0.05, 0.5).all()
    assert facts.temperature.between(40, 80).all()
    assert facts.mean_severity.between(0.45, 0.86).all()
    assert abs(facts.rises.mean() - 0.3) < 0.08
    assert abs((facts.transient != "none").mean() - 0.25) < 0.08
    assert abs(facts.alias.mean() - 0.1) < 0.06
    steady = facts[~facts.rises.astype(bool)]
    assert steady.mean_severity.between(0.45, 0.70).all()
    assert np.array_equal(
        records[5].signal, si.journal_record("imbalance", "mild", seed=5, seconds=0.1).signal
    )
    for effect in si.EFFECTS:
        assert not np.array_equal(
            si.journal_record("imbalance", "mild", 5, seconds=1, effects=[effect]).signal,
            si.journal_record("imbalance", "mild", 5, seconds=1).signal,
        )


def test_healthy_noise_has_its_size():
    "Floor, measurement, mains, walk and drift add up in power."
    got = np.mean(
        [si.journal_record("healthy", seed=s).signal.astype(float).var() for s in range(10)]
    )
    facts = [si.journal_record("healthy", seed=s, seconds=0.1).facts for s in range(10)]
    expected = (
        np.mean([(0.05 * f["A"]) ** 2 for f in facts])
        + 0.03**2
        + 0.0125**2 / 2
        + 0.02**2
        + 0.015**2 / 2
    )
    assert got == pytest.approx(expected, rel=0.05)


def test_a_third_of_cavitation_windows_is_healthy():
    "Which bounds the accuracy of windows at 97 %; a burst is louder than what is around it."
    counts = {s: int(2 + 5 * np.mean(b)) for s, b in si.SEVERITIES.items()}
    records = [si.journal_record("cavitation", s, seed=i) for s in si.SEVERITIES for i in range(25)]
    has = np.array([si.burst_in_window(r) for r in records])
    assert 0.28 < 1 - has.mean() < 0.41
    assert counts["severe"] == 6
    assert has[-25:].mean() > has[:25].mean()
    r = records[0]
    a, b = r.facts["bursts"][0]
    assert b - a == 163
    assert si.burst_in_window(r, 163, 163).sum() <= 2 * len(r.facts["bursts"])


def test_set_is_balanced_and_split_by_record():
    "Counts of the full plan; gates of a small one."
    plan = si.journal_plan()
    assert plan.split.value_counts().to_dict() == dict(train=2464, valid=528, test=528)
    assert plan.name.is_unique
    assert (plan.groupby(["split", "fault"]).size().unstack().nunique(axis=1) == 1).all()
    records = si.journal_set(3, seconds=0.1, shares=(1 / 3,) * 3, faults=JOURNAL_FAULTS[:2])
    assert [r.facts["split"] for r in records].count("test") == 8
    small = si.journal_plan(3, shares=(1 / 3,) * 3, faults=JOURNAL_FAULTS[:2])
    with pytest.raises(InputError, match="each signal once"):
        si.check_set(small, [records[0]] * len(small))
    with pytest.raises(InputError, match="balance"):
        si.check_set(small.iloc[1:], records[1:])


@pytest.mark.parametrize("snr", [20, 10, 5])
def test_added_noise_has_its_ratio(snr):
    "Of each record's own size."
    r = si.journal_record("wear", seed=2)
    n = si.add_noise(r, snr).signal - r.signal
    assert 10 * np.log10(
        (r.signal.astype(float) ** 2).mean() / (n.astype(float) ** 2).mean()
    ) == pytest.approx(snr, abs=0.1)


def test_rolling_record_has_its_ratio_and_rhythm():
    "Noise power, number of impacts, and jitter."
    clean = si.rolling_record("outer", snr=np.inf, seed=3)
    noisy = si.rolling_record("outer", snr=3, seed=3)
    assert 10 * np.log10(
        (clean.signal**2).mean() / ((noisy.signal - clean.signal) ** 2).mean()
    ) == pytest.approx(3, abs=0.1)
    times = si._impact_times(np.random.default_rng(0), 0.01, 20.0, 0.015)
    assert np.diff(times).std() / 0.01 == pytest.approx(0.015, rel=0.1)


@pytest.mark.parametrize("kind", ["rolling", "random", "journal"])
def test_simulated_folder_is_read_like_any_other(tmp_path, kind):
    "Names, speeds, faults and samples come back, and nothing is found wrong."
    made = si.simulate_records(tmp_path, kind, count=3, seconds=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = read_records(tmp_path)
    assert [(r.fault, r.diameter, r.bearing, round(r.rpm, 6)) for r in back] == [
        (r.fault, r.diameter, r.bearing, round(r.rpm, 6)) for r in made
    ]
    assert np.array_equal(back[0].signal, made[0].signal)
    assert not [f for f in check(tmp_path) if "only the bearing" not in f]
    assert len(pd.read_csv(tmp_path / "facts.csv")) == len(made)


# models and search


@pytest.fixture(scope="module")
def windows():
    return RecordWindows(si.rolling_set(seconds=1, snr=-4), 6000)


@pytest.mark.parametrize(
    "name", ["constant", "rule", "lines_lr", "physics_lr", "physics_rf", "boosting", "tabular_rf"]
)
def test_simple_models_give_probabilities(windows, name):
    "Rows add up to one, in the order of the windows' classes; physics is right on a bearing it has not seen."
    test = np.flatnonzero(windows.diameters == "021")
    train = np.flatnonzero(windows.diameters != "021")
    p = ft.baseline_probabilities(name, windows, train, test)
    accuracy = (p.argmax(1) == windows.labels[test]).mean()
    assert p.shape == (len(test), 3)
    assert np.allclose(p.sum(1), 1)
    if name in ("rule", "lines_lr", "physics_lr", "physics_rf"):
        assert accuracy > 0.9


def test_absent_package_is_named(windows, monkeypatch):
    "MiniRocket without aeon says which extra it needs."
    import builtins

    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *a, **k: (
            (_ for _ in ()).throw(ImportError(name))
            if name.startswith("aeon")
            else real(name, *a, **k)
        ),
    )
    with pytest.raises(InputError, match="rocket"):
        ft.baseline_probabilities("minirocket", windows, np.arange(20), np.arange(20, 30))
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *a, **k: (
            (_ for _ in ()).throw(ImportError(name))
            if name.startswith("optuna")
            else real(name, *a, **k)
        ),
    )
    with pytest.raises(InputError, match="sweep"):
        se.search(lambda p: 0, dict(a=[1, 2]), "bayes", 2)


@pytest.mark.parametrize("cv", [3, KFold(3, shuffle=True, random_state=0), StratifiedKFold(4)])
def test_plain_folds_of_grouped_data_are_refused(windows, cv):
    "Unless they are forced, and then the result says leak."
    x = ft.window_features(windows)
    space = dict(max_depth=[2, 3])
    with pytest.raises(ValueError, match="allow_leak=True"):
        se.classifier_objective("random_forest", x, windows.labels, windows.bearings, cv)
    found = se.search(
        se.classifier_objective(
            lambda max_depth: se.classifier("random_forest", n_estimators=3, max_depth=max_depth),
            x,
            windows.labels,
            windows.bearings,
            cv,
            allow_leak=True,
        ),
        space,
        "grid",
    )
    assert found.leak
    assert found.history.leak.all()


def test_search_folds_hold_whole_sizes_out(windows):
    "And a side with one class is an error."
    folds, leak = se.grouped_folds(windows.diameters, windows.labels)
    assert not leak
    assert len(folds) == 3
    assert all(not {*windows.diameters[a]} & {*windows.diameters[b]} for a, b in folds)
    with pytest.raises(InputError, match="two or more classes"):
        se.grouped_folds(["a", "a", "b", "b"], [0, 0, 1, 1])


@pytest.mark.parametrize("method", ["grid", "random", "bayes"])
def test_searches_repeat_and_keep_the_budget(method):
    "The same seed gives the same trials; the best so far never falls."
    if method == "bayes":
        pytest.importorskip("optuna")

    def f(p):
        return -((p["x"] - 0.5) ** 2) - (p["kind"] is None)

    a, b = (
        se.search(f, dict(x=[0.0, 0.25, 0.5, 0.75, 1.0], kind=["a", None]), method, 8, seed=3)
        for _ in range(2)
    )
    assert len(a.history) == 8
    assert a.history.score.equals(b.history.score)
    assert a.history.best.is_monotonic_increasing
    assert f(a.best) == a.score


def test_heat_map_takes_none():
    "As a value of either axis."
    import matplotlib

    matplotlib.use("Agg")
    found = se.search(
        lambda p: 0.0 if p["depth"] is None else p["depth"],
        dict(depth=[1, 2, None], kind=[None, "x"]),
        "grid",
    )
    ax = se.plot_settings(found, "depth", "kind")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "None"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["x", "None"]


def test_rule_on_real_recordings():
    "Without training, on the recordings of CWRU where they are: 190 of 270 windows, 21 of 27 records by mean probability."
    from gcode_ml.lab.settings import data_folder

    folder = data_folder("bearing")
    if not folder:
        pytest.skip("the recordings are not here")
    records = read_records(folder / "cwru_12k_drive_end")
    windows = RecordWindows(records, 12000)
    p = ft.baseline_probabilities("rule", windows, [], np.arange(len(windows)))
    right = p.argmax(1) == windows.labels
    vote = [
        p[windows.record == i].mean(0).argmax() == windows.labels[windows.record == i][0]
        for i in range(len(records))
    ]
    assert right.sum() == pytest.approx(190, abs=1)
    assert sum(vote) == 21
