"What a user may bring to `gcode_ml check sign` and `gcode_ml run sign`: each fault is one sentence and the exit code 2, before anything is trained; what is odd but harmless is remarked on and ends with 0."

import shutil
from pathlib import Path

import numpy as np
import pytest

from gcode_ml.sign.simulate import simulate_clips


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return simulate_clips(tmp_path_factory.mktemp("signs"), glosses=3, signers=2, repetitions=2)


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "signs"))


def files(folder):
    return sorted((folder / "npz").glob("*.npz"))


def change(folder, i=3, **make):
    "Write a file anew with arrays made from those that it has."
    with np.load(files(folder)[i]) as z:
        a = dict(z)
    np.savez(files(folder)[i], **{**a, **{k: f(a[k]) for k, f in make.items()}})


def nan(x):
    x = x.copy()
    x[5, 7] = np.nan
    return x


def rows(folder, edit):
    "Edit the lines of the labels."
    f = folder / "labels.csv"
    lines = f.read_text(encoding="utf-8").splitlines()
    edit(lines)
    f.write_text("\n".join(lines) + "\n", encoding="utf-8")


def gloss(text):
    def edit(lines):
        cells = lines[4].split(",")
        cells[1] = text
        lines[4] = ",".join(cells)

    return lambda folder: rows(folder, edit)


def drop(lines):
    lines[1] = "gone" + lines[1]


FAULTS = dict(
    nan=(lambda f: change(f, X=nan), "column 7"),
    no_frame=(lambda f: change(f, X=lambda x: x[:0]), "T at least 1"),
    width=(lambda f: change(f, X=lambda x: x[:, :155]), ", 155]"),
    label_word=(gloss("two"), "row 5, column gloss"),
    label_empty=(
        gloss(""),
        "row 5, column gloss: expected a whole number from 0 on, found nothing",
    ),
    label_negative=(gloss("-2"), "found '-2'"),
    no_file=(lambda f: rows(f, drop), "which is not there"),
    two_signers=(
        lambda f: shutil.copy(files(f)[0], files(f)[-5]),
        "expected the same for the same clip",
    ),
)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_with_two(name, folder, command):
    "File, field, expected and found in a line of its own; no traceback."
    make, says = FAULTS[name]
    make(folder)
    code, out, err = command("check", "sign", folder)
    assert code == 2 and any(says in line for line in out.splitlines()), out
    assert "Traceback" not in out + err


def spread(lines):
    lines[0] = "\ufeff" + lines[0]
    lines[1:] = [("sub\\" + l if i == 0 else l) for i, l in enumerate(lines[1:])]


def test_spreadsheets_and_windows(folder, command):
    "A byte-order mark and backslashes are understood, and remarked on."
    (folder / "npz" / "sub").mkdir()
    rows(folder, spread)
    first = (
        (folder / "labels.csv")
        .read_text(encoding="utf-8-sig")
        .splitlines()[1]
        .split(",")[0]
        .split("\\")[1]
    )
    shutil.move(folder / "npz" / f"{first}.npz", folder / "npz" / "sub" / f"{first}.npz")
    code, out, err = command("check", "sign", folder)
    messages = out + err
    assert code == 0
    assert "byte-order mark" in messages
    assert "backslashes" in messages
    assert "1 rows, first row 2" in messages


def test_five_thousand_frames(folder, command):
    "One clip of that length is remarked on; a fit follows `long_clips`."
    n = 5000
    change(
        folder,
        X=lambda x: np.resize(x, (n, 156)),
        mask=lambda m: np.resize(m, (n, 78)),
        timestamps_ms=lambda t: np.arange(n) * 33,
    )
    code, out, err = command("check", "sign", folder)
    assert code == 0
    assert "5000 frames" in out + err


RUNS = dict(
    rate=(("learning_rate=-1",), "learning_rate"),
    model=(("model=lstm",), "conv_attention"),
    epochs=(("max_epochs=0",), "max_epochs"),
    unknown=(("epochs=3",), "epochs"),
)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_refuses(name, folder, command):
    "Before a kernel starts."
    words, says = RUNS[name]
    code, out, err = command(
        "run", "sign", "-p", f"data={folder}", *(w for p in words for w in ("-p", p))
    )
    assert code == 2
    assert says in out + err
    assert "Traceback" not in out + err
