"The trajectory domain: reader, planner, sampler, axes and windows beside the plain ways, and pyGCodeDecode where it is installed."

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.integrate import solve_ivp
from scipy.signal import lsim

from bench import benchmark
from gcode_ml.core.errors import InputError
from gcode_ml.gcode.parts import part_program
from gcode_ml.gcode.planner import jerk_junctions, look_ahead, plan, sample
from gcode_ml.gcode.reader import moves, parse_gcode
from gcode_ml.lab.settings import data_folder
from gcode_ml.trajectory.simulate import (
    Machine,
    axis_error,
    nonlinear_mode,
    random_machine,
    simulate_part,
    tracking_error,
)

F, Z = 55.0, 0.08
ROOT = Path(__file__).parents[1]

HOMES = []


def scratch():
    "A folder that goes with the process."
    HOMES.append(tempfile.TemporaryDirectory())
    return Path(HOMES[-1].name)


def text(quick=False, name="benchy_crealityprint_ender3v2"):
    "A real program, or a generated one where there is none."
    folder = data_folder("gcode")
    path = folder and next(iter(folder.glob(f"{name}.*")), None)
    return (
        part_program("tube", layers=2 if quick else 60) if quick or not path else path.read_text()
    )


def seconds(n, quick):
    "X and Y of some seconds of a part at 1 kHz."
    s = sample(
        plan(parse_gcode(part_program("box", layers=30))), 1000, ("x", "y"), 0, 0.5 if quick else n
    )
    return s["x"], s["y"]


CHAIN = """import sys, time, resource
from gcode_ml.gcode.planner import plan
from gcode_ml.trajectory.simulate import simulate_part
t = time.process_time()
r = simulate_part(plan(sys.argv[1]), 'bedslinger', columns=())
print(time.process_time()-t, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024, len(r['error_x']))"""


def chain_facts(source):
    "Processor seconds, peak memory and samples of file to error, in a process of its own."
    with tempfile.TemporaryDirectory() as d:
        file = Path(d) / "part.gcode"
        file.write_text(source)
        out = subprocess.run(
            [sys.executable, "-c", CHAIN, str(file)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).stdout.split()
    return dict(
        zip(
            ("whole_file_cpu_seconds", "whole_file_peak_megabytes", "whole_file_samples"),
            map(float, out),
        )
    )


def scalar_rk4(x, f, z, substeps=1):
    "One axis, one step at a time."
    w, h = 2 * np.pi * f, 1e-3 / substeps
    w2, c = w * w, 2 * z * w
    p = float(x[0])
    v = 0.0
    out = [0.0]
    x = x.tolist()
    for i in range(len(x) - 1):
        du = (x[i + 1] - x[i]) * 1000
        for j in range(substeps):
            a = x[i] + (x[i + 1] - x[i]) * j / substeps
            b = x[i] + (x[i + 1] - x[i]) * (j + 1) / substeps
            m = (a + b) / 2
            k1 = w2 * (a - p) + c * (du - v)
            v2 = v + h / 2 * k1
            k2 = w2 * (m - p - h / 2 * v) + c * (du - v2)
            v3 = v + h / 2 * k2
            k3 = w2 * (m - p - h / 2 * v2) + c * (du - v3)
            v4 = v + h * k3
            k4 = w2 * (b - p - h * v3) + c * (du - v4)
            p = p + h / 6 * (v + 2 * v2 + 2 * v3 + v4)
            v = v + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        out.append(p - x[i + 1])
    return out


def numpy_rk4(x, f, z):
    "One axis with matrices, one step at a time."
    w = 2 * np.pi * f
    A = np.array([[0, 1], [-w * w, -2 * z * w]])
    s = np.array([x[0], 0.0])
    out = [0.0]
    h = 1e-3
    for i in range(len(x) - 1):
        du = (x[i + 1] - x[i]) * 1000

        def rate(s, u, du=du):
            return A @ s + np.array([0, w * w * u + 2 * z * w * du])

        m = (x[i] + x[i + 1]) / 2
        k1 = rate(s, x[i])
        k2 = rate(s + h / 2 * k1, m)
        k3 = rate(s + h / 2 * k2, m)
        k4 = rate(s + h * k3, x[i + 1])
        s = s + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        out.append(s[0] - x[i + 1])
    return out


def both(function, x, y, times=1):
    return lambda: [(function(x, F, Z), function(y, 40.0, Z)) for _ in range(times)]


@benchmark(
    "file to tracking error of two axes at 1 kHz; a generated part",
    "the same with the axes by scalar Runge-Kutta",
    1 / 15,
)
def chain(quick):
    source = part_program("box", layers=1 if quick else 12)

    def slow():
        s = sample(plan(parse_gcode(source)), 1000, ("x", "y"))
        return scalar_rk4(s["x"], F, Z), scalar_rk4(s["y"], 40.0, Z)

    return (
        lambda: simulate_part(plan(parse_gcode(source)), "bedslinger", columns=()),
        slow,
        chain_facts(text(quick)),
    )


@benchmark(
    "a whole Benchy, file to tracking error of two axes at 1 kHz",
    "the same with the axes by scalar Runge-Kutta",
    1 / 15,
    repetitions=1,
)
def whole_benchy(quick):
    source = text(quick)
    facts = chain_facts(source)
    facts |= dict(
        within_2_cpu_seconds=facts["whole_file_cpu_seconds"] <= 2,
        within_600_megabytes=facts["whole_file_peak_megabytes"] < 600,
    )

    def ours():
        return simulate_part(plan(parse_gcode(source)), "bedslinger", columns=())

    ours()

    def slow():
        s = sample(plan(parse_gcode(source)), 1000, ("x", "y"))
        return scalar_rk4(s["x"], F, Z), scalar_rk4(s["y"], 40.0, Z)

    return ours, slow, facts


# The four rows below do our part many times over, so that it takes long enough to be measured beside one call of the other.
@benchmark("two axes, 20,000 samples, 100 times", "scalar Runge-Kutta, once", 100 / 40)
def axes_rk4(quick):
    x, y = seconds(20, quick)
    return both(axis_error, x, y, 100), both(scalar_rk4, x, y)


@benchmark("two axes, 20,000 samples, 200 times", "Runge-Kutta with NumPy matrices, once", 1)
def axes_numpy(quick):
    x, y = seconds(20, quick)
    return both(axis_error, x, y, 200), both(numpy_rk4, x, y)


@benchmark("two axes, 20,000 samples, 100 times", "scipy.signal.lsim, once", 100 / 50)
def axes_lsim(quick):
    x, y = seconds(20, quick)
    t = np.arange(len(x)) / 1000

    def other(x, f, z):
        w = 2 * np.pi * f
        return lsim(([-1.0, 0, 0], [1, 2 * z * w, w * w]), x - x[0], t)[1]

    assert np.abs(axis_error(x, F, Z) - other(x, F, Z)).max() < 1e-6
    return both(axis_error, x, y, 100), both(other, x, y)


@benchmark("two axes, 2,000 samples, 1,000 times", "scipy.integrate.solve_ivp, once", 1)
def axes_solve_ivp(quick):
    x, y = seconds(2, quick)
    t = np.arange(len(x)) / 1000

    def other(x, f, z):
        w = 2 * np.pi * f
        v = np.append(np.diff(x) * 1000, 0)
        return solve_ivp(
            lambda s, q: (
                q[1],
                w * w * (np.interp(s, t, x) - q[0])
                + 2 * z * w * (v[min(int(s * 1000), len(v) - 1)] - q[1]),
            ),
            (0, t[-1]),
            (x[0], 0.0),
            t_eval=t,
            max_step=1e-3,
        ).y

    return both(axis_error, x, y, 1000), both(other, x, y)


@benchmark(
    "an axis whose stiffness depends on the position, 1,000,000 samples side by side",
    "the same Runge-Kutta one step at a time, 20,000 samples",
)
def lanes(quick):
    x = seconds(20, quick)[0]
    long = np.tile(np.concatenate([x, x[::-1]]), 1 if quick else 25)
    return lambda: nonlinear_mode(long, F, Z, 1000, slope=0.1), lambda: scalar_rk4(x, F, Z, 4)


def fancy_sample(p, rate):
    "The motion by indexing every array with the phase of each sample."
    t = np.concatenate([p.pause[:-1, None], p.phases], 1).ravel()
    end = np.cumsum(t)
    at = np.arange(int(p.duration * rate) + 1) / rate
    k = np.minimum(np.searchsorted(end, at, "right"), len(t) - 1)
    seg, phase = k // 4, k % 4
    tau = at - (end - t)[k]
    v0 = np.choose(phase, [0 * tau, p.entry[seg], p.peak[seg], p.peak[seg]])
    a = np.choose(phase, [0 * tau, p.acceleration[seg], 0 * tau, -p.acceleration[seg]])
    s1 = (p.entry + p.peak) / 2 * p.phases[:, 0]
    s0 = np.choose(phase, [0 * tau, 0 * tau, s1[seg], (s1 + p.peak * p.phases[:, 1])[seg]])
    s = s0 + v0 * tau + a * tau**2 / 2
    return [p.start[seg, i] + p.unit[seg, i] * s for i in (0, 1)]


@benchmark(
    "x and y of a whole program at 1 kHz",
    "indexing every array with the phase of each sample",
    1 / 10,
)
def sampler(quick):
    p = plan(parse_gcode(text(quick)))

    def ours():
        return sample(p, 1000, ("x", "y"))

    assert max(np.abs(a - b).max() for a, b in zip(ours().values(), fancy_sample(p, 1000))) < 1e-6
    return ours, lambda: fancy_sample(p, 1000)


def loop_plan(unit, nominal, jerk, cap_end, rise):
    "Junctions and both passes, move by move."
    n = len(unit)
    unit, nominal, jerk, rise = (v.tolist() for v in (unit, nominal, jerk, rise))
    safe = [
        min([v] + [j / abs(u) for u, j in zip(us, js) if u])
        for us, v, js in zip(unit, nominal, jerk)
    ]
    w = [safe[0] ** 2]
    for k in range(1, n):
        v = min(nominal[k], nominal[k - 1])
        f = 1.0
        for a in range(4):
            p, q = unit[k - 1][a] * v * f, unit[k][a] * nominal[k] * f
            c = abs(p - q) if p * q >= 0 else max(abs(p), abs(q))
            if c > jerk[k][a]:
                f *= jerk[k][a] / c
        slower = v
        v *= f
        w.append(
            (min(safe[k], slower) if safe[k - 1] > 0.99 * v and safe[k] > 0.99 * v else v) ** 2
        )
    w.append(cap_end)
    for i in range(n - 1, -1, -1):
        w[i] = min(w[i], w[i + 1] + rise[i])
    for i in range(n):
        w[i + 1] = min(w[i + 1], w[i] + rise[i])
    return w


@benchmark(
    "corners and look-ahead of a whole program, equal to 1e-9 mm/s", "loops over the moves", 1 / 20
)
def look_ahead_passes(quick):
    p = plan(parse_gcode(text(quick)))
    jerk = np.broadcast_to([8.0, 8.0, 0.4, 5.0], p.unit.shape)
    rise = 2 * p.acceleration * p.length

    def ours():
        return look_ahead(np.append(jerk_junctions(p.unit, p.nominal, jerk) ** 2, 0), rise)

    assert (
        np.abs(np.sqrt(ours()) - np.sqrt(loop_plan(p.unit, p.nominal, jerk, 0.0, rise))).max()
        < 1e-9
    )
    return ours, lambda: loop_plan(p.unit, p.nominal, jerk, 0.0, rise)


@benchmark(
    "read a program with its state, limits and comments",
    "one re.findall of words a line, nothing else",
    5,
)
def reader(quick):
    source = text(quick)
    word = re.compile(r"([A-Z])([-+]?[\d.]+)")
    return lambda: moves(parse_gcode(source)), lambda: [
        word.findall(l.split(";")[0]) for l in source.splitlines()
    ]


@benchmark("a part on 32 machines, planned and sampled once", "32 full runs", 1 / 2)
def machines(quick):
    source = part_program("box", layers=1) if quick else text(name="helixcube_prusaslicer_mini")
    found = [
        Machine("m", frequency=(random_machine(k).frequency)) for k in range(2 if quick else 32)
    ]

    def ours():
        s = sample(plan(parse_gcode(source)), 1000, ("x", "y"))
        return [tracking_error(s["x"], s["y"], m) for m in found]

    return (
        ours,
        lambda: [simulate_part(plan(parse_gcode(source)), m, 1000, columns=()) for m in found],
        thirty_two(text(quick), found),
    )


def thirty_two(source, found):
    "Processor seconds of a whole Benchy on all machines, planned and sampled once."
    t = time.process_time()
    s = sample(plan(parse_gcode(source)), 1000, ("x", "y"))
    for m in found:
        tracking_error(s["x"], s["y"], m)
    took = time.process_time() - t
    return dict(
        whole_benchy_machines=len(found),
        whole_benchy_cpu_seconds=took,
        within_20_seconds=took <= 20,
    )


def latency(name, quick):
    "A window of 128 steps in ONNX Runtime with one thread, and in eager PyTorch."
    import torch

    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            "bench", "onnxruntime", "installed", "not installed", "pip install onnxruntime"
        ) from None
    from gcode_ml.lab.export import make_programs
    from gcode_ml.trajectory.models import MODELS

    torch.manual_seed(0)
    model = MODELS[name]().eval()
    given = [torch.randn(1, 128, 15), 0.01 * torch.randn(1, 128, 2), torch.rand(1, 2)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        make_programs(model, "deploy", "onnx")["onnx"], options, providers=["CPUExecutionProvider"]
    )
    feed = dict(zip([i.name for i in session.get_inputs()], [v.numpy() for v in given]))
    ms = []

    def eager():
        with torch.no_grad():
            return model.deploy(*given)

    assert max(np.abs(a - b.numpy()).max() for a, b in zip(session.run(None, feed), eager())) < 1e-5
    for _ in range(10 if quick else 210):
        t = time.perf_counter()
        session.run(None, feed)
        ms.append(1e3 * (time.perf_counter() - t))
    return (
        lambda: session.run(None, feed),
        eager,
        dict(
            parameters=sum(p.numel() for p in model.parameters()),
            p50_ms=float(np.percentile(ms[10:] or ms, 50)),
            p95_ms=float(np.percentile(ms[10:] or ms, 95)),
        ),
    )


@benchmark(
    "one window of 128 steps, deployment model in ONNX Runtime, one thread",
    "the same in eager PyTorch",
    1,
)
def latency_deployment(quick):
    return latency("tcn", quick)


@benchmark(
    "one window of 128 steps, reference transformer in ONNX Runtime, one thread",
    "the same in eager PyTorch",
    1.5,
)
def latency_reference(quick):
    return latency("transformer", quick)


@benchmark(
    "32 windows a batch, gathered from the series; 100 batches",
    "windows of stride 4 stored as one tensor",
    1.2,
)
def windows(quick):
    import torch

    from gcode_ml.trajectory.data import TrajectoryWindows, collect, read_collection

    with tempfile.TemporaryDirectory() as d:
        file = Path(d) / "box_0.gcode"
        file.write_text(part_program("box", layers=1 if quick else 8))
        collect(file, Path(d) / "set", "all")
        w = TrajectoryWindows(read_collection(Path(d) / "set"))
    index = np.random.default_rng(0).integers(0, len(w), (3 if quick else 100, 32))
    stored = [
        torch.cat(
            [w.batch(np.arange(a, min(a + 512, len(w))))[k][n] for a in range(0, len(w), 512)]
        )
        for k, n in ((0, "features"), (2, "error"), (2, "thermal"), (2, "thermal_mask"))
    ]
    held = sum(t.nbytes for t in (w.motion, w.errors, w.thermal))
    large = sum(t.nbytes for t in stored)
    return (
        lambda: [w.batch(i) for i in index],
        lambda: [[t[torch.as_tensor(i)] for t in stored] for i in index],
        dict(megabytes_held=held / 1e6, megabytes_stored=large / 1e6),
    )


BLOCKS = """import sys, resource
from gcode_ml.gcode.planner import program_blocks
n = sum(len(own) for _,own,_ in program_blocks(sys.argv[1]))
print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)"""


@benchmark(
    "read and plan a file of 300 MB block by block, in a process of its own",
    "one re.findall of words a line, nothing else",
    5,
    repetitions=1,
)
def large_file(quick):
    source = text(quick, "benchy_prusaslicer_mini")
    file = scratch() / "large.gcode"
    word = re.compile(r"([A-Z])([-+]?[\d.]+)")
    facts = {}
    with open(file, "w") as f:
        for _ in range(int((1e6 if quick else 3e8) / len(source)) + 1):
            f.write(source)
    facts["megabytes"] = file.stat().st_size / 1e6

    def ours():
        facts["segments"], facts["peak_megabytes"] = map(
            float,
            subprocess.run(
                [sys.executable, "-c", BLOCKS, str(file)],
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ).stdout.split(),
        )

    def other():
        with open(file) as f:
            for l in f:
                word.findall(l.split(";")[0])

    return ours, other, facts


PGD = """import sys, types
try: import pyvista
except ImportError:
    class Any(types.ModuleType):
        def __getattr__(self, name): return object
    sys.modules['pyvista'] = Any('pyvista')                      # only its plots need it
from pyGCodeDecode.gcode_interpreter import simulation
simulation(sys.argv[1], machine_name='prusa_mini', verbosity_level=0)"""


@benchmark(
    "read and plan the first 12,000 lines of a Benchy",
    "pyGCodeDecode, in a process of its own",
    1 / 25,
)
def planning_pygcodedecode(quick):
    python = os.environ.get("PYGCODEDECODE_PYTHON", sys.executable)
    if subprocess.run(
        [
            python,
            "-c",
            'import importlib.util as u, sys; sys.exit(u.find_spec("pyGCodeDecode") is None)',
        ],
        capture_output=True,
    ).returncode:
        raise InputError(
            "bench",
            "pyGCodeDecode",
            "installed",
            "not installed",
            "pip install pyGCodeDecode, or name an interpreter that has it in PYGCODEDECODE_PYTHON",
        )
    folder = scratch()
    lines = text(quick, "benchy_prusaslicer_mini").splitlines(True)
    full = folder / "part.gcode"
    full.write_text("".join(l for l in lines[: 1000 if quick else 12000] if not l.startswith(";")))

    def other():
        return subprocess.run([python, "-c", PGD, str(full)], check=True, capture_output=True)

    return lambda: plan(full), other
