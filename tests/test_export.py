"Programs say what the models say, at sizes they were not exported with; a stranger's programs are not opened; prediction needs little."

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from examples_fingerprint import MODALITIES, SMALL
from test_contracts import EXAMPLES
from torch import nn

import gcode_ml
from gcode_ml.core.files import checksum, read_json, write_json
from gcode_ml.fingerprint.models import GCodeFingerprinter
from gcode_ml.fingerprint.tokens import tokenizer
from gcode_ml.lab.bundle import load_bundle, save_bundle
from gcode_ml.lab.export import (
    SUFFIXES,
    bundle_programs,
    compare_program,
    eager_programs,
    export_bundle,
    make_programs,
    predict_arrays,
    read_program,
    run_programs,
)
from gcode_ml.training.tiny import TinyClassifier

missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if not find_spec(p)]
no_onnx = f"not installed: {', '.join(missing)} (pip install 'gcode_ml[export]')"
needs_onnx = pytest.mark.skipif(bool(missing), reason=no_onnx)
KINDS = [pytest.param(k, marks=needs_onnx if k in ("onnx", "int8") else ()) for k in SUFFIXES]
ROOT = Path(gcode_ml.__file__).parents[1]


def a_model(name):
    "A small model with weights that are all different, in evaluation."
    torch.manual_seed(0)
    model, _ = EXAMPLES[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.eval()


def exported_models():
    "Models that name the inputs of their programs, and those that need not."
    return [
        n
        for n, example in sorted(EXAMPLES.items())
        if n.startswith(("core.", "fingerprint.")) or hasattr(example()[0], "program_inputs")
    ]


@lru_cache(None)
def made(name, method):
    "All programs of a method; without ONNX the other two formats."
    if not missing:
        return make_programs(a_model(name), method)
    return {f: make_programs(a_model(name), method, f)[f] for f in ("exported", "torchscript")}


@pytest.mark.parametrize("name", exported_models())
def test_programs_equal_the_model(name):
    "Each format of each model, at a second batch size and length and for a single sequence; int8 within its own tolerance."
    for method, eager in eager_programs(a_model(name)).items():
        for kind, data in made(name, method).items():
            found = compare_program(
                eager,
                read_program(data, kind, eager.inputs, eager.outputs, trusted=True),
                kind == "int8",
            )
            assert found["within"], (kind, found)
            rows = found["compared"]
            assert {r["batch"] for r in rows} == {5, 1}
            assert all(r["length"] > 7 for r in rows)
            assert {r["output"] for r in rows} == set(eager.outputs)
    if missing:
        pytest.skip(f"ONNX not compared, {no_onnx}")


@pytest.mark.parametrize("kind", KINDS)
def test_programs_name_no_folder(kind):
    "A program carries no path of the machine it was made on."
    data = made("training.tiny.TinyClassifier", "forward")[kind]
    if kind in ("exported", "torchscript"):
        data = b"".join(
            z.read(f) for z in [zipfile.ZipFile(io.BytesIO(data))] for f in z.namelist()
        )
    assert str(ROOT).encode() not in data
    assert str(Path(torch.__file__).parent).encode() not in data


class Fixed(TinyClassifier):
    "Its reshape holds for one length."

    def forward(self, x, mask):
        return super().forward(x.reshape(-1, 7, 2), mask)


class Branch(nn.Module):
    "Says something else for long sequences."

    def program_inputs(self):
        return dict(forward=dict(x="float32[batch,length,2]", mask="bool[batch,length]"))

    def forward(self, x, mask):
        return x.sum((1, 2)) if x.shape[1] < 9 else x.amax((1, 2))


@pytest.mark.parametrize("model", [Fixed, Branch])
@pytest.mark.parametrize("format", ["exported", "torchscript"])
def test_bad_exports_are_found(model, format):
    "A size or a branch that was traced as a constant ends in an error, or in a comparison that does not hold."
    model = model().eval()
    eager = eager_programs(model)["forward"]
    try:
        data = make_programs(model, "forward", format)[format]
    except RuntimeError as e:
        assert "cannot be exported" in str(e)
        return
    assert not compare_program(
        eager, read_program(data, format, eager.inputs, eager.outputs, trusted=True)
    )["within"]


@needs_onnx
def test_int8_of_shared_weights():
    "Layers that share a weight are quantised rightly."

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(6, 6)
            self.two = nn.Linear(6, 6)
            self.two.weight = self.one.weight

        def program_inputs(self):
            return dict(forward=dict(x="float32[batch,6]"))

        def forward(self, x):
            return self.two(self.one(x).tanh())

    torch.manual_seed(0)
    model = Tied().eval()
    eager = eager_programs(model)["forward"]
    found = compare_program(
        eager,
        read_program(
            make_programs(model, format="onnx")["int8"], "int8", eager.inputs, eager.outputs
        ),
        int8=True,
    )
    assert found["within"], found


# a bundle of a fingerprinter

LINES = ["G1 X1.5 Y2.", "G0 Z0.5", "M5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A fingerprinter's bundle, its TorchScript programs, and the inputs of five windows."
    words = tokenizer("lossless", LINES)
    folder = tmp_path_factory.mktemp("fingerprint") / "run"
    arguments = dict(
        modalities=MODALITIES, parts=words.parts.tolist(), operations=3, num_layers=1, **SMALL
    )
    torch.manual_seed(3)
    model = GCodeFingerprinter(**arguments)
    save_bundle(
        folder / "bundle",
        model,
        arguments,
        dict(tokenizer=words.to_json(), operations=["face", "pocket", "drill"], length=8),
        dict(domain="fingerprint", trained_on=[]),
    )
    export_bundle(load_bundle(folder), "torchscript")
    rng = np.random.default_rng(0)
    np.savez(
        folder / "a.npz",
        sensors=rng.standard_normal((5, 9, 6)),
        present=rng.random((5, 9, 6)) < 0.9,
        mask=np.arange(9) < rng.integers(3, 10, (5, 1)),
    )
    return folder


def batch(folder):
    "The model and its inputs as tensors."
    arrays = {
        k: torch.from_numpy(v.astype(np.float32) if v.dtype == float else v)
        for k, v in np.load(folder / "a.npz").items()
    }
    return load_bundle(folder).model, arrays


def test_chain_writes_the_same_lines(folder):
    "The two programs and a loop write what `write_lines` writes, and tell the same operation."
    model, arrays = batch(folder)
    mask = arrays.pop("mask")
    written = model.write_lines(arrays, mask, 8).numpy()
    operation = model.read_sensors(**arrays, mask=mask)["operation"].detach().numpy()
    for kind in ("", "torchscript"):
        out = run_programs(
            bundle_programs(load_bundle(folder), kind, trusted=True),
            {**{k: v.numpy() for k, v in arrays.items()}, "mask": mask.numpy()},
            8,
        )
        tokens = out["tokens"]
        assert (written[:, : tokens.shape[1]] == tokens).all()
        assert not written[:, tokens.shape[1] :].any()
        assert np.abs(out["operation"] - operation).max() < 1e-5


def test_table(folder):
    "Operation by name, lines as text; the same in small batches."
    table = predict_arrays(load_bundle(folder), folder / "a.npz")
    assert list(table.columns) == ["operation", "operation_value", "text"]
    assert set(table.operation) <= {"face", "pocket", "drill"}
    small = predict_arrays(load_bundle(folder), folder / "a.npz", batch_size=2)
    assert table.drop(columns="operation_value").equals(small.drop(columns="operation_value"))
    assert np.allclose(table.operation_value, small.operation_value)


def test_findings_are_kept(folder):
    "The description, the card and the list beside the programs say what the comparison gave."
    facts = read_json(folder / "bundle" / "bundle.json")["facts"]
    listing = read_json(folder / "bundle" / "programs" / "programs.json")
    assert facts["programs"] == listing
    assert "next_token.ts" in listing
    assert all(v["within"] and v["tolerance"] for v in listing.values())
    assert all(name in (folder / "bundle" / "README.md").read_text() for name in listing)


WITHOUT = """
import json, sys
sys.argv = ['gcode_ml', 'predict', {bundle!r}, {file!r}, *{words!r}]
from gcode_ml.lab.cli import main
code = main(sys.argv[1:])
print(json.dumps(sorted(set(sys.modules) & {{'fastai', 'sklearn', 'matplotlib', 'papermill'}})), file=sys.stderr)
sys.exit(code)
"""


def alone(script, cwd):
    out = subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    return out.stdout, out.stderr


def test_predict_needs_no_fastai(folder):
    "`gcode_ml predict` on prepared arrays loads PyTorch and not fastai."
    out, err = alone(
        WITHOUT.format(bundle=str(folder / "bundle"), file=str(folder / "a.npz"), words=[]), folder
    )
    assert out.splitlines()[0] == "operation,operation_value,text"
    assert len(out.splitlines()) == 6
    assert json.loads(err.splitlines()[-1]) == []


ONNX_ALONE = """
import json, sys, numpy as np, onnxruntime
read,write = (onnxruntime.InferenceSession(f'bundle/programs/{n}.onnx') for n in ('read_sensors','next_token'))
a = dict(np.load('a.npz')); a['sensors'] = a['sensors'].astype('float32')
memory,operation = read.run(['memory','operation'], a)
tokens = np.zeros((len(memory), 1), 'int64')
while tokens.shape[1] <= 8 and (tokens.shape[1] == 1 or tokens[:,-1].any()):
    tokens = np.concatenate([tokens, write.run(['next_tokens'], dict(tokens=tokens, memory=memory, mask=a['mask']))[0][:,None]], 1)
assert not set(sys.modules) & {'torch', 'gcode_ml', 'fastai'}
print(json.dumps(tokens[:,1:].tolist()))
"""


@needs_onnx
def test_onnx_runtime_alone(folder, tmp_path):
    "NumPy and ONNX Runtime write the lines, without PyTorch and without this package; `predict` writes the same with them."
    shutil.copytree(folder, tmp_path / "run")
    found = export_bundle(load_bundle(tmp_path / "run"), "onnx")
    assert {v["format"] for v in found.values()} == {"onnx", "int8"}
    assert all(v["within"] for v in found.values())
    model, arrays = batch(folder)
    mask = arrays.pop("mask")
    tokens = np.array(json.loads(alone(ONNX_ALONE, tmp_path / "run")[0]))
    assert (model.write_lines(arrays, mask, 8).numpy()[:, : tokens.shape[1]] == tokens).all()
    bundle = load_bundle(tmp_path / "run")
    table, onnx = (predict_arrays(bundle, folder / "a.npz", format) for format in ("", "onnx"))
    assert table.text.equals(onnx.text)
    assert np.allclose(table.operation_value, onnx.operation_value, atol=1e-5)
    assert len(predict_arrays(bundle, folder / "a.npz", "int8")) == 5


# what is refused


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


def hostile(folder, marker):
    "Put a `.pt2` whose example inputs are a pickle in the place of a program, checksum and all."
    eager = eager_programs(load_bundle(folder).model)["read_sensors"]
    good = io.BytesIO(made("training.tiny.TinyClassifier", "forward")["exported"])
    pickle = io.BytesIO()
    file = folder / "bundle" / "programs" / "read_sensors.pt2"
    torch.save(Evil(marker), pickle)
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(file, "w") as new:
        assert any("sample_inputs" in n for n in old.namelist())
        for n in old.namelist():
            new.writestr(n, pickle.getvalue() if "sample_inputs" in n else old.read(n))
    about = read_json(folder / "bundle" / "bundle.json")
    about["facts"].setdefault("programs", {})["read_sensors.pt2"] = dict(
        inputs=eager.inputs, outputs=eager.outputs, checksum=checksum([file])
    )
    write_json(folder / "bundle" / "bundle.json", about)
    return file


def test_hostile_program(folder, tmp_path, command):
    "A `.pt2` can run code when PyTorch loads it; so it is not loaded unless that is asked for in so many words."
    shutil.copytree(folder, tmp_path / "run")
    marker = tmp_path / "was here"
    file = hostile(tmp_path / "run", marker)
    code, out, err = command("predict", tmp_path / "run", folder / "a.npz", "--format", "exported")
    assert (code, out) == (
        2,
        "",
    )
    assert "expected onnx or int8, which run no code on loading, found exported" in err
    assert command("predict", tmp_path / "run", folder / "a.npz")[0] == 0
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.export.load(file)
    assert marker.exists()  # the day this fails, the refusal can go


@pytest.mark.parametrize(
    "words,sentence",
    [
        (
            ["--format", "exported", "--trust"],
            "programs: expected read_sensors.pt2, found no such program; make it with `gcode_ml export`",
        ),
        (
            ["--format", "torchscript"],
            "expected onnx or int8, which run no code on loading, found torchscript",
        ),
    ],
)
def test_refused_programs(folder, command, words, sentence):
    "A program that is not there, or that was not said to be one's own."
    code, out, err = command("predict", folder / "bundle", folder / "a.npz", *words)
    assert (code, out) == (2, "")
    assert sentence in err


ARRAYS = {  # what is done to the arrays -> part of the sentence
    "missing": (
        lambda a: a.pop("sensors"),
        "array sensors: expected float32[batch,length,6], found present, mask",
    ),
    "channels": (
        lambda a: a.update(sensors=a["sensors"][..., :5]),
        "array sensors: expected float32[batch,length,6], found float64[5,9,5]",
    ),
    "lengths": (
        lambda a: a.update(mask=a["mask"][:, :4]),
        "array mask: expected bool[batch,length], found bool[5,4]",
    ),
    "type": (
        lambda a: a.update(present=a["present"] + 0),
        "array present: expected bool[batch,length,6], found int64[5,9,6]",
    ),
    "nan": (
        lambda a: a.update(sensors=a["sensors"] * np.nan),
        "array sensors: expected finite numbers",
    ),
    "empty": (
        lambda a: a.update({k: v[:0] for k, v in a.items()}),
        "array sensors: expected float32[batch,length,6], found float64[0,9,6]",
    ),
    "pickle": (
        lambda a: a.update(sensors=np.array([print], dtype=object)),
        "Python objects (a pickle), which are never loaded",
    ),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_bad_arrays(folder, command, tmp_path, name):
    "Arrays that do not fit end in one sentence."
    arrays = dict(np.load(folder / "a.npz"))
    spoil, sentence = ARRAYS[name]
    spoil(arrays)
    np.savez(tmp_path / "b.npz", **arrays)
    code, out, err = command("predict", folder / "bundle", tmp_path / "b.npz")
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_format_needs_arrays(folder, command):
    "A recording goes through the recipe, which has no programs."
    assert (
        "expected an .npz of prepared arrays"
        in command("predict", folder / "bundle", "x.parquet", "--format", "onnx")[2]
    )


def test_stale_program(folder, tmp_path):
    "A bundle that was written anew does not know the programs of the old one."
    shutil.copytree(folder, tmp_path / "run")
    bundle = load_bundle(tmp_path / "run")
    about = read_json(bundle.folder / "bundle.json")
    save_bundle(
        bundle.folder,
        bundle.model,
        about["arguments"],
        about["preprocessing"],
        dict(domain="fingerprint"),
    )
    with pytest.raises(ValueError, match="no such program"):
        bundle_programs(load_bundle(tmp_path / "run"), "torchscript", trusted=True)


def test_export_command(folder, command, tmp_path):
    "`gcode_ml export RUN` makes the programs of a finished run and says how they compare."
    runs = tmp_path / "runs" / "fingerprint"
    shutil.copytree(folder, runs / "mine")
    shutil.rmtree(runs / "mine" / "bundle" / "programs")
    write_json(runs / "mine" / "params.json", dict(parameters={}, created=""))
    assert command("export", "mine", "--format", "torchscript")[0] == 2  # has not finished
    write_json(runs / "mine" / "result.json", dict(status="finished", table=[]))
    code, out, err = command(
        "export", "mine", "--format", "torchscript", "-o", tmp_path / "elsewhere"
    )
    assert code == 0, err
    assert "next_token.ts" in out
    assert (tmp_path / "elsewhere" / "next_token.ts").exists()
    assert (tmp_path / "elsewhere" / "programs.json").exists()
    assert (
        "next_token.ts" in read_json(runs / "mine" / "bundle" / "bundle.json")["facts"]["programs"]
    )
