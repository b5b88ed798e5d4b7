"Corrected programs: what they keep, what they are worth when printed again, and what is refused."

import numpy as np
import pytest

from gcode_ml.gcode.parts import part_program
from gcode_ml.gcode.planner import plan, sample
from gcode_ml.gcode.reader import moves, parse_gcode
from gcode_ml.lab.cli import main
from gcode_ml.trajectory.correct import (
    Compensation,
    apply_correction,
    compare_methods,
    compensate,
    correct_program,
    evaluate_corrected,
    firmware_lines,
    identify_machine,
    inverse_command,
    machine_prior_samples,
    motor_command,
    perturbed_machines,
    print_evaluator,
    resampled_program,
    select_compensation,
    select_shaper,
    simulate_calibration_print,
)
from gcode_ml.trajectory.simulate import (
    MACHINES,
    Machine,
    axis_error,
    named_machine,
    random_machine,
)

MODES = list(zip(MACHINES["bedslinger"].frequency, MACHINES["bedslinger"].damping))


@pytest.fixture(scope="module")
def text():
    return part_program("box", 1, layers=1)


@pytest.fixture(scope="module")
def made(text):
    return {
        m: correct_program(parse_gcode(text), MODES, m, [MACHINES["bedslinger"]])
        for m in ("inverse", "ZV", "MZV")
    }


def test_inverse_is_below_zv_on_the_machine_it_knows(made):
    contour = {m: c.table.contour_after[0] for m, c in made.items()}
    assert contour["inverse"] < contour["ZV"] < contour["MZV"] < made["ZV"].table.contour_before[0]


def test_mistuned_inverse_is_not_worse_than_mistuned_mzv(text):
    "10 % off either way."
    evaluator = print_evaluator(plan(parse_gcode(text)))
    for off in (0.9, 1.1):
        modes = [(f * off, z) for f, z in MODES]
        table = (
            compare_methods(evaluator, modes, [MACHINES["bedslinger"]], ("none", "MZV", "inverse"))
            .set_index("method")
            .contour
        )
        assert table["inverse"] < table["MZV"] < table["none"]


def test_subtracting_the_error_makes_it_worse(text):
    "The obvious correction is the negative control."
    evaluator = print_evaluator(plan(parse_gcode(text)))
    m = MACHINES["bedslinger"]
    exact = np.column_stack([axis_error(v, f, z) for v, (f, z) in zip(evaluator.position.T, MODES)])
    assert (
        evaluator.evaluate(evaluator.position - exact, m)["contour"]
        > 2 * evaluator.evaluate(evaluator.position, m)["contour"]
    )


def test_inverse_undoes_a_smooth_motion():
    "A slow sine arrives where it was sent."
    t = np.arange(4000) / 1000
    x = 10 * np.sin(2 * np.pi * 2 * t) ** 2
    c = inverse_command(x, 40, 0.1)
    assert (
        np.abs(c + axis_error(c, 40, 0.1) - x)[200:-200].max()
        < 0.05 * np.abs(axis_error(x, 40, 0.1)).max()
    )


def test_resampled_program_keeps(text, made):
    "Comments, other lines, extrusion of each line, layers and time."
    a = parse_gcode(text)
    b = parse_gcode(made["inverse"].text)
    p = plan(a)
    q = plan(b)
    assert [l for l in b.lines if not l.startswith(("G1 ", "M201", "M204", "M205"))] == [
        l for l in a.lines if not l.startswith(("G1 ", "M201", "M204", "M205"))
    ]
    assert abs(moves(a).de.sum() - moves(b).de.sum()) < 1e-3
    assert abs(p.duration - q.duration) < 0.01 * p.duration
    assert set(p.layer) == set(q.layer)
    assert all(l in b.lines for l in a.lines if l.startswith("M2"))


def test_absolute_extrusion(text):
    "A program with M82 and G92 E0 gives the same filament line by line."
    lines, e = [], 0.0
    for l in text.splitlines():
        words = l.split()
        if l == "M83":
            l = "M82"
        elif words and words[0] == "G1" and (w := [i for i, x in enumerate(words) if x[0] == "E"]):
            e += float(words[w[0]][1:])
            words[w[0]] = f"E{e:.5f}"
            l = " ".join(words)
        elif l == ";TYPE:Outer wall":
            l += "\nG92 E0"
            e = 0.0
        lines.append(l)
    absolute = parse_gcode("\n".join(lines))
    done = correct_program(absolute, MODES, "inverse", [MACHINES["bedslinger"]])
    assert abs(moves(parse_gcode(done.text)).de.sum() - moves(parse_gcode(text)).de.sum()) < 2e-3


def test_never_worse_on_machines_it_does_not_know(text):
    "What is not better on every machine that is judged is not written."
    program = parse_gcode(text)
    for seed in range(2):
        machine = random_machine(seed, "bedslinger")
        try:
            done = correct_program(program, MODES, "inverse", [machine])
        except Exception as e:
            assert "nothing was written" in str(e)
        else:
            assert (done.table.contour_after < done.table.contour_before).all()


def test_a_program_judged_twice_is_the_same(text):
    p = plan(parse_gcode(text))
    evaluator = print_evaluator(p)
    same = np.arange(len(text.splitlines()) + 1)
    assert evaluate_corrected(p, evaluator, p, same, MACHINES["hard"])["contour"] == pytest.approx(
        evaluator.evaluate(evaluator.position, MACHINES["hard"])["contour"], rel=1e-3
    )


def test_advice(text):
    evaluator = print_evaluator(plan(parse_gcode(text)))
    table = compare_methods(
        evaluator, MODES, perturbed_machines(MODES), ("none", "ZV", "MZV", "EI")
    )
    best = select_shaper(table)
    worst = table.groupby("method").contour.max()
    assert worst[best] == worst[["ZV", "MZV", "EI"]].min()
    assert firmware_lines("3HUMP", MODES)[0].startswith(
        "SET_INPUT_SHAPER SHAPER_TYPE_X=3hump_ei SHAPER_FREQ_X=55"
    )


def test_shaper_line_and_nothing_else(text, made):
    assert [
        l for l in made["ZV"].text.splitlines() if not l.startswith("SET_INPUT_SHAPER")
    ] == text.splitlines()


def test_vertices_keep_everything_but_positions(text):
    "Zero error is the same bytes; otherwise lines, E, F and comments stay."
    n = len(sample(plan(parse_gcode(text)), 500.0, ("x",))["x"])
    assert apply_correction(text, np.zeros(n), np.zeros(n)) == text
    moved = apply_correction(text, np.full(n, 0.02), np.full(n, -0.02))
    a = moves(parse_gcode(text))
    b = moves(parse_gcode(moved))
    assert len(moved.splitlines()) == len(text.splitlines())
    assert a.de.equals(b.de)
    assert a.feed.equals(b.feed)
    assert np.abs(b.x - a.x + 0.02)[6:].max() < 2e-3
    assert [l for l in moved.splitlines() if not l.startswith("G1")] == [
        l for l in text.splitlines() if not l.startswith("G1")
    ]


def test_refused(text, refused):
    program = parse_gcode(text)
    n = len(sample(plan(parse_gcode(text)), 500.0, ("x",))["x"])
    assert "at most 0.1 mm" in refused(apply_correction, text, np.full(n, 0.5), np.zeros(n))
    assert "relative ones" in refused(
        apply_correction, "G91\nG1 X1 F600\nG90\n", np.zeros(100), np.zeros(100)
    )
    assert "nothing was written" in refused(
        correct_program, program, [(20.0, 0.08)] * 2, "inverse", [MACHINES["bedslinger"]]
    )
    assert "moves inside" in refused(correct_program, program, MODES, bed=(50.0, 50.0, 50.0))
    assert "one of" in refused(correct_program, program, MODES, "subtract")
    for lines, words in (
        ("G91\nG1 X1 Y1 F600\n", "relative"),
        ("G20\nG1 X1 Y1 F60\n", "inches"),
        ("G1 X10 Y10 F600\nG92 X0 Y0\nG1 X2 Y1 E.1\n", "origin"),
    ):
        p = parse_gcode(lines)
        assert words in refused(resampled_program, p, plan(p), np.zeros((5000, 2)))


def test_commands_write_atomically(text, tmp_path, capsys):
    file = tmp_path / "box_1.gcode"
    file.write_text(text)
    out = tmp_path / "better.gcode"
    words = [
        "correct",
        str(file),
        "--model",
        "filter",
        "--frequency",
        "55",
        "40",
        "--damping",
        ".08",
        "-o",
        str(out),
        "--identified",
    ]
    assert main(words) == 0
    assert "as modelled" in capsys.readouterr().out
    assert out.exists()
    out.unlink()
    assert (
        main(
            [
                *words,
                "--method",
                "inverse",
                "--judge",
                "bedslinger",
                "--spread",
                "0",
                "--frequency",
                "20",
            ]
        )
        == 2
    )
    assert not out.exists()
    assert "gcode_ml: " in capsys.readouterr().err
    assert (
        main(
            [
                "simulate",
                str(file),
                "--layers",
                "all",
                "--machine",
                "soft",
                "-o",
                str(tmp_path / "set"),
                "--quiet",
            ]
        )
        == 0
    )
    assert (tmp_path / "set" / "box_1" / "soft.parquet").exists()
    assert main(["correct", str(tmp_path / "no.gcode"), "--model", "filter", "-o", str(out)]) == 2
    file.write_bytes(b"\x1f\x8b\x08\x00" + bytes(range(256)) * 4)
    assert main(words) == 2
    assert not out.exists()


def test_extrusion_before_a_retraction():
    "No piece of a move that lays something down draws filament back."
    text = "M83\nG1 X10 Y10 F6000\n" + "".join(
        f"G1 X{10 + 9 * (k % 2)} Y{11 + k} E.3 F1200\nG1 E-2.7 F4200\nG1 X12 Y{11.5 + k} F6000\nG1 E2.7 F2400\n"
        for k in range(6)
    )
    program = parse_gcode(text)
    motion = plan(program)
    written, origin = resampled_program(
        program, motion, np.column_stack([*sample(motion, 1000.0, ("x", "y")).values()])
    )
    a = moves(program)
    b = moves(parse_gcode(written))
    assert b.de.clip(0).sum() == pytest.approx(a.de.clip(0).sum(), rel=1e-6)
    assert (b.de[np.isin(origin[b.line], a.line[(a.de > 0) & (a.x != a.x0)])] >= 0).all()


def test_commands_one_after_the_other(text):
    "Printed in one series, each is worth what it is alone."
    evaluator = print_evaluator(plan(parse_gcode(text)))
    made = [
        evaluator.position,
        motor_command(evaluator.position, "ZV", MODES),
        motor_command(evaluator.position, "inverse", MODES),
    ]
    for machine in (MACHINES["bedslinger"], MACHINES["hard"].without("belt")):
        for one, c in zip(evaluator.evaluate_all(made, machine), made):
            assert one["contour"] == pytest.approx(
                evaluator.evaluate(c, machine)["contour"], rel=0.02
            )


@pytest.fixture(scope="module")
def hard():
    return identify_machine(*simulate_calibration_print(MACHINES["hard"]))


def test_machine_is_identified_from_a_record(hard):
    true = MACHINES["hard"]
    np.testing.assert_allclose(hard.frequency, true.frequency, rtol=0.02)
    assert abs(hard.backlash - true.backlash) < 1e-3
    assert abs(hard.second_gain - true.second_gain) < 0.03
    np.testing.assert_allclose(
        [a for a, _, _ in hard.ripple], [a for a, _, _ in true.ripple], atol=5e-4
    )
    made = Machine(
        "m",
        "cartesian",
        (62.0, 33.0),
        (0.06, 0.11),
        second_gain=0.2,
        second_ratio=2.5,
        backlash=0.02,
        ripple=((0.002, 0.8, 1.0),),
    )
    found = identify_machine(*simulate_calibration_print(made))
    np.testing.assert_allclose(
        [*found.frequency, found.backlash], [*made.frequency, made.backlash], rtol=0.03
    )


def test_identified_machine_is_below_zv(hard):
    "On a machine with a second mode, play and ripple; with frequencies 10 % off not above MZV."
    evaluator = print_evaluator(plan(parse_gcode(part_program("label", 2, layers=1))))
    modes = list(zip(hard.frequency, hard.damping))

    def of(name, k=1.0):
        return evaluator.evaluate(
            motor_command(
                evaluator.position,
                name,
                [(f * k, z) for f, z in modes],
                machine=Machine(**{**vars(hard), "frequency": [f * k for f in hard.frequency]}),
            ),
            MACHINES["hard"],
        )["contour"]

    assert of("full") < 0.5 * of("ZV")
    assert all(of("full", k) <= of("MZV", k) for k in (0.9, 1.1))


def test_safe_choice_is_better_on_the_whole_family():
    "And on machines that are not in it; the full inverse is not."
    evaluator = print_evaluator(
        plan(parse_gcode(part_program("label", 2, layers=1))), max_samples=3000
    )
    machines = machine_prior_samples(MODES)
    chosen, ratio = select_compensation(evaluator, MODES, machines)
    assert (ratio[str(chosen[0])] < 1).all()
    assert ratio["inverse"].max() > 1
    assert len({m.name for m in machines}) == len(machines)
    c = compensate(evaluator.position, chosen[0], MODES)
    for machine in (
        MACHINES["soft"],
        MACHINES["bedslinger"],
        named_machine("bedslinger:3"),
        Machine("other", "cartesian", (75.0, 52.0), (0.1, 0.05), backlash=0.01),
    ):
        assert (
            evaluator.evaluate(c, machine)["contour"]
            < evaluator.evaluate(evaluator.position, machine)["contour"]
        )
    known, _ = select_compensation(evaluator, MODES, perturbed_machines(MODES))
    assert known[0].fraction == 1
    assert (
        evaluator.evaluate(compensate(evaluator.position, known[0], MODES), MACHINES["bedslinger"])[
            "contour"
        ]
        < 0.5 * evaluator.evaluate(c, MACHINES["bedslinger"])["contour"]
    )


def test_shares_and_refusals(text, refused):
    evaluator = print_evaluator(plan(parse_gcode(text)))
    np.testing.assert_allclose(
        compensate(evaluator.position, Compensation("ZV", 1.0, 0.5), MODES),
        (evaluator.position + motor_command(evaluator.position, "ZV", MODES)) / 2,
    )
    assert "an identified machine" in refused(motor_command, evaluator.position, "full", MODES)
    assert "one of" in refused(correct_program, parse_gcode(text), MODES, Compensation("magic"))


def test_record_of_a_machine(tmp_path, capsys, refused):
    import pandas as pd

    from gcode_ml.trajectory.commands import read_record

    x, e = simulate_calibration_print(MACHINES["hard"])
    table = pd.DataFrame(
        np.column_stack([np.arange(len(x)) / 1000, x, e]),
        columns=["t", "x", "y", "error_x", "error_y"],
    )
    table.to_parquet(tmp_path / "r.parquet")
    file = tmp_path / "tube.gcode"
    file.write_text(part_program("tube", 4, layers=1))
    out = tmp_path / "out.gcode"
    assert (
        main(
            [
                "correct",
                str(file),
                "--record",
                str(tmp_path / "r.parquet"),
                "-o",
                str(out),
                "--judge",
                "hard",
            ]
        )
        == 0
    )
    assert "chosen   full" in capsys.readouterr().out
    assert out.exists()
    table.drop(columns="x").to_csv(tmp_path / "r.csv")
    assert "none called x" in refused(read_record, tmp_path / "r.csv")
    table.assign(x=np.nan).to_csv(tmp_path / "n.csv")
    assert "no numbers" in refused(read_record, tmp_path / "n.csv")
    table[:5].to_csv(tmp_path / "s.csv")
    assert "5 rows" in refused(read_record, tmp_path / "s.csv")
    assert "nothing there" in refused(read_record, tmp_path / "no.csv")
    assert main(["correct", str(file), "-o", str(out)]) == 2
