"The simulated machine and its data against closed forms, long loops and what must not change."

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.linalg import solve_banded
from scipy.signal import cont2discrete, lsim

from gcode_ml.data.batch import Subset, dataloaders
from gcode_ml.gcode.parts import part_program, write_parts
from gcode_ml.gcode.planner import plan, sample
from gcode_ml.gcode.reader import parse_gcode
from gcode_ml.trajectory.data import (
    FEATURES,
    SampleFiles,
    Standardizer,
    TrajectoryWindows,
    check,
    collect,
    fit_standardizer,
    part_file,
    prepare_trajectory_features,
    read_collection,
    split_windows,
    trajectory_features,
    verify_simulation,
    write_samples,
)
from gcode_ml.trajectory.simulate import (
    EFFECTS,
    MACHINES,
    SHAPERS,
    Machine,
    Thermal,
    apply_input_shaper,
    axis_error,
    backlash,
    error_filter,
    exact_error,
    layer_temperatures,
    motor_positions,
    random_machine,
    random_process,
    residual_vibration,
    shaper_impulses,
    shaper_smoothing,
    simulate_part,
    tracking_error,
)

T = np.arange(1500) / 1000
AXES = [(55, 0.08), (24.06, 0.1417), (90, 0.03), (20, 0.9)]


@pytest.mark.parametrize("f,z", AXES)
def test_closed_forms(f, z):
    "A ramp to 1e-9 mm; constant acceleration within a h²/6; a step spread over one sample."
    assert np.abs(axis_error(80 * T, f, z) - exact_error(T, f, z, speed=80)).max() < 1e-9
    assert (
        np.abs(axis_error(2500 * T**2, f, z) - exact_error(T, f, z, acceleration=5000)).max()
        < 5000 * 1e-6 / 6
    )
    step = axis_error(np.append(0.0, np.ones(1500)), f, z)[1:]
    spread = exact_error(T + 1e-3, f, z, speed=1000) - exact_error(T, f, z, speed=1000)
    assert np.abs(step - spread).max() < 1e-9
    assert np.isclose(exact_error(np.array([0.0]), f, z, step=1.0)[0], -1)
    assert abs(axis_error(250 * T**2, f, z)[-1] + 500 / (2 * np.pi * f) ** 2) < 1e-4


@pytest.mark.parametrize("f,z", AXES)
def test_filter_is_scipys(f, z):
    w = 2 * np.pi * f
    b, a, _ = cont2discrete(([-1, 0, 0], [1, 2 * z * w, w * w]), 1e-3, "foh")
    assert np.allclose(np.ravel(b), error_filter(f, z, 1000)[0], atol=1e-9)
    assert np.allclose(a, error_filter(f, z, 1000)[1], atol=1e-9)


def loop_mode(u, f, z, slope, substeps=4):
    "One axis by Runge-Kutta, sample by sample."
    w, h = 2 * np.pi * f, 1e-3 / substeps
    p, v = u[0], 0.0
    out = [p]
    for i in range(len(u) - 1):
        du = (u[i + 1] - u[i]) * 1000

        def acc(p, v, x, du=du):
            return w * w * (1 + slope * (p - 110) / 110) * (x - p) + 2 * z * w * (du - v)

        for j in range(substeps):
            a, m, b = (u[i] + (u[i + 1] - u[i]) * (j + q) / substeps for q in (0, 0.5, 1))
            k1 = acc(p, v, a)
            k2 = acc(p + h / 2 * v, v + h / 2 * k1, m)
            k3 = acc(p + h / 2 * (v + h / 2 * k1), v + h / 2 * k2, m)
            k4 = acc(p + h * (v + h / 2 * k2), v + h * k3, b)
            p = p + h * v + h * h / 6 * (k1 + k2 + k3)
            v = v + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        out.append(p)
    return np.array(out)


def path(seconds=12, seed=0):
    s = sample(
        plan(parse_gcode(part_program("box", seed, layers=3))),
        1000,
        ("x", "y", "e"),
        8,
        8 + seconds,
    )
    return s["x"], s["y"], s["e"]


def test_lanes_are_one_long_loop():
    "Side by side or one after the other: the same positions."
    from gcode_ml.trajectory.simulate import nonlinear_mode

    x = path(3)[0]
    assert (
        np.abs(nonlinear_mode(x, 55, 0.08, 1000, slope=0.15) - loop_mode(x, 55, 0.08, 0.15)).max()
        < 1e-9
    )
    long = np.tile(np.concatenate([x, x[::-1]]), 3)
    for options in (
        dict(slope=0.1),
        dict(friction=0.015),
        dict(growth=np.linspace(1, 1.05, len(long))),
    ):
        whole = nonlinear_mode(long, 40, 0.05, 1000, **options)
        parts = nonlinear_mode(
            long[:9000],
            40,
            0.05,
            1000,
            **{k: v[:9000] if k == "growth" else v for k, v in options.items()},
        )
        assert np.abs(whole[:9000] - parts).max() < 1e-7, options


def test_play_is_the_loop():
    rng = np.random.default_rng(1)
    for n in (1, 2, 50, 777):
        x = np.cumsum(rng.normal(0, 0.003, n))
        y, slow = x[0], []
        for v in x:
            y = min(max(y, v - 0.005), v + 0.005)
            slow.append(y)
        assert np.array_equal(backlash(x, 0.01), slow)


def test_friction_holds_an_axis():
    "A slow move drags behind by the band, at rest the axis stays within it."
    x = np.concatenate([np.zeros(100), np.linspace(0, 5, 2000), np.full(900, 5.0)])
    e = tracking_error(x, x, Machine(friction=0.012))[0]
    assert np.isclose(e[1900], -0.012, atol=2e-4)
    assert abs(e[-1]) <= 0.0121


def test_coupled_belts_against_lsim():
    "Modes of a CoreXY are the four-state system."
    m = Machine("c", "corexy", (70.0, 60.0), (0.05, 0.05), belt_ratio=1.2)
    wx, wy = 2 * np.pi * np.array(m.frequency)
    k = 0.2 / 2.2
    mass = np.diag([1 / wx**2, 1 / wy**2])
    K = np.array([[1, k], [k, 1]])
    root = np.sqrt(mass)
    lam, V = np.linalg.eigh(np.linalg.inv(root) @ K @ np.linalg.inv(root))
    C = root @ V @ np.diag(2 * 0.05 * np.sqrt(lam)) @ V.T @ root
    A = np.block(
        [[np.zeros((2, 2)), np.eye(2)], [-np.linalg.solve(mass, K), -np.linalg.solve(mass, C)]]
    )
    x, y, _ = path(2)
    u = np.stack([x - x[0], y - y[0]], 1)
    du = np.vstack([np.diff(u, axis=0) * 1000, [[0, 0]]])
    fine = np.repeat(du, 20, 0)
    position = np.vstack([[0, 0], np.cumsum(fine, 0)[:-1] / 20000])
    drive = np.linalg.solve(mass, (K @ position.T + C @ fine.T)).T
    out = lsim(
        (A, np.vstack([np.zeros((2, 2)), np.eye(2)]), np.eye(4)[:2], np.zeros((2, 2))),
        drive,
        np.arange(len(drive)) / 20000,
    )[1]
    assert np.abs((out - position)[::20] - np.stack(tracking_error(x, y, m), 1)).max() < 2e-4


def test_every_effect_switches():
    "Each effect changes the error, and without all of them the linear machine is left."
    x, y, e = path()
    full = replace(
        MACHINES["hard"],
        friction=0.01,
        steps=80.0,
        moving_mass=0.4,
        pressure_advance=0.05,
        nozzle_lag=0.05,
    )
    linear = np.stack([axis_error(x, 55, 0.08), axis_error(y, 40, 0.08)])
    assert np.array_equal(np.stack(tracking_error(x, y, full.only(), filament=e)), linear)
    assert full.only() == full.without(*EFFECTS)
    for name in ("second_mode", "belt", "ripple", "steps", "friction", "backlash", "mass"):
        assert (
            np.abs(np.stack(tracking_error(x, y, full.only(name), filament=e)) - linear).max()
            > 1e-7
        ), name
    assert (
        np.std(tracking_error(x, y, Machine("c", "corexy", belt_ratio=1.3))[1] - linear[1]) > 1e-5
    )


def test_ripple_of_a_corexy_lies_along_the_diagonals():
    x = np.linspace(0, 3, 500)
    r = ((0.01, 0.8, 0.0),)
    a, b = motor_positions(x, 0 * x, Machine("c", "corexy", ripple=r))
    assert np.allclose(a - x, 0.01 * np.sin(2 * np.pi * x / 0.8))
    assert np.allclose(b, 0)


@pytest.mark.parametrize(
    "bad",
    [
        dict(damping=(1.0, 0.1)),
        dict(damping=(0.0, 0.1)),
        dict(frequency=(-5.0, 40.0)),
        dict(frequency=(50.0,)),
        dict(backlash=-0.1),
        dict(kind="delta"),
        dict(belt_slope=2.0),
        dict(friction=float("nan")),
    ],
    ids=str,
)
def test_bad_machines(refused, bad):
    assert refused(Machine, **bad)


def test_bad_rates(refused):
    assert "quarter" in refused(axis_error, T, 300, 0.1, 1000.0)
    assert "belt_ratio" in refused(
        tracking_error, T, T, Machine("c", "corexy", belt_ratio=1.1, friction=0.01)
    )


def test_random_machines_are_sound():
    for s in range(40):
        m = random_machine(s)
        p = random_process(s)
        assert 35 <= m.frequency[0] <= 90
        assert 25 <= m.frequency[1] <= 60
        assert m == random_machine(s)
        assert 300 <= p["acceleration"] <= 5000
        assert Machine(**json.loads(json.dumps(asdict(m)))) == m
    x, y, e = path(3)
    assert all(
        np.isfinite(tracking_error(x, y, random_machine(s), 2000.0, e)).all() for s in range(3)
    )


@pytest.mark.parametrize("kind", SHAPERS)
@pytest.mark.parametrize("z", [0.02, 0.1])
def test_shapers(kind, z):
    "Amplitudes sum to one, the mean time is zero, the vibration at the design frequency is what the shaper promises."
    a, t = shaper_impulses(kind, 45, z)
    left = residual_vibration((a, t), 45, z)
    assert np.isclose(a.sum(), 1)
    assert np.isclose((a * t).sum(), 0)
    assert (a > 0).all()
    assert left < {"ZV": 1e-9, "ZVD": 1e-9, "MZV": 0.02}.get(kind, 0.08)


def test_shaper_bands_and_smoothing():
    "Widths of the 5 % band at damping 0.1 and the smoothing of a turn, against published tables."
    bands = dict(ZV=(-0.04, 0.04), MZV=(-0.06, 0.07), ZVD=(-0.17, 0.17), EI=(-0.21, 0.22)) | {
        "2HUMP": (-0.37, 0.40),
        "3HUMP": (-0.48, 0.53),
    }
    for k, (low, high) in bands.items():
        f = 50 * np.linspace(0.4, 1.7, 1301)
        bad = f[residual_vibration(shaper_impulses(k, 50), f) > 0.051]
        assert (
            abs(bad[bad < 50].max() / 50 - 1 - low) < 0.012
            and abs(bad[bad > 50].min() / 50 - 1 - high) < 0.012
        ), k
    assert np.allclose(
        [shaper_smoothing(shaper_impulses(k, 50)) for k in SHAPERS],
        [0.062, 0.081, 0.123, 0.129, 0.216, 0.328],
        atol=1.5e-3,
    )


def test_residual_vibration_is_what_is_left():
    "The formula against the ringing after a shaped corner."
    x = np.where(T < 0.7, 60 * T, 42.0)
    for k, f in (("ZV", 50), ("MZV", 50), ("EI", 44)):
        rings = [
            np.abs(apply_input_shaper(x, i) + axis_error(apply_input_shaper(x, i), 40, 0.05) - x)[
                800:
            ].max()
            for i in (shaper_impulses(k, f, 0.05), ([1.0], [0.0]))
        ]
        i = shaper_impulses(k, f, 0.05)
        late = np.exp(0.05 * 2 * np.pi * 40 * i[1][-1])
        assert abs(rings[0] / rings[1] - residual_vibration(i, 40, 0.05) * late) < 0.06


def test_shaping_keeps_a_steady_speed_and_the_ends():
    for k in SHAPERS:
        y = apply_input_shaper(30 * T, shaper_impulses(k, 50))
        assert np.allclose(y[200:-200], 30 * T[200:-200], atol=1e-9)
        assert len(y) == len(T)


def test_a_shaper_helps_on_a_part():
    p = plan(parse_gcode(part_program("box", 0, layers=2)))
    m = MACHINES["soft"]
    r = simulate_part(p, "soft")

    def e(r):
        return np.hypot(r["error_x"], r["error_y"]).std()

    z = simulate_part(
        p, "soft", shapers=[shaper_impulses("ZV", f, d) for f, d in zip(m.frequency, m.damping)]
    )
    assert e(z) < 0.4 * e(r)
    subtracted = np.stack([r["x"] - r["error_x"], r["y"] - r["error_y"]])
    left = np.stack(tracking_error(*subtracted, m)) + subtracted - np.stack([r["x"], r["y"]])
    assert np.sqrt((left**2).sum(0).mean()) > np.sqrt(
        np.mean(r["error_x"] ** 2 + r["error_y"] ** 2)
    )  # subtracting even the exact error makes it worse


def test_thermal_against_euler_and_its_laws():
    th = Thermal()
    stack = np.zeros(0)
    c = th.density * th.capacity * th.height
    k = th.conductivity / th.height
    rim = th.side * th.rim * th.height
    for dt in (0.05, 0.025):
        stack = np.zeros(0)
        found = []
        for n in range(25):
            found.append(stack[-1] if n else th.bed)
            stack = np.append(stack, th.deposit)
            d = np.full(n + 1, rim + c / dt)
            d[1:] += k
            d[:-1] += k
            d[0] += th.bed_contact
            d[-1] += th.convection + th.radiation
            heat = np.full(n + 1, rim * th.ambient)
            heat[0] += th.bed_contact * th.bed
            heat[-1] += (th.convection + th.radiation) * th.ambient
            ab = np.zeros((3, n + 1))
            ab[1] = d
            ab[0, 1:] = ab[2, :-1] = -k
            for _ in range(int(6 / dt)):
                stack = solve_banded((1, 1), ab, heat + c / dt * stack)
        exact = layer_temperatures(np.full(25, 6.0)).substrate.to_numpy()
        assert np.abs(np.array(found) / exact - 1).max() < (0.02 if dt == 0.05 else 0.01)
    peaks = [layer_temperatures(np.full(40, s)).loc[10:].substrate.max() for s in (5.0, 10.0, 20.0)]
    assert 70 < peaks[0] < 90
    assert 45 < peaks[1] < 60
    assert 32 < peaks[2] < 48
    assert layer_temperatures(np.full(40, 8.0)).adhesion.loc[10:].between(0.8, 1).all()
    assert layer_temperatures(np.full(40, 22.0)).adhesion.loc[10:].between(0.6, 0.8).all()
    deep = layer_temperatures(np.full(100, 9.0), Thermal(depth=1000))
    assert np.abs(deep.substrate - layer_temperatures(np.full(100, 9.0)).substrate).max() < 0.5


def test_verification_holds():
    assert verify_simulation().ok.all()


# data


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    here = tmp_path_factory.mktemp("trajectory")
    for f in write_parts(here / "gcode", ("box", "tube", "label"), (0, 1), layers=5):
        collect(f, here / "set", "all", ["bedslinger", "random:7"])
    return here / "set"


@pytest.fixture(scope="module")
def windows(collection):
    return TrajectoryWindows(read_collection(collection))


def test_features_are_what_they_say():
    p = plan(parse_gcode(part_program("tube", 0, layers=1, arcs=True)))
    f = dict(zip(FEATURES, trajectory_features(p).T))
    s = sample(p, 500, ("vx", "vy", "v", "segment"))
    assert np.allclose(f["vx"], s["vx"], atol=1e-4)
    assert np.allclose(f["ax"][1:], np.diff(s["vx"]) * 500, atol=0.05)
    assert np.allclose(f["jx"][2:], np.diff(s["vx"], 2) * 250000, atol=20)
    assert np.allclose(f["cos"] ** 2 + f["sin"] ** 2, 1, atol=1e-5)
    assert (np.abs(f["curvature"]) <= 20).all()
    assert (f["since"] <= 1).all()
    assert (f["since"] >= 0).all()
    assert (f["distance"] >= -1e-6).all()
    arc = p.turn[s["segment"]]
    assert (arc != 0).any()
    assert np.allclose(f["curvature"][arc != 0], arc[arc != 0], rtol=1e-4)
    assert np.isclose(
        f["flow"].clip(0)[f["extruding"] == 1].sum() / 500,
        p.filament * np.pi * 1.75**2 / 4,
        rtol=0.01,
    )
    assert np.array_equal(
        trajectory_features(p, start=1.0, stop=2.0), trajectory_features(p)[500:1000]
    )
    assert np.array_equal(
        prepare_trajectory_features(part_program("tube", 0, layers=1, arcs=True)),
        trajectory_features(p),
    )


def test_mirrored_part_has_mirrored_features():
    "Signs of one axis' velocities, of curvature and turning angle; nothing else."
    text = "M83\nG1 F3000\nG1 X20 Y5 E1\nG1 X30 Y20 E1\nG3 X40 Y30 I10 J0 E1\nG1 X0 Y1\n"
    mirrored = text.replace("Y", "Y-").replace("G3", "G2").replace("J0", "J-0")
    a, b = (trajectory_features(plan(parse_gcode(t))) for t in (text, mirrored))
    sign = np.array(
        [-1 if n in ("vy", "ay", "jy", "sin", "curvature", "next_turn") else 1 for n in FEATURES]
    )
    assert np.allclose(a, b * sign, atol=1e-3, rtol=1e-3)


def test_collecting_twice_does_nothing_and_a_cut_is_repaired(collection, tmp_path):
    f = write_parts(tmp_path / "g", ("box",), layers=2)[0]
    home = collect(f, tmp_path / "s", "all", ["soft", "hard"])
    before = {p.name: p.stat().st_mtime_ns for p in home.iterdir()}
    collect(f, tmp_path / "s", "all", ["soft", "hard"])
    assert before == {p.name: p.stat().st_mtime_ns for p in home.iterdir()}
    (home / "hard.json").unlink()
    (home / "hard.parquet").write_bytes(b"half")
    collect(f, tmp_path / "s", "all", ["soft", "hard"])
    assert {p.name for p in home.iterdir() if p.stat().st_mtime_ns != before[p.name]} == {
        "hard.json",
        "hard.parquet",
    }
    assert check(tmp_path / "s") == []
    f.write_text(part_program("box", 5, layers=2))
    collect(f, tmp_path / "s", "all", ["soft"])
    faults = check(tmp_path / "s")
    # the other machine still has the old motion
    assert len(faults) == 1
    assert "another one" in faults[0]


def test_windows_are_the_series(windows):
    rng = np.random.default_rng(0)
    index = rng.integers(0, len(windows), 40)
    inputs, mask, targets = windows.batch(index)
    assert mask.all()
    assert mask.shape == (40, 128)
    for k, i in enumerate(index):
        item = windows.item(i)
        s = windows.series[windows.run_table.series[windows.recording[i]]]
        at = np.flatnonzero(s.part.sample == item["metadata"]["start"])[0]
        assert torch.equal(inputs["features"][k], item["input_features"])
        assert np.array_equal(targets["error"][k], s.errors[at : at + 128])
        assert item["metadata"]["machine"] == json.dumps(s.machine)
        assert np.array_equal(targets["thermal_mask"][k], s.part.features[at : at + 128, 13] > 0)
    assert (np.diff(windows.start)[(np.diff(windows.recording) == 0)] <= 4).all()


def test_splits_keep_families_and_machines_apart(windows, refused):
    def side(index, c):
        return set(windows.run_table[c].to_numpy()[windows.recording[index]])

    for kind, names in (
        ("family", ("box", "label", "tube")),
        ("machine", ("bedslinger", "random_7")),
    ):
        for n in names:
            train, valid, test = split_windows(windows, kind, n)
            assert side(test, kind) == {n}
            assert n not in side(train, kind) | side(valid, kind)
            assert len(train) + len(valid) + len(test) == len(windows)

    def runs(i):
        return set(
            zip(
                windows.run_table.part.to_numpy()[windows.recording[i]],
                windows.run_table.layer.to_numpy()[windows.recording[i]],
            )
        )

    train, valid, test = split_windows(windows, "family", "box")
    assert not runs(train) & runs(valid)
    train, _, test = split_windows(windows, "layer")
    assert not runs(train) & runs(test)
    assert side(test, "family") & side(train, "family")
    assert "another one" in refused(split_windows, windows, "family", "box,label,tube")
    assert "one of" in refused(split_windows, windows, "family", "boat")
    assert "one of" in refused(split_windows, windows, "time")


def test_scale_comes_from_training_windows_only(collection):
    series = read_collection(collection)
    w = TrajectoryWindows(series)
    train, _, test = split_windows(w, "family", "tube")
    before = asdict(fit_standardizer(w, train))
    for s in series:
        if s.part.family == "tube":
            s.part.features, s.errors = s.part.features * 3, s.errors + 1
    again = TrajectoryWindows(series)
    assert asdict(fit_standardizer(again, train)) == before
    x = w.batch(train[::9])[0]["features"]
    assert torch.isfinite(x).all()
    assert x.std((0, 1))[:6].max() < 3


def test_constant_feature_warns(collection):
    series = read_collection(collection, ["box_0"], ["bedslinger"])
    series[0].part.features = series[0].part.features * (np.arange(15) != 9)
    w = TrajectoryWindows(series)
    with pytest.warns(UserWarning, match="curvature"):
        s = fit_standardizer(w, np.arange(len(w)))
    assert s.std[9] == 1e-6
    assert torch.isfinite(w.batch([0])[0]["features"]).all()


def test_loader_and_travel_windows(windows):
    train, valid, _ = split_windows(windows, "family", "tube")
    fit_standardizer(windows, train)
    xb, mask, yb = next(
        iter(dataloaders(Subset(windows, train[:64]), Subset(windows, valid[:8]), 16).train)
    )
    assert xb["features"].shape == (16, 128, 15)
    assert xb["static"].shape == (16, 2)
    assert yb["thermal"].shape == (16, 128, 3)
    assert torch.isfinite(yb["thermal"]).all()
    assert not yb["thermal"][~yb["thermal_mask"]].any()
    windows.scale = None


def test_sample_files_round_trip(windows, tmp_path, refused):
    train, valid, test = split_windows(windows, "family", "tube")
    assert "scale" in refused(write_samples, windows, tmp_path, dict(train=train))
    fit_standardizer(windows, train)
    write_samples(windows, tmp_path, dict(train=train[:9], val=valid[:3], test=test[:3]))
    files = SampleFiles(tmp_path / "val")
    a = files.batch([0, 1, 2])
    b = windows.batch(valid[:3])
    assert files.scale == Standardizer.read(tmp_path / "stats.json") == windows.scale
    assert all(torch.allclose(a[0][k], b[0][k], atol=1e-5) for k in b[0])
    assert all(torch.allclose(a[2][k].float(), b[2][k].float(), atol=1e-5) for k in b[2])
    windows.scale = None
    found = torch.load(tmp_path / "train" / "sample_00001.pt", weights_only=True)
    assert set(found) == {
        "input_features",
        "trajectory_targets",
        "thermal_targets",
        "metadata",
    }
    assert found["input_features"].shape == (128, 15)
    assert check(tmp_path) == []
    torch.save(
        dict(found, trajectory_targets=found["trajectory_targets"][:5]),
        tmp_path / "train" / "sample_00002.pt",
    )
    (tmp_path / "train" / "sample_00003.pt").write_bytes(b"junk")
    assert len(check(tmp_path)) == 2


def test_bad_data(collection, tmp_path, refused):
    assert "at least 500000 rows" in refused(TrajectoryWindows, read_collection(collection), 500000)
    assert "file not provided" in refused(part_file, "boat")
    assert "none" in refused(read_collection, tmp_path)
    assert "none" in refused(read_collection, collection, ["box_9"])
    assert "divisor" in refused(
        collect,
        write_parts(tmp_path / "g", ("box",), layers=1)[0],
        tmp_path / "s",
        "all",
        "soft",
        333.0,
    )
    (tmp_path / "b.gcode").write_bytes(b"\x1f\x8b\x00\x00")
    assert refused(collect, tmp_path / "b.gcode", tmp_path / "s")
    assert check(tmp_path / "nothing")[0].endswith(".")
