"""Contract of every loss, optimiser and schedule: a finite, decreasing loss, gradients for all
weights, reproducibility and bit-exact resumption. They are discovered, not listed."""

import inspect

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.metrics import accuracy
from fastai.optimizer import Optimizer
from torch import nn

from gcode_ml.data.batch import dataloaders
from gcode_ml.lab.snapshot import Snapshot
from gcode_ml.training import losses
from gcode_ml.training.losses import (
    LOSSES,
    CrossEntropy,
    Distillation,
    Focal,
    MultiTask,
    PhysicsInformed,
    Regression,
    SupervisedContrastive,
    UncertaintyWeighted,
    class_weights,
    create_loss,
    two_tasks,
)
from gcode_ml.training.schedules import (
    OPTIMIZERS,
    PRESETS,
    SCHEDULES,
    ExtraTargets,
    LossParameters,
    create_optimizer,
    schedule,
    schedule_curve,
    teacher_logits,
)
from gcode_ml.training.tiny import TinyClassifier, TinySequences, tiny_learner

pytestmark = pytest.mark.filterwarnings("ignore")


class TwoTargets(TinySequences):
    "Two targets: class and length."

    def batch(self, index):
        x, mask, y = super().batch(index)
        return x, mask, dict(kind=y, length=mask.sum(1) / 40)


class TwoHeads(TinyClassifier):
    "Two heads: class and length."

    def __init__(self, classes=3, **kwargs):
        super().__init__(classes=classes + 1, **kwargs)

    def forward(self, x, mask):
        out = super().forward(x, mask)
        return dict(kind=out[:, :-1], length=out[:, -1])


def teacher():
    torch.manual_seed(5)
    return TinyClassifier(width=8)


def residual(prediction, target):
    return prediction["length"] - target["kind"] / 3  # an arbitrary law


def one_head_residual(prediction, target):
    return prediction.softmax(-1)[:, 0] - 0.3


def tasks():
    return dict(kind=Focal(), length=Regression("huber"))


EXAMPLES = {  # class in `losses` -> loss, whether the model has two heads, callbacks
    "CrossEntropy": lambda: (CrossEntropy([1.0, 2.0, 1.0], label_smoothing=0.1), False, []),
    "Focal": lambda: (Focal(3.0, [1.0, 2.0, 1.0], head="kind"), True, []),
    "SupervisedContrastive": lambda: (SupervisedContrastive(0.5), False, []),
    "Distillation": lambda: (Distillation(), False, [ExtraTargets(teacher_logits(teacher()))]),
    "Regression": lambda: (Regression("absolute", head="length"), True, []),
    "PhysicsInformed": lambda: (PhysicsInformed(residual, MultiTask(tasks())), True, []),
    "MultiTask": lambda: (two_tasks(tasks(), 0.7, 0.3), True, []),
    "UncertaintyWeighted": lambda: (
        UncertaintyWeighted(tasks(), regressions=["length"]),
        True,
        [LossParameters()],
    ),
}
NAMED = {n: (lambda n=n: (create_loss(n), False, [])) for n in LOSSES}
ONE_HEAD = {"Focal", "Regression"}  # no gradient for the other head


def found():
    "Every loss class of the page except base classes."
    return {
        n
        for n, c in vars(losses).items()
        if inspect.isclass(c)
        and issubclass(c, nn.Module)
        and c.__module__ == losses.__name__
        and not n.startswith("_")
        and n != "Loss"
    }


class PowerCut(Callback):
    "Interrupt the fit at given epochs and batches."

    order = 2000

    def __init__(self, *where):
        self.where = {where}  # a snapshot does not save a set

    def after_batch(self):
        if self.training and (self.epoch, self.iter) in self.where:
            raise SystemError("power cut")


def learner(example, *cbs, seed=0, **kwargs):
    "Tiny learner with dropout and one or two targets."
    loss, two, own = example()
    learn = tiny_learner(loss_func=loss, cbs=[*own, *cbs], seed=seed, **kwargs)
    torch.manual_seed(seed)
    learn.model = (TwoHeads if two else TinyClassifier)(dropout=0.2)
    if two:
        learn.dls = dataloaders(
            TwoTargets(96, seed=seed), TwoTargets(48, seed=seed + 1000), 16, seed=seed
        )
    return learn


def fitted(example, *cbs, epochs=4, schedule_cb=None, **kwargs):
    learn = learner(example, *cbs, **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, cbs=schedule_cb)
    return learn


def weights(learn):
    return [
        *learn.model.state_dict().values(),
        *(learn.loss_func.state_dict().values() if isinstance(learn.loss_func, nn.Module) else []),
    ]


def same(a, b):
    return (
        all(map(torch.equal, weights(a), weights(b)))
        and a.recorder.lrs == b.recorder.lrs
        and list(map(list, a.recorder.values)) == list(map(list, b.recorder.values))
    )


def resumes(folder, make, cuts=((1, 2), (1, 5), (3, 0))):
    "Whether a fit `make(*callbacks)` interrupted at each of `cuts` equals an uninterrupted one."
    whole = make()
    file = folder / "fit.safetensors"
    for cut in cuts:
        with pytest.raises(SystemError):
            make(Snapshot(file, batches=2), PowerCut(*cut))
    assert file.exists()
    return same(whole, make(Snapshot(file, batches=2)))


def test_every_loss_has_an_example():
    "Every loss has an example, and every example its loss."
    assert found() == set(EXAMPLES)


@pytest.mark.parametrize("name,example", [*EXAMPLES.items(), *NAMED.items()])
def test_loss_decreases_reproducibly(name, example):
    "The loss is finite and decreases, and the same seed gives the same fit."
    learn = fitted(example, epochs=6)
    values = np.array([v[:2] for v in learn.recorder.values])
    assert np.isfinite(values).all()
    assert values[-1, 1] < values[0, 1]
    assert same(learn, fitted(example, epochs=6))
    assert not same(learn, fitted(example, epochs=6, seed=1))


@pytest.mark.parametrize("name,example", [*EXAMPLES.items(), *NAMED.items()])
def test_gradient_reaches_everything(name, example):
    "All parameters get a gradient, and `none` gives one value per item with the same mean."
    learn = learner(example)
    loss = learn.loss_func
    learn.model.eval()
    x, mask, y = learn.dls.train.dataset.batch(np.arange(16))
    for cb in learn.cbs.filter(lambda cb: isinstance(cb, ExtraTargets)):
        y = dict(target=y, **cb.extra(x, mask))
    value = loss(learn.model(x, mask), y)
    value.backward()
    silent = [
        n
        for n, p in [*learn.model.named_parameters(), *loss.named_parameters()]
        if p.grad is None or not p.grad.any()
    ]
    rows = learn.model.head[1].weight.grad.abs().sum(1) > 0
    assert silent == []
    assert value.dim() == 0
    assert rows.all() or (
        name in ONE_HEAD and rows.tolist() == [name == "Focal"] * 3 + [name == "Regression"]
    )
    loss.reduction = "none"
    items = loss(learn.model(x, mask), y)
    assert items.shape == (16,)
    assert getattr(loss, "weight", None) is not None or torch.allclose(items.mean(), value)


@pytest.mark.parametrize("name,example", [*EXAMPLES.items()])
def test_loss_resumes(tmp_path, name, example):
    "A fit interrupted three times has the same final weights, also those of the loss."
    assert resumes(tmp_path, lambda *cbs: fitted(example, *cbs))


def test_accumulated_gradients_of_a_loss(tmp_path):
    "Gradients of the loss parameters survive an interruption during accumulation."
    assert resumes(
        tmp_path,
        lambda *cbs: fitted(EXAMPLES["UncertaintyWeighted"], GradientAccumulation(48), *cbs),
        ((1, 1), (1, 3), (2, 4)),
    )


def test_lost_state_is_detected(tmp_path, monkeypatch):
    "`resumes` detects loss parameters or optimiser state that are not restored."

    def make(*cbs):
        return fitted(EXAMPLES["UncertaintyWeighted"], *cbs)

    with monkeypatch.context() as m:
        m.setattr(UncertaintyWeighted, "load_state_dict", lambda self, state: None)
        assert not resumes(tmp_path, make)
    (tmp_path / "fit.safetensors").unlink()
    monkeypatch.setattr(Optimizer, "load_state_dict", lambda self, state: None)
    assert not resumes(tmp_path, make)


@pytest.mark.parametrize("measure", ["squared", "absolute", "huber"])
def test_degenerate_batches_have_finite_loss(measure):
    "Batches of one item, without a target or of one class have a finite loss and gradient."
    out = torch.randn(1, 3, requires_grad=True)
    for loss, target in [
        (CrossEntropy(), torch.tensor([-100])),
        (Focal(0.5), torch.tensor([2])),
        (SupervisedContrastive(), torch.tensor([1])),
        (Regression(measure), torch.full((1, 3), torch.nan)),
        (Distillation(), dict(target=torch.tensor([-100]), teacher=torch.zeros(1, 3))),
    ]:
        out.grad = None
        value = loss(out, target)
        value.backward()
        assert value.isfinite()
        assert out.grad.isfinite().all()


def test_learned_task_weights(tmp_path):
    "Task weights are trained without decay, and restored by `lr_find`."
    example = EXAMPLES["UncertaintyWeighted"]
    learn = fitted(example, GradientClip(1.0), wd=0.5)
    assert (learn.loss_func.log_variances.abs() > 1e-3).all()
    assert len(learn.opt.param_lists) == 2
    fresh = learner(example, path=tmp_path)
    with fresh.no_bar(), fresh.no_logging():
        assert np.isfinite(fresh.validate()[0])
        fresh.lr_find(num_it=12, show_plot=False)
    assert not fresh.loss_func.log_variances.any()
    still = fitted(lambda: (*example()[:2], []))  # not trained without the callback
    assert not still.loss_func.log_variances.any()


def test_metrics_see_the_original_target():
    "Metrics see the original target, and the teacher is not trained."
    model = teacher()
    before = [p.clone() for p in model.parameters()]
    learn = fitted(
        lambda: (Distillation(), False, [ExtraTargets(teacher_logits(model))]), metrics=accuracy
    )
    *_, valid_loss, score = learn.recorder.values[-1]
    assert 0 <= score <= 1
    assert all(map(torch.equal, before, model.parameters()))
    item_losses = learn.get_preds(dl=learn.dls.valid, reorder=False, with_loss=True)[2]
    assert item_losses.shape == (48,)
    assert item_losses.mean().item() == pytest.approx(valid_loss, rel=1e-4)


BAD = [
    (
        lambda: create_loss("hinge"),
        "loss: name: expected one of cross_entropy, label_smoothing, focal, supervised_contrastive, found 'hinge'",
    ),
    (lambda: create_loss("focal", alpha=1), "loss focal: option: expected one of gamma, weight"),
    (lambda: Focal(-1), "gamma"),
    (lambda: Focal(float("nan")), "gamma"),
    (lambda: CrossEntropy(label_smoothing=1.0), "label_smoothing"),
    (lambda: SupervisedContrastive(0), "temperature"),
    (lambda: Distillation(alpha=2), "alpha"),
    (lambda: CrossEntropy(reduction="sum"), "reduction"),
    (lambda: two_tasks(dict(kind=Focal())), "expected two, found 1"),
    (lambda: PhysicsInformed(one_head_residual, physics_weight=-1), "physics_weight"),
    (lambda: MultiTask(tasks(), dict(kind=-1)), "weights"),
    (lambda: class_weights([-1, 0], 2), "found -1 to 0"),
    (lambda: class_weights([], 2), "found none"),
    (lambda: create_optimizer("lion"), "expected one of adamw, sgd, rmsprop, found 'lion'"),
    (
        lambda: create_optimizer("adamw", momentum=0.9),
        "optimizer adamw: option: expected one of weight_decay, betas, eps",
    ),
    (lambda: create_optimizer("sgd", -1), "learning_rate"),
    (lambda: create_optimizer("sgd", weight_decay=-1), "weight_decay"),
    (lambda: schedule("step", 1e-3), "found 'step'"),
    (lambda: schedule("cosine", float("inf")), "learning_rate"),
    (
        lambda: schedule("cosine", 1e-3, eta=0),
        "schedule cosine: option: expected one of eta_min, warmup",
    ),
    (lambda: schedule_curve("cosine", 1e-3, 4, warmup=4), "warmup"),
    (lambda: schedule_curve("cosine", 1e-3, 4, warmup=-1), "warmup"),
]


@pytest.mark.parametrize("make,sentence", BAD)
def test_bad_input_is_refused(refused, make, sentence):
    "The error message names the mistake."
    assert sentence in refused(make)


def plain():
    return None, False, []


ALL_OPTIMIZERS = {
    **{n: dict(name=n, weight_decay=0.01) for n in OPTIMIZERS},
    "momentum": dict(name="sgd", momentum=0.9, decoupled=True),
    **PRESETS,
}


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_optimizer(tmp_path, name):
    "The loss decreases reproducibly, also after interruptions; a preset sets its learning rate."
    options = ALL_OPTIMIZERS[name]

    def make(*cbs):
        return fitted(plain, *cbs, opt_func=create_optimizer(**options), metrics=accuracy)

    learn = make()
    assert learn.recorder.values[-1][1] < learn.recorder.values[0][1]
    assert learn.recorder.lrs[0] == options.get("learning_rate", 1e-2)
    assert same(learn, make())
    assert resumes(tmp_path, make)


STARTS = {"plateau": dict(patience=0, min_delta=0.2)}  # reduces within four epochs
CASES = [(name, warmup) for name in SCHEDULES for warmup in ({}, dict(warmup=1))]


@pytest.mark.parametrize("name,warmup", CASES)
def test_schedule(tmp_path, name, warmup):
    "Learning rates follow the curve, the loss decreases, also after interruptions."
    options = {**STARTS.get(name, {}), **warmup}

    def make(*cbs):
        return fitted(
            plain,
            *cbs,
            schedule_cb=schedule(name, 1e-2, **options),
            opt_func=create_optimizer("adamw"),
            epochs=5,
        )

    learn = make()
    lrs = np.array(learn.recorder.lrs)
    values = [v[1] for v in learn.recorder.values]
    curves = [
        schedule_curve(
            name, 1e-2, 5, **options, **(dict(values=values[:n]) if name == "plateau" else {})
        )
        for n in range(5)
    ]
    np.testing.assert_allclose(
        lrs, [curves[i // 6](i / 30) for i in range(30)], rtol=1e-5, atol=1e-9
    )
    assert values[-1] < values[0]
    assert lrs.max() <= 1e-2 * (1 + 1e-6)
    assert (lrs >= 0).all()
    assert not warmup or lrs[0] == 0
    assert name != "plateau" or lrs[-1] < 5e-3
    assert resumes(tmp_path, make)


def test_plateau_resumes_at_a_reduction(tmp_path):
    "An interruption in the epoch of a reduction does not change the learning rates."

    def make(*cbs):
        return fitted(
            plain,
            *cbs,
            schedule_cb=schedule("plateau", 1e-2, patience=1, factor=0.1, min_delta=0.15),
            epochs=8,
        )

    lrs = make().recorder.lrs[::6]
    reductions = [i for i in range(1, 8) if lrs[i] < lrs[i - 1]]
    assert reductions
    assert resumes(
        tmp_path,
        make,
        [(i - 1, 5) for i in reductions] + [(i, b) for i in reductions[-1:] for b in (0, 3)],
    )


def test_schedules_equal_those_of_fastai():
    "Three schedules equal those of fastai."
    progress = np.linspace(0, 1, 9)
    from fastai.callback.schedule import SchedCos, SchedNo, combined_cos

    for name, fastai_curve in dict(
        constant=SchedNo(1e-3, 1e-3),
        cosine=SchedCos(1e-3, 1e-6),
        one_cycle=combined_cos(0.25, 1e-3 / 25, 1e-3, 1e-3 / 1e5),
    ).items():
        assert [SCHEDULES[name](1e-3)(p) for p in progress] == [fastai_curve(p) for p in progress]


class Group(nn.Module):
    "Normalisation layers and biases at several depths."

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv1d(1, 2, 3),
            nn.BatchNorm1d(2),
            nn.Sequential(
                nn.InstanceNorm1d(2, affine=True), nn.ModuleList([nn.LayerNorm(3), nn.Linear(3, 2)])
            ),
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_decay_on_bias_and_norm(name):
    "With zero gradients only decaying weights change, also after loading the optimiser state."
    model = Group()
    learn = tiny_learner(model=model, opt_func=create_optimizer(name, 0.1, weight_decay=0.5))
    learn.create_opt()
    for p in model.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    learn.opt.step()
    learn.opt.load_state_dict(learn.opt.state_dict())
    learn.opt.step()
    assert {n for n, p in model.named_parameters() if (p != 1).any()} == {
        "inner.0.weight",
        "inner.2.1.1.weight",
    }


def test_lr_find_is_silent(tmp_path):
    "`lr_find` changes neither weights, optimiser nor snapshot, and ignores the schedule."
    learn = fitted(plain, Snapshot(tmp_path / "fit.safetensors"), path=tmp_path, epochs=2)
    learn.add_cb(schedule("plateau", 1e-2))
    before = weights(learn)
    before = [w.clone() for w in before]
    state = str(learn.opt.state_dict())
    file = (tmp_path / "fit.safetensors").read_bytes()
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=30, show_plot=False)
    assert all(map(torch.equal, before, weights(learn)))
    assert str(learn.opt.state_dict()) == state
    assert (tmp_path / "fit.safetensors").read_bytes() == file
    assert learn.recorder.lrs[0] == pytest.approx(1e-7)
    assert learn.recorder.lrs == sorted(learn.recorder.lrs)
