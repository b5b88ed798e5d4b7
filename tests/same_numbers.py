"""Compare what two commits compute: `python tests/same_numbers.py REV_A REV_B`.

A side is a revision or a folder with a working tree. Both are measured on this machine, by the
same commands: tiny runs, simulators, the planner, and what the lessons of every page get from the
package. A is measured twice; what differs between the two (times, names of temporary files) is
left out. The exit code is 1 when a number of A is missing in B.
"""

import argparse
import collections
import contextlib
import fnmatch
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiny_runs

HERE = Path(__file__).resolve().parent
PARTS = ("runs", "simulators", "lessons")

# Where functions of the planner are, under their old and new dotted names.
NAMES = {
    "parse_gcode": ["gcode_ml.gcode.reader.parse_gcode"],
    "plan": ["gcode_ml.gcode.planner.plan", "gcode_ml.gcode.planner.plan_motion"],
    "sample": ["gcode_ml.gcode.planner.sample", "gcode_ml.gcode.planner.sample_motion"],
    "test_part": ["gcode_ml.gcode.parts.test_part"],
}

# Further simulators, each a command; the domains' own are in `tiny_runs`.
SIMULATORS = {
    "bearing random": [
        "simulate",
        "bearing",
        "-p",
        "kind=random",
        "-p",
        "count=2",
        "-p",
        "seconds=0.5",
    ],
    "bearing journal": [
        "simulate",
        "bearing",
        "-p",
        "kind=journal",
        "-p",
        "count=3",
        "-p",
        "seconds=0.5",
    ],
    "fingerprint program": ["simulate", "fingerprint", "-p", "program=part.gcode", "-p", "runs=1"],
    "trajectory file": ["simulate", "part.gcode", "--machine", "bedslinger+worn:1+corexy"],
}
GCODE = """M201 X500 Y500 Z100 E5000
M205 X8 Y8
G28
G90
M83
;LAYER:0
G1 X10 Y10 Z0.2 F6000
G1 X60 Y12 E2.5 F1800
G1 X60 Y60 E2.4
G1 X12 Y58 E2.4
G1 X10 Y10 E2.4 F2400
G1 E-1 F1800
;LAYER:1
G1 Z0.4 F600
G1 E1 F1800
G1 X30 Y40 E1.8 F3000
G2 X50 Y40 I10 J0 E1.5
G1 X52 Y41 E0.1
G1 X53 Y43 E0.1
G1 X10 Y10 E2
"""
RESULT_KEYS = ("table", "metrics", "baselines", "audit", "split", "validation", "seed")
PAGE_SECONDS = 900


def named_function(key: str):
    """Return a function of the package under the first of its names that is there."""
    for name in NAMES[key]:
        module, _, attribute = name.rpartition(".")
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), attribute)
    raise LookupError(f"{key}: none of {', '.join(NAMES[key])}; add its new name to NAMES")


def planner_values() -> dict:
    """Return arrays of the planned motion of a small program."""
    program = named_function("parse_gcode")(GCODE)
    motion = named_function("plan")(program)
    columns = named_function("sample")(motion, 500.0)
    return dict(motion=motion, samples=columns)


def counted(values) -> dict:
    """Return the hashes of values with how often each is there, and what they are."""
    from numeric_form import hashes

    counts, labels = collections.Counter(), {}
    for label, value in values:
        for digest, text in hashes(value):
            counts[digest] += 1
            labels.setdefault(digest, f"{label}: {text}")
    return dict(counts=counts, labels=labels, ended="")


def folder_values(folder: Path):
    """Yield what the files below a folder hold."""
    from numeric_form import file_values

    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".lock" not in path.name:
            for value in file_values(path):
                yield path.name, value


def run_values(run: Path):
    """Yield the weights and the metrics of a finished run."""
    import pandas
    import safetensors.numpy

    weights = safetensors.numpy.load_file(run / "bundle" / "model.safetensors")
    yield from (("weight", weight) for weight in weights.values())
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    yield from ((key, result.get(key)) for key in RESULT_KEYS)
    history = pandas.read_csv(run / "history.csv")
    yield "history", history.drop(columns="seconds", errors="ignore")


def measure_simulators(source: Path, found: dict, processes: int):
    """Measure the planner and every simulator."""
    commands = dict(SIMULATORS)
    for target in tiny_runs.DATA:
        commands[target] = tiny_runs.simulate_words(target)[:2]
        commands[target] += tiny_runs.options(tiny_runs.DATA[target])

    def simulated(name):
        folder = Path(place) / name.replace(" ", "_")
        folder.mkdir()
        (folder / "part.gcode").write_text(GCODE)
        tiny_runs.gcode_ml([*commands[name], "-o", "out"], folder, source)
        return counted(folder_values(folder / "out"))

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(processes) as pool:
        for name, answer in zip(commands, pool.map(simulated, commands)):
            found[f"simulator {name}"] = answer
    found["planner"] = counted(planner_values().items())


def measure_runs(source: Path, found: dict, processes: int):
    """Measure the tiny run of each domain."""

    def carried_out(domain):
        folder = Path(place) / domain
        folder.mkdir()
        tiny_runs.gcode_ml(tiny_runs.simulate_words(domain), folder, source)
        tiny_runs.gcode_ml(tiny_runs.run_words(domain), folder, source)
        return counted(run_values(folder / "runs" / domain / "tiny"))

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(processes) as pool:
        for domain, answer in zip(tiny_runs.RUNS, pool.map(carried_out, tiny_runs.RUNS)):
            found[f"run {domain}"] = answer


def pages(source: Path, pattern: str) -> list:
    """Return the notebooks of a checkout that are executed, experiments not among them."""
    found = sorted((source / "nbs").rglob("*.ipynb"))
    inside = [path.relative_to(source / "nbs") for path in found]
    return [
        source / "nbs" / path
        for path in inside
        if path.parts[0] != "experiments"
        and not any(part.startswith((".", "_")) for part in path.parts)
        and (fnmatch.fnmatch(str(path), pattern) or fnmatch.fnmatch(page_stem(path), pattern))
    ]


def page_stem(path: Path) -> str:
    """Return the name of a page without its number."""
    return re.sub(r"^\d+[a-z]?_", "", path.stem)


def measure_lessons(source: Path, found: dict, arguments):
    """Execute every page, each in a forked process that has the large libraries."""
    keep = Path(arguments.keep) if arguments.keep else None
    waiting = pages(source, arguments.pages)
    with tempfile.TemporaryDirectory() as place:
        live = {}
        while waiting or live:
            while waiting and len(live) < arguments.processes:
                path = waiting.pop(0)
                name = page_name(source, path)
                if keep is not None and kept_page(keep, name).exists():
                    found[name] = page_answer(kept_page(keep, name))
                else:
                    live[path] = started_page(path, Path(place), len(waiting), arguments)
            for path in [path for path, page in live.items() if has_ended(*page)]:
                process, output, began = live.pop(path)
                process.kill()
                process.join()
                name = page_name(source, path)
                found[name] = page_answer(output)
                print(f"{name} {time.time() - began:.0f} s", file=sys.stderr, flush=True)
                if keep is not None and output.exists():
                    shutil.copy(output, kept_page(keep, name))
            time.sleep(0.05)


def page_name(source: Path, path: Path) -> str:
    """Return the name of a page's part."""
    return f"lesson {path.relative_to(source / 'nbs')}"


def kept_page(keep: Path, name: str) -> Path:
    """Return where the measurement of a page is kept."""
    return keep / (name.replace("/", "--") + ".json")


def started_page(path: Path, place: Path, number: int, arguments) -> tuple:
    """Start a process that measures a page: (process, its output, when it began)."""
    warm_up()
    output = place / f"{number}.json"
    words = path, place / f"runs-{number}", output, arguments.seed_cells
    process = multiprocessing.get_context("fork").Process(target=one_page, args=words)
    process.start()
    return process, output, time.time()


def has_ended(process, output, began) -> bool:
    """Tell whether a page's process is done, or has had its time."""
    return not process.is_alive() or time.time() - began > PAGE_SECONDS


@functools.cache
def warm_up():
    """Import what nearly every page imports, and nothing of the package."""
    import matplotlib

    matplotlib.use("Agg")
    for name in ("fastai.basics", "fastai.callback.all", "matplotlib.pyplot", "scipy.signal"):
        importlib.import_module(name)
    for name in ("pandas", "sklearn.ensemble", "torch.nn.functional", "nbdev.showdoc"):
        importlib.import_module(name)


def one_page(path: Path, runs: Path, output: Path, seed_cells: bool):
    """Measure a page in this process, with nothing on the terminal."""
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    from lesson_numbers import measure_page

    measure_page(path, runs, output, seed_cells)
    os._exit(0)


def page_answer(output: Path) -> dict:
    """Return what a page's process wrote; empty when it was killed."""
    if output.exists():
        with contextlib.suppress(ValueError):
            return json.loads(output.read_text(encoding="utf-8"))
    return dict(counts={}, labels={}, ended=f"killed after {PAGE_SECONDS} s or crashed")


def measure(arguments):
    """Measure the checkout that `PYTHONPATH` names, and write it as JSON."""
    import gcode_ml

    source = Path(arguments.measure).resolve()
    if Path(gcode_ml.__file__).resolve().parents[1] != source:
        raise RuntimeError(f"gcode_ml comes from {gcode_ml.__file__}, not from {source}")
    found = {}
    if "runs" in arguments.only:
        measure_runs(source, found, arguments.processes)
    if "simulators" in arguments.only:
        measure_simulators(source, found, arguments.processes)
    if "lessons" in arguments.only:
        measure_lessons(source, found, arguments)
    Path(arguments.output).write_text(json.dumps(found), encoding="utf-8")


def measured(source: Path, arguments, part: str, keep: Path | None = None) -> dict:
    """Measure a part of a checkout in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "found.json"
        words = [sys.executable, str(HERE / "same_numbers.py"), "--measure", str(source)]
        words += ["--output", str(output), "--pages", arguments.pages]
        words += ["--processes", str(arguments.processes), "--only", part]
        words += ["--seed-cells"] if arguments.seed_cells else []
        words += ["--keep", str(keep)] if keep is not None else []
        subprocess.run(words, cwd=place, env=tiny_runs.environment(source), check=True)
        return json.loads(output.read_text(encoding="utf-8"))


def git(*words) -> str:
    """Return what a git command of this repository says."""
    done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout.strip()


@contextlib.contextmanager
def checkout(side: str):
    """Give the folder of a side: a temporary worktree of a revision, or the folder itself."""
    if Path(side).is_dir():
        yield Path(side).resolve()
        return
    place = tempfile.mkdtemp()
    folder = Path(place).resolve() / "tree"
    git("worktree", "add", "--detach", str(folder), side)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))
        shutil.rmtree(place, ignore_errors=True)


def clean_commit(side: str) -> str:
    """Return the commit of a side; empty for a folder with changes, which is never cached."""
    if not Path(side).is_dir():
        return git("rev-parse", side + "^{commit}")
    done = subprocess.run(
        ["git", "-C", side, "status", "--porcelain"], capture_output=True, text=True
    )
    if done.returncode or done.stdout.strip():
        return ""
    return git("-C", str(Path(side).resolve()), "rev-parse", "HEAD")


def cache_path(side: str, arguments, part: str) -> Path | None:
    """Return where the measurements of a part of a clean commit are kept, without a suffix."""
    commit = clean_commit(side)
    if not commit:
        return None
    scripts = ["numeric_form", "lesson_numbers" if part == "lessons" else "tiny_runs"]
    text = b"".join((HERE / f"{name}.py").read_bytes() for name in scripts)
    told = arguments.seed_cells if part == "lessons" else (SIMULATORS, GCODE)
    text += repr(told).encode()
    name = f"{part}-{commit[:12]}-{hashlib.sha256(text).hexdigest()[:12]}"
    return Path(tempfile.gettempdir()) / "gcode_ml_same_numbers" / name


def kept_folder(path: Path | None, number: int) -> Path | None:
    """Return the folder that keeps the pages of one measurement."""
    if path is None:
        return None
    folder = path.with_name(f"{path.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def part_numbers(side: str, arguments, part: str, times: int) -> dict:
    """Measure a part of a side, or take what is kept; lessons are kept page by page."""
    path = cache_path(side, arguments, part)
    file = path.with_name(f"{path.name}-{times}.json") if path and part != "lessons" else None
    if file is not None and file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    folders = [kept_folder(path, number) if part == "lessons" else None for number in range(times)]
    with checkout(side) as source:
        answer = stable([measured(source, arguments, part, folder) for folder in folders])
    if file is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(answer), encoding="utf-8")
    return answer


def side_numbers(side: str, arguments, times: int) -> dict:
    """Measure a side, `times` times, and keep what is in every measurement."""
    found = {}
    for part in arguments.only:
        found |= part_numbers(side, arguments, part, times)
    return found


def stable(measurements: list) -> dict:
    """Return the first measurement without what the others lack."""
    first = measurements[0]
    for part, of_part in first.items():
        kept = collections.Counter(of_part["counts"])
        for other in measurements[1:]:
            kept &= collections.Counter(other[part]["counts"])
        of_part["unstable"] = sum(of_part["counts"].values()) - kept.total()
        of_part["counts"] = dict(kept)
    return first


def group_of(part: str) -> str:
    """Return what a part is compared with: a page has no number and no room."""
    if not part.startswith("lesson "):
        return part
    return f"lesson {page_stem(Path(part.removeprefix('lesson ')))}"


def grouped(found: dict) -> dict:
    """Return the counts of all groups."""
    groups = collections.defaultdict(collections.Counter)
    for part, of_part in found.items():
        groups[group_of(part)] += collections.Counter(of_part["counts"])
    return groups


def compare(old: dict, new: dict) -> dict:
    """Return group -> (compared, equal, missing, new); pages may give cells to other pages."""
    before, after = grouped(old), grouped(new)
    spare = collections.Counter()
    for group in after:
        if group.startswith("lesson "):
            spare += after[group] - before.get(group, collections.Counter())
    rows = {}
    for group in sorted({*before, *after}):
        counts, others = before.get(group, collections.Counter()), after.get(group)
        others = collections.Counter() if others is None else others
        missing = counts - others
        if group.startswith("lesson "):
            elsewhere = missing & spare
            spare -= elsewhere
            missing -= elsewhere
        rows[group] = counts, counts - missing, missing, others - counts
    return rows


def table_line(label: str, rows: list) -> str:
    """Return a line of the table, of the sums over rows."""
    sums = [sum(row[column].total() for row in rows) for column in range(4)]
    return f"{label:34}" + "".join(f"{number:10}" for number in sums)


def show(old: dict, new: dict, rows: dict, all_pages: bool):
    """Print the table, what is missing, and the pages that ended early."""
    print(f"{'part':34}" + "".join(f"{word:>10}" for word in ("hashes", "equal", "missing", "new")))
    for group, row in rows.items():
        if all_pages or not group.startswith("lesson ") or row[2] or row[3]:
            print(table_line(group, [row]))
    for kind in ("run", "simulator", "planner", "lesson"):
        of_kind = [row for group, row in rows.items() if group.split()[0] == kind]
        if of_kind:
            print(table_line(f"all: {kind}", of_kind))
    print("left out as unstable:", sum(of_part["unstable"] for of_part in old.values()))
    show_ends(old, new)
    show_missing(old, rows)


def show_ends(old: dict, new: dict):
    """Print the pages that ended early."""
    for side, found in (("A", old), ("B", new)):
        for part, of_part in found.items():
            if of_part["ended"]:
                print(f"{side}: {part} ended early: {of_part['ended']}")


def show_missing(old: dict, rows: dict):
    """Print where the missing values come from, twelve per group."""
    labels = {}
    for part, of_part in old.items():
        for digest, label in of_part["labels"].items():
            labels.setdefault((group_of(part), digest), f"{part}, {label}")
    for group, row in rows.items():
        for digest in list(row[2])[:12]:
            print(f"missing: {labels[group, digest]}")


def grammar() -> argparse.ArgumentParser:
    """Return the words of the command line."""
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("sides", nargs="*", metavar="REV", help="two revisions or folders")
    top.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, help="parts to compare")
    top.add_argument("--pages", default="*", help="pages, such as 'core/*' or 'planner'")
    top.add_argument("--seed-cells", action="store_true", help="seed before each cell")
    top.add_argument("--processes", type=int, default=2, help="pages at once")
    top.add_argument("--all", action="store_true", help="also show pages that are equal")
    top.add_argument("--measure", help=argparse.SUPPRESS)
    top.add_argument("--output", help=argparse.SUPPRESS)
    top.add_argument("--keep", help=argparse.SUPPRESS)
    return top


def main() -> int:
    """Compare two sides; return 1 when something is missing."""
    arguments = grammar().parse_args()
    if arguments.measure:
        measure(arguments)
        return 0
    if len(arguments.sides) != 2:
        raise SystemExit("give two revisions or folders")
    old = side_numbers(arguments.sides[0], arguments, times=2)
    new = side_numbers(arguments.sides[1], arguments, times=1)
    rows = compare(old, new)
    show(old, new, rows, arguments.all)
    return int(any(row[2] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
