"A sweep whose workers, kernels and driver are killed: for the test that nothing is lost, and for the benchmark of what it costs."

import random
import signal
import subprocess
import sys
import time

import nbformat
import psutil

COMMAND = "import sys; from gcode_ml.lab.cli import main; sys.exit(main())"
TRIALS = 12
KILLS = ("worker", "kernel", "driver", "kernel", "worker", "driver", "worker", "kernel", "driver")

CELLS = [
    """x = 0.0  # Place [-10..10]
epochs = 12  # Epochs [1..1000]
pause = 0.1  # Seconds an epoch [0..10]
seed = 0  # Seed [0..]
run_dir = ""  # Folder of the run""",
    """import time
import pandas as pd
from fastai.callback.core import Callback
from gcode_ml.training.callbacks import History
from gcode_ml.training.learner import set_seed
from gcode_ml.training.tiny import tiny_learner
from gcode_ml.lab.runs import open_run
from gcode_ml.lab.snapshot import Snapshot
run = open_run(run_dir); set_seed(seed)
class Slow(Callback):
    order = 2000
    def after_epoch(self):
        with open(run.path('epochs.txt'), 'a') as f: f.write(f'{self.epoch}\\n')
        time.sleep(pause)
        run.report_epoch(fit='fit', epoch=self.epoch, valid_loss=(x-2)**2)
learn = tiny_learner(cbs=[History(run.path('history.csv'), 'fit'), Snapshot(run.path('snapshot', 'fit.safetensors')), Slow()])
with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3)
weights = sum(p.double().sum().item() for p in learn.model.parameters())
with open(run.path('finished.txt'), 'a') as f: f.write('once\\n')
result = run.finish(pd.DataFrame([dict(measure='loss', value=(x-2)**2)]), validation=dict(loss=(x-2)**2), weights=weights)""",
]


def small_experiment(folder):
    "A notebook that trains a tiny net slowly, and a space for it."
    nb = nbformat.v4.new_notebook(
        metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
        cells=[nbformat.v4.new_code_cell(c) for c in CELLS],
    )
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, folder / "tiny.ipynb")
    (folder / "space.yaml").write_text(
        "method: random\nmetric: {name: loss, goal: minimize}\nparameters: {x: {min: -5.0, max: 5.0}}\n"
    )
    return folder / "tiny.ipynb"


def driver(notebook, name, *more):
    "The command of a sweep, in a process of its own."
    words = [
        "sweep",
        str(notebook),
        "--space",
        str(notebook.parent / "space.yaml"),
        "--name",
        name,
        "--trials",
        str(TRIALS),
        "--workers",
        "2",
        "--runs",
        str(notebook.parent / "runs"),
        "--quiet",
        *more,
    ]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def below(process, what):
    "Processes below a driver: its `kernels`, or the `workers` of its cluster."
    try:
        found = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    kinds = {"kernels": "ipykernel", "workers": "multiprocessing.spawn"}

    def line(p):
        try:
            return " ".join(p.cmdline())
        except psutil.Error:
            return ""

    return [p for p in found if kinds[what] in line(p)]


def wait_for_work(process):
    "Return when a kernel is there, or when the driver has ended."
    while process.poll() is None and not below(process, "kernels"):
        time.sleep(0.1)


def killed_sweep(notebook, name, *more, after_driver=lambda: None, pause=(0.5, 3), seed=5):
    "Carry out a sweep under three kills each of a worker, a kernel and the driver; returns the kills and the output."
    rng = random.Random(seed)
    kills = []
    process = driver(notebook, name, *more)
    for what in KILLS:
        wait_for_work(process)
        time.sleep(rng.uniform(*pause))
        if process.poll() is not None:
            break
        if what == "driver":
            process.send_signal(signal.SIGKILL)
            process.wait()
            after_driver()
            process = driver(notebook, name, *more)
        elif found := below(process, what + "s"):
            try:
                rng.choice(found).kill()
            except psutil.NoSuchProcess:
                continue
        kills.append(what)
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out
    return kills, out
