"What a killed process leaves under a temporary name is cleared away, and nothing else."

import os
import time

import pytest

from gcode_ml.core import files
from gcode_ml.core.files import atomic_path, sweep_temporary


def writing(folder, begun):
    with atomic_path(folder / "stages" / "fit.json") as f:
        f.write_text("half")
        begun.set()
        time.sleep(60)


def temporary(folder):
    return sorted(f.name for f in folder.rglob("*.tmp"))


@pytest.mark.skipif(os.name != "posix", reason="a process cannot be asked for elsewhere")
def test_killed_and_alive(fork, tmp_path):
    "A living process keeps its file; once it is dead the file goes."
    process = fork.start(writing, tmp_path)
    try:
        assert len(temporary(tmp_path)) == 1
        assert sweep_temporary(tmp_path) == []
    finally:
        process.kill()
        process.join()
    assert len(temporary(tmp_path)) == 1
    assert len(sweep_temporary(tmp_path)) == 1
    assert temporary(tmp_path) == []


def test_other_machine(tmp_path, monkeypatch):
    "A file of another machine on the same disk is left until it is a day old."
    with monkeypatch.context() as m:
        m.setattr(files.platform, "node", lambda: "elsewhere")
        m.setattr(files.os, "getpid", lambda: 2**22 + 1)
        context = atomic_path(tmp_path / "a.json")
        f = context.__enter__()
    assert sweep_temporary(tmp_path) == []
    assert f.exists()
    os.utime(f, (time.time() - 90000,) * 2)
    assert sweep_temporary(tmp_path) == [f]
    assert not f.exists()
    with pytest.raises(FileNotFoundError):
        context.__exit__(None, None, None)


def test_only_temporary_names(tmp_path):
    "Old files of other names stay, visible ones that end alike too, and what a link points to."
    away = tmp_path / "away"
    away.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    for f in (
        run / "result.json",
        run / ".hidden",
        run / "notes.tmp",
        away / ".x.tmp",
        run / ".result.json.abc.tmp",
    ):
        f.write_text("")
        os.utime(f, (0, 0))
    if os.name == "posix":
        (run / "link").symlink_to(away)
    assert sweep_temporary(run) == [
        run / ".result.json.abc.tmp"
    ]  # as names were before they told the process
    assert (away / ".x.tmp").exists()
    assert sweep_temporary(tmp_path / "nowhere") == []
