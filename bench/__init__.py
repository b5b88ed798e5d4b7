"""Benchmarks: how long our way takes beside another way to the same end, measured in turns in one run.

A file `bench/<topic>.py` holds functions marked with `@benchmark`. Each returns two functions without arguments, ours and the alternative;
what it does before it returns is not measured. `python -m bench` finds and measures them all and writes `bench/results.json`."""

import importlib
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

from gcode_ml.core.errors import InputError
from gcode_ml.core.files import write_json

try:
    import resource
except ImportError:
    resource = None  # Windows

FOLDER = Path(__file__).parent


@dataclass
class Benchmark:
    "A marked function and what is said of it."

    function: object  # `function(quick) -> (ours, alternative)`, and perhaps a dictionary of facts
    what: str  # What is measured, in words
    alternative: str  # What it is measured against
    goal: float  # Largest ratio of ours to the alternative; None where there is none
    by: str = "cpu"  # What decides: processor time, or `wall`
    repetitions: int = 7  # How often each is measured; with 1 nothing warms up

    @property
    def name(self):
        return f"{self.function.__module__.rpartition('.')[2]}.{self.function.__name__}"


FOUND = {}  # name -> benchmark, of all imported topics


def benchmark(what, alternative, goal=None, by="cpu", repetitions=7):
    "Mark a function as a benchmark."

    def mark(function):
        found = Benchmark(function, what, alternative, goal, by, repetitions)
        FOUND[found.name] = found
        return function

    return mark


def topics():
    return sorted(p.stem for p in FOLDER.glob("[!_]*.py"))


def find(only=""):
    "Benchmarks whose name, or topic, is `only` or fits it as a pattern; all by default."
    wanted = [t for t in topics() if not only or fnmatch(t, only.split(".")[0])]
    for topic in wanted:
        importlib.import_module(f"bench.{topic}")
    return [
        b
        for name, b in FOUND.items()
        if name.split(".")[0] in wanted
        and (not only or fnmatch(name, only) or name.split(".")[0] == only)
    ]


def processor_name():
    "Model name of the processor."
    if not os.path.exists("/proc/cpuinfo"):
        return platform.processor()
    with open("/proc/cpuinfo") as info:
        names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return names[0] if names else ""


def machine():
    "What the numbers depend on."
    return dict(
        cpu=processor_name(),
        cpus=os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        system=platform.system(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


def clocks():
    "Seconds of the processor, children that have ended included, and of the wall."
    children = 0.0
    if resource:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        children = used.ru_utime + used.ru_stime
    return time.process_time() + children, time.perf_counter()


def timed(function, times=1):
    "Processor and wall seconds of one call."
    before = clocks()
    for _ in range(times):
        function()
    return [(b - a) / times for a, b in zip(before, clocks())]


def measure(bench, quick=False):
    "One row of the results: medians of repetitions in turns, ours first and second alternately."
    ours, other, *facts = bench.function(quick)
    times = {ours: 1, other: 1}
    if not quick and bench.repetitions > 1:
        times = {
            f: max(1, int(0.1 / min(timed(f)[1], timed(f)[1]))) for f in (ours, other)
        }  # the first calls warm up; a quick function is called several times
    took = {ours: [], other: []}
    for i in range(min(bench.repetitions, 2) if quick else bench.repetitions):
        for f in ((ours, other), (other, ours))[i % 2]:
            took[f].append(timed(f, times[f]))
    (cpu, wall), (cpu_other, wall_other) = (
        [statistics.median(t) for t in zip(*took[f])] for f in (ours, other)
    )
    ratio = cpu / max(cpu_other, 1e-9)
    ratio_wall = wall / max(wall_other, 1e-9)
    pairs = sorted(a[0] / max(b[0], 1e-9) for a, b in zip(*took.values()))
    return dict(
        seconds=dict(
            ours=dict(cpu=cpu, wall=wall), alternative=dict(cpu=cpu_other, wall=wall_other)
        ),
        ratio=ratio,
        ratio_wall=ratio_wall,
        ratio_range=[pairs[0], pairs[-1]],
        repetitions=len(took[ours]),
        calls=list(times.values()),
        met=None
        if bench.goal is None
        else (ratio if bench.by == "cpu" else ratio_wall) <= bench.goal,
        **(facts[0] if facts else {}),
    )


def run(only="", quick=False, output=None, tell=print):
    "Measure and write; rows of other names that the file holds for the same machine stay. Returns the rows, and sentences on what failed."
    torch.set_num_threads(1)
    facts = dict(machine(), quick=quick)
    rows = []
    failed = []
    for bench in find(only):
        base = dict(
            name=bench.name, what=bench.what, alternative=bench.alternative, goal=bench.goal
        )
        try:
            row = dict(
                base,
                **measure(bench, quick),
                load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
                measured=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            )
        except InputError as e:
            row = dict(base, skipped=str(e))  # what it needs is not installed
        except Exception as e:
            failed.append(f"{bench.name}: {type(e).__name__}: {e}")
            tell(failed[-1])
            continue
        rows.append(row)
        tell(line(row))
    if output and rows:
        output = Path(output)
        kept = []
        if only and output.exists():
            old = json.loads(output.read_text())
            if old["machine"] == facts:
                kept = [r for r in old["benchmarks"] if r["name"] not in {r["name"] for r in rows}]
        write_json(
            output, dict(machine=facts, benchmarks=sorted(kept + rows, key=lambda r: r["name"]))
        )
    return rows, failed


def line(row):
    "A row as text."
    if "skipped" in row:
        return f"{row['name']:36}skipped: {row['skipped']}"
    goal = (
        ""
        if row["goal"] is None
        else f"  goal {row['goal']:.2f}x {'met' if row['met'] else 'MISSED'}"
    )
    ours, other = (1e3 * row["seconds"][k]["cpu"] for k in ("ours", "alternative"))
    return f"{row['name']:36}{ours:10.2f} ms {other:10.2f} ms {row['ratio']:8.3f}x (wall {row['ratio_wall']:.3f}x){goal}"
