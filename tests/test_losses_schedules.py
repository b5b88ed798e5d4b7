"What every loss, optimiser and schedule promises: a finite, falling loss, a gradient for every weight, the same result from the same seed, and a resumed fit equal to the last bit. They are found, not listed."

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
    LossParameters,
    MoreTargets,
    create_optimizer,
    schedule,
    schedule_curve,
    teacher_answers,
)
from gcode_ml.training.tiny import TinyClassifier, TinySequences, tiny_learner

pytestmark = pytest.mark.filterwarnings("ignore")


class TwoTargets(TinySequences):
    "The class, the length, and both once more as the target of one head."

    def batch(self, index):
        x, mask, y = super().batch(index)
        return x, mask, dict(kind=y, length=mask.sum(1) / 40)


class TwoHeads(TinyClassifier):
    "A class and a length."

    def __init__(self, classes=3, **kwargs):
        super().__init__(classes=classes + 1, **kwargs)

    def forward(self, x, mask):
        out = super().forward(x, mask)
        return dict(kind=out[:, :-1], length=out[:, -1])


def teacher():
    torch.manual_seed(5)
    return TinyClassifier(width=8)


def smooth(prediction, target):
    return prediction["length"] - target["kind"] / 3  # some law


def likely(prediction, target):
    return prediction.softmax(-1)[:, 0] - 0.3


def tasks():
    return dict(kind=Focal(), length=Regression("huber"))


EXAMPLES = {  # class in `losses` -> how it is used: loss, whether there are two heads, callbacks
    "CrossEntropy": lambda: (CrossEntropy([1.0, 2.0, 1.0], label_smoothing=0.1), False, []),
    "Focal": lambda: (Focal(3.0, [1.0, 2.0, 1.0], head="kind"), True, []),
    "SupervisedContrastive": lambda: (SupervisedContrastive(0.5), False, []),
    "Distillation": lambda: (Distillation(), False, [MoreTargets(teacher_answers(teacher()))]),
    "Regression": lambda: (Regression("absolute", head="length"), True, []),
    "PhysicsInformed": lambda: (PhysicsInformed(smooth, MultiTask(tasks())), True, []),
    "MultiTask": lambda: (two_tasks(tasks(), 0.7, 0.3), True, []),
    "UncertaintyWeighted": lambda: (
        UncertaintyWeighted(tasks(), regressions=["length"]),
        True,
        [LossParameters()],
    ),
}
NAMED = {n: (lambda n=n: (create_loss(n), False, [])) for n in LOSSES}
ONE_HEAD = {"Focal", "Regression"}  # leave the other head alone, as they should


def found():
    "Every loss class of the page that is not a mere base."
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
    "Stop the fit where a power cut would."

    order = 2000

    def __init__(self, *where):
        self.where = {where}  # a set, which no snapshot keeps

    def after_batch(self):
        if self.training and (self.epoch, self.iter) in self.where:
            raise SystemError("power cut")


def learner(example, *cbs, seed=0, **kwargs):
    "A tiny learner with dropout on one target or two."
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
    "Whether a fit that is interrupted once at each of `cuts`, taken up by new learners, equals the unbroken one; `make(*callbacks)` fits."
    whole = make()
    file = folder / "fit.safetensors"
    for cut in cuts:
        with pytest.raises(SystemError):
            make(Snapshot(file, batches=2), PowerCut(*cut))
    assert file.exists()
    return same(whole, make(Snapshot(file, batches=2)))


def test_every_loss_has_an_example():
    "A new loss cannot be forgotten, nor an example outlive its loss."
    assert found() == set(EXAMPLES)


@pytest.mark.parametrize("name,example", [*EXAMPLES.items(), *NAMED.items()])
def test_loss_in_a_fit(name, example):
    "Finite, smaller after a few epochs, and the same again from the same seed."
    learn = fitted(example, epochs=6)
    values = np.array([v[:2] for v in learn.recorder.values])
    assert np.isfinite(values).all()
    assert values[-1, 1] < values[0, 1]
    assert same(learn, fitted(example, epochs=6))
    assert not same(learn, fitted(example, epochs=6, seed=1))


@pytest.mark.parametrize("name,example", [*EXAMPLES.items(), *NAMED.items()])
def test_gradient_reaches_everything(name, example):
    "Every weight of the model gets a gradient, every parameter of the loss too, and `none` gives a value an item with the same mean."
    learn = learner(example)
    loss = learn.loss_func
    learn.model.eval()
    x, mask, y = learn.dls.train.dataset.batch(np.arange(16))
    for cb in learn.cbs.filter(lambda cb: isinstance(cb, MoreTargets)):
        y = dict(target=y, **cb.more(x, mask))
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
    "Stopped three times, a fit ends in the same weights, learned ones of the loss included."
    assert resumes(tmp_path, lambda *cbs: fitted(example, *cbs))


def test_accumulated_gradients_of_a_loss(tmp_path):
    "Interrupted while gradients of three batches are gathered, learned weights get all three."
    assert resumes(
        tmp_path,
        lambda *cbs: fitted(EXAMPLES["UncertaintyWeighted"], GradientAccumulation(48), *cbs),
        ((1, 1), (1, 3), (2, 4)),
    )


def test_lost_state_is_found(tmp_path, monkeypatch):
    "The comparison above sees learned weights, or averages of an optimiser, that are not put back."

    def make(*cbs):
        return fitted(EXAMPLES["UncertaintyWeighted"], *cbs)

    with monkeypatch.context() as m:
        m.setattr(UncertaintyWeighted, "load_state_dict", lambda self, state: None)
        assert not resumes(tmp_path, make)
    (tmp_path / "fit.safetensors").unlink()
    monkeypatch.setattr(Optimizer, "load_state_dict", lambda self, state: None)
    assert not resumes(tmp_path, make)


@pytest.mark.parametrize("measure", ["squared", "absolute", "huber"])
def test_odd_batches(measure):
    "A batch of one, without a target, or of a single class costs a finite amount, with a finite gradient."
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


def test_learned_weights(tmp_path):
    "They move, without decay, with a clipped gradient as well, and `lr_find` leaves them; `validate` works before any fit."
    example = EXAMPLES["UncertaintyWeighted"]
    learn = fitted(example, GradientClip(1.0), wd=0.5)
    assert (learn.loss_func.log_variances.abs() > 1e-3).all()
    assert len(learn.opt.param_lists) == 2
    fresh = learner(example, path=tmp_path)
    with fresh.no_bar(), fresh.no_logging():
        assert np.isfinite(fresh.validate()[0])
        fresh.lr_find(num_it=12, show_plot=False)
    assert not fresh.loss_func.log_variances.any()
    still = fitted(lambda: (*example()[:2], []))  # without the callback nobody trains them
    assert not still.loss_func.log_variances.any()


def test_metrics_see_the_batch():
    "What is added for the loss alone is gone when a metric looks; the teacher is never trained."
    model = teacher()
    before = [p.clone() for p in model.parameters()]
    learn = fitted(
        lambda: (Distillation(), False, [MoreTargets(teacher_answers(model))]), metrics=accuracy
    )
    *_, valid_loss, share = learn.recorder.values[-1]
    assert 0 <= share <= 1
    assert all(map(torch.equal, before, model.parameters()))
    losses_ = learn.get_preds(dl=learn.dls.valid, reorder=False, with_loss=True)[2]
    assert losses_.shape == (48,)
    assert losses_.mean().item() == pytest.approx(valid_loss, rel=1e-4)


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
    (lambda: PhysicsInformed(likely, physics_weight=-1), "physics_weight"),
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
def test_bad_input(refused, make, sentence):
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
    "A falling loss, the same again, and the same after interruptions; a preset brings its own learning rate."
    options = ALL_OPTIMIZERS[name]

    def make(*cbs):
        return fitted(plain, *cbs, opt_func=create_optimizer(**options), metrics=accuracy)

    learn = make()
    assert learn.recorder.values[-1][1] < learn.recorder.values[0][1]
    assert learn.recorder.lrs[0] == options.get("learning_rate", 1e-2)
    assert same(learn, make())
    assert resumes(tmp_path, make)


STARTS = {"plateau": dict(patience=0, min_delta=0.2)}  # falls within four epochs
CASES = [(name, warmup) for name in SCHEDULES for warmup in ({}, dict(warmup=1))]


@pytest.mark.parametrize("name,warmup", CASES)
def test_schedule(tmp_path, name, warmup):
    "A falling loss, learning rates of the drawn curve and never above the largest, the same after interruptions."
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


def test_plateau_forgets_nothing(tmp_path):
    "Where the learning rate falls does not depend on being interrupted in the very epoch."

    def make(*cbs):
        return fitted(
            plain,
            *cbs,
            schedule_cb=schedule("plateau", 1e-2, patience=1, factor=0.1, min_delta=0.15),
            epochs=8,
        )

    lrs = make().recorder.lrs[::6]
    falls = [i for i in range(1, 8) if lrs[i] < lrs[i - 1]]
    assert falls
    assert resumes(
        tmp_path, make, [(i - 1, 5) for i in falls] + [(i, b) for i in falls[-1:] for b in (0, 3)]
    )


def test_names_of_a_former_page():
    "The first three schedules are what they were."
    share = np.linspace(0, 1, 9)
    from fastai.callback.schedule import SchedCos, SchedNo, combined_cos

    for name, old in dict(
        constant=SchedNo(1e-3, 1e-3),
        cosine=SchedCos(1e-3, 1e-6),
        one_cycle=combined_cos(0.25, 1e-3 / 25, 1e-3, 1e-3 / 1e5),
    ).items():
        assert [SCHEDULES[name](1e-3)(s) for s in share] == [old(s) for s in share]


class Group(nn.Module):
    "Norms and biases at every depth."

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
    "With gradients of zero only weights that multiply move, and stay so after a snapshot's state is read."
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
    "Weights, optimiser and an unfinished snapshot are as before, and the schedule does not interfere."
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
