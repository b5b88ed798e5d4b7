"""Contract of every callback of the shared pages: finite losses, reproducibility, unchanged
validation and bit-exact resumption. The callbacks are discovered, not listed."""

import importlib
import inspect
import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import fastai.callback.schedule  # noqa: F401  gives a Learner `lr_find`
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.metrics import accuracy

import gcode_ml
from gcode_ml.data.batch import dataloaders
from gcode_ml.lab.runs import Run, RunProgress
from gcode_ml.lab.snapshot import Snapshot, pack_attributes
from gcode_ml.lab.tracking import Tracker, Tracking
from gcode_ml.signals.augment import Augment
from gcode_ml.training import speed
from gcode_ml.training.averaging import EMA, SWA
from gcode_ml.training.callbacks import (
    Checkpoints,
    EarlyStopping,
    FiniteLoss,
    History,
    TextLog,
    TrainingMetrics,
    load_checkpoint,
    monitored,
)
from gcode_ml.training.curriculum import Curriculum, ScheduledSampling
from gcode_ml.training.distillation import Distill
from gcode_ml.training.mixing import AdversarialTraining, CutMix, MixUp
from gcode_ml.training.monitors import GradientMonitor, Timing, UniqueTokens
from gcode_ml.training.physics import PhysicsLoss
from gcode_ml.training.schedules import ExtraTargets, LossParameters, Schedule, schedule
from gcode_ml.training.speed import (
    Accumulation,
    Compile,
    Deterministic,
    GradientCheckpointing,
    MixedPrecision,
    ProgressiveLength,
    check_mixed_precision,
)
from gcode_ml.training.tiny import TinyClassifier, TinySequences, tiny_learner

pytestmark = pytest.mark.filterwarnings("ignore")
EPOCHS = 4  # of six batches

ELSEWHERE = {
    "lab.distributed.SharedFit",
    "lab.distributed.SharedSnapshot",
}  # need several processes: tested in tests/test_distributed.py


def callbacks():
    "Every callback class of the shared pages, keyed by its name in the package."
    pages = [
        f"{p.parent.name}.{p.stem}"
        for d in ("data", "signals", "evaluation", "training", "lab")
        for p in sorted((Path(gcode_ml.__file__).parent / d).glob("[!_]*.py"))
    ]
    return {
        f"{page}.{name}": cls
        for page in pages
        for name, cls in vars(importlib.import_module(f"gcode_ml.{page}")).items()
        if inspect.isclass(cls)
        and issubclass(cls, Callback)
        and cls.__module__ == f"gcode_ml.{page}"
        and not name.startswith("_")
        and f"{page}.{name}" not in ELSEWHERE
    }


class LearnedTemperature(torch.nn.Module):
    "Cross entropy with a learned temperature."

    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.ones(1))

    def forward(self, pred, y):
        return torch.nn.functional.cross_entropy(pred * self.temperature, y)


def lengths(x, mask):
    return dict(length=mask.sum(1))


def weighted(pred, y):
    return (
        torch.nn.functional.cross_entropy(pred, y["target"], reduction="none") * y["length"] / 30
    ).mean()


def teacher():
    "Teacher with weights from a fixed seed."
    torch.manual_seed(9)
    return TinyClassifier(width=8)


def residual(pred, y, x, mask):
    return pred.softmax(-1)[:, 0] - 0.3


class Lines(TinySequences):
    "Lines of four tokens that encode the class, also part of the inputs for a decoder."

    def batch(self, index):
        x, mask, y = super().batch(index)
        line = 3 + (y[:, None] + torch.arange(4)) % 3
        return dict(x=x, tokens=torch.nn.functional.pad(line[:, :-1], (1, 0), value=1)), mask, line


class LineWriter(TinyClassifier):
    "Logits of the next token from the previous token and the sequence."

    def __init__(self):
        super().__init__(classes=6, dropout=0.3)
        self.embed = torch.nn.Embedding(6, 6)

    def forward(self, inputs, mask):
        return super().forward(inputs["x"], mask)[:, None] + self.embed(inputs["tokens"])


def line_loss(pred, y):
    return torch.nn.functional.cross_entropy(pred.flatten(0, 1), y.flatten())


def line_accuracy(pred, y):
    return (pred.argmax(-1) == y).float().mean()


def writer(*cbs):
    return dict(
        cbs=[*cbs], model=LineWriter(), data=Lines, loss_func=line_loss, metrics=line_accuracy
    )


# Name in the package -> callbacks, or arguments of `tiny_learner` (and `data`, another data set).
# Each example has an effect within four epochs.
EXAMPLES = {
    "training.callbacks.History": lambda folder: [History(folder / "history.csv")],
    "training.callbacks.TextLog": lambda folder: [
        TextLog(folder / "train_log.txt"),
        UniqueTokens(4),
    ],
    "training.callbacks.TrainingMetrics": lambda folder: [
        TrainingMetrics(),
        History(folder / "history.csv"),
    ],
    "training.callbacks.EarlyStopping": lambda folder: [EarlyStopping(patience=2, min_delta=10)],
    "training.callbacks.Checkpoints": lambda folder: [
        Checkpoints(folder / "checkpoints", "accuracy", "max", every=1, keep_last=2)
    ],
    "training.callbacks.FiniteLoss": lambda folder: [FiniteLoss()],
    "training.monitors.GradientMonitor": lambda folder: [
        GradientMonitor(interval=4, alert=0.1, bins=5)
    ],
    "training.monitors.Timing": lambda folder: [Timing()],
    "training.monitors.UniqueTokens": lambda folder: [UniqueTokens(6, ignore=[5])],
    "training.speed.MixedPrecision": lambda folder: [MixedPrecision()],
    "training.speed.Compile": lambda folder: [Compile("eager")],
    "training.speed.GradientCheckpointing": lambda folder: [GradientCheckpointing()],
    "training.speed.Accumulation": lambda folder: [Accumulation(40)],
    "training.speed.Deterministic": lambda folder: [Deterministic()],
    "training.speed.ProgressiveLength": lambda folder: [ProgressiveLength([(10, 1), (25, 2)])],
    "training.averaging.EMA": lambda folder: [EMA(0.9), Checkpoints(folder / "checkpoints")],
    "training.averaging.SWA": lambda folder: [SWA(0.5)],
    "signals.augment.Augment": lambda folder: [Augment({"noise": dict(std=0.1)})],
    "training.schedules.Schedule": lambda folder: [schedule("plateau", 1e-2, patience=1)],
    "training.schedules.ExtraTargets": lambda folder: dict(
        cbs=[ExtraTargets(lengths)], loss_func=weighted
    ),
    "training.schedules.LossParameters": lambda folder: dict(
        cbs=[LossParameters()], loss_func=LearnedTemperature()
    ),
    "training.mixing.Mixing": lambda folder: [MixUp(1.0)],  # base class of the next two
    "training.mixing.MixUp": lambda folder: [MixUp(p=0.5)],
    "training.mixing.CutMix": lambda folder: [CutMix()],
    "training.mixing.AdversarialTraining": lambda folder: [AdversarialTraining(0.1)],
    "training.distillation.Distill": lambda folder: [Distill(teacher(), alpha=0.5)],
    "training.physics.PhysicsLoss": lambda folder: [
        PhysicsLoss(residual, 0.5, delay=0.5, rise=2),
        History(folder / "history.csv"),
    ],
    "training.curriculum.Curriculum": lambda folder: [
        Curriculum("length", "root", start=0.3, until=2.5),
        History(folder / "history.csv"),
    ],
    "training.curriculum.ScheduledSampling": lambda folder: writer(
        ScheduledSampling(k=3.0, greedy=False), History(folder / "history.csv")
    ),
    "lab.tracking.Tracking": lambda folder: [Tracking(Tracker(), gradients_every=2)],
    "lab.snapshot.Snapshot": lambda folder: [],
    "lab.runs.RunProgress": lambda folder: [RunProgress(Run(folder / "run"))],
}
SILENT = {  # leave the weights of a fit alone
    "History",
    "TextLog",
    "TrainingMetrics",
    "Checkpoints",
    "FiniteLoss",
    "GradientMonitor",
    "Timing",
    "UniqueTokens",
    "Compile",
    "GradientCheckpointing",
    "Deterministic",
    "Snapshot",
    "RunProgress",
    "Tracking",
}
if not check_mixed_precision("cpu")["bf16"]:  # then the fit goes on in float32
    SILENT.add("MixedPrecision")
OWN_WEIGHTS = {"EMA"}  # validate with weights other than those in training
MEASURED = {
    "seconds",
    "elapsed",
    "batch_seconds",
    "epoch_seconds",
    "batch_p50",
    "batch_p95",
    "batch_p99",
    "peak_memory",
    "start_epoch",
    "log",
}  # times and sizes: only their number is reproducible


class PowerCut(Callback):
    "Interrupt the fit at a given epoch and batch."

    order = 2000

    def __init__(self, *where):
        self.where = where

    def after_batch(self):
        if (self.epoch, self.iter, self.training) == self.where:
            raise SystemError("power cut")


def fit(folder, example, *cbs, epochs=EPOCHS):
    "Fit a tiny learner with dropout."
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    made = example(folder)
    kwargs = dict(made) if isinstance(made, dict) else dict(cbs=made)
    data = kwargs.pop("data", None)
    rates = (
        []
        if any(isinstance(cb, Schedule) for cb in kwargs["cbs"])
        else [schedule("one_cycle", 1e-2)]
    )
    learn = tiny_learner(
        **{
            "metrics": accuracy,
            "model": TinyClassifier(dropout=0.3),
            **kwargs,
            "cbs": [*kwargs["cbs"], *rates, *cbs],
        }
    )
    if data:
        learn.dls = dataloaders(data(96), data(48, seed=1000), 16)
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs)
    return learn


def resumed(folder, example, where):
    "The same fit, interrupted and resumed by a new learner."
    folder.mkdir(exist_ok=True)
    file = folder / "fit.snapshot"
    with pytest.raises(SystemError):
        fit(folder, example, Snapshot(file, batches=2), PowerCut(*where))
    return fit(folder, example, Snapshot(file, batches=2))


def uncounted(value):
    "`value` with times and sizes replaced by their number."
    if isinstance(value, dict):
        return {
            k: len(v) if isinstance(v, list) and k in MEASURED else uncounted(v)
            for k, v in value.items()
            if k not in MEASURED or isinstance(v, list)
        }
    return type(value)(map(uncounted, value)) if isinstance(value, (list, tuple)) else value


def kept(learn):
    "State of every callback as saved by a snapshot."
    tensors = {}
    state = [
        (cb.name, pack_attributes(SimpleNamespace(**uncounted(vars(cb))), tensors))
        for cb in learn.cbs
        if not isinstance(cb, (Snapshot, PowerCut))
    ]
    return json.dumps(state, sort_keys=True), {
        k: (str(v.dtype), v.numpy().tobytes()) for k, v in tensors.items()
    }


def written(folder):
    "Contents of the files of a fit, without measured times."
    files = [
        f
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name not in ("fit.snapshot", "progress.json")
    ]
    return {
        f.relative_to(folder).as_posix(): uncounted(pd.read_csv(f).to_dict("list"))
        if f.suffix == ".csv"
        else f.read_bytes()
        for f in files
    }


def same_weights(a, b):
    return all(
        torch.equal(p, q)
        for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )


def same(a, b, folders=()):
    "Whether two fits have equal weights, records, callback states and files."
    return (
        same_weights(a, b)
        and json.dumps(list(map(list, a.recorder.values)))
        == json.dumps(list(map(list, b.recorder.values)))
        and kept(a) == kept(b)
        and len({repr(written(f)) for f in folders}) < 2
    )


NAMES = sorted(callbacks())


def example(name):
    assert name in EXAMPLES, f"add {name} to EXAMPLES in tests/test_callbacks.py"
    return EXAMPLES[name]


def test_every_callback_has_an_example():
    "Every callback has an example, and every example its callback."
    assert set(NAMES) == set(EXAMPLES)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_gives_same_result(tmp_path, name):
    "Losses are finite, the same seed gives the same fit, and monitors do not change the weights."
    a, b = (fit(tmp_path / f, example(name)) for f in "ab")
    assert torch.tensor([list(v) for v in a.recorder.values]).isfinite().all()
    assert same(a, b, (tmp_path / "a", tmp_path / "b"))
    assert same_weights(a, fit(tmp_path / "c", plain(example(name)))) == (
        name.split(".")[-1] in SILENT
    )


def plain(example):
    "The same data and model without the callbacks; with the default loss if they need another."

    def made(folder):
        made = example(folder)
        return {**made, "cbs": []} if isinstance(made, dict) and "data" in made else []

    return made


def leaves(value):
    "All tensors of nested containers."
    if isinstance(value, dict):
        value = value.values()
    return [value] if torch.is_tensor(value) else [t for v in value for t in leaves(v)]


class Spy(Callback):
    "Record the validation batches, and whether the weights are those of training."

    order = 3000

    def __init__(self):
        self.seen, self.as_trained = [], []

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def after_train(self):
        self.trained = self.weights().clone()

    def before_batch(self):
        if self.training or self.epoch:
            return
        self.seen.append((*self.xb, *self.yb))
        self.as_trained.append(torch.equal(self.weights(), self.trained))


@pytest.mark.parametrize("name", NAMES)
def test_validation_is_unchanged(tmp_path, name):
    "Validation batches are unchanged and evaluated with the current weights."
    learn = fit(tmp_path / "a", example(name), Spy(), epochs=2)
    for seen, batch in zip(learn.spy.seen, learn.dls.valid, strict=True):
        assert all(map(torch.equal, leaves(seen), leaves(batch)))
    assert set(learn.spy.as_trained) == {name.split(".")[-1] not in OWN_WEIGHTS}


CUTS = {"in an epoch": (1, 2, True), "in validation": (1, 0, False), "between epochs": (2, 0, True)}


def resumes(folder, example):
    "The `CUTS` after which a resumed fit equals the uninterrupted one."
    whole = fit(folder / "whole", example)
    return {
        k
        for k, where in CUTS.items()
        if same(whole, resumed(folder / k, example, where), (folder / "whole", folder / k))
    }


@pytest.mark.parametrize("name", NAMES)
def test_resumed_fit_equals_uninterrupted(tmp_path, name):
    "A resumed fit equals an uninterrupted one bit for bit, wherever it was interrupted."
    assert resumes(tmp_path, example(name)) == set(CUTS)
    if getattr(callbacks()[name], "resumable", True) is False:
        assert not list(tmp_path.glob("*/fit.snapshot"))


class Hidden(Callback):
    "Keep the number of batches where a snapshot does not find it; changes the weights."

    def __init__(self):
        self.batches = count()

    def before_step(self):
        if next(self.batches) % 7 == 6:
            for p in self.parameters():
                p.grad.mul_(0.5)


class HiddenSum(Callback):
    "Hidden state that affects only an attribute."

    def __init__(self):
        self.batches = count()
        self.last = 0

    def before_batch(self):
        self.last = next(self.batches)


class HiddenFile(HiddenSum):
    "Hidden state that affects only a file."

    def __init__(self, path):
        super().__init__()
        self.path = path

    def before_batch(self):
        next(self.batches)

    def after_fit(self):
        self.path.write_text(repr(self.batches))


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: [Hidden()],
        lambda folder: [HiddenSum()],
        lambda folder: [HiddenFile(folder / "count.txt")],
    ],
)
def test_lost_callback_state_is_detected(tmp_path, make):
    "`resumes` detects lost state that affects the weights, an attribute or a file."
    assert resumes(tmp_path, make) == set()


def test_fit_with_unresumable_callback_restarts(tmp_path):
    "With a callback that is not resumable no snapshot is written, and the fit starts again."

    class Unresumable(Hidden):
        resumable = False

    assert resumes(tmp_path, lambda folder: [Unresumable()]) == set(CUTS)
    assert not list(tmp_path.glob("*/fit.snapshot"))


def test_scaler_resumes(tmp_path, monkeypatch):
    "The fp16 gradient scale is restored; a fit without its state differs."
    monkeypatch.setattr(
        speed, "check_mixed_precision", lambda kind: dict(fp16=True)
    )  # float16 is slow on a CPU, but works

    def scaled(folder):
        return [MixedPrecision("fp16", init_scale=2.0**22, growth_interval=4)]

    assert resumes(tmp_path, scaled) == set(CUTS)
    assert fit(tmp_path / "a", scaled).mixed_precision.scaler_state["scale"] != 2.0**22
    monkeypatch.setattr(MixedPrecision, "before_train", lambda self: None)
    (tmp_path / "forgotten").mkdir()
    assert resumes(tmp_path / "forgotten", scaled) == set()


class Tally(Callback):
    "Halve every n-th gradient, and count the steps."

    def __init__(self, every):
        self.every, self.seen = every, 0

    def before_step(self):
        self.seen += 1
        if self.seen % self.every == 0:
            for p in self.parameters():
                p.grad.mul_(0.5)


def test_callbacks_of_one_class_keep_separate_state(tmp_path, monkeypatch):
    "Each of several callbacks of one class gets its own state back."

    def tallies(folder):
        return [Tally(3), Tally(4), Tally(5)]

    assert resumes(tmp_path, tallies) == set(CUTS)
    (tmp_path / "one_name").mkdir()
    monkeypatch.setattr(
        Snapshot,
        "_kept_callbacks",
        lambda self: {cb.name: cb for cb in self.learn.cbs if cb is not self},
    )
    assert resumes(tmp_path / "one_name", tallies) == set()


def test_stopped_fit_stops_again(tmp_path):
    "A fit that ended by early stopping is not continued from its snapshot."

    def stopping(folder):
        return [EarlyStopping(patience=1, min_delta=10), Checkpoints(folder)]

    first, again = (fit(tmp_path, stopping, Snapshot(tmp_path / "fit.snapshot")) for _ in range(2))
    assert len(monitored(first, "valid_loss")) == 2
    assert same(first, again)


def test_best_epoch_survives_an_interruption(tmp_path):
    "A resumed fit compares with the best epoch before the interruption."

    def keep(folder):
        return [Checkpoints(folder / "c", "accuracy", "max")]

    whole = fit(tmp_path / "a", keep)
    broken = resumed(tmp_path / "b", keep, (3, 0, True))
    for folder, learn in ((tmp_path / "a", whole), (tmp_path / "b", broken)):
        values = monitored(learn, "accuracy")
        assert load_checkpoint(TinyClassifier(), folder / "c" / "best.safetensors") == dict(
            epoch=int(values.argmax()), monitor="accuracy", value=values.max()
        )


@pytest.mark.parametrize("name", NAMES)
def test_silent_outside_a_fit(tmp_path, name):
    "`lr_find` and `validate` write no file and do not change the weights."
    made = example(name)(tmp_path / "files")
    kwargs = dict(made) if isinstance(made, dict) else dict(cbs=made)
    data = kwargs.pop("data", None)
    learn = tiny_learner(**{"metrics": accuracy, **kwargs, "path": tmp_path})
    if data:
        learn.dls = dataloaders(data(96), data(48, seed=1000), 16)
    before = [p.clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=8, show_plot=False)
        learn.validate()
    assert all(map(torch.equal, before, learn.model.parameters()))
    assert {f.name for f in (tmp_path / "files").rglob("*") if f.is_file()} <= {"progress.json"}
