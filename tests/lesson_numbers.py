"""Execute the code cells of one page and hash what its lessons get from the package.

A lesson is a code cell that exports nothing. Its calls are rewritten so that what comes back
from a function of the package, or of an exported cell, is hashed when it returns. (A profiler
would see nothing of functions behind a decorator of torch, and no new objects.)
"""

import ast
import contextlib
import functools
import inspect
import io
import json
import linecache
import os
import random
import re
import sys
import types
from pathlib import Path

import numpy
import torch
from numeric_form import hashes

SKIPPED = ("slow", "cuda")
LAZY = ("map", "filter", "starmap", "partial")


def directives(source: str) -> set:
    """Return the words after `#|` at the beginning of lines."""
    found = re.findall(r"^#\s*\|\s*(.+)$", source, re.M)
    return {word for line in found for word in line.replace(":", " ").split()[:1]}


def is_off(source: str) -> bool:
    """Tell whether a cell is not executed."""
    off = re.search(r"^#\s*\|\s*eval:\s*false", source, re.M)
    return bool(off) or bool(directives(source) & set(SKIPPED))


class Rewriter(ast.NodeTransformer):
    """Turn every call `f(x)` of a lesson into `__seen__(f)(x)`."""

    def visit_Call(self, node):
        """Rewrite a call, and the functions given to `map` and its like."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in ("super", "locals", "globals"):
            return node
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in LAZY and node.args:
            node.args[0] = self.seen(node.args[0])
        node.func = self.seen(node.func)
        return node

    def seen(self, function):
        """Return the expression `__seen__(function)`."""
        name = ast.Name("__seen__", ast.Load())
        return ast.copy_location(ast.Call(name, [function], []), function)


class Page:
    """A page that is executed, and the hashes of what its lessons got."""

    def __init__(self, path: Path):
        self.path = path
        self.module = types.ModuleType("__main__")
        self.module.__dict__["__seen__"] = self.seen
        self.module.__dict__["display"] = lambda *shown: None
        self.exported = set()
        self.counts = {}
        self.labels = {}
        self.number = 0
        self.ended = ""

    def is_ours(self, function) -> bool:
        """Tell whether a function or class is of the package or of an exported cell."""
        while isinstance(function, functools.partial):
            function = function.func
        function = inspect.unwrap(getattr(function, "__func__", function))
        code = getattr(function, "__code__", None)
        if code is not None:
            return code.co_filename in self.exported or is_package(function)
        kind = function if isinstance(function, type) else type(function)
        return is_package(kind) or self.is_exported_class(kind)

    def is_exported_class(self, kind) -> bool:
        """Tell whether a class of this page was defined in an exported cell."""
        if kind.__module__ != "__main__":
            return False
        return any(
            getattr(inspect.unwrap(value), "__code__", None) is not None
            and value.__code__.co_filename in self.exported
            for value in vars(kind).values()
            if isinstance(value, types.FunctionType)
        )

    def seen(self, function):
        """Return the function itself, or one that also hashes what it returns."""
        try:
            ours = callable(function) and self.is_ours(function)
        except Exception:
            ours = False
        if not ours:
            return function

        def call(*args, **kwargs):
            value = function(*args, **kwargs)
            self.keep(function, args[0] if value is None and args else value)
            return value

        return call

    def keep(self, function, value):
        """Count the hashes of a value."""
        name = getattr(function, "__qualname__", type(function).__name__)
        states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        for digest, text in hashes(value):
            self.counts[digest] = self.counts.get(digest, 0) + 1
            self.labels.setdefault(digest, f"cell {self.number}: {name}(): {text}")
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])

    def cell(self, source: str):
        """Execute one cell."""
        exports = any(word.startswith("export") for word in directives(source))
        file = f"{self.path.name}-{self.number}-{'export' if exports else 'lesson'}"
        tree = ast.parse(source, file)
        if exports:
            self.exported.add(file)
        else:
            tree = ast.fix_missing_locations(Rewriter().visit(tree))
        linecache.cache[file] = len(source), None, source.splitlines(True), file
        exec(compile(tree, file, "exec"), self.module.__dict__)

    def run(self, seed_cells: bool):
        """Execute all cells, to the end or to the first error."""
        cells = json.loads(self.path.read_text(encoding="utf-8"))["cells"]
        seed()
        for self.number, cell in enumerate(cells):
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or is_off(source):
                continue
            if seed_cells:
                seed()
            try:
                self.cell(source)
            except Exception as error:
                self.ended = f"cell {self.number}: {type(error).__name__}: {str(error)[:100]}"
                return


def is_package(function) -> bool:
    """Tell whether something is defined in the package."""
    return str(getattr(function, "__module__", "")).partition(".")[0] == "gcode_ml"


def seed():
    """Begin all generators anew."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def measure_page(path: Path, runs: Path, output: Path, seed_cells: bool = False):
    """Execute a page in this process, which does nothing else, and write what was found."""
    os.environ["GCODE_ML_RUNS"] = str(runs)
    os.environ["GCODE_ML_DATA"] = ""
    os.chdir(path.parent)
    page = Page(path)
    sys.modules["__main__"] = page.module
    sys.argv = [str(path)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        page.run(seed_cells)
    found = dict(counts=page.counts, labels=page.labels, ended=page.ended)
    output.write_text(json.dumps(found), encoding="utf-8")
