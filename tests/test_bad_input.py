"A mistake ends in exit code 2 and one sentence that names file, field, expected and found; nothing is left half done."

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from gcode_ml.core.files import read_json, write_json
from gcode_ml.data.split import check_disjoint
from gcode_ml.fingerprint.data import read_recordings
from gcode_ml.fingerprint.recipe import recipe
from gcode_ml.lab.bundle import save_bundle
from gcode_ml.lab.runs import new_run


def sentence(text, *parts):
    "Is `text` one line in the order file, field, expected, found, with `parts` in it in their order?"
    assert re.fullmatch(
        r"(gcode_ml: )?[^\n]+?: [^\n]+: expected [^\n]+, found [^\n]+\.\n?", text
    ), text
    assert re.search(".*".join(map(re.escape, parts)), text), (text, parts)


@pytest.fixture
def data(recordings, tmp_path):
    "Three recordings to be broken: parquet files."
    folder = tmp_path / "data"
    folder.mkdir()
    for f in sorted(recordings.iterdir())[:3]:
        shutil.copy(f, folder)
    return folder


def change(data, **columns):
    "Change columns of `adaptive_002`; a function gets the column."
    file = data / "adaptive_002.parquet"
    table = pd.read_parquet(file)
    for c, value in columns.items():
        table[c] = value(table[c])
    table.to_parquet(file)


def cut(data):
    file = data / "adaptive_002.parquet"
    file.write_bytes(file.read_bytes()[:-999])


def csv(data, drop=(), name="adaptive_002"):
    "The recording as a CSV file, which replaces the other where it has its name."
    table = pd.read_parquet(data / "adaptive_002.parquet").drop(columns=list(drop))
    if name == "adaptive_002":
        (data / "adaptive_002.parquet").unlink()
    table.to_csv(data / f"{name}_aligned.csv", index=False)


def sample(value):
    "A column with one bad value in its middle, which is well within the program."
    return lambda column: column.where(np.arange(len(column)) != len(column) // 2, value)


BROKEN = {  # what is done to a folder of recordings -> parts of the sentence
    "no folder": (
        shutil.rmtree,
        ["data: folder: expected a folder of recordings, found nothing there"],
    ),
    "a file": (
        lambda d: (shutil.rmtree(d), d.write_text("x")),
        ["data: folder: expected a folder of recordings, found a file"],
    ),
    "empty": (lambda d: [f.unlink() for f in d.iterdir()], ["data: files", "found none"]),
    "truncated": (cut, ["adaptive_002.parquet: content: expected a whole .parquet table, found "]),
    "no label column": (
        lambda d: csv(d, ["gcode_string"]),
        ["adaptive_002_aligned.csv: column gcode_string: expected", "found no such column"],
    ),
    "no clock": (
        lambda d: csv(d, ["t_console"]),
        ["adaptive_002_aligned.csv: column t_console", "found no such column"],
    ),
    "no sensors": (
        lambda d: pd.read_parquet(
            d / "adaptive_002.parquet", columns=["t_console", "gcode_line", "gcode_string"]
        ).to_parquet(d / "adaptive_002.parquet"),
        ["adaptive_002.parquet: columns: expected sensor channels"],
    ),
    "nan": (
        lambda d: change(d, x_motor=sample(np.nan)),
        [
            "adaptive_002.parquet: column x_motor: expected finite numbers, found nan at row ",
            "(1 in all)",
        ],
    ),
    "infinite": (
        lambda d: change(d, spindle=sample(np.inf)),
        [
            "adaptive_002.parquet: column spindle: expected finite numbers, found inf at row ",
            "(1 in all)",
        ],
    ),
    "text": (
        lambda d: change(d, spindle=lambda c: c.astype(str)),
        ["adaptive_002.parquet: column spindle: expected numbers, found "],
    ),
    "no labelled row": (
        lambda d: change(d, gcode_string=lambda c: None),
        ["adaptive_002.parquet: rows: expected at least one row with a label, found 0"],
    ),
    "bad clock": (
        lambda d: change(d, t_console=sample("noon")),
        ["adaptive_002.parquet: t_console: expected HH:MM:SS.mmm or MM:SS.f, found 'noon'"],
    ),
    "duplicate run": (
        lambda d: (
            csv(d, name="face_001")
            or shutil.copy(d / "adaptive_002.parquet", d / "face_001.parquet")
        ),
        ["data: run face_001: expected one file a run, found face_001", " and face_001"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check(command, data, name):
    "`gcode_ml check` says what is wrong with recordings, and writes nothing."
    assert command("check", "fingerprint", data)[:2] == (0, f"{data}: no fault found\n")
    before = set(data.parent.rglob("*"))
    spoil, parts = BROKEN[name]
    spoil(data)
    code, out, _ = command("check", "fingerprint", data)
    assert code == 2
    sentence(out, *parts)
    assert {f for f in data.parent.rglob("*") if data not in f.parents} <= before


def test_check_tells_all_faults(command, data):
    "One sentence for each broken file."
    for f in data.iterdir():
        f.write_bytes(b"PAR1")
    code, out, _ = command("check", "fingerprint", data)
    assert code == 2
    assert len(out.splitlines()) == 3
    for line in out.splitlines():
        sentence(line, "parquet: content")


def test_check_sequences(command, tmp_path):
    "Prepared windows are checked too."
    good = dict(sensor_data=np.zeros((2, 3, 4)), gcode_tokens=np.ones((2, 5), int))
    for change, *parts in [
        ({},),
        (
            dict(sensor_data=np.full((2, 3, 4), np.nan)),
            "sensor_data: expected finite numbers, found nan at window 0 (24 in all)",
        ),
        (dict(gcode_tokens=np.ones((3, 5), int)), "sensor_data: expected [3,T,C], found [2, 3, 4]"),
    ]:
        np.savez(tmp_path / "w.npz", **{**good, **change})
        code, out, _ = command("check", "fingerprint", tmp_path / "w.npz")
        assert code == (2 if parts else 0)
        if parts:
            sentence(out, "w.npz: ", *parts)


def test_a_source_on_two_sides(refused, recordings):
    "A split that tears a source apart is refused; that of random windows is one."
    sentence(
        refused(check_disjoint, ["a", "b", "a", "c"], [0, 1], [2, 3]),
        "split: sources: expected each on one side, found a on both sides (1 in all)",
    )
    sentence(
        refused(check_disjoint, ["a", "b"], [0, 1], []),
        "split: test: expected at least one item, found none",
    )
    leaky = recipe(read_recordings(recordings), split="leaky", **SMALL)
    sentence(
        refused(check_disjoint, leaky.fold.windows.sources, leaky.train, leaky.test),
        "split: sources: expected each on one side",
    )


@pytest.mark.parametrize(
    "change,parts",
    [
        (dict(fold=5), ["fold: number: expected 0 to 1, found 5"]),
        (dict(folds=20), ["split: "]),
        (dict(modalities=["colour"]), ["modalities: names: "]),
        (dict(controller=["raw_json"]), ["controller: column: "]),
        (dict(d_model=10, nhead=4), ["parameter: d_model: ", "found 10"]),
        (dict(d_model=7), ["parameter: d_model: ", "found 7"]),
        (dict(tokenizer="words"), ["parameters: tokenizer: "]),
        (dict(device="none"), ["parameter: device: expected auto, or cpu", "found 'none'"]),
    ],
)
def test_recipe(refused, recordings, change, parts):
    "What only the recipe can know to be wrong is told by it in the same way."
    sentence(refused(recipe, read_recordings(recordings), **{**SMALL, **change}), *parts)


SMALL = dict(
    d_model=8,
    nhead=1,
    num_layers=1,
    encoder_layers=1,
    dim_feedforward=8,
    stride=64,
    folds=2,
    device="cpu",
)


@pytest.fixture(scope="module")
def bundle(recordings, tmp_path_factory):
    "A bundle of a model that has learnt nothing."
    learn = recipe(read_recordings(recordings), **SMALL)
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(
        folder,
        learn.model,
        learn.arguments,
        learn.fold.preprocessing(),
        dict(domain="fingerprint", trained_on=sorted(set(learn.fold.windows.sources[learn.train]))),
    )
    return folder


def shorter(state):
    vocab = state["tokenizer"]["vocab"]
    vocab.pop(max(vocab, key=vocab.get))


def swapped(state):
    v = state["tokenizer"]["vocab"]
    v["G0"], v["G1"] = v["G1"], v["G0"]


def gap(state):
    v = state["tokenizer"]["vocab"]
    v["G1"] = len(v)


@pytest.mark.parametrize(
    "spoil,parts",
    [
        (shorter, ["vocabulary", "tokens"]),
        (swapped, ["vocabulary", "token"]),
        (gap, ["vocabulary: token ", "expected id "]),
    ],
)
def test_vocabulary_of_another_bundle(command, recordings, bundle, tmp_path, spoil, parts):
    "A bundle whose vocabulary is not the one of its weights predicts nothing."
    code, out, _ = command("predict", bundle, recordings / "face_001.parquet")
    assert code == 0
    assert out.startswith("run,seconds,operation,probability,line\nface_001,")
    shutil.copytree(bundle, tmp_path / "bundle")
    about = read_json(tmp_path / "bundle" / "bundle.json")
    spoil(about["preprocessing"])
    write_json(tmp_path / "bundle" / "bundle.json", about)
    code, out, error = command("predict", tmp_path / "bundle", recordings / "face_001.parquet")
    assert (code, out) == (2, "")
    sentence(error, *parts)


@pytest.mark.parametrize(
    "spoil,parts",
    [
        (lambda b: (b / "model.safetensors").unlink(), ["model.safetensors: weights"]),
        (lambda b: (b / "bundle.json").unlink(), ["bundle.json: expected a bundle"]),
        (lambda b: (b / "bundle.json").write_text("[]"), ["bundle.json: model"]),
        (lambda b: (b / "bundle.json").write_text("{"), ["bundle.json: line 1: expected JSON"]),
    ],
)
def test_broken_bundle(command, recordings, bundle, tmp_path, spoil, parts):
    "So does one with a part missing."
    shutil.copytree(bundle, tmp_path / "bundle")
    spoil(tmp_path / "bundle")
    code, out, error = command("predict", tmp_path / "bundle", recordings / "face_001.parquet")
    assert (code, out) == (2, "")
    sentence(error, *parts)


def test_predict_needs_a_recording(command, bundle, data):
    "What is to be read must be there, whole, and of the model's channels."
    code, _, error = command("predict", bundle, data / "none.parquet")
    assert code == 2
    sentence(error, "none.parquet: file: expected a recording, found nothing there")
    cut(data)
    code, _, error = command("predict", bundle, data / "adaptive_002.parquet")
    assert code == 2
    sentence(error, "adaptive_002.parquet: content")
    table = pd.read_parquet(data / "adaptive_001.parquet")
    boards = [c for c in table if "." in c or c.endswith("_motor") or c == "spindle"]
    table.rename(columns={c: f"other_{c}" for c in boards}).to_parquet(
        data / "adaptive_001.parquet"
    )
    code, _, error = command("predict", bundle, data / "adaptive_001.parquet")
    assert code == 2
    sentence(error, "adaptive_001: channels: ")


MISTAKES = [  # words after `gcode_ml`; TMP is an empty folder -> parts of the sentence
    (
        "run fingerprint -p colour=red",
        "parameter: colour: expected one of data, ",
        "found a name that this experiment does not have",
    ),
    ("run fingerprint -p run_dir=x", "parameter: run_dir: expected one of data, "),
    (
        "run fingerprint -p max_epochs=many",
        "parameter: max_epochs: expected int such as ",
        "found 'many'",
    ),
    ("run fingerprint -p max_epochs=1.5", "parameter: max_epochs: expected int"),
    ("run fingerprint -p leaky=maybe", "parameter: leaky: expected bool such as True"),
    ("run fingerprint -p learning_rate=fast", "parameter: learning_rate: expected float"),
    (
        'run fingerprint -p learning_rate=__import__("os").getpid()',
        "parameter: learning_rate: expected float",
    ),
    ("run fingerprint -p dropout=nan", "parameter: dropout: expected float"),
    ("run fingerprint -p max_epochs=0", "parameter: max_epochs: expected 1 to 1000, found 0"),
    ("run fingerprint -p seed=-1", "parameter: seed: expected at least 0, found -1"),
    ("run fingerprint -p dropout=0.95", "parameter: dropout: expected 0 to 0.9, found 0.95"),
    ("run fingerprint -p learning_rate=1e999", "parameter: learning_rate: expected ", "found inf"),
    (
        "run fingerprint -p tokenizer=words",
        "parameter: tokenizer: expected one of lossless, bucket, found 'words'",
    ),
    ("run fingerprint -p seed", "-p: seed: expected name=value, found no equals sign"),
    ("run fingerprint --config TMP/no.yaml", "no.yaml: file: expected a YAML or JSON file"),
    ("run fingerprint --name a/b", "--name: a/b: expected letters"),
    ("run fingerprint --resume none", "runs: run none: expected one run of that name, found 0"),
    ("run fingerprint --resume none -p seed=1", "--resume: none: expected no parameters beside it"),
    ("run cooking", "command: domain: expected one of ", "found 'cooking'"),
    ("check cooking TMP", "command: domain: "),
    ("run core", "command: domain: "),
    ("parameters cooking", "expected", "found"),
    ("report none", "run none: expected one run"),
    ("compare none", "run none: expected one run"),
    ("evaluate none --data TMP", "run none: expected one run"),
    ("predict TMP x.csv", "bundle.json: expected a bundle"),
]


@pytest.mark.parametrize(
    "words,parts", [(w, p) for w, *p in MISTAKES], ids=[w for w, *_ in MISTAKES]
)
def test_mistakes(command, tmp_path, words, parts):
    "Mistakes on the command line are told before anything begins: no run folder is made."
    code, out, error = command(*words.replace("TMP", str(tmp_path)).split())
    assert (code, out) == (2, "")
    sentence(error, *parts)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    "text,parts",
    [
        ("seed: [", ["c.yaml: content: expected YAML"]),
        ("- 1", ["c.yaml: content: expected names and values, found list"]),
        ("seed: x", ["parameter: seed: expected int"]),
        ("colour: 1", ["parameter: colour"]),
    ],
)
def test_bad_config(command, tmp_path, text, parts):
    "A file of parameters is checked like those of the command line."
    (tmp_path / "c.yaml").write_text(text)
    code, _, error = command("run", "fingerprint", "--config", tmp_path / "c.yaml")
    assert code == 2
    sentence(error, *parts)
    assert [f.name for f in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    "words", ["", "dance", "run", "check fingerprint", "run fingerprint --no-such-word"]
)
def test_grammar(command, words):
    "Words that are no command: exit code 2 and how to use it."
    code, out, error = command(*words.split())
    assert code == 2
    assert out == ""
    assert error.startswith("usage: gcode_ml")


@pytest.mark.parametrize(
    "verb", ["run bearing", "sweep bearing --space nbs/experiments/bearing.sweep.yaml"]
)
@pytest.mark.parametrize("name", [".", "..", "...", "../bearing", "a/b"])
def test_name_that_is_no_name(command, tmp_path, verb, name):
    "A name of dots would be the folder of all runs: it is refused before anything is made, and --replace removes nothing."
    kept = new_run("fingerprint", dict(seed=1), "kept", tmp_path / "runs")
    for replace in ([], ["--replace"] if verb.startswith("run") else []):
        code, _, error = command(*verb.split(), "--name", name, *replace)
        assert code == 2
        sentence(error, f"--name: {name}: expected ")
    assert kept.path("params.json").exists()
    assert [f.name for f in (tmp_path / "runs").iterdir()] == ["fingerprint"]


def test_only_a_run_is_replaced(command, tmp_path):
    "A folder that is no run of this workspace is not removed, whatever it holds."
    mine = tmp_path / "runs" / "bearing" / "mine"
    for params in (
        {},
        dict(domain="bearing", name="another"),
        dict(domain="sign", name="mine", parameters={}),
    ):
        write_json(mine / "params.json", params)
        code, _, error = command("run", "bearing", "--name", "mine", "--replace")
        assert code == 2
        sentence(error, "mine: params.json: expected those of the run bearing/mine")
        assert (mine / "params.json").exists()


def test_existing_run(command, tmp_path):
    "A name that is taken is refused, and the run that has it stays as it is; it is not finished, so there is no report of it."
    run = new_run("fingerprint", dict(seed=1), "taken", tmp_path / "runs")
    run.log("kept")
    before = {f: f.read_bytes() for f in run.folder.iterdir()}
    code, _, error = command("run", "fingerprint", "--name", "taken")
    assert code == 2
    sentence(
        error, "taken: run: expected a free name, found a run that is interrupted; ", "--replace"
    )
    for words in ("report taken", "compare taken", f"evaluate taken --data {tmp_path}"):
        code, _, error = command(*words.split())
        assert code == 2
        sentence(
            error,
            "taken: result.json: expected a finished run, found one that is interrupted; ",
            "--resume taken",
        )
    with_lock = {f for f in run.folder.iterdir() if f.name != ".lock"}
    assert with_lock == {f for f in before if f.name != ".lock"}
    assert all(f.read_bytes() == before[f] for f in with_lock)
    run.hold()
    for words in ("run fingerprint --name taken", "run fingerprint --name taken --replace"):
        code, _, error = command(*words.split())
        assert code == 2
        sentence(error, "taken: run: expected a free name, found a run that is going on")


def test_broken_data_in_a_run(command, data, tmp_path):
    "Found out in the notebook, the sentence is the same; an interrupted run without `result.json` is left."
    cut(data)
    code, out, error = command("run", "fingerprint", "-p", f"data={data}", "--name", "x")
    assert (code, out) == (2, "")
    sentence(error, "adaptive_002.parquet: content: expected a whole .parquet table")
    folder = tmp_path / "runs" / "fingerprint" / "x"
    assert {f.name for f in folder.iterdir()} <= {
        ".lock",
        "params.json",
        "run.ipynb",
        "log.txt",
    }
    assert json.loads((folder / "params.json").read_text())
    assert "interrupted" in command("runs")[1]
