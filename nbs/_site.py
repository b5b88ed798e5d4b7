"Build the docs site into _docs: Quarto where it is installed (unless --smalldocs is given), smalldocs where it is not."

import ast
import re
import shutil
import sys
from html import unescape
from pathlib import Path

import yaml
from nbdev import processors
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import _build_modidx, nbglob
from nbdev.quarto import nbdev_docs, refresh_quarto_yml
from nbdev.serve import proc_nbs

FIRST = [
    "tutorials",
    "explanations",
    "fingerprint",
    "trajectory",
    "bearing",
    "sign",
    "binary_vae",
]  # a folder in neither list is a new domain: between the two
LAST = ["experiments", "gcode", "core", "data", "signals", "evaluation", "training", "lab"]
TITLES = dict(
    gcode="G-code",
    binary_vae="Binary latent spaces",
    sign="Sign language",
    bearing="Bearing faults",
    trajectory="Trajectory correction",
)

_runs = processors._do_eval


def _runs_alone(cell):
    "nbdev runs every cell with an import for `show_doc`: leave out lessons that import and compute in one cell, they need the cells before them."
    lesson = (
        not cell.directives_.keys() & {"export", "exports", "exporti", "exec_doc"}
        and "show_doc" not in cell.source
    )
    return not (
        lesson
        and any(not isinstance(t, (ast.Import, ast.ImportFrom)) for t in cell.parsed_() or ())
    ) and _runs(cell)


processors._do_eval = _runs_alone  # at the top: the worker processes of `proc_nbs` import this file


def _rank(folder):
    return (
        (0, FIRST.index(folder))
        if folder in FIRST
        else (2, LAST.index(folder))
        if folder in LAST
        else (1, folder)
    )


def _number(page):
    m = re.match(r"(\d+)", page.name)
    return (int(m[1]) if m else 10**6), page.name


def sidebar(
    nbs: Path,  # Folder of the notebooks
) -> dict:  # Content of `sidebar.yml`
    "List what lies in the folders of `nbs`: first the index, then one section a folder, its pages in file-number order."
    pages = [p.relative_to(nbs) for p in nbglob(nbs, as_path=True)]
    top = sorted(
        (p for p in pages if len(p.parts) == 1), key=lambda p: (p.stem != "index", *_number(p))
    )
    contents = [p.as_posix() for p in top]
    for folder in sorted({p.parts[0] for p in pages if len(p.parts) > 1}, key=_rank):
        rows = sorted(
            (p for p in pages if p.parts[0] == folder and len(p.parts) > 1),
            key=lambda p: (p.parent.as_posix(), *_number(p)),
        )
        title = TITLES.get(folder, folder.replace("_", " ").capitalize())
        contents.append(dict(section=title, contents=[p.as_posix() for p in rows]))
    return dict(website=dict(sidebar=dict(contents=contents)))


def strip(page):
    "The path of a page without the number of its file, as nbdev names its HTML."
    return nbpath2html(Path(page)).with_suffix(".ipynb").as_posix()


def stage(cache):
    "smalldocs reads no `output-file`: give each staged notebook, and each link to one, the name that nbdev's links expect."
    for nb in sorted(cache.rglob("*.ipynb")):
        text = re.sub(
            r"\]\(([^()\s:]+\.ipynb)", lambda m: f"]({strip(m[1])}", nb.read_text(encoding="utf-8")
        )
        text = re.sub(
            r'\s*"    (?:\*, )?(?:(?:before|after)_\w+:NoneType=None,? ?)+\\n",', "", text
        )  # the 25 events in each fastai callback's signature
        text = re.sub(r'\(\\n",\s*"\):', "():", text)
        new = cache / strip(nb.relative_to(cache))
        if new != nb and new.exists():
            raise FileExistsError(
                f"{nb.name} and another page of its folder both become {new.name}"
            )
        nb.unlink()
        new.write_text(text, encoding="utf-8")
    side = cache / "sidebar.yml"
    side.write_text(re.sub(r"\S+\.ipynb", lambda m: strip(m[0]), side.read_text()))


def math(page):
    "Turn TeX into MathML, so that no page needs a script from elsewhere."
    from latex2mathml.converter import convert

    def sub(kind, pattern, text):
        return re.sub(
            rf'<span class="math {kind}">{pattern}</span>',
            lambda m: convert(unescape(m[1]), display="block" if kind == "display" else "inline"),
            text,
            flags=re.S,
        )

    page = sub("display", r"\\\[(.*?)\\\]", sub("inline", r"\\\((.*?)\\\)", page))
    return re.sub(r"<(?:script|link)[^>]*/npm/katex[^>]*>(?:</script>)?", "", page)


def sources(site, lib):
    "Write each module as a page of highlighted source, so that `source` links need no code host."
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    for f in lib.rglob("*.py"):
        if f.name.startswith("_"):
            continue
        out = site / "source" / f.relative_to(lib.parent).with_suffix(".html")
        out.parent.mkdir(parents=True, exist_ok=True)
        form = HtmlFormatter(
            full=True, title=f.relative_to(lib.parent).as_posix(), linenos="inline", lineanchors="L"
        )
        out.write_text(
            highlight(f.read_text(encoding="utf-8"), PythonLexer(), form), encoding="utf-8"
        )


def finish(site, cfg):
    "Make nbdev's absolute links relative, and every page free of requests to other hosts."
    base = cfg.doc_host + cfg.doc_baseurl.rstrip("/")
    code = f"{cfg.git_url.rstrip('/')}/blob/{cfg.branch}/"
    ids = {
        f.relative_to(site).as_posix(): set(
            re.findall(r'\bid="([^"]+)"', f.read_text(encoding="utf-8"))
        )
        for f in site.rglob("*.html")
    }

    def symbol(m):
        return (
            m[0] if m[2] in ids.get(m[1], ()) else m[3]
        )  # nbdev also links private names, which have no section

    for f in site.rglob("*.html"):
        up = "../" * (len(f.relative_to(site).parts) - 1) or "./"
        page = re.sub(
            rf'href="{re.escape(code)}([^"#]+)\.py(?:#L(\d+))?"',
            lambda m, up=up: f'href="{up}source/{m[1]}.html{"#L-" + m[2] if m[2] else ""}"',
            f.read_text(encoding="utf-8"),
        )
        page = re.sub(rf'<a href="{re.escape(base)}/([^"#]+)#([^"]+)">(.*?)</a>', symbol, page)
        f.write_text(math(page.replace(f'href="{base}/', f'href="{up}')), encoding="utf-8")
    for f in site.rglob("*.css"):  # web fonts: the theme's fallback fonts do
        f.write_text(
            re.sub(r'@import url\(["\']?https?:[^)]*\);?', "", f.read_text(encoding="utf-8")),
            encoding="utf-8",
        )
    js = site / "site_libs/smalldocs.js"  # search for every word instead of the whole phrase
    words = r'{ $and: q.split(/\s+/).map((w) => ({ $or: ["title", "section", "text"].map((k) => ({ [k]: w })) })) }'
    js.write_text(
        js.read_text(encoding="utf-8").replace("fuse.search(q, {", f"fuse.search({words}, {{"),
        encoding="utf-8",
    )


def main():
    cfg = get_config()
    sys.path.insert(
        0, str(cfg.config_path)
    )  # pages are built from this tree's package, also in a copy of the tree
    (cfg.nbs_path / "sidebar.yml").write_text(
        yaml.safe_dump(sidebar(cfg.nbs_path), sort_keys=False)
    )
    if shutil.which("quarto") and "--smalldocs" not in sys.argv:
        return nbdev_docs.__wrapped__()
    from smalldocs.site import build

    refresh_quarto_yml()
    _build_modidx()
    cache = proc_nbs(n_workers=2, force=True)
    stage(cache)
    site = build(str(cache), quiet=True)
    out = cache / cfg.doc_path.name
    sources(out, cfg.lib_path)
    finish(out, cfg)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(out, cfg.doc_path)
    quiet = "output-file is not read", "format-links", "commonmark", "keep-md"
    for w in site.warnings:
        if not any(q in w for q in quiet):
            print("warning:", w, file=sys.stderr)
    print(f"site: {cfg.doc_path}")


if __name__ == "__main__":
    main()
