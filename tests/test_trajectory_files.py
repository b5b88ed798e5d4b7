"Files as they come: streams that were sent again, lines that cannot be read, files larger than one would hold, and what a corrected file keeps."

import subprocess
import sys

import numpy as np
import pytest

from gcode_ml.gcode.parts import part_program
from gcode_ml.gcode.planner import limit_lines, limits_of_lines, plan, program_blocks
from gcode_ml.gcode.reader import line_checksum, moves, parse_gcode, read_blocks, read_gcode
from gcode_ml.lab.cli import main
from gcode_ml.trajectory.correct import correct_file, correct_program
from gcode_ml.trajectory.data import check, collect
from gcode_ml.trajectory.simulate import MACHINES, named_machine

MODES = list(zip(MACHINES["bedslinger"].frequency, MACHINES["bedslinger"].damping))


def streamed(lines, numbers=None):
    "Lines as a host sends them."
    made = [f"N{n} {l}" for n, l in zip(numbers or range(1, len(lines) + 1), lines)]
    return "N0 M110*35\n" + "".join(f"{l}*{line_checksum(l)}\n" for l in made)


def test_a_stream_that_was_resent_is_the_program():
    "After a broken line the host sends from there on again; nothing is executed twice."
    lines = ["M83"] + [f"G1 X{k} E.5 F600" for k in range(1, 9)]
    plain = moves(parse_gcode("\n".join(lines)))
    for back in (1, 3):
        sent = lines[:5] + lines[5 - back :]
        numbers = [*range(1, 6), *range(6 - back, len(lines) + 1)]
        text = streamed(sent, numbers).splitlines(True)
        text[5] = text[5].replace("E.5", "E.6")  # number 5 arrives broken
        p = parse_gcode("".join(text))
        m = moves(p)
        assert m.x.tolist() == plain.x.tolist()
        assert m.e.iloc[-1] == plain.e.iloc[-1]
        assert any("sent again" in i for i in p.issues)
        assert "".join(p.lines) == "".join(text)


def test_numbers_without_checksums_are_labels():
    p = parse_gcode("N1 G1 X1 F60\nN1 G1 X2\nN1 G1 X3\n")
    assert len(moves(p)) == 3
    assert not p.issues


def test_a_number_may_come_again_after_m110():
    text = streamed(["G1 X1 F60", "G1 X2"]) + streamed(["G1 X3", "G1 X4"])
    assert moves(parse_gcode(text)).x.tolist() == [1, 2, 3, 4]


def test_gap_and_lasting_fault_are_named():
    text = streamed(["G1 X1 F60", "G1 X2", "G1 X3"], [1, 2, 5]).replace("X2", "X9")
    p = parse_gcode(text)
    assert moves(p).x.tolist() == [1, 9, 3]
    assert any("executed as it stands" in i for i in p.issues)
    assert any("does not follow" in i for i in p.issues)


@pytest.mark.parametrize("bad", ["G1 Xnan Y2", "G1 X1.2.3", "G1 X--1", "G1 X", "G1 X[1+2]"])
def test_lenient_leaves_lines_out(bad, refused):
    text = f"G1 X1 Y1 F600\n{bad}\nG1 X5\n"
    assert "line 2" in refused(parse_gcode, text)
    p = parse_gcode(text, lenient=True)
    assert moves(p).x.tolist() == [1, 5]
    assert len(p.issues) == 1
    assert "line 2" in p.issues[0]
    assert len(plan(p).issues) >= 1


def test_lenient_arcs_are_chords(refused):
    text = "G1 X1 F600\nG2 X10\nG3 X20 R1\nG2 X22 I1\n"
    assert "line 2" in refused(moves, parse_gcode(text))
    p = parse_gcode(text, lenient=True)
    m = plan(p)
    assert np.isclose(m.length.sum(), 1 + 9 + 10 + np.pi, rtol=1e-3)
    assert len(p.issues) == 2


def test_lenient_coordinates_without_a_motion(refused):
    assert "line 1" in refused(moves, parse_gcode("X5\nG1 X7 F60\n"))
    assert moves(parse_gcode("X5\nG1 X7 F60\n", lenient=True)).x.tolist() == [7]


def program(rows=600, seed=0):
    "Moves with all that has to be carried from block to block."
    rng = np.random.default_rng(seed)
    out = ["M82", "G21", "G90"]
    e = 0.0
    for k, (x, y) in enumerate(rng.uniform(20, 200, (rows, 2))):
        if k % 97 == 50:
            out += ["G92 E0"]
            e = 0.0
        if k % 130 == 60:
            out += [f"M204 P{500 + k} T{900 + k}", f"M205 X{8 + k % 3} Y8"]
        if k % 150 == 100:
            out += ["G91", "G1 Z.2 F300", "G90", ";LAYER_CHANGE"]
        if k == 333:
            out += ["M220 S80"]
        e += 0.05
        out.append(f"G1 X{x:.3f} Y{y:.3f} E{e:.4f} F{1000 + k}")
    return "\n".join(out) + "\n"


@pytest.mark.parametrize("lines", [70, 250, 10_000])
def test_blocks_are_the_program(tmp_path, lines):
    "Same segments, limits, lines, layers and filament; one stop a block."
    file = tmp_path / "a.gcode"
    file.write_text(program())
    whole = plan(file)
    parts = [own for _, own, _ in program_blocks(file, lines)]
    for c in ("length", "line", "layer", "nominal", "acceleration"):
        np.testing.assert_allclose(
            np.concatenate([getattr(p, c) for p in parts]), getattr(whole, c), atol=1e-5
        )
    np.testing.assert_allclose(np.concatenate([p.start for p in parts]), whole.start, atol=1e-4)
    assert 0 <= sum(p.duration for p in parts) - whole.duration < 0.3 * len(parts)


def test_blocks_of_inches_and_steps(tmp_path):
    file = tmp_path / "a.gcode"
    file.write_text(
        "G20 G91 G18\nG1 F30\nG92 X5 Z1\n"
        + "G1 X1 Y.5\n" * 50
        + "G90\nG1 X9 Y9\n"
        + "G19\nG3 Y9.5 Z1 J.25\n" * 3
    )
    whole = plan(file)
    parts = [own for _, own, _ in program_blocks(file, 20)]

    def ends(p):
        return p.start[-1, :3] + p.unit[-1, :3] * p.length[-1]

    np.testing.assert_allclose(ends(parts[-1]), ends(whole), atol=1e-4)
    assert np.isclose(sum(p.length.sum() for p in parts), whole.length.sum(), rtol=1e-5)


def test_faults_in_blocks_name_the_line_of_the_file(tmp_path, refused):
    file = tmp_path / "a.gcode"
    file.write_text(program() + "G1 Xnan\n")
    n = file.read_text().count("\n")

    def read():
        list(program_blocks(file, 100))

    assert f"line {n}" in refused(read)
    assert sum(len(own) for _, own, _ in program_blocks(file, 100, lenient=True)) == 600 + 4
    file.write_bytes(b"")
    assert "nothing" in refused(lambda: list(read_blocks(file)))
    file.write_bytes(program().encode() + bytes(range(256)) * 40)
    assert "text" in refused(read)


PEAK = """import resource, sys
from gcode_ml.gcode.planner import plan, program_blocks
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; n = 0
for _,own,_ in program_blocks(sys.argv[1], 20_000): n += len(own)
print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/1024)"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    "Four times the file, about the same peak."
    one = program(4000)
    peaks = []
    for k, times in enumerate((10, 40)):
        file = tmp_path / f"{k}.gcode"
        file.write_text(one * times)
        n, peak = subprocess.run(
            [sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, check=True
        ).stdout.split()
        peaks.append(float(peak))
        assert int(n) > 4000 * times
    assert peaks[1] < 1.5 * peaks[0] + 20


def test_limits_are_restated():
    t = limits_of_lines(
        parse_gcode(
            "M201 X700\nM203 Y60\nM204 P600 R300 T900\nM205 X8 J0.02\nM220 S80\nM221 S95\nG1 X1 F60\n"
        )
    )
    again = limits_of_lines(parse_gcode("\n".join(limit_lines(t, deviation=True))))
    for k in t:
        np.testing.assert_allclose(again[k][-1], t[k][-1])


def other_lines(text):
    return [
        l.strip()
        for l in text.splitlines()
        if not l.startswith(("G0", "G1", "G2", "G3", "M201", "M204", "M205"))
    ]


def test_corrected_in_blocks_keeps_the_program(tmp_path):
    "Comments, commands, filament, layers, time; written whole or not at all."
    file = tmp_path / "a.gcode"
    file.write_text(
        part_program("tube", 3, layers=3)
        + "G91\nG1 E-2 F1800\nG1 Z5 F600\nG1 X5 Y5 F3000\nG90\nG1 X0 Y0\nM84\n"
    )
    judges = [MACHINES["bedslinger"]]
    for name, large in (("one", 32.0), ("many", 0.0)):
        done = correct_file(
            file, tmp_path / f"{name}.gcode", MODES, "inverse", judges, large=large, lines=400
        )
        a = file.read_text()
        b = (tmp_path / f"{name}.gcode").read_text()
        p = plan(parse_gcode(a))
        q = plan(parse_gcode(b))
        assert other_lines(a) == other_lines(b)
        assert abs(moves(parse_gcode(a)).de.sum() - moves(parse_gcode(b)).de.sum()) < 2e-3
        assert set(p.layer) == set(q.layer)
        assert abs(p.duration - q.duration) < 0.02 * p.duration
        assert (done.table.contour_after < 0.5 * done.table.contour_before).all()
        assert np.allclose(
            q.start[-1, :3] + q.unit[-1, :3] * q.length[-1],
            p.start[-1, :3] + p.unit[-1, :3] * p.length[-1],
            atol=0.05,
        )


def test_relative_moves_keep_their_limits():
    "Lines that stay as they are run under the program's own acceleration and corners."
    text = part_program("box", 1, layers=1) + "G91\nG1 X5 Y5 F6000\nG1 X5 Y-5\nG90\n"
    done = correct_program(parse_gcode(text), MODES, "inverse", [MACHINES["bedslinger"]])
    p = plan(parse_gcode(text))
    q = plan(parse_gcode(done.text))
    assert np.allclose(q.acceleration[-2:], p.acceleration[-2:])
    assert q.entry[-1] <= 1.05 * p.entry[-1]


def test_machine_at_hand_is_identified_and_helped():
    "On a machine that is identified the robust command is below ZV; ten percent off it is not above MZV."
    from gcode_ml.trajectory.correct import compare_methods, identify_modes, print_evaluator

    evaluator = print_evaluator(plan(parse_gcode(part_program("label", 2, layers=1))))
    for machine in (MACHINES["soft"], named_machine("bedslinger:4")):
        modes = identify_modes(machine)
        np.testing.assert_allclose([f for f, _ in modes], machine.frequency, rtol=0.01)
        t = (
            compare_methods(evaluator, modes, [machine], ("none", "ZV", "inverse", "robust"))
            .set_index("method")
            .contour
        )
        assert t["inverse"] < t["robust"] < t["ZV"] < t["none"]
        for off in (0.9, 1.1):
            t = (
                compare_methods(
                    evaluator,
                    [(f * off, z) for f, z in modes],
                    [machine],
                    ("none", "MZV", "robust"),
                )
                .set_index("method")
                .contour
            )
            assert t["robust"] <= t["MZV"] < t["none"]


def test_odd_files(tmp_path, refused, monkeypatch):
    "Nothing moves, cut off, of no length, too large to simulate."
    file = tmp_path / "a.gcode"
    file.write_text("; only words\nM84\n")
    assert "at least one that changes position" in check(file)[0]
    file.write_text("G1 X5 F600\nG1 X5\n")
    assert len(plan(file)) == 1
    file.write_text("G92 X5\nG1 X5 F600\n")
    assert "at least one" in refused(plan, file)
    text = part_program("box", 1, layers=1)
    file.write_text(text[: len(text) // 2].rstrip("0123456789."))
    assert "line" in refused(read_gcode, file) or len(plan(file)) > 10
    import gcode_ml.trajectory.data as data

    monkeypatch.setattr(data, "MAX_MEGABYTES", 0)
    assert "at most 0 MB" in refused(collect, file, tmp_path / "set")


def test_commands(tmp_path, capsys):
    file = tmp_path / "a.gcode"
    file.write_text(part_program("box", 1, layers=1) + "G1 Xnan\n")
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
        str(tmp_path / "b.gcode"),
        "--judge",
        "bedslinger:1",
        "--identified",
    ]
    assert main(words) == 2
    assert "a number after X" in capsys.readouterr().err
    assert main([*words, "--lenient"]) == 0
    assert "G1 Xnan" in (tmp_path / "b.gcode").read_text()
