"The docs site builds from a copy of the tree, every link in it leads somewhere, and it asks nothing of other hosts."

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

CFG = get_config()
ROOT, NBS = CFG.config_path, CFG.nbs_path


class Links(HTMLParser):
    "The ids, links and loaded addresses of a page."

    def __init__(self, text):
        super().__init__()
        self.ids = set()
        self.hrefs = []
        self.loads = []
        self.script = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.script = tag == "script"
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag in ("a", "area"):
            self.hrefs.append(a.get("href"))
        elif tag != "link" or a.get("rel") not in ("canonical", "next", "prev"):
            self.loads += [a.get(k) for k in ("src", "href", "poster", "data")]
        if tag != "link" and a.get("srcset"):
            self.loads += [s.split()[0] for s in a["srcset"].split(",")]

    def handle_endtag(self, tag):
        self.script = False

    def handle_data(self, data):
        if self.script:
            self.loads += re.findall(r'(?:import|from|fetch\()\s*[\'"](https?:[^\'"]+)', data)


def broken(site):
    "One line for each link without a target and each thing that a page loads from another host."
    pages = {f: Links(f.read_text(encoding="utf-8")) for f in site.rglob("*.html")}
    bad = []
    for f, page in pages.items():
        here = f.relative_to(site).as_posix()
        for url, load in [(u, False) for u in page.hrefs if u] + [
            (u, True) for u in page.loads if u
        ]:
            u = urlsplit(url)
            if u.scheme or u.netloc:
                if u.scheme != "data" and (load or u.scheme == "file"):
                    bad.append(f"{here}: loads {url}")
                continue
            to = (
                (
                    site / u.path.lstrip("/")
                    if u.path.startswith("/")
                    else f.parent / unquote(u.path)
                ).resolve()
                if u.path
                else f
            )
            if to.is_dir():
                to = to / "index.html"
            if not to.is_file():
                bad.append(f"{here}: no file {url}")
            elif u.fragment and to in pages and unquote(u.fragment) not in pages[to].ids:
                bad.append(f"{here}: no id {url}")
    for f in site.rglob("*.css"):
        bad += [
            f"{f.relative_to(site).as_posix()}: loads {u}"
            for u in re.findall(
                r'(?:url\(|@import)\s*["\']?((?:https?:)?//[^"\')\s]+)',
                f.read_text(encoding="utf-8"),
            )
        ]
    return bad


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, built in a copy of the tree by a program of its own."
    tree = tmp_path_factory.mktemp("docs").resolve()
    for d in (NBS, CFG.lib_path):
        shutil.copytree(
            d,
            tree / d.name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "sidebar.yml"),
        )
    for f in ("pyproject.toml", "settings.ini", "README.md", "LICENSE"):
        if (ROOT / f).exists():
            shutil.copy(ROOT / f, tree)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(
        GCODE_ML_DATA="", OMP_NUM_THREADS="1", MPLBACKEND="agg"
    )
    done = subprocess.run(
        [sys.executable, "nbs/_site.py", "--smalldocs"],
        cwd=tree,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning:" not in done.stderr, done.stderr[-3000:]
    return tree / "_docs"


def expected(site):
    "The pages that the notebooks of the copy become: their paths without the numbers."
    nbs = site.parent / NBS.name
    return {
        re.sub(r"(^|/)\d+[a-z]*_", r"\1", p.relative_to(nbs).as_posix().lower()).replace(
            ".ipynb", ".html"
        )
        for p in nbglob(nbs, as_path=True)
    }


def test_every_notebook_is_a_page(site):
    "Each notebook has its page, and the front page's side bar leads to all of them."
    pages = expected(site)
    assert [p for p in pages if not (site / p).is_file()] == []
    links = {
        Path(u).as_posix()
        for u in Links((site / "index.html").read_text(encoding="utf-8")).hrefs
        if u
    }
    assert [p for p in pages if p not in links] == []


def test_links(site):
    "Every internal link of every page has a target; nothing is loaded from elsewhere."
    assert broken(site) == []


def test_search(site):
    "The search index knows every page, and each entry leads to one."
    entries = json.loads((site / "search.json").read_text(encoding="utf-8"))
    found = {e["href"].split("#")[0] for e in entries}
    assert expected(site) <= found
    assert all((site / f).is_file() for f in found)
    assert "$and" in (site / "site_libs/smalldocs.js").read_text(encoding="utf-8")


def test_broken_page_is_found(tmp_path):
    "The checker sees a missing file, a missing id, a foreign script, style sheet, module and font, and no fault in a sound page."
    (tmp_path / "sub").mkdir()
    (tmp_path / "pic.png").write_bytes(b"")
    (tmp_path / "sub/b.html").write_text(
        '<h1 id="top">b</h1><a href="../a.html#x">a</a><a href="https://example.org/">out</a><img src="../pic.png"><img src="data:image/png;base64,A">'
    )
    (tmp_path / "a.html").write_text(
        '<p id="x"><a href="sub/b.html#top">b</a><a href="#x">x</a></p>'
    )
    assert broken(tmp_path) == []
    (tmp_path / "a.html").write_text(
        '<p id="x"><a href="sub/c.html">c</a><a href="sub/b.html#none">b</a><script src="https://cdn.example.org/a.js"></script>'
        '<link rel="stylesheet" href="//cdn.example.org/a.css"><script type="module">import m from "https://cdn.example.org/m.mjs"</script><img src="gone.png">'
    )
    (tmp_path / "a.css").write_text(
        '@import url(https://fonts.example.org/css?family=A); p {background: url("pic.png")} @font-face {src: url(//fonts.example.org/a.woff2)}'
    )
    assert len(broken(tmp_path)) == 8


def test_sidebar_lists_what_is_there(tmp_path):
    "A new domain's folder appears after the known ones, pages in the order of their numbers, without a list to edit."
    spec = importlib.util.spec_from_file_location("_site", NBS / "_site.py")
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    for p in [
        "index",
        "lab/00_a",
        "core/10_b",
        "core/9_a",
        "experiments/x",
        "zeta/00_data",
        "alpha_two/00_data",
        "fingerprint/00_data",
        "binary_vae/00_data",
        "tutorials/a",
        "zeta/_draft",
    ]:
        f = tmp_path / f"{p}.ipynb"
        f.parent.mkdir(exist_ok=True)
        f.write_text("{}")
    first, *sections = mod.sidebar(tmp_path)["website"]["sidebar"]["contents"]
    assert first == "index.ipynb"
    assert [s["contents"][0].split("/")[0] for s in sections] == [
        "tutorials",
        "fingerprint",
        "binary_vae",
        "alpha_two",
        "zeta",
        "experiments",
        "core",
        "lab",
    ]
    assert {s["section"]: s["contents"] for s in sections}["Core"] == [
        "core/9_a.ipynb",
        "core/10_b.ipynb",
    ]
    assert {"Alpha two", "Zeta"} <= {s["section"] for s in sections}
