"""Tiny seeded commands of every domain, shared by the fixtures, the tests and `same_numbers.py`.

Everything goes through the command line, so that names inside the package may change.
The commands use relative paths: they are carried out in a folder of their own.
"""

import importlib
import json
import os
import subprocess
import sys

# What `gcode_ml simulate TARGET -o data/TARGET` is told before the runs.
DATA = {
    "fingerprint": dict(runs=2, seed=3),
    "trajectory": dict(machine="bedslinger+worn:1", layers="sampled:1", rate=100.0, seed=3),
    "bearing": dict(kind="rolling", seconds=0.5, snr=0.0, seed=3),
    "sign": dict(),
    "binary_vae": dict(rows=40, seed=3),
}

# What `gcode_ml run DOMAIN` is told; every run takes seconds.
RUNS = {
    "fingerprint": dict(
        data="data/fingerprint",
        folds=2,
        test_folds=1,
        leaky="no",
        window=32,
        stride=64,
        d_model=8,
        nhead=1,
        num_layers=1,
        encoder_layers=1,
        dim_feedforward=8,
        max_epochs=3,
        batch_size=4,
        augment="noise, time_warp",
        save_best="valid_loss",
    ),
    "trajectory": dict(
        data="data/trajectory",
        machine="bedslinger+worn:1",
        splits="part",
        test_folds=1,
        seeds=1,
        baselines="zero+fir+sign",
        sequence_length=32,
        stride=32,
        others="",
        base="fir",
        d_model=8,
        num_layers=2,
        max_epochs=3,
    ),
    "bearing": dict(
        data="data/bearing",
        splits="bearing",
        test_folds=1,
        seeds=1,
        baselines="constant+rule+physics_lr",
        window=3000,
        max_epochs=3,
    ),
    "sign": dict(
        glosses=3,
        signers=3,
        repetitions=2,
        test_folds=1,
        random_folds=0,
        width=16,
        num_layers=1,
        frames=16,
        batch_size=8,
        max_epochs=3,
    ),
    "binary_vae": dict(
        data="bars",
        latent=4,
        hidden=8,
        subset=128,
        beta_warmup_epochs=2,
        leaky="no",
        made=20,
        max_epochs=3,
    ),
}

# What every run shares.
SHARED = dict(seed=7, device="cpu", workers=0)

# Where the command line begins, now and in 0.1.0; pyproject.toml names it as well.
ENTRY_MODULE = "gcode_ml.lab.cli"
ENTRY = f"""
import sys
try:
    from {ENTRY_MODULE} import main
except ImportError:
    from gcode_ml.lab.command import main
sys.exit(main())
"""


def options(values: dict) -> list:
    """Return the words `-p name=value` of a command line."""
    return [word for name, value in values.items() for word in ("-p", f"{name}={value}")]


def simulate_words(target: str) -> list:
    """Return the words of the command that simulates the data of a domain."""
    return ["simulate", target, "-o", f"data/{target}", *options(DATA[target])]


def run_words(domain: str, name: str = "tiny", **changed) -> list:
    """Return the words of the command that carries out the tiny run of a domain."""
    values = {**RUNS[domain], **SHARED, **changed}
    return ["run", domain, "--name", name, *options(values)]


def environment(source=None) -> dict:
    """Return the variables of a process: one thread, no real data, runs in its folder."""
    found = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GCODE_ML_DATA": "",
        "GCODE_ML_RUNS": "runs",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if source is not None:
        found["PYTHONPATH"] = str(source)
    return found


def gcode_ml(words: list, folder, source=None, code: int = 0) -> str:
    """Carry out a command in `folder` with the package of `source`; return what it printed."""
    command = [sys.executable, "-c", ENTRY, *map(str, words), "--quiet"]
    done = subprocess.run(
        command, cwd=folder, env=environment(source), capture_output=True, text=True
    )
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr[-2000:]}")
    return done.stdout


def entry_point():
    """Return the function behind the command `gcode_ml`, for calls in this process."""
    return importlib.import_module(ENTRY_MODULE).main


def execute_here(notebook, output, parameters=None, **unused):
    """Execute a notebook in this process, in the place of papermill's `execute_notebook`."""
    names = {"__name__": "__main__", "display": lambda *shown: None}
    with open(notebook, encoding="utf-8") as file:
        cells = json.load(file)["cells"]
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), f"{notebook}-{number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names.update(parameters or {})
