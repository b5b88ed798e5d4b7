"The package is what the notebooks export, and the notebooks are clean."

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob

CFG = get_config()
ROOT = CFG.config_path
LIB = CFG.lib_path
NBS = CFG.nbs_path
PAGES = sorted(nbglob(NBS, as_path=True))


def read(nb):
    return json.loads(nb.read_text(encoding="utf-8"))


def code(nb):
    return ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]


def modules(lib):
    return {p.relative_to(lib).as_posix(): p.read_bytes() for p in lib.rglob("*.py")}


def default_exp(nb):
    "The module a notebook exports to, None if it exports nothing."
    names = [m[1] for s in code(nb) for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", s, re.M)]
    assert len(names) < 2, names
    return names[0] if names else None


def exports(nb):
    return any(re.search(r"^#\|\s*export", s, re.M) for s in code(nb))


EXPORTED = {p.relative_to(NBS).as_posix(): default_exp(read(p)) for p in PAGES}


def fresh_export(folder):
    "Export the notebooks into an otherwise empty package below `folder`: the files of the package, and of pyproject.toml."
    lib = folder / LIB.name
    lib.mkdir(parents=True)
    shutil.copytree(
        NBS,
        folder / NBS.name,
        ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_*", ".last_checked"),
    )
    for f in (
        LIB / "__init__.py",
        ROOT / "pyproject.toml",
        ROOT / "settings.ini",
        ROOT / "README.md",
    ):
        if f.exists():
            shutil.copy(f, folder / f.relative_to(ROOT))
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run(
        [
            sys.executable,
            "-c",
            "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()",
        ],
        cwd=folder,
        env=env,
        check=True,
    )
    return modules(lib), (folder / "pyproject.toml").read_bytes()


def test_export_in_sync(tmp_path):
    "A fresh export gives the committed package byte for byte: no hand edits, no orphan modules, no missing ones."
    fresh, project = fresh_export(tmp_path)
    have = modules(LIB)
    assert sorted(have) == sorted(fresh), (
        "run nbdev-export, and delete the modules that no notebook exports"
    )
    assert [f for f in have if have[f] != fresh[f]] == [], "run nbdev-export"
    assert project == (ROOT / "pyproject.toml").read_bytes(), "nbdev-export rewrites pyproject.toml"


def test_default_exp():
    "A notebook exports to the module at its own path without the number; two to one module would lose code silently."
    named = {p: e for p, e in EXPORTED.items() if e}
    assert [e for e, n in Counter(named.values()).items() if n > 1] == []
    assert {
        p: e
        for p, e in named.items()
        if e != re.sub(r"(^|/)\d+_", r"\1", p).removesuffix(".ipynb").replace("/", ".")
    } == {}
    assert [p for p, e in EXPORTED.items() if not e and exports(read(NBS / p))] == []


def test_every_module_has_a_notebook():
    "No module without a page."
    have = {
        f.removesuffix(".py").replace("/", ".")
        for f in modules(LIB)
        if not f.rsplit("/", 1)[-1].startswith("_")
    }
    assert have == {e for p, e in EXPORTED.items() if e and exports(read(NBS / p))}


def clean(nb):
    "A notebook as nbdev-clean would leave it."
    nb = copy.deepcopy(nb)
    clean_nb(
        nb,
        allowed_cell_metadata_keys=CFG.get("allowed_cell_metadata_keys"),
        clean_ids=CFG.clean_ids,
    )
    return nb


def text(nb):
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def test_notebooks_are_clean():
    "nbdev-clean would change no byte, so a diff shows what a person wrote."
    assert [
        p for p in EXPORTED if text(clean(read(NBS / p))) != (NBS / p).read_text(encoding="utf-8")
    ] == [], "run nbdev-clean"


def test_dirty_notebook_is_found():
    "Execution counts, object addresses and foreign metadata are dirt."
    cell = dict(
        cell_type="code", id="a", source=["x"], metadata={}, execution_count=None, outputs=[]
    )
    nb = dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)
    assert clean(nb) == nb
    for dirt in (dict(execution_count=3), dict(metadata=dict(scrolled=True))):
        assert clean(dict(nb, cells=[dict(cell, **dirt)])) == nb


def test_parameters_tag_survives_cleaning():
    "Without the tag papermill's values would be overridden by the defaults, and the run would still exit 0."
    cell = dict(
        cell_type="code",
        id="a",
        source=["x = 1"],
        metadata=dict(tags=["parameters"]),
        execution_count=None,
        outputs=[],
    )
    nb = dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)
    assert clean(nb)["cells"][0]["metadata"] == dict(tags=["parameters"])
    clean_nb(nb)  # what nbdev does without the setting
    assert nb["cells"][0]["metadata"] == {}


def parameter_lines(nb):
    "Lines of the cell that papermill reads."
    cells = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    return "".join("".join(c["source"]) for c in cells).splitlines()


def test_every_parameter_has_its_help():
    "A default that the formatter wraps in parentheses would lose its help and its limits."
    lines = {p: parameter_lines(read(NBS / p)) for p in EXPORTED}
    assert {
        p: bad for p, found in lines.items() if (bad := [l for l in found if "# " not in l])
    } == {}
