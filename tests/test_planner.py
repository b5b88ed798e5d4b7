"The planner against loops, closed forms and the slicers' own totals."

import numpy as np
import pytest

from gcode_ml.gcode.parts import part_program
from gcode_ml.gcode.planner import (
    Limits,
    compare_with_slicer,
    deviation_junctions,
    jerk_junctions,
    klipper_junctions,
    limits_of_lines,
    look_ahead,
    outside,
    plan,
    sample,
    sample_blocks,
    slicer_totals,
)
from gcode_ml.gcode.reader import filament_used, moves, parse_gcode, read_gcode

FILES = dict(
    benchy_crealityprint_ender3v2=5276, benchy_prusaslicer_mini=6314, helixcube_prusaslicer_mini=399
)


def real(name):
    from gcode_ml.lab.settings import data_folder

    folder = data_folder("gcode")
    path = folder and next(iter(folder.glob(f"{name}.*")), None)
    return path or pytest.skip(f"{name} is absent")


def loop_jerk(unit, nominal, jerk):
    "Marlin's classic jerk, axis by axis and move by move."
    safe = [
        min(v, min(j / abs(u) if u else np.inf for u, j in zip(us, js)))
        for us, v, js in zip(unit, nominal, jerk)
    ]
    found = [safe[0]]
    for k in range(1, len(unit)):
        small = min(nominal[k], nominal[k - 1])
        f = 1.0
        for a in range(4):
            p = unit[k - 1][a] * small * f
            q = unit[k][a] * nominal[k] * f
            change = abs(p - q) if p * q >= 0 else max(abs(p), abs(q))
            if change > jerk[k][a]:
                f *= jerk[k][a] / change
        v = small * f
        found.append(min(safe[k], small) if safe[k - 1] > 0.99 * v and safe[k] > 0.99 * v else v)
    return np.array(found)


def loop_passes(cap, rise):
    w = cap.copy()
    for i in range(len(rise) - 1, -1, -1):
        w[i] = min(w[i], w[i + 1] + rise[i])
    for i in range(len(rise)):
        w[i + 1] = min(w[i + 1], w[i] + rise[i])
    return w


def test_junctions_against_a_loop():
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(500, 4))
    unit /= np.linalg.norm(unit[:, :3], axis=1)[:, None]
    unit[::7] = [0, 0, 0, 1]
    unit[::11, :3] = [0, 0, -1]
    nominal = rng.uniform(5, 100, 500)
    jerk = rng.uniform(0.3, 12, (500, 4))
    assert np.allclose(
        jerk_junctions(unit, nominal, jerk), loop_jerk(unit, nominal, jerk), atol=1e-9
    )


@pytest.mark.parametrize("n", [1, 2, 1023, 1024, 1025, 5000])
def test_passes_against_a_loop(n):
    rng = np.random.default_rng(n)
    cap = np.append(rng.uniform(0, 5e3, n) * (rng.random(n) < 0.9), 0)
    rise = rng.exponential(300, n)
    assert np.allclose(look_ahead(cap, rise) ** 0.5, loop_passes(cap, rise) ** 0.5, atol=1e-9)


def test_known_corner_speeds():
    "90 degrees at 500 mm/s² and 0.013 mm: 3.96 mm/s; straight on is free; back is a stop."
    unit = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 1.0, 0, 0], [0, -1.0, 0, 0]])
    v = np.full(4, 50.0)
    a = np.full(4, 500.0)
    assert np.allclose(deviation_junctions(unit, v, a, 0.013), [0, 3.962, 50, 0], atol=1e-3)
    assert np.allclose(klipper_junctions(unit, v, a, 5.0, np.full(4, 10.0)), [0, 5, 50, 0])
    assert (
        deviation_junctions(
            np.array([[1.0, 0, 0, 0], [np.cos(0.3), np.sin(0.3), 0, 0]]),
            v[:2],
            a[:2],
            0.5,
            np.full(2, 0.1),
        )[1]
        <= np.sqrt(500 * 0.1 / 0.3) + 1e-9
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(junction="deviation"),
        dict(junction="klipper"),
        dict(junction="stop"),
        dict(s_curve=True),
        dict(override=dict(acceleration=3000.0, jerk=15.0, speed_factor=1.5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("family,arcs", [("box", False), ("tube", True), ("label", False)])
def test_plan_keeps_its_limits(family, arcs, options):
    "No speed above what was asked, no acceleration above its limit, no jump in place, and all of the way."
    p = plan(parse_gcode(part_program(family, 1, layers=2, arcs=arcs)), **options)
    assert (p.peak <= p.nominal * (1 + 1e-9)).all()
    assert (p.entry <= p.peak + 1e-9).all()
    assert (p.exit <= p.peak + 1e-9).all()
    assert (p.phases >= -1e-12).all()
    way = (
        (p.entry + p.peak) / 2 * p.phases[:, 0]
        + p.peak * p.phases[:, 1]
        + (p.peak + p.exit) / 2 * p.phases[:, 2]
    )
    assert np.allclose(way, p.length, atol=1e-9)
    assert p.exit[-1] == 0
    inner = p.exit[:-1] - p.entry[1:]
    assert np.abs(inner[p.pause[1:-1] == 0]).max() < 1e-9
    s = sample(p, 4000, ("x", "y", "z", "e", "v", "a"))
    assert np.abs(np.diff(s["x"])).max() * 4000 <= p.peak.max() * 1.001
    assert s["a"].max() <= p.acceleration.max() * (1.876 if p.s_curve else 1.000001)
    end = p.start[-1] + p.unit[-1] * p.length[-1]
    assert np.allclose([s[c][-1] for c in "xyze"], end, atol=1e-3)


def test_speed_is_the_slope_of_the_way():
    p = plan(parse_gcode(part_program("tube", 0, layers=1)), s_curve=True)
    s = sample(p, 20000, ("s", "v", "a", "segment"))
    same = np.diff(s["segment"]) == 0
    assert np.abs(np.diff(s["s"]) * 20000 - (s["v"][1:] + s["v"][:-1]) / 2)[same].max() < 0.01


def test_blocks_and_spans_are_the_whole():
    p = plan(parse_gcode(part_program("label", 0, layers=1)))
    whole = sample(p, 1000)
    for block in (7, 1000):
        assert np.array_equal(
            np.concatenate([b["y"] for b in sample_blocks(p, 1000, ("y",), block=block)]),
            whole["y"],
        )
    part = sample(p, 1000, start=3.2, stop=4.7)
    assert all(np.array_equal(part[c], whole[c][3200:4700]) for c in whole)


def test_waits_stop_the_motion():
    p = plan(
        parse_gcode("M83\nG1 X10 E1 F3000\nG4 P250\nG1 X20 E1\nG4 S2\nG1 X30 E1\nM400\nG1 X40 E1\n")
    )
    assert p.pause.tolist() == [0, 0.25, 2, 0, 0]
    assert (p.exit == 0).all()
    s = sample(p, 1000, ("t", "x"))
    still = (s["t"] > p.begin[1] - 0.25) & (s["t"] < p.begin[1])
    assert np.ptp(s["x"][still]) < 1e-9


def test_units_incremental_planes_and_feed():
    p = plan(parse_gcode("G20 G91 G1 F60\nG1 X1\nG1 X1 F30\n"))
    assert p.length.tolist() == [25.4, 25.4]
    assert np.allclose(p.nominal, [25.4, 12.7])
    arc = plan(parse_gcode("G18 G1 F600 X0\nG2 X10 Z0 I5 K0\n"))
    assert np.isclose(arc.length.sum(), 5 * np.pi, rtol=1e-3)
    helix = plan(parse_gcode("G1 X5 F600\nG3 X5 Y0 Z2 I-5 J0 P2\n"))
    assert np.isclose(helix.length[helix.line == 1].sum(), np.hypot(20 * np.pi, 2), rtol=2e-3)
    assert np.isclose(plan(parse_gcode("G93\nG1 X10 F6\n")).nominal[0], 1)
    assert np.isclose(plan(parse_gcode("M220 S50\nM83\nG1 X10 E1 F600\n")).nominal[0], 5)
    assert np.isclose(plan(parse_gcode("M221 S50\nM83\nG1 X10 E1 F600\n")).unit[0, 3], 0.05)


def test_rapid_moves_of_a_mill():
    "G0 runs at the limits of the axes where nothing is extruded, at F where something is."
    assert plan(parse_gcode("G1 Y1 F60\nG0 X100\n")).nominal[1] == 500
    assert plan(parse_gcode("M83\nG1 Y1 E1 F60\nG0 X100\n")).nominal[1] == 1


def test_limits_change_on_the_way():
    t = limits_of_lines(
        parse_gcode("M205 X8\nM201 X900 Y900\nM205 X12 J0.02\nM566 X600\n"), dialect="marlin"
    )
    assert t["jerk"][:, 0].tolist() == [8, 8, 12, 12]
    assert t["acceleration"][0, 0] == 500
    assert t["deviation"].tolist() == [0.013, 0.013, 0.02, 0.02]
    k = limits_of_lines(
        parse_gcode("SET_VELOCITY_LIMIT VELOCITY=80 ACCEL=2000 ACCEL_TO_DECEL=500\nG1 X1\n")
    )
    assert k["speed"][1, 0] == 80
    assert k["printing"][1] == 2000
    assert np.isclose(k["cruise"][1], 0.75)
    assert plan(parse_gcode("SET_VELOCITY_LIMIT ACCEL=2000\nG1 X1 F60")).junction == "klipper"
    assert plan(parse_gcode("M205 J0.02\nG1 X1 F60")).junction == "deviation"


@pytest.mark.parametrize(
    "text,word",
    [
        ("M204 P0\nG1 X1 F60", "P of M204 above 0"),
        ("M203 X-5\nG1 X1 F60", "X of M203 above 0"),
        ("M205 Y0\nG1 X1 F60", "Y of M205 above 0"),
        ("SET_VELOCITY_LIMIT ACCEL=0\nG1 X1 F60", "ACCEL above 0"),
        ("G28\nM107\n", "at least one that changes position"),
        ("; nothing\n", "at least one"),
    ],
)
def test_bad_programs(refused, text, word):
    assert word in refused(plan, parse_gcode(text))


def test_bad_arguments(refused):
    p = parse_gcode("G1 X1 F60")
    assert "jerk" in refused(plan, p, Limits(jerk=(0, 8, 8, 8)))
    assert "override" in refused(plan, p, override=dict(speed=3))
    assert "junction" in refused(plan, p, junction="fast")
    assert "rate" in refused(sample, plan(p), 0)
    assert "column" in refused(sample, plan(p), 10, ("w",))
    assert "time" in refused(sample, plan(p), 100, ("x",), 99.0)


def test_odd_moves_are_planned_and_noted():
    p = plan(
        parse_gcode(
            "M83\nG1 X5\nG1 X5\nG1 E-1\nG1 Z1 F300\nG1 X5.000000001\nG1 X2000 F0\nG28\nG1 X10\n"
        )
    )
    assert all(np.isfinite(v).all() for v in sample(p, 500).values())
    assert len(p.issues) == 3
    s = sample(p, 500, ("x", "z"))
    assert np.abs(np.diff(s["x"])).max() < 2  # homing is no jump
    assert outside(plan(parse_gcode("G1 X10 F600\nG1 Y300\n"))).tolist() == [1]


@pytest.mark.parametrize("name", FILES)
def test_totals_of_the_slicers(name):
    "Printing time within 5 %, layers within 8 %, filament to 0.01 %."
    program = read_gcode(real(name))
    p = plan(program)
    ratio = compare_with_slicer(program, p)
    assert slicer_totals(program)["seconds"] == FILES[name]
    assert abs(ratio["seconds"] - 1) < 0.05
    if name.startswith("benchy_c"):
        assert abs(np.median(ratio["layers"]) - 1) < 0.08
        assert (np.abs(np.percentile(ratio["layers"], [5, 95]) - 1) < 0.08).all()
        assert len(ratio["layers"]) > 230
    missing = (
        18 if "mini" in name and "benchy" in name else 0
    )  # an intro line that was cut from the commands
    assert abs((p.filament + missing) / slicer_totals(program)["filament"] - 1) < 1e-4
    assert np.isclose(p.filament, filament_used(moves(program)))


def test_every_real_file_is_planned():
    from gcode_ml.lab.settings import data_folder

    folder = data_folder("gcode") or pytest.skip("no real G-code")
    for f in sorted(folder.iterdir()):
        if f.suffix not in (".gcode", ".ngc") or f.stat().st_size > 3e6:
            continue
        p = plan(f)
        assert p.duration > 0 and all(np.isfinite(v).all() for v in sample(p, 50).values()), f
