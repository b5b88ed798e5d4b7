"Sweeps: what a trial costs besides its fit, in a kernel that is kept and in one that is started for it."

import itertools
import tempfile
import time
from pathlib import Path

import nbformat

from bench import benchmark
from bench._faults import KILLS, driver, killed_sweep, small_experiment, wait_for_work

CELLS = [
    'x = 0.0  # Place\nrun_dir = ""  # Folder of the run',
    """import pandas as pd
from gcode_ml.training.tiny import tiny_learner
from gcode_ml.lab.runs import open_run
run = open_run(run_dir)
result = run.finish(pd.DataFrame([dict(measure='x', value=x)]), validation=dict(x=x))
run._lock.release()""",
]


@benchmark(
    "a trial that fits nothing, by the clock, in a kernel that has run others",
    "papermill with a kernel of its own, which imports anew",
    0.3,
)
def warm_kernel(quick):
    from gcode_ml.lab.experiment import execute
    from gcode_ml.lab.sweeps import WarmKernel

    folder = Path(tempfile.mkdtemp())
    number = itertools.count()
    kernel = WarmKernel()
    nb = nbformat.v4.new_notebook(
        metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
        cells=[nbformat.v4.new_code_cell(c) for c in CELLS],
    )
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, folder / "empty.ipynb")

    def words():
        i = next(number)
        return (
            folder / "empty.ipynb",
            folder / f"{i}.ipynb",
            dict(x=1.0, run_dir=str(folder / "runs" / str(i))),
        )

    def ours():
        kernel.execute(*words())

    def theirs():
        execute(*words())

    ours()  # the first one starts the kernel
    return ours, theirs


@benchmark(
    "twelve trials on two workers, by the clock, while worker, kernel and driver are killed three times each",
    "the same sweep left alone; the goal is for the time without the starts of the drivers",
    1.5,
    by="wall",
    repetitions=1,
)
def killed(quick):
    notebook = small_experiment(Path(tempfile.mkdtemp()))
    facts = {}
    more = ["-p", f"epochs={4 if quick else 40}", "-p", "pause=0.5"]

    def ours():
        began = time.time()
        kills, _ = killed_sweep(notebook, "killed", *more, pause=(0.5, 1) if quick else (5, 15))
        facts.update(kills=len(kills), seconds_killed=time.time() - began)

    def alone():
        began = time.time()
        process = driver(notebook, "alone", *more)
        wait_for_work(process)
        facts["seconds_start"] = time.time() - began
        process.communicate()
        took = time.time() - began
        if process.returncode:
            raise RuntimeError("the sweep that nothing disturbed has failed")
        facts["ratio_without_starts"] = (
            facts["seconds_killed"] - KILLS.count("driver") * facts["seconds_start"]
        ) / took
        facts["met"] = facts["ratio_without_starts"] <= 1.5

    return ours, alone, facts
