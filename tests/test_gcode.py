"The reader of G-code: dialects, real files, broken files."

import re
import warnings

import numpy as np
import pytest

from gcode_ml.core.errors import InputError
from gcode_ml.gcode.reader import (
    arc_sweeps,
    checksum_mismatches,
    filament_used,
    format_number,
    line_checksum,
    moves,
    parse_gcode,
    path_points,
    read_gcode,
    replace_words,
    to_text,
    unknown_commands,
)

SNIPPETS = dict(
    marlin="G21\nG90\nM83 ; relative E\nG28\nG92 E0\nG1 Z.6 F3600\nG1 X81.991 Y98.32 E.04014\nG17\nG3 Z.8 I.5 J-.2 P1 F3000\nG1 E-4.5",
    cura="M82\n;LAYER:0\nG0 F3600 X43.256 Y45.828 Z0.3\n;TYPE:SKIRT\nG1 F1800 X43.853 Y45.312 E0.01484\n;LAYER:1\nG1 X44.5 Y44.859 E0.0297\n",
    prusa='M486 S0\nM486 A3DBenchy.stl\nM862.3 P "MINI"\nM862.6 P"Input shaper"\nM115 U6.0.1+14848\nM569 S1 X Y\nM117 Hello X10 Y20\n',
    klipper="START_PRINT BED=60 EXTRUDER=200\nSET_VELOCITY_LIMIT ACCEL=3000\nG1 X5 F600\nEXCLUDE_OBJECT_END NAME=a_1\n",
    streamed='N0 M110*35\nN11 M862.3 P "MINI"*81\nN24 G28*37\n',
    nist="(hello (world)\nn0010 g21 g0 x0 y0 z50 (top)\nn0090 x 7\nn0170 x16 y2.5\nn0190 g3 x13.5 y0 i-2.5\nn0320 g2 j2.5\nn0490 g2 x18 r4\n",
    mach="G20 ;(Units: Inches)\r\nF140\r\nG53 G90 G40\r\nM11P1 ;(torch)\r\nG00X1.82Y6.05\r\nG02 X2.22 Y6.45 R0.4\r\nS900\r\nM05 M30",
    fanuc="%\nO1000\n/N10 G1 X5. F100.\nN20 G91 G28 Z0\nN30 G90 G43 H1 Z10. M8\n%",
    grbl="$H\n$110=500\nG21 (open to the end\nG1X-.5Y+2F100\n\n;\n",
    thumbnail="; thumbnail begin 16x16 8\n; iVBORw0KGgo/+AB==\n; thumbnail end\nG1 X1\n",
    text="M104 S200 ; 200 \u00b0C \u2603\rG1 X1 (a) Y2 (b) ; c\r\n",
)

README = dict(
    benchy_crealityprint_ender3v2=3904.16,
    benchy_arcfitted_ender3v2=3904.16,
    helixcube_prusaslicer_mini=870.58,
    part_cura25_absE=153.994,
)


def real_files():
    from gcode_ml.lab.settings import data_folder

    folder = data_folder("gcode")
    if folder is None:
        pytest.skip("no real G-code: data folder gcode is absent")
    return sorted(f for f in folder.iterdir() if f.suffix in (".gcode", ".ngc"))


def real_file(name):
    return next((f for f in real_files() if f.stem == name), None) or pytest.skip(
        f"{name} is absent"
    )


def slow_words(line):
    "Words of a line without text commands, read character by character: an oracle."
    line = re.sub(r";.*|\([^)]*\)?", "", line)
    words, k = [], 0
    line = re.sub(r"\s", "", line).split("*")[0].lstrip("/%").upper()
    while k < len(line):
        e = k + 1
        while e < len(line) and not line[e].isalpha():
            e += 1
        words.append((line[k], float(line[k + 1 : e]) if e > k + 1 else None))
        k = e
    return words


@pytest.mark.parametrize("name", SNIPPETS)
def test_dialects(name):
    p = parse_gcode(SNIPPETS[name], name)
    assert to_text(p) == SNIPPETS[name]
    assert len(checksum_mismatches(p)) == 0
    m = moves(p)
    assert np.isfinite(m[["x0", "y0", "z0", "x", "y", "z", "e", "de"]]).all(axis=None)
    text = set(p.extended.line)
    for n, group in p.words.groupby("line"):
        for letter, start, end, value in zip(group.letter, group.start, group.end, group.value):
            assert p.lines[n][start].upper() == letter
            if not np.isnan(value):
                assert float(re.sub(r"\s", "", p.lines[n][start + 1 : end])) == value
        if n not in text:
            assert [
                (a, None if np.isnan(v) else v) for a, v in zip(group.letter, group.value)
            ] == slow_words(p.lines[n])


def test_positions():
    m = moves(parse_gcode(SNIPPETS["nist"]))
    assert m.x.tolist() == [0, 7, 16, 13.5, 13.5, 18]
    assert m.modal.tolist() == [
        False,
        True,
        True,
        False,
        False,
        False,
    ]
    assert np.allclose(arc_sweeps(m)[[3, 4]], [1.5 * np.pi, -2 * np.pi])
    m = moves(parse_gcode(SNIPPETS["mach"]))
    assert np.allclose(m[["x", "y"]].iloc[-1], [2.22 * 25.4, 6.45 * 25.4])
    assert np.allclose(m.feed, 140 * 25.4)
    assert np.isclose(m.r.iloc[-1], 0.4 * 25.4)
    m = moves(parse_gcode(SNIPPETS["fanuc"]))
    assert m[["x", "z"]].to_numpy().tolist() == [[5, 0], [5, 10]]
    assert moves(parse_gcode("G1 X1\n /X9\n/G91\nX2"), block_delete=True).x.tolist() == [1, 2]


def slow_positions(text):
    "Positions by a loop over lines for the words G0 G1 G28 G53 G90 G91 G92 G92.1 M82 M83 X E: an oracle."
    place = dict(X=0.0, E=0.0)
    offset = dict(X=0.0, E=0.0)
    state = dict(x=True, e=True)
    rows = []
    for line in text.split("\n"):
        words = slow_words(line)
        codes = [f"{a}{v:g}" for a, v in words if a in "GM"]
        values = {a: v for a, v in words if a in "XE"}
        if "G90" in codes or "G91" in codes:
            state["x"] = state["e"] = "G90" in codes
        if "M82" in codes or "M83" in codes:
            state["e"] = "M82" in codes
        if "G28" in codes:
            place["X"] = offset["X"] = 0.0
        elif "G92.1" in codes:
            offset["X"] = 0.0
        elif "G92" in codes:
            offset.update({a: place[a] - v for a, v in values.items()})
        elif "G1" in codes:
            slow_move(place, offset, state, values, "G53" in codes)
            rows.append((place["X"], place["E"]))
    return rows


def slow_move(place, offset, state, values, in_machine_coordinates):
    "Move `place` by the words of one G1 line."
    for a, v in values.items():
        if a == "X" and in_machine_coordinates:
            place[a] = v
        elif state[a.lower()]:
            place[a] = v + offset[a]
        else:
            place[a] += v


@pytest.mark.parametrize("seed", range(40))
def test_positions_against_a_loop(seed):
    rng = np.random.default_rng(seed)

    def number():
        return f"{rng.normal() * 10:.2f}"

    kinds = [
        lambda: f"G1 X{number()} E{number()}",
        lambda: f"G1 X{number()}",
        lambda: f"G53 G1 X{number()}",
        lambda: f"G92 X{number()}",
        lambda: f"G92 E{number()}",
        lambda: "G92.1",
        lambda: "G28",
        lambda: "G90",
        lambda: "G91",
        lambda: "M82",
        lambda: "M83",
        lambda: "M201 X500 E9",
    ]
    text = "\n".join(
        kinds[k]() for k in rng.choice(len(kinds), 80, p=[0.2, 0.2, 0.1] + [0.5 / 9] * 9)
    )
    m = moves(parse_gcode(text))
    assert np.allclose(m[["x", "e"]].to_numpy(), slow_positions(text), atol=1e-9)
    assert np.allclose(np.cumsum(m.de), m.e, atol=1e-9)


def test_arcs():
    m = moves(
        parse_gcode(
            "G0 X10\nG3 X0 Y10 I-10 J0\nG3 X-10 Y0 R10\nG3 X0 Y-10 I10\nG3 X10 Y0 R-10\nG2 X10 Y0 I-5 P2"
        )
    )
    assert np.allclose(arc_sweeps(m), [0, np.pi / 2, np.pi / 2, np.pi / 2, 1.5 * np.pi, -4 * np.pi])
    row, points = path_points(m, 0.001)
    for k in range(1, len(m)):
        centre = m.loc[k, ["x0", "y0"]].to_numpy(float) + m.loc[k, ["i", "j"]].to_numpy(float)
        assert np.allclose(np.hypot(*(points[row == k, :2] - centre).T), m.r[k])
        assert np.allclose(points[row == k][-1], m.loc[k, ["x", "y", "z"]].to_numpy(float))


@pytest.mark.parametrize(
    "text,expected",
    [
        ("", "nothing"),
        ("G1 X1.2.3", "line 1"),
        ("G28\nG1 Xnan", "line 2"),
        ("G1 Xinf", "line 1"),
        ("G1 X", "line 1"),
        ("G1 X0\nG2 X10", "line 2: expected a centre"),
        ("G2 X10 R1", "radius of at least half the chord"),
        ("G2 R1", "chord of length 0"),
        ("G2 X1 I0 J0", "centre at its start"),
        ("G2 X1 R0", "radius"),
        ("X5", "G0, G1, G2 or G3"),
        ("G1 X1 Y2\nG1 X5 Y", "line 2"),
        ("G1 X1 @", "line 1"),
        ("#1=5", "line 1"),
        ("G1 X" + "9" * 400, "line 1"),
        ("G G1", "line 1"),
        ("5 G1", "line 1"),
    ],
)
def test_bad_programs(text, expected):
    with pytest.raises(InputError) as e:
        moves(parse_gcode(text, "part.gcode"))
    assert expected in str(e.value)
    assert str(e.value).startswith("part.gcode")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "data,expected",
    [
        (b"", "nothing"),
        (b"\n\n ", "nothing"),
        (b"GCDE\1\0\0\0", "NUL"),
        (bytes(range(128, 256)) * 4, "no text"),
    ],
)
def test_bad_files(tmp_path, data, expected):
    (tmp_path / "part.gcode").write_bytes(data)
    with pytest.raises(InputError, match=expected):
        read_gcode(tmp_path / "part.gcode")
    with pytest.raises(InputError):
        read_gcode(tmp_path)


def test_replace_words():
    text = SNIPPETS["streamed"] + "N25 G1 X1.000 Y2.5 ; keep (this)*5\r\nN26 g1x1y2*86\n"
    p = parse_gcode(text)
    q = replace_words(p, [3, 4], X=[1.5, -2], Y=[np.nan, 0.25], digits=3)
    assert q.lines[:3] == p.lines[:3]
    assert q.lines[3] == "N25 G1 X1.5 Y2.5 ; keep (this)*5\r\n"
    body, written = q.lines[4].strip().split("*")
    assert body == "N26 g1x-2y0.25"
    assert int(written) == line_checksum(body)
    assert to_text(replace_words(p, 4, X=None)).startswith("".join(p.lines[:4]))
    for bad in (dict(X=np.inf), dict(X=np.nan), dict(XY=1)):
        with pytest.raises(InputError):
            replace_words(p, 3, **bad)
    with pytest.raises(InputError):
        replace_words(p, 99, X=1)
    assert format_number(-1e-9) == "0"
    assert format_number(3e7) == "30000000"


def test_fuzz():
    rng = np.random.default_rng(0)
    characters = list('GMXYZEFIJKRPN0123456789.-+*;()/% \n\r\t"=[#_nax\u00e9\x1f\udcb0')
    read = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(1200):
            text = list(SNIPPETS[list(SNIPPETS)[k % len(SNIPPETS)]])
            for _ in range(rng.integers(1, 6)):
                at = rng.integers(len(text) + 1) - 1 if text else 0
                what = rng.integers(4)
                if what == 0:
                    text[at : at + 1] = rng.choice(characters)
                elif what == 1:
                    text.insert(at, rng.choice(characters))
                elif what == 2:
                    del text[at : at + 1]
                else:
                    text = text[: at + 2]
            text = "".join(text)
            try:
                p = parse_gcode(text, "fuzz")
                assert to_text(p) == text
                unknown_commands(p)
                checksum_mismatches(p)
                m = moves(p)
                read += 1
                assert np.isfinite(m[["x", "y", "z", "e"]]).all(axis=None)
                assert np.isfinite(m.loc[m.command >= 2, ["i", "j", "k", "r"]]).all(axis=None)
                path_points(m, 0.05)
            except InputError as e:
                assert str(e).startswith("fuzz")
    assert read > 300


@pytest.mark.filterwarnings("ignore:.*half circle")
def test_real_files():
    for f in real_files():
        p = read_gcode(f)
        assert to_text(p).encode("utf-8", "surrogateescape") == f.read_bytes(), f.name
        m = moves(p)
        assert len(checksum_mismatches(p)) == 0
        commands = sum(
            bool(
                re.match(
                    r"\s*(?:n\d+\s*)?(?:.*[a-z\d\s])?g0?[0-3](?!\d|\.)",
                    re.sub(r";.*|\([^)]*\)?", "", line),
                    re.I,
                )
            )
            for line in p.lines
        )
        assert (~m.modal).sum() == commands, f.name
        assert np.isfinite(
            m[["x0", "y0", "z0", "x", "y", "z", "e", "de", "i", "j", "k", "r"]].fillna(0)
        ).all(axis=None)
        assert (m.r[m.command >= 2] > 0).all()


def test_real_words_against_a_loop():
    for name in (
        "helixcube_streamed_checksums",
        "nist_c1_lowercase_arcs",
        "plasma_mach3_inch",
        "thread_mill_inch_incremental_arcsR",
        "arc_g18",
        "sample_slic3r_absE",
    ):
        p = read_gcode(real_file(name))
        text = set(p.extended.line)
        got = {
            n: list(zip(g.letter, g.value.where(g.value.notna(), None)))
            for n, g in p.words.groupby("line")
            if n not in text
        }
        for n, line in enumerate(p.lines):
            if n not in text:
                assert [
                    (a, None if v is None or v != v else v) for a, v in got.get(n, [])
                ] == slow_words(line), (name, n)


@pytest.mark.parametrize("name", README)
def test_filament(name):
    assert filament_used(moves(read_gcode(real_file(name)))) == pytest.approx(
        README[name], rel=1e-4
    )


def test_filament_of_the_prusa_benchy():
    "The slicer's 4084.12 mm hold an intro line of 18 mm that stands in the file's configuration and was cut from its commands."
    p = read_gcode(real_file("benchy_prusaslicer_mini"))
    start = next(c for c in p.comments.text if c.startswith("; start_gcode"))
    cut = moves(
        parse_gcode("M83\n" + start.split("; intro line")[1].split("G92")[0].replace("\\n", "\n"))
    )
    assert filament_used(cut) == 18
    assert filament_used(moves(p)) + filament_used(cut) == pytest.approx(4084.12, rel=1e-4)


def test_layers_and_types():
    m = moves(read_gcode(real_file("benchy_crealityprint_ender3v2")))
    assert m.layer.max() == 239
    assert len(m) == 110413
    assert (m.command == 3).sum() == 248
    assert "Outer wall" in set(m.type)
    assert (m.turns[m.command == 3] == 1).all()
    m = moves(read_gcode(real_file("part_cura25_absE")))
    assert m.layer.max() == 57
    assert set(m.units) == {"mm"}


def test_commands_of_a_real_file():
    p = read_gcode(real_file("benchy_prusaslicer_mini"))
    unknown = unknown_commands(p)
    assert unknown["M204"] == 9157
    assert unknown["M486"] == 643
    assert unknown["M862.3"] == 1
    assert "G1" not in unknown


def test_edit_of_a_real_file():
    p = read_gcode(real_file("helixcube_streamed_checksums"))
    m = moves(p)
    line = m.line[(m.x != m.x0)].to_numpy()
    has_x = line[np.isin(line, p.words.line[p.words.letter == "X"])]
    q = replace_words(p, has_x, X=m.set_index("line").x[has_x].to_numpy() + 1)
    changed = [k for k in range(len(p.lines)) if p.lines[k] != q.lines[k]]
    assert changed == has_x.tolist()
    assert len(checksum_mismatches(q)) == 0
    assert np.allclose(moves(q).set_index("line").x[has_x], m.set_index("line").x[has_x] + 1)
