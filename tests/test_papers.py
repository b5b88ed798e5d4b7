"Every number of a paper comes from its results, these from recorded runs, and every paper renders."

import re
import shutil
from importlib.util import find_spec

import pandas as pd
import pytest

from gcode_ml.core.files import read_json
from gcode_ml.lab.papers import (
    Results,
    altered_results,
    collect,
    paper_markdown,
    paper_names,
    papers_folder,
    render_paper,
    unaccounted_numbers,
)
from gcode_ml.lab.settings import runs_folder

PAPERS = paper_names()


def test_there_are_papers():
    "One a domain, and one for the workspace."
    assert {"bearing", "binary_vae", "fingerprint", "sign", "trajectory", "workspace"} <= set(
        PAPERS
    )


@pytest.mark.parametrize("name", PAPERS)
def test_numbers_come_from_results(name):
    "No digit of the text is typed in, no table was changed by hand, and the command, seeds and split of each are told."
    paper = papers_folder() / name
    assert unaccounted_numbers(paper / "paper.ipynb") == []
    assert altered_results(paper) == []
    for table, told in read_json(paper / "results" / "provenance.json").items():
        for run in told["made_by"]:
            assert (
                run["command"].startswith("make bench")
                or run["command"].startswith("gcode_ml ")
                and run["split"]
                and ("seed" in run or "seeds" in run)
            ), (table, run)
            assert not re.search(r"(?:^|[\s=])/", run["command"]), run["command"]


@pytest.mark.parametrize("name", PAPERS)
def test_text_follows_its_tables(name, tmp_path):
    "A paper renders; with other numbers in its tables the text and the tables are others, so that none of them is fixed."
    folder = papers_folder() / name
    honest = paper_markdown(folder, tmp_path / "honest")
    assert "{python}" not in honest
    assert "nan" not in re.findall(r"(?<![\w-])nan(?!\w)", honest)
    copy = shutil.copytree(folder, tmp_path / "copy")
    for f in (copy / "results").glob("*.csv"):
        t = pd.read_csv(f)
        if set(t) == {"fact", "value"}:
            t["value"] = [_moved(v) for v in t.value]
        else:
            t = t.apply(lambda c: c * 1.37 if pd.api.types.is_float_dtype(c) else c)
        t.to_csv(f, index=False)
    other = paper_markdown(copy, tmp_path / "other")

    def fractions(text):
        return set(re.findall(r"\d+\.\d+", re.sub(r"^---\n.*?\n---\n", "", text, flags=re.S)))

    given = {v for v, _ in Results(folder).given.values()}
    kept = fractions(honest) & fractions(other) - given
    assert len(kept) < 0.35 * len(fractions(honest) - given), (
        kept
    )  # some numbers meet others by chance


def _moved(text):
    try:
        return float(text) * 1.37
    except ValueError:
        return text


@pytest.mark.parametrize("name", PAPERS)
def test_results_are_the_runs(name, tmp_path):
    "Where a run is at hand, its tables are what the paper has."
    paper = shutil.copytree(papers_folder() / name, tmp_path / name)
    for table in collect(paper, runs_folder()):
        assert (paper / "results" / f"{table}.csv").read_bytes() == (
            papers_folder() / name / "results" / f"{table}.csv"
        ).read_bytes(), table


@pytest.mark.skipif(
    not (find_spec("pypandoc") and find_spec("typst")), reason="the extra papers is not installed"
)
def test_pages(tmp_path):
    "HTML and PDF of one paper, from one text; the page loads nothing from other hosts."
    page, pdf = render_paper(papers_folder() / PAPERS[0], tmp_path)
    text = page.read_text()
    assert pdf.read_bytes().startswith(b"%PDF")
    assert "<table" in text
    assert "References" in text
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', text)


def test_commands(command, tmp_path, monkeypatch):
    "`gcode_ml paper` refuses a name that is none, and a paper with a number of its own."
    code, _, said = command("paper", "none")
    assert code == 2
    assert "none" in said
    assert said.count("\n") == 1
    copy = tmp_path / "papers" / PAPERS[0]
    shutil.copytree(papers_folder() / PAPERS[0], copy)
    text = (copy / "paper.ipynb").read_text()
    (copy / "paper.ipynb").write_text(
        text.replace("# Limits", "# Limits\\n\\nIt reaches 99.9 percent.", 1)
        if "# Limits" in text
        else text
    )
    monkeypatch.setattr("gcode_ml.lab.papers.papers_folder", lambda: tmp_path / "papers")
    code, _, said = command("paper", PAPERS[0])
    assert code == 2
    assert "99.9" in said
