"What several test files share: processes to be killed, and simulated recordings."

import multiprocessing
import os
import time
import warnings

import pytest

from gcode_ml.core.errors import InputError

os.environ.setdefault("OMP_NUM_THREADS", "1")


class Fork:
    "Starts processes from a server that has imported torch and fastai once, so that a start costs a moment."

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            [
                "gcode_ml.training.tiny",
                "gcode_ml.lab.snapshot",
                "fastai.callback.schedule",
                "pytest",
            ]
        )

    def start(self, function, *args):
        "A process that calls `function(*args, begun)`; returns when it has set the event `begun`, or ended."
        begun = self.context.Event()
        process = self.context.Process(target=function, args=(*args, begun))
        process.start()
        while not begun.wait(0.02) and process.is_alive():
            pass
        return process

    def finish(self, function, *args):
        "Call `function` in a process and return its exit code; -9 after a SIGKILL."
        process = self.start(function, *args)
        process.join(60)
        return process.exitcode

    def kill(self, function, *args, after):
        "Kill it `after` seconds from its beginning; returns whether it was still at work."
        process = self.start(function, *args)
        time.sleep(after)
        process.kill()
        process.join(60)
        return process.exitcode == -9


@pytest.fixture(scope="session")
def fork():
    return Fork()


@pytest.fixture
def refused():
    "Call something that must end in an `InputError`; returns its sentence."

    def call(function, *args, **kwargs):
        with pytest.raises(InputError) as error:
            function(*args, **kwargs)
        return str(error.value)

    return call


@pytest.fixture
def warnings_of():
    "Call something and collect its warnings: returns its result and the messages of its `UserWarning`s."

    def call(function, *args, **kwargs):
        with warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("always")
            result = function(*args, **kwargs)
        return result, [str(w.message) for w in recorded if w.category is UserWarning]

    return call


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    "A folder of ten simulated recordings, five operations; copy what you mean to break."
    from gcode_ml.fingerprint.simulate import simulate_recordings

    return simulate_recordings(tmp_path_factory.mktemp("recordings"), runs=2) / "runs"


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    "Run a command line in this process, with no real data and a runs folder of its own; returns (exit code, output, error output)."
    from gcode_ml.lab.cli import main

    monkeypatch.setenv("GCODE_ML_DATA", "")
    monkeypatch.setenv("GCODE_ML_RUNS", str(tmp_path / "runs"))

    def call(*words):
        capsys.readouterr()
        try:
            code = main([*map(str, words), "--quiet"])
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return call
