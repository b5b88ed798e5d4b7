"Verification of recordings against programs: parts against oracles, verdicts, bad input, and streaming."

import numpy as np
import pandas as pd
import pytest
from scipy.stats import multivariate_normal

from gcode_ml.core.errors import InputError
from gcode_ml.fingerprint.anomaly import DETECTORS, AnomalyDetector
from gcode_ml.fingerprint.commands import check_healthy
from gcode_ml.fingerprint.data import check, check_sections, recording_from_table
from gcode_ml.fingerprint.machine import (
    planned_motion,
    record_program,
    structure,
    varied_programs,
    warmth,
)
from gcode_ml.fingerprint.simulate import example_programs
from gcode_ml.fingerprint.tokens import NumberScale
from gcode_ml.fingerprint.verify import (
    EDITS,
    FEATURES,
    Verifier,
    calibrate,
    edit_program,
    fit_response,
    program_signals,
    rebuilt_program,
    self_check,
    subtract_running_mean,
    trace,
    verification_rows,
    verify,
)
from gcode_ml.lab.cli import main

PROGRAMS = example_programs()


def rows(program, name="pocket_001", **kwargs):
    return verification_rows(recording_from_table(record_program(program, **kwargs), name))


@pytest.fixture(scope="module")
def machine():
    "Signals of three programs, and a response fitted on others."
    texts = varied_programs(6, 1)
    healthy = [
        (rows(t, f"{n}_001", day=i % 3, seed=i), program_signals(t, n))
        for i, (n, t) in enumerate(texts.items())
    ]
    return (
        {n: program_signals(PROGRAMS[n], n) for n in ("pocket", "face", "contour")},
        fit_response(healthy),
        calibrate(healthy),
    )


def test_planned_motion_takes_the_time_of_its_feeds():
    "A long straight cut takes length divided by feed."
    m = planned_motion("G21 G90\nG1 X100 F600\nM30\n")
    assert m["time"][-1] == pytest.approx(10, abs=0.2)
    assert m["position"][-1, 0] == pytest.approx(100, abs=0.1)


def test_fast_sensors_integrate_to_the_motion():
    "Without noise and modes far above the motion, the board's acceleration integrates to the velocity."
    m = planned_motion("G21 G90\nG1 Y40 F1200\nM30\n", 1000.0)
    a = np.gradient(m["velocity"], m["time"], axis=0)
    felt = structure(a, 1000.0, (200.0, 200.0, 200.0), 0.5)
    assert np.cumsum(felt[:, 1]) / 1000 == pytest.approx(m["velocity"][:, 1], abs=1.5)


def test_temperature_under_constant_current_is_exponential():
    "Step response of a first-order lag."
    t = np.arange(600)
    assert warmth(np.ones((600, 1)), 1.0, tau=100.0, gain=8.0)[:, 0] == pytest.approx(
        8 * (1 - np.exp(-(t + 1) / 100))
    )


@pytest.mark.parametrize("rate", [0, 200])
def test_any_file_becomes_a_recording(rate):
    "Also a program without M30, in millimetres, with a helix."
    t = record_program("G21 G90\nG0 X5\nG1 Z-1 F300\nG2 X15 Y0 I5 J0 Z-2\nG1 X0\n", rate=rate)
    r = recording_from_table(t, "helix_001")
    assert {"G2 X15 Y0 I5 J0 Z-2", "M30"} <= set(r.texts)
    assert np.isfinite(r.sensors).all()


def test_running_mean_is_causal_and_removes_offsets():
    "Neither a constant offset nor later rows change the result."
    x = np.random.default_rng(0).normal(size=(200, 2))
    g = np.full(200, 0.25)
    assert subtract_running_mean(x + 7, g) == pytest.approx(subtract_running_mean(x, g))
    assert subtract_running_mean(x[:90], g[:90]) == pytest.approx(subtract_running_mean(x, g)[:90])


def test_evidence_is_the_likelihood_ratio_of_normal_distributions(machine):
    "For one row and one lag, the sufficient statistics equal the full densities of all channels."
    signals, response, _ = machine
    r = rows(PROGRAMS["pocket"], seed=3)
    v = Verifier(response, signals["pocket"], r.channels, start=0.0)
    known = v.known
    f = np.random.default_rng(0).normal(size=(1, len(FEATURES))) * 0.3
    x = np.random.default_rng(1).normal(size=len(known))
    project, j, inner, constant, *_ = v._information(np.ones(len(known), bool))
    y = x @ project
    ours = (f @ y - 0.5 * ((f @ j) * f).sum(1))[0] - (0.5 * y @ inner @ y + constant)
    s = response.covariance[np.ix_(known, known)] * response.temperature
    w = response.weights[:, known]
    full = multivariate_normal(f[0] @ w, s).logpdf(x) - multivariate_normal(
        np.zeros(len(known)), s + w.T @ response.spread @ w
    ).logpdf(x)
    assert ours == pytest.approx(full, rel=1e-6, abs=1e-6)


def test_genuine_recordings_match_and_others_do_not(machine):
    "Genuine recordings, other programs and scaled feeds are separated by CUSUM and verdict."
    signals, response, limits = machine
    found = {}
    for n in ("pocket", "contour"):
        for i in range(3):
            r = rows(PROGRAMS[n], f"{n}_001", day=i, seed=50 + i)
            found.setdefault("genuine", []).append(verify(r, signals[n], response, limits))
            found.setdefault("other", []).append(verify(r, signals["face"], response, limits))
            found.setdefault("feed", []).append(
                verify(
                    rows(edit_program(PROGRAMS[n], "feed")[0], f"{n}_001", day=i, seed=60 + i),
                    signals[n],
                    response,
                    limits,
                )
            )
    cusum = {k: np.array([v.cusum for v in vs]) for k, vs in found.items()}
    assert cusum["genuine"].max() < cusum["other"].min()
    assert cusum["genuine"].max() < cusum["feed"].min()
    assert np.mean([v.match for v in found["genuine"]]) >= 0.8
    assert not any(v.match for v in found["other"])
    assert all(v.evidence > 0 for v in found["genuine"])


def test_stream_continues_after_faults(machine):
    "Dropped boards, a clock that goes back, an empty row: constant memory, no alarm."
    signals, response, limits = machine
    r = rows(PROGRAMS["pocket"], seed=4)
    v = Verifier(response, signals["pocket"], r.channels)
    x = r.values.copy()
    x[50:, [i for i, c in enumerate(r.channels) if c.startswith("frame")]] = np.nan
    for row, t in zip(x[:80], r.time):
        v.step(row, t)
    before = (v.cusum, v.evidence)
    with pytest.raises(InputError, match="the clock jumps; this row is passed over"):
        v.step(x[80], r.time[79] - 3)
    assert (v.cusum, v.evidence) == before
    assert v.step(np.full(len(r.channels), np.nan), r.time[79] + 0.25)["ratio"] == 0
    last = [v.step(row, t) for row, t in zip(x[81:], r.time[81:])][-1]
    assert last["cusum"] < 2 * limits.alarm
    assert last["evidence"] > 0
    assert len(v.parts) == 2


def test_offline_verification_equals_the_stream(machine):
    "`trace` returns the results of the single steps."
    signals, response, _ = machine
    r = rows(PROGRAMS["pocket"], seed=4)
    v = Verifier(response, signals["pocket"], r.channels)
    steps = [v.step(row, t)["cusum"] for row, t in zip(r.values, r.time)]
    assert trace(r, signals["pocket"], response).cusum.to_numpy() == pytest.approx(steps)


@pytest.mark.parametrize("kind", EDITS)
def test_edits_are_valid_programs(kind):
    "Each edit can be planned, leaves the motion before its line unchanged, and is determined by the seed."
    text, line = edit_program(PROGRAMS["contour"], kind, 3)
    again, _ = edit_program(PROGRAMS["contour"], kind, 3)
    assert text == again
    assert planned_motion(text)["time"][-1] > 10
    a = planned_motion(PROGRAMS["contour"])
    b = planned_motion(text)
    before = a["line"] < line
    n = min(before.sum(), len(b["time"])) - 30
    assert a["position"][:n] == pytest.approx(b["position"][:n], abs=1.0)


def test_rebuilt_program_moves_as_its_recordings():
    "Reconstructed from reports alone, apart from corners between reports."
    again = rebuilt_program(
        [
            recording_from_table(record_program(PROGRAMS["face"], seed=i), f"face_00{i}")
            for i in range(2)
        ]
    )
    assert planned_motion(again)["time"][-1] == pytest.approx(
        planned_motion(PROGRAMS["face"])["time"][-1], abs=4
    )


def test_without_healthy_recordings_a_wrong_program_is_found(machine):
    signals, *_ = machine
    r = rows(PROGRAMS["pocket"], seed=6)
    assert self_check(r, signals["pocket"])[0] > 4 > self_check(r, signals["contour"])[0]


def test_numbers_keep_sign_and_magnitude():
    "Round trip through standardised numbers; absent letters are NaN."
    texts = ["G1 X-0.0151 Y1.575", "X0.157", "F22.", "M30"]
    s = NumberScale.fit(texts)
    assert s.write(texts, np.nan_to_num(s.standardise(texts))) == texts
    assert np.isnan(s.standardise(["M30"])).all()


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_score_broken_sensors_higher(name):
    "One finite score per row, larger for a recording with broken sensors."
    signals = program_signals(PROGRAMS["pocket"], "pocket")
    d = AnomalyDetector(name).fit([(rows(PROGRAMS["pocket"], seed=i), signals) for i in range(3)])
    calm = rows(PROGRAMS["pocket"], seed=9)
    wild = rows(PROGRAMS["pocket"], seed=9)
    wild.values = (
        wild.values
        + np.random.default_rng(0).normal(size=wild.values.shape) * wild.values.std(0) * 5
    )
    a = d.score(calm, signals)
    b = d.score(wild, signals)
    assert np.isfinite(a).all()
    assert len(a) == len(calm.time)
    assert b.mean() > a.mean()


def test_faulty_files_are_reported(tmp_path):
    "Two programs in one file and a clock that jumps give one sentence each."
    t = record_program(PROGRAMS["pocket"], seed=1)
    pd.concat([t, record_program(PROGRAMS["pocket"], seed=2)]).to_parquet(
        tmp_path / "twice_001.parquet"
    )
    t = t.reset_index(drop=True)
    t.loc[80:, "t_console"] = "23:00:00.000"
    t.to_parquet(tmp_path / "jump_001.parquet")
    with pytest.raises(InputError, match="two programs or more"):
        check_sections(tmp_path / "twice_001.parquet")
    faults = check(tmp_path)
    assert len(faults) == 2
    assert any("two programs" in f for f in faults)
    assert any("the clock jumps" in f for f in faults)


def test_verify_command_exit_codes(tmp_path, capsys):
    "Exit codes 0, 1 and 2, with one sentence on standard error."
    file = tmp_path / "pocket.gcode"
    file.write_text(PROGRAMS["pocket"])
    (tmp_path / "healthy").mkdir()
    (tmp_path / "runs").mkdir()
    for i in range(3):
        record_program(PROGRAMS["pocket"], i % 2, seed=i).to_parquet(
            tmp_path / "healthy" / f"pocket_00{i}.parquet"
        )
    for n, p in (("same", PROGRAMS["pocket"]), ("other", PROGRAMS["face"])):
        record_program(p, seed=30).to_parquet(tmp_path / "runs" / f"{n}_001.parquet")

    def ask(run, *extra):
        return main(
            [
                "verify",
                str(tmp_path / "runs" / f"{run}_001.parquet"),
                "--program",
                str(file),
                *extra,
            ]
        )

    assert [
        ask("same", "--healthy", str(tmp_path / "healthy")),
        ask("other", "--healthy", str(tmp_path / "healthy")),
        ask("same"),
        ask("other"),
    ] == [0, 1, 0, 1]
    capsys.readouterr()
    assert ask("none") == 2
    assert (
        main(
            [
                "verify",
                str(tmp_path / "runs" / "same_001.parquet"),
                "--program",
                str(tmp_path / "no.gcode"),
            ]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert err.count("\n") == 2
    assert "Traceback" not in err
    assert (
        main(
            [
                "simulate",
                "fingerprint",
                "-o",
                str(tmp_path / "made"),
                "-p",
                f"program={file}",
                "-p",
                "runs=1",
                "--quiet",
            ]
        )
        == 0
    )
    assert (tmp_path / "made" / "runs" / "pocket_001.parquet").exists()


def test_healthy_recordings_of_another_program_are_refused(tmp_path, capsys):
    "Otherwise the response would be fitted on the wrong program, and a wrong claim would match."
    run = recording_from_table(record_program(PROGRAMS["pocket"], seed=1), "pocket_001")
    moves = [t for t in run.texts if "X" in t and "Y" in t]
    changed = PROGRAMS["pocket"].replace(moves[20], "G1 X0.7777")
    assert check_healthy(run, PROGRAMS["pocket"]) is None
    dressed = "\n".join(
        f"N{i} {l.lower()} (part; one)" for i, l in enumerate(PROGRAMS["pocket"].splitlines(), 10)
    )
    assert check_healthy(run, dressed) is None
    for text in (
        PROGRAMS["face"],
        edit_program(PROGRAMS["pocket"], "feed", factor=1.05)[0],
        changed,
    ):
        with pytest.raises(InputError, match="which that program does not hold"):
            check_healthy(run, text)
    (tmp_path / "face.gcode").write_text(PROGRAMS["face"])
    (tmp_path / "healthy").mkdir()
    for i in range(3):
        record_program(PROGRAMS["pocket"], seed=i).to_parquet(
            tmp_path / "healthy" / f"pocket_00{i}.parquet"
        )
    assert (
        main(
            [
                "verify",
                str(tmp_path / "healthy" / "pocket_000.parquet"),
                "--program",
                str(tmp_path / "face.gcode"),
                "--healthy",
                str(tmp_path / "healthy"),
            ]
        )
        == 2
    )
    assert "name a folder of runs of this very program" in capsys.readouterr().err


def test_verify_command_with_a_program_library(tmp_path, capsys):
    "The claim is compared with the other programs of a folder; an unknown program is refused."
    for n in ("pocket", "face"):
        (tmp_path / f"{n}.gcode").write_text(PROGRAMS[n])
        (tmp_path / "runs").mkdir(exist_ok=True)
        for i in range(3):
            record_program(PROGRAMS[n], i % 2, seed=i).to_parquet(
                tmp_path / "runs" / f"{n}_00{i}.parquet"
            )
    record_program(PROGRAMS["pocket"], 5, seed=30).to_parquet(tmp_path / "night_001.parquet")
    (tmp_path / "contour.gcode").write_text(PROGRAMS["contour"])

    def ask(program, run="night_001", *extra):
        return main(
            [
                "verify",
                str(tmp_path / f"{run}.parquet"),
                "--program",
                str(tmp_path / f"{program}.gcode"),
                "--library",
                str(tmp_path / "runs"),
                *extra,
            ]
        )

    assert [
        ask("pocket"),
        ask("face"),
        ask("pocket", "runs/pocket_001"),
        ask("face", "runs/pocket_001"),
    ] == [0, 1, 0, 1]
    assert "fit pocket best" in capsys.readouterr().out
    assert ask("contour") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a program with no run cannot be compared" in error
