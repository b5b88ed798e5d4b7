"Each notebook is one test, so that pytest's closing line counts them."

import io
import sys

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

run_nb.__test__ = False

CFG = get_config()
NBS = sorted(nbglob(CFG.nbs_path, as_path=True))


@pytest.mark.parametrize("nb", NBS, ids=lambda p: p.relative_to(CFG.nbs_path).as_posix())
def test_notebook(nb, monkeypatch, tmp_path):
    "Every cell runs and every assertion holds, on simulated data and with runs kept apart."
    err = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", err)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("GCODE_ML_DATA", "")
    monkeypatch.setenv("GCODE_ML_RUNS", str(tmp_path / "runs"))
    ok, _ = run_nb(
        nb,
        skip_flags=CFG.tst_flags.split(),
        basepath=CFG.config_path,
        cell_timeout=CFG.cell_timeout,
    )
    assert ok, err.getvalue()
