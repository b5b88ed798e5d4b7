"Pages are made of small cells, each shown at work by the next, and carry nothing of the machine they were written on."

import ast
import json
import re
import subprocess
from statistics import median

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


def oversize(pages):
    "What is wrong with the sizes of the exported cells of `pages`: half have at most 10 lines, nine of ten at most 25, none more than 60."
    size = {
        (p, i): len(lines(s))
        for p, nb in pages.items()
        for i, s in enumerate(code(nb))
        if exported(s)
    }
    bad = [f"{p}, code cell {i}: {n} lines" for (p, i), n in size.items() if n > 60]
    if size and median(size.values()) > 10:
        bad.append(f"median {median(size.values())}")
    if size and sum(n <= 25 for n in size.values()) < 0.9 * len(size):
        bad.append(
            "more than a tenth over 25 lines: "
            + ", ".join(f"{p} {i} ({n})" for (p, i), n in size.items() if n > 25)
        )
    return bad


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


def test_cells_are_small():
    "The cell sizes of the whole workspace."
    assert oversize(PAGES) == []


def test_definitions_are_shown():
    "At least four of five definitions are followed by a lesson."
    share, bad = unshown(PAGES)
    assert share <= 0.2, bad


def page(*sources):
    return dict(cells=[dict(cell_type="code", source=[s]) for s in sources])


def test_bad_pages_are_found():
    "The two measures see a long cell, a long median, and definitions without lessons."

    def export(n):
        return "#| export\ndef f():\n" + "    x = 1\n" * (n - 1)

    assert oversize(dict(a=page(export(10), "f()"))) == []
    assert oversize(dict(a=page(export(11)))) == ["median 11"]
    assert len(oversize(dict(a=page(*[export(3)] * 20, export(61))))) == 1
    assert len(oversize(dict(a=page(*[export(3)] * 8, export(26))))) == 1
    assert unshown(dict(a=page(export(3), "import os", "f()", "#| export\nimport os")))[0] == 0
    assert unshown(dict(a=page(export(3), export(3), "#| hide\nf()", export(3), "f()")))[0] == 2 / 3
    assert (
        unshown(
            dict(a=page(export(3), "#| export\n@patch(as_prop=True)\ndef g(self:C): pass", "f()"))
        )[0]
        == 0
    )


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
