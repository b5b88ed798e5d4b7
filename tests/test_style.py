"Pages are made of small cells, each shown at work by the next, and carry nothing of the machine they were written on."

import ast
import json
import re
import subprocess
import sys

from nbdev.config import get_config
from nbdev.doclinks import nbglob

CFG = get_config()
ROOT = CFG.config_path
PAGES = {
    p.relative_to(CFG.nbs_path).as_posix(): json.loads(p.read_text(encoding="utf-8"))
    for p in sorted(nbglob(CFG.nbs_path, as_path=True))
}


def directives(source):
    return {m[1] for m in re.finditer(r"^#\|\s*(\w+)", source, re.M)}


def lines(source):
    return [l for l in source.splitlines() if l.strip() and not l.startswith("#|")]


def code(nb):
    return ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]


def exported(source):
    return bool(directives(source) & {"export", "exporti", "exports"})


def public(source):
    return bool(directives(source) & {"export", "exports"})


def definitions(source):
    return [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def patches(source):
    return any(
        ast.unparse(d).split("(")[0] == "patch"
        for n in definitions(source)
        for d in n.decorator_list
    )


def only_imports(source):
    return all(
        isinstance(n, (ast.Import, ast.ImportFrom))
        for n in ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M)).body
    )


def statements(node):
    "Number of statements in `node`, without `node` itself."
    return sum(isinstance(n, ast.stmt) for n in ast.walk(node)) - isinstance(node, ast.stmt)


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def oversize_cells(pages):
    "Exported cells of more than 45 statements: a cell holds one idea."
    sizes = {
        f"{p}, code cell {i}": statements(ast.parse(s))
        for p, nb in pages.items()
        for i, s in enumerate(code(nb))
        if exported(s)
    }
    return {where: n for where, n in sizes.items() if n > 45}


def oversize_functions(sources):
    "Functions of more than 40 statements, and all over 20 where those are more than a tenth."
    sizes = [
        (f"{where}: {f.name}", statements(f))
        for where, source in sources.items()
        for f in functions(ast.parse(source))
    ]
    large = [(where, n) for where, n in sizes if n > 20]
    if len(large) > len(sizes) / 10:
        return large
    return [(where, n) for where, n in large if n > 40]


def private_names_used(sources):
    "Private names that a module imports from another module, or reads from an imported module."
    found = []
    for where, source in sources.items():
        tree = ast.parse(source)
        imported = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names = [a.name for n in imported for a in n.names]
        found += [f"{where}: {name}" for name in names if re.match("_[^_]", name)]
        modules = {a.asname or a.name for n in imported if n.level for a in n.names}
        found += [
            f"{where}: {n.value.id}.{n.attr}"
            for n in ast.walk(tree)
            if isinstance(n, ast.Attribute)
            and isinstance(n.value, ast.Name)
            and n.value.id in modules
            and re.match("_[^_]", n.attr)
        ]
    return found


def unshown(pages):
    """Share of the cells with a public definition whose next code cell (of more than imports) is no lesson: exported or hidden. And which they are.
    A definition that the next cell carries on with `@patch` is counted at its end."""
    all_, bad = 0, []
    for p, nb in pages.items():
        cells = [s for s in code(nb) if exported(s) or not only_imports(s)]
        for i, s in enumerate(cells):
            if not (public(s) and definitions(s)) or (
                i + 1 < len(cells) and exported(cells[i + 1]) and patches(cells[i + 1])
            ):
                continue
            all_ += 1
            if i + 1 == len(cells) or exported(cells[i + 1]) or "hide" in directives(cells[i + 1]):
                bad.append(f"{p} {i}: {lines(s)[0]}")
    return len(bad) / max(all_, 1), bad


SOURCES = {
    f.relative_to(ROOT).as_posix(): f.read_text(encoding="utf-8")
    for folder in (CFG.lib_path, ROOT / "tests", ROOT / "bench")
    for f in sorted(folder.rglob("*.py"))
    if f.name != "_modidx.py"
}


def test_cells_are_small():
    "No exported cell holds more than one idea."
    assert oversize_cells(PAGES) == {}


def test_functions_are_small():
    "Nine of ten functions have at most 20 statements, none has more than 40."
    assert oversize_functions(SOURCES) == []


def test_no_private_name_crosses_a_page():
    "What two pages need is public and documented."
    assert private_names_used(SOURCES) == []


def test_ruff_is_clean():
    "`ruff format` would change nothing and `ruff check` finds nothing."
    for command in (["format", "--check", "-q"], ["check", "-q"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_definitions_are_shown():
    "At least four of five definitions are followed by a lesson."
    share, bad = unshown(PAGES)
    assert share <= 0.2, bad


def page(*sources):
    return dict(cells=[dict(cell_type="code", source=[s]) for s in sources])


def export(n):
    "An exported cell with `n` statements."
    return "#| export\ndef f():\n" + "    x = 1\n" * (n - 1)


def test_long_cell_is_found():
    "The measure sees a cell of 46 statements."
    assert oversize_cells(dict(a=page(export(45), "f()"))) == {}
    assert oversize_cells(dict(a=page(export(46)))) == {"a, code cell 0": 46}


def test_long_function_is_found():
    "One function over 40 statements is found, and any over 20 where they are more than a tenth."
    few = "\n".join([export(4)] * 20)
    assert oversize_functions(dict(a=few + "\n" + export(30))) == []
    assert oversize_functions(dict(a=few + "\n" + export(42))) == [("a: f", 41)]
    assert oversize_functions(dict(a=export(30))) == [("a: f", 29)]


def test_private_name_is_found():
    "Both ways of reading a private name of another module are seen; a dunder and a public name are not."
    source = "from .a import _b\nfrom . import c\nc._d\nfrom .e import f, __version__\nf.g"
    assert private_names_used(dict(m=source)) == ["m: _b", "m: c._d"]


def test_missing_lesson_is_found():
    "A definition without a lesson is found; imports and `@patch` cells are passed over."
    shown = page(export(3), "import os", "f()", "#| export\nimport os")
    assert unshown(dict(a=shown))[0] == 0
    two_of_three = page(export(3), export(3), "#| hide\nf()", export(3), "f()")
    assert unshown(dict(a=two_of_three))[0] == 2 / 3
    patched = page(export(3), "#| export\n@patch(as_prop=True)\ndef g(self:C): pass", "f()")
    assert unshown(dict(a=patched))[0] == 0


FORBIDDEN = [f"/{folder}/" for folder in ("work", "root", "home", "Users")]


def machine_paths(text):
    "The paths of some machine in `text`; pictures, which are random letters, do not count."
    text = re.sub(r'"image/\w+": "[^"]*"', "", text)
    return [f for f in FORBIDDEN if re.search(r"(?<![\w.<>{}])" + f, text)]


def tracked():
    "The files of the repository: what git knows or would add; without git, the notebooks and sources."
    try:
        out = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        out = []
    return [ROOT / f for f in out] or [
        f
        for d in (CFG.nbs_path, CFG.lib_path, ROOT / "tests")
        for f in d.rglob("*")
        if f.suffix in (".py", ".ipynb")
    ]


def test_no_machine_paths():
    "No notebook, module or text names a folder of a machine it was written on."
    texts = [
        f
        for f in tracked()
        if f.is_file()
        and f.suffix
        in (".py", ".ipynb", ".md", ".toml", ".ini", ".yml", ".yaml", ".css", ".txt", ".bib", "")
    ]
    assert {
        f.relative_to(ROOT).as_posix(): bad
        for f in texts
        if (bad := machine_paths(f.read_text(encoding="utf-8", errors="replace")))
    } == {}


def test_machine_path_is_found():
    "A path is found in text and in an output, not in an address and not in a picture."
    p = FORBIDDEN[0]
    assert machine_paths(f'open("{p}main/x")') == [p]
    assert machine_paths(f"File {p}main/x") == [p]
    assert machine_paths(f"https://example.org{p}x") == []
    assert machine_paths(f'"image/png": "iVB+{p}+x"') == []


def test_notebooks_are_light():
    "Under 500 kB each, outputs included."
    assert {
        p: (CFG.nbs_path / p).stat().st_size
        for p in PAGES
        if (CFG.nbs_path / p).stat().st_size >= 500_000
    } == {}
