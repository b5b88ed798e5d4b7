"Who may import whom, read from the source of the package; the domains are the folders that are there."

import ast
import os
import subprocess
import sys

import pytest
from nbdev.config import get_config

CFG = get_config()
LIB, PKG = CFG.lib_path, CFG.lib_path.name
BELOW = {  # floor -> the floors it may import, besides itself
    "core": set(),
    "data": {"core"},
    "signals": {"core", "data"},
    "evaluation": {"core", "data"},
    "training": {"core", "data", "signals", "evaluation"},
    "gcode": {"core"},
    "lab": {"core", "data", "evaluation", "training"},
}
SHARED = set(BELOW)
DOMAINS = sorted(
    d.name for d in LIB.iterdir() if (d / "__init__.py").exists() and d.name not in SHARED
)
LOWER_FLOORS = ("core", "data", "signals")  # what a models page may import, beside torch
PLAIN_PAGES = {"data", "augment", "models", "callbacks", "evaluate"}
VISION = {f"fastai.vision.{m}" for m in ("all", "augment", "learner", "models")}
DRAWING = {"matplotlib", "seaborn"}
LIGHT = {
    "fastcore.basics",
    "fastcore.basics.patch",
}  # a long class grows by `patch`, also in a models page
PICTURES = {"evaluation.plots", "lab.report", "lab.reports"}  # and every domain's evaluate page


def imports(module, source):
    "The absolute dotted names that a module's source imports, anywhere in it; `from a import b` gives `a` and `a.b`, a star `a.*`."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(module.split(".")[: -node.level] + ([node.module] if node.module else []))
                if node.level
                else node.module
            )
            yield base
            yield from (f"{base}.{a.name}" for a in node.names)


def inside(name, parent):
    return name == parent or name.startswith(parent + ".")


def faults(module, source, domains):
    "One line for each import in `module` that breaks a rule."
    names = set(imports(module, source))
    _, folder, *rest = module.split(".")
    page = rest[-1] if rest else ""
    ours = {n.split(".")[1] for n in names if n.startswith(PKG + ".")}
    bad = []

    def rule(broken, text):
        bad.extend(f"{module}: {text}: {x}" for x in sorted(broken))

    if folder in BELOW:
        rule(ours - BELOW[folder] - {folder}, f"{folder} imports")
    if folder in domains:
        rule(ours & {*domains} - {folder}, "a domain imports another")
        if page in PLAIN_PAGES:
            rule(ours & {"lab"}, "a page below the recipe imports")
        if page == "models":
            rule(
                {
                    n
                    for n in names - LIGHT
                    if n.split(".")[0] not in sys.stdlib_module_names
                    and not inside(n, "torch")
                    and not any(inside(n, f"{PKG}.{floor}") for floor in LOWER_FLOORS)
                },
                "models imports",
            )
    if page != "evaluate" and f"{folder}.{page}" not in PICTURES:
        rule({n for n in names if n.split(".")[0] in DRAWING}, "draws")
    rule({n for n in names if n.startswith("fastai") and n.endswith(".*")}, "star import")
    rule(
        {n for n in names if inside(n, "torchvision") or any(inside(n, v) for v in VISION)},
        "needs torchvision",
    )
    return bad


def test_rules_hold():
    "The package keeps every rule."
    files = [f for f in LIB.rglob("*.py") if not f.name.startswith("_")]
    assert files
    assert (
        sum(
            (
                faults(
                    ".".join(f.relative_to(LIB.parent).with_suffix("").parts),
                    f.read_text(encoding="utf-8"),
                    DOMAINS,
                )
                for f in files
            ),
            [],
        )
        == []
    )


BROKEN = [
    ("evaluation.plots", "from ..lab.runs import Run"),
    ("data.batch", "from ..signals.layers import masked_mean"),
    ("core.files", "from ..data.split import group_kfold"),
    ("signals.augment", "from ..training.losses import focal_loss"),
    ("lab.runs", "from ..signals.spectra import stft"),
    ("gcode.planner", "from ..data.batch import pad"),
    ("alpha.read.models", "from ...training.losses import part"),
    ("data.batch", "def f():\n    import gcode_ml.gcode.reader"),
    ("data.batch", "from gcode_ml.alpha import models"),
    ("gcode.planner", "from ..lab import runs"),
    ("gcode.planner", "from ..alpha.data import x"),
    ("lab.cli", "from gcode_ml.alpha.recipe import recipe"),
    ("alpha.data", "from ..beta.data import read"),
    ("alpha.recipe", "import gcode_ml.beta"),
    ("alpha.callbacks", "from ..lab.runs import Run"),
    ("alpha.evaluate", "import gcode_ml.lab.runs as r"),
    ("alpha.models", "import numpy as np"),
    ("alpha.models", "from .data import Windows"),
    ("alpha.models", "from fastai.layers import SigmoidRange"),
    ("alpha.models", "from fastcore.basics import store_attr"),
    ("alpha.models", "from gcode_ml.gcode.reader import words"),
    ("alpha.data", "from fastai.basics import *"),
    ("alpha.augment", "from torchvision.transforms import v2"),
    ("signals.layers", "from fastai.vision import augment"),
    ("signals.layers", "from fastai.vision.all import Learner"),
    ("data.batch", "import matplotlib.pyplot as plt"),
    ("alpha.data", "from seaborn import heatmap"),
]
SOUND = [
    ("evaluation.plots", "import matplotlib.pyplot as plt\nfrom .batch import pad"),
    ("gcode.planner", "from .reader import words\nfrom ..core.errors import InputError"),
    ("lab.runs", "from ..core.files import write_json"),
    (
        "alpha.models",
        "from __future__ import annotations\nimport math, torch\nfrom torch import nn\nfrom fastcore.basics import patch\nfrom typing import Any\nfrom ..signals.layers import masked_mean",
    ),
    (
        "alpha.evaluate",
        "import seaborn as sns\nfrom .data import read\nfrom ..gcode.reader import words",
    ),
    (
        "alpha.recipe",
        "from ..lab.settings import settings\nfrom .models import Net\nfrom fastai.vision.core import PILImage",
    ),
    ("lab.runs", "from ..training.callbacks import in_fit"),
    ("alpha.read.models", "import torch\nfrom ...data.windows import length_mask"),
    ("lab.cli", 'name = "gcode_ml.alpha.recipe"'),
]


@pytest.mark.parametrize("module,source", BROKEN)
def test_broken_rule_is_found(module, source):
    "Each rule catches a source that breaks it."
    assert len({f.split(":")[1] for f in faults(f"{PKG}.{module}", source, ["alpha", "beta"])}) == 1


@pytest.mark.parametrize("module,source", SOUND)
def test_sound_source_passes(module, source):
    "No rule complains about what is allowed."
    assert faults(f"{PKG}.{module}", source, ["alpha", "beta"]) == []


HEAVY = {"matplotlib", "seaborn", "fastai", "pandas"}


def loaded(statement):
    "Which of the heavy libraries `statement` loads in a fresh interpreter."
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{statement}\nimport sys; print(*sorted({HEAVY} & set(sys.modules)))",
        ],
        cwd=LIB.parent,
        env={**os.environ, "PYTHONPATH": str(LIB.parent)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return set(out.split())


@pytest.mark.parametrize("domain", [d for d in DOMAINS if (LIB / d / "models.py").exists()])
def test_models_are_light(domain):
    "A bundle predicts without fastai, pandas and drawing."
    assert loaded(f"import {PKG}.{domain}.models") == set()


def test_heavy_import_is_found():
    "The check above sees a library that is loaded on the way."
    assert loaded("import json, pandas") == {"pandas"}
