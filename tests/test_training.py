"""Every training option has an effect, is validated, and is the same in notebooks and recipes. The
options are discovered, not listed."""

import warnings

import pytest
import torch
from fastai.callback.core import Callback
from fastai.metrics import accuracy
from safetensors.torch import save_file
from torch import nn

from gcode_ml.core.domain import domain_names, find_domain
from gcode_ml.core.errors import InputError
from gcode_ml.core.files import write_json
from gcode_ml.lab.experiment import experiment_notebook
from gcode_ml.lab.parameters import read_parameters
from gcode_ml.lab.snapshot import Snapshot
from gcode_ml.training import speed
from gcode_ml.training.callbacks import epoch_table
from gcode_ml.training.fit import TRAINING, fit, training_options, training_values
from gcode_ml.training.losses import CrossEntropy, MultiTask
from gcode_ml.training.schedules import OPTIMIZERS, PRESETS, SCHEDULES, schedule_curve
from gcode_ml.training.tiny import TinyClassifier, tiny_learner

DEFAULTS = dict(max_epochs=2, learning_rate=1e-2, batch_size=16)


class Witness(Callback):
    "Record learning rate, batch shape and determinism of each training batch."

    order = 100

    def before_fit(self):
        self.seen = []

    def after_batch(self):
        if self.training:
            self.seen.append(
                (
                    self.opt.hypers[0]["lr"],
                    tuple(self.xb[1].shape),
                    torch.are_deterministic_algorithms_enabled(),
                )
            )


def learner(cbs=(), **training):
    "A recipe like those of the domains."
    options = training_options(training, **DEFAULTS)
    base = tiny_learner(batch_size=options.batch_size, model=TinyClassifier(dropout=0.1))
    data = base.dls.train.dataset
    labels = data.targets
    loss = options.loss(labels.clamp_max(1), 3)  # unbalanced classes
    if options.oversample > 1:
        base.dls.train.restrict(options.oversampled((labels != 0).long()[:60], range(60)))
    return options.learner(
        base.dls, base.model, loss, cbs, metrics=accuracy, tokens=dict(vocabulary_size=4)
    )


def observed(**training):
    "Weights, batches, columns of the history, number of epochs, losses and warnings of a fit."
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        learn = learner([Witness()], **training)
        with learn.no_bar(), learn.no_logging():
            fit(learn)
    table = epoch_table(learn)
    return dict(
        weights=torch.cat([p.detach().flatten() for p in learn.model.parameters()]).tolist(),
        batches=learn.witness.seen,
        columns=list(table),
        epochs=len(table),
        losses=table[["train_loss", "valid_loss"]].values.tolist(),
        warnings=sorted({str(w.message)[:40] for w in recorded if w.category is UserWarning}),
    )


CHANGES = {  # option -> result that must change, another value, further options needed
    "max_epochs": ("epochs", 3, {}),
    "batch_size": ("batches", 8, {}),
    "optimizer": ("weights", "rmsprop", {}),
    "preset": ("weights", "sgd_baseline", {}),
    "learning_rate": ("batches", 2e-3, {}),
    "weight_decay": ("weights", 0.5, {}),
    "decay_on": ("weights", "all", dict(weight_decay=0.5)),
    "momentum": ("weights", 0.5, {}),
    "optimizer_options": ("weights", "betas: [0.5, 0.9]", {}),
    "schedule": ("batches", "cosine", {}),
    "warmup": ("batches", 1.0, dict(schedule="cosine")),
    "schedule_options": ("batches", "eta_min: 1e-3", dict(schedule="cosine")),
    "schedule_patience": ("batches", 0, dict(schedule="plateau", max_epochs=4, min_delta=10.0)),
    "loss": ("losses", "focal", {}),
    "label_smoothing": ("losses", 0.4, dict(loss="label_smoothing")),
    "focal_gamma": ("losses", 1.0, dict(loss="focal")),
    "class_weights": ("losses", True, {}),
    "teacher": ("losses", "TEACHER", {}),
    "temperature": ("losses", 1.0, dict(teacher="TEACHER")),
    "alpha": ("losses", 0.1, dict(teacher="TEACHER")),
    "monitor": ("epochs", "accuracy", dict(early_stop=1, max_epochs=4, monitor_mode="min")),
    "monitor_mode": ("epochs", "max", dict(early_stop=1, max_epochs=4)),
    "early_stop": ("epochs", 1, dict(max_epochs=4, min_delta=10.0)),
    "min_delta": ("epochs", 10.0, dict(max_epochs=4, early_stop=1)),
    "save_best": ("files", "accuracy", {}),
    "restore_best": ("weights", True, dict(monitor_mode="max")),
    "checkpoint_every": ("files", 1, {}),
    "keep_last": ("files", 1, dict(checkpoint_every=1)),
    "train_metrics": ("columns", True, {}),
    "text_log": ("files", True, {}),
    "gradient_alert": ("warnings", 1e-6, {}),
    "timing": ("columns", True, {}),
    "unique_tokens": ("columns", 0.1, {}),
    "checkpoint_folder": ("files", "OTHER", dict(save_best="accuracy")),
    "clip": ("weights", 0.01, {}),
    "accumulate": ("weights", 2, {}),
    "precision": ("warnings", "fp16", {}),
    "compile_model": ("warnings", True, {}),
    "gradient_checkpointing": ("forwards", True, {}),
    "deterministic": ("batches", True, {}),
    "averaging": ("weights", "ema", {}),
    "ema_decay": ("weights", 0.5, dict(averaging="ema")),
    "swa_start": ("weights", 0.2, dict(averaging="swa", max_epochs=4)),
    "augment": ("weights", "{noise: {std: 0.1}}", {}),
    "augment_share": ("weights", 0.3, dict(augment="noise")),
    "augment_policy": ("weights", 1, dict(augment="noise, time_shift")),
    "spec_augment": ("weights", True, {}),
    "mixing": ("weights", "cutmix", {}),
    "mixing_alpha": ("weights", 5.0, dict(mixing="mixup")),
    "adversarial": ("weights", 0.1, {}),
    "oversample": ("batches", 3, {}),
    "oversample_threshold": ("batches", 0.5, dict(oversample=3)),
    "progressive": ("batches", "10:1, 20:1", {}),
    "curriculum": ("batches", 0.2, dict(max_epochs=4)),
    "curriculum_until": ("batches", 3.0, dict(curriculum=0.2, max_epochs=4)),
}
ELSEWHERE = {
    "processes",
    "scheduled_sampling",
}  # need a run and a decoder: tested in tests/test_experiment.py


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    "Bundle of a tiny model."
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    model = TinyClassifier(width=8)
    write_json(
        folder / "bundle.json",
        dict(
            model="gcode_ml.training.tiny.TinyClassifier",
            arguments=dict(width=8),
            preprocessing={},
            facts={},
        ),
    )
    save_file(model.state_dict(), folder / "model.safetensors")
    return str(folder)


def counted(monkeypatch):
    "Count the calls of the tiny model's convolutions."
    calls, forward = [], nn.Conv1d.forward
    monkeypatch.setattr(nn.Conv1d, "forward", lambda self, x: calls.append(1) or forward(self, x))
    return calls


@pytest.mark.parametrize("name", sorted(set(TRAINING) - ELSEWHERE))
def test_option_changes_something(name, tmp_path, teacher, monkeypatch):
    "A fit with another value of an option differs in the expected result."
    assert name in CHANGES, f"add {name} to CHANGES"
    monkeypatch.setattr(
        speed, "has_compiler", lambda kind: False
    )  # avoids a slow compilation; a warning is issued instead
    where, value, needs = CHANGES[name]

    def fill(v):
        return teacher if v == "TEACHER" else v

    results = []
    for i, changed in enumerate(({}, {name: value})):
        folder = tmp_path / str(i)
        calls = counted(monkeypatch) if where == "forwards" else []
        given = {
            "checkpoint_folder": str(folder / "a"),
            **{k: fill(v) for k, v in {**needs, **changed}.items()},
        }
        if given["checkpoint_folder"] == "OTHER":
            given["checkpoint_folder"] = str(folder / "b")
        results.append(
            dict(
                observed(**given),
                files=sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()),
                forwards=len(calls),
            )
        )
    assert results[0][where] != results[1][where]


def test_same_options_give_the_same_fit():
    "Two fits with the same options are equal."
    assert observed(augment="noise", mixing="mixup") == observed(augment="noise", mixing="mixup")


def test_every_option_is_named():
    "The lists above cover all options."
    assert set(CHANGES) | ELSEWHERE == set(TRAINING)


@pytest.mark.parametrize("name", sorted(TRAINING))
def test_bad_value_is_one_sentence(name):
    "A value of the wrong type, or outside choices or range, is refused with the option's name."
    p = TRAINING[name]
    bad = (
        [[1, 2]]
        + (["no such choice"] if p.choices else [])
        + ([p.low - 1 if p.type is float else int(p.low) - 1] if p.low is not None else [])
        + ([p.high * 2] if p.high is not None and p.type is float else [])
        + (["maybe"] if p.type is bool else [])
    )
    for value in bad:
        with pytest.raises(InputError) as error:
            training_options({name: value})
        assert str(error.value).startswith(f"parameter: {name}: expected ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given,part",
    [
        (dict(speed=1), "parameter: speed: expected one of"),
        (dict(augment="noise: {loud: 1}"), "augmentation noise: option: expected one of std, p"),
        (dict(augment="{noise: 3}"), "augment: expected settings of noise"),
        (dict(augment="[noise]"), "augment: expected a mapping"),
        (dict(augment="noise", augment_policy=2), "RandomPolicy: n: expected 0 to 1"),
        (dict(schedule_options="speed: 1"), "schedule one_cycle: option: expected one of"),
        (
            dict(optimizer="sgd", optimizer_options="betas: [0.9]"),
            "optimizer sgd: option: expected one of",
        ),
        (dict(progressive="32"), "progressive: expected lengths"),
        (dict(progressive="0:3"), "progressive: expected lengths"),
        (dict(warmup=99.0, schedule="plateau"), ""),
        (dict(monitor="colour", early_stop=1), "monitor: expected one of"),
        (dict(mixing="mixup", teacher="x"), "mixing: expected none with a teacher"),
        (dict(teacher="x"), "x: bundle.json: expected a bundle"),
        (dict(save_best="valid_loss"), "checkpoint_folder: expected a folder"),
    ],
)
def test_bad_combinations(given, part):
    "Options that exclude each other are refused in one sentence, before the fit at the latest."
    with pytest.raises(InputError) as error:
        learn = learner(**given)
        with learn.no_bar(), learn.no_logging():
            fit(learn)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_defaults_are_checked():
    "Defaults of a domain are validated too."
    for bad in (dict(colour=1), dict(clip=-1.0), dict(schedule="slow")):
        with pytest.raises(InputError, match="^default: "):
            training_options({}, **bad)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets(preset):
    "A preset changes only options left at their defaults."
    expected = PRESETS[preset]
    options = training_options(dict(preset=preset), learning_rate=0.5, weight_decay=0.3)
    assert (options.optimizer, options.learning_rate, options.weight_decay) == (
        expected["name"],
        expected["learning_rate"],
        expected["weight_decay"],
    )
    made = options.opt_func()
    assert made.func is OPTIMIZERS[expected["name"]]
    assert made.keywords.get("nesterov", False) == expected.get("nesterov", False)
    mine = training_options(
        dict(preset=preset, learning_rate=0.07, optimizer="rmsprop"), learning_rate=0.5
    )
    assert (mine.optimizer, mine.learning_rate, mine.weight_decay) == (
        "rmsprop",
        0.07,
        expected["weight_decay"],
    )


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules(name):
    "The learning rates of a fit are those of its schedule."
    rates = [lr for lr, *_ in observed(schedule=name, max_epochs=3)["batches"]]
    curve = schedule_curve(name, 1e-2, 3)
    expected = [float(curve(i / len(rates))) for i in range(len(rates))]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_norms_and_biases_do_not_decay():
    "With zero gradients only decaying parameters shrink: no normalisation layer and no bias."

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.group = nn.GroupNorm(2, 4)
            self.root = nn.RMSNorm(4)
            self.batch = nn.BatchNorm1d(4)
            self.layer = nn.LayerNorm(4)
            self.lstm = nn.LSTM(2, 4)
            self.attention = nn.MultiheadAttention(4, 2)
            self.linear = nn.Linear(4, 3)

        def forward(self, x, mask):
            return 0 * sum(p.sum() for p in self.parameters()) + torch.zeros(len(x), 3)

    def shrunk(**training):
        base = tiny_learner()
        net = Net()
        options = training_options(
            training,
            weight_decay=0.5,
            clip=0.0,
            learning_rate=0.1,
            schedule="constant",
            max_epochs=1,
        )
        for p in net.parameters():
            p.data.fill_(1.0)
        learn = options.learner(base.dls, net, options.loss())
        with learn.no_bar(), learn.no_logging():
            fit(learn)
        return {k for k, p in net.named_parameters() if p.data.max() < 1}

    weights = {
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "linear.weight",
    }
    assert shrunk() == weights
    assert shrunk(decay_on="fastai") == weights | {
        "lstm.bias_ih_l0",
        "lstm.bias_hh_l0",
        "attention.in_proj_bias",
    }
    assert len(shrunk(decay_on="all")) == len(list(Net().parameters()))


def test_teacher_of_two_heads(teacher):
    "Each head learns from the head of the teacher with the same name."
    options = training_options(dict(teacher=teacher, alpha=0.6, temperature=2.0))
    loss = MultiTask({"a": options.loss(head="a"), "b": options.loss(head="b")}, {"b": 0.5})
    out = {"a": torch.randn(5, 3), "b": torch.randn(5, 2)}
    target = dict(
        a=torch.tensor([0, 1, 2, 0, 1]),
        b=torch.tensor([0, 1, 1, 0, 0]),
        teacher_a=torch.randn(5, 3),
        teacher_b=torch.randn(5, 2),
    )

    def one(k):
        soft = 4 * nn.functional.kl_div(
            (out[k] / 2).log_softmax(-1),
            (target[f"teacher_{k}"] / 2).softmax(-1),
            reduction="batchmean",
        )
        return 0.6 * soft + 0.4 * nn.functional.cross_entropy(out[k], target[k])

    assert loss(out, target).item() == pytest.approx((one("a") + 0.5 * one("b")).item(), rel=1e-5)
    plain = MultiTask({"a": CrossEntropy(head="a"), "b": CrossEntropy()})
    assert plain(out, target).item() == pytest.approx(
        sum(nn.functional.cross_entropy(out[k], target[k]) for k in "ab").item(), rel=1e-5
    )


def test_class_weights_count(refused):
    "Class weights come from the training labels; without labels they are refused."
    loss = training_options(dict(class_weights=True)).loss([0, 0, 0, 1], 2)
    assert loss.weight.tolist() == pytest.approx([2 / 3, 2])
    assert "class_weights: expected a recipe with class labels" in refused(
        training_options(dict(class_weights=True)).loss
    )


class PowerCut(Callback):
    order = 2000

    def __init__(self, *where):
        self.where = where

    def after_batch(self):
        if (self.epoch, self.iter, self.training) == self.where:
            raise SystemError("power cut")


@pytest.mark.parametrize(
    "given",
    [
        dict(
            averaging="ema",
            ema_decay=0.9,
            mixing="mixup",
            augment="noise, time_warp",
            augment_policy=1,
            early_stop=9,
            save_best="accuracy",
            timing=True,
        ),
        dict(
            accumulate=2,
            clip=0.1,
            schedule="plateau",
            schedule_patience=1,
            adversarial=0.05,
            unique_tokens=0.1,
            checkpoint_every=1,
        ),
        dict(
            averaging="swa",
            swa_start=0.4,
            curriculum=0.3,
            progressive="15:2, 40:1",
            preset="sgd_baseline",
            train_metrics=True,
        ),
    ],
)
@pytest.mark.parametrize("where", [(1, 3, True), (2, 1, False)])
def test_many_options_resume_bit_exactly(tmp_path, given, where):
    "With many options at once, an interrupted fit has the same weights and history."

    def run(folder, *cbs):
        torch.manual_seed(0)
        learn = learner(
            [Snapshot(folder / "fit.safetensors", batches=1), *cbs],
            max_epochs=4,
            checkpoint_folder=str(folder),
            **given,
        )
        with learn.no_bar(), learn.no_logging():
            fit(learn)
        return learn

    whole = run(tmp_path / "a")
    with pytest.raises(SystemError):
        run(tmp_path / "b", PowerCut(*where))
    again = run(tmp_path / "b")
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    assert (
        epoch_table(whole)
        .filter(regex="loss|accuracy")
        .equals(epoch_table(again).filter(regex="loss|accuracy"))
    )


def test_values_of_a_notebook(refused):
    "Options defined in a notebook are collected; objects that are no values are refused."
    assert training_values(dict(clip=1.0, loss="focal", np=torch, x=3)) == dict(
        clip=1.0, loss="focal"
    )
    assert "schedule: expected a value, found function" in refused(
        training_values, dict(schedule=fit)
    )


def with_experiment():
    "Domains with an experiment notebook."
    found = []
    for domain in domain_names():
        try:
            experiment_notebook(domain)
        except InputError:
            continue
        found.append(domain)
    return found


@pytest.mark.parametrize("domain", with_experiment())
def test_notebook_has_the_defaults_of_the_recipe(domain):
    "The parameters cell lists the defaults of the domain, and other options with the shared default."
    defaults = find_domain(domain).defaults
    cell = read_parameters(experiment_notebook(domain), shared=False)
    training_options({}, **defaults)  # they pass their own check
    own = {k: v for k, v in defaults.items() if v != TRAINING[k].default}
    listed = {k: p.default for k, p in cell.items() if k in TRAINING}
    assert {
        k: v
        for k, v in listed.items()
        if v != {**{n: p.default for n, p in TRAINING.items()}, **defaults}[k]
    } == {}
    assert set(own) <= set(listed)
    assert {
        k for k in listed if cell[k].choices and set(cell[k].choices) - set(TRAINING[k].choices)
    } == set()
