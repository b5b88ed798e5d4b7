"Distillation, physical laws, curricula and scheduled sampling, each compared with its definition."

import json

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.metrics import accuracy
from torch import nn
from torch.nn import functional as F

from gcode_ml.data.batch import BatchLoader, dataloaders
from gcode_ml.fingerprint.models import GCodeFingerprinter, LineLoss, token_scores
from gcode_ml.lab.snapshot import Snapshot
from gcode_ml.training.callbacks import epoch_table
from gcode_ml.training.curriculum import (
    DECAYS,
    PACINGS,
    Curriculum,
    ScheduledSampling,
    difficulty_order,
    item_losses,
    teacher_forcing,
)
from gcode_ml.training.distillation import (
    Distill,
    check_classes,
    compare,
    latencies,
    model_size,
)
from gcode_ml.training.losses import CrossEntropy, Distillation, PhysicsInformed
from gcode_ml.training.mixing import MixUp
from gcode_ml.training.physics import PhysicsLoss, ramp
from gcode_ml.training.schedules import ExtraTargets, teacher_logits
from gcode_ml.training.tiny import TinyClassifier, TinySequences, tiny_learner

pytestmark = pytest.mark.filterwarnings("ignore")


def model(seed=5, **kwargs):
    torch.manual_seed(seed)
    return TinyClassifier(**kwargs)


def fit(*cbs, epochs=2, data=None, **kwargs):
    learn = tiny_learner(
        **{
            "cbs": list(cbs),
            "metrics": accuracy,
            "loss_func": CrossEntropy(),
            "model": model(),
            **kwargs,
        }
    )
    if data:
        learn.dls = dataloaders(data(96), data(48, seed=1000), 16)
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs)
    return learn


def weights(learn):
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


class FirstGradients(Callback):
    "Record the gradients of the first training batch."

    order, run_valid = 900, False

    def after_backward(self):
        if "gradients" not in vars(self):
            self.gradients = [p.grad.clone() for p in self.model.parameters()]


def gradients(*cbs, **kwargs):
    return fit(*cbs, FirstGradients(), epochs=1, **kwargs).first_gradients.gradients


# -- distillation


@pytest.mark.parametrize("alpha,temperature", [(0.7, 4.0), (0.0, 2.0), (1.0, 1.0)])
def test_distill_callback_equals_the_loss(alpha, temperature):
    "With cross entropy the callback equals the loss; the validation loss is unchanged."
    teacher = model(9, width=8)
    a = gradients(Distill(teacher, temperature, alpha))
    b = gradients(ExtraTargets(teacher_logits(teacher)), loss_func=Distillation(temperature, alpha))
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    learn = fit(Distill(teacher, temperature, alpha))
    assert learn.validate()[0] == pytest.approx(
        F.cross_entropy(*learn.get_preds(act=lambda x: x)).item(), rel=1e-4
    )


class Steps(TinySequences):
    "Class at every step, -100 at padded steps, as one of two targets."

    def batch(self, index):
        x, mask, y = super().batch(index)
        return x, mask, dict(kind=torch.where(mask, y[:, None], -100), length=mask.sum(1))


class StepHead(TinyClassifier):
    "Logits at every step."

    def forward(self, x, mask):
        for conv in self.convs:
            x = torch.relu(conv((x * mask.unsqueeze(-1)).mT)).mT
        return dict(kind=self.head(x))


def test_distill_heads_and_padding():
    "With a named head, ignored labels are excluded from both terms."
    torch.manual_seed(3)
    teacher = StepHead(width=8)
    student = StepHead()
    loss = CrossEntropy(head="kind")
    made = dict(model=student, loss_func=loss, metrics=None, data=Steps)
    found = gradients(Distill(teacher, 2.0, 0.5, head="kind"), **made)
    student = StepHead()
    torch.manual_seed(3)
    StepHead(width=8)
    student = StepHead()
    dls = dataloaders(Steps(96), Steps(48), 16)
    x, mask, y = next(iter(dls.train))
    s = student(x, mask)["kind"]
    t = teacher(x, mask)["kind"]
    real = y["kind"] >= 0
    soft = 4 * F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="none").sum(-1)
    (0.5 * soft[real].mean() + 0.5 * F.cross_entropy(s[real], y["kind"][real])).backward()
    for p, q in zip(found, student.parameters()):
        torch.testing.assert_close(p, q.grad, rtol=1e-3, atol=1e-6)


def test_teacher_is_frozen(tmp_path):
    "The teacher is frozen, in evaluation mode, and not part of a snapshot."
    teacher = model(9, width=64, dropout=0.5)
    before = [p.clone() for p in teacher.parameters()]
    fit(Distill(teacher), Snapshot(tmp_path / "a.safetensors"))
    fit(Snapshot(tmp_path / "b.safetensors"))
    assert all(map(torch.equal, before, teacher.parameters()))
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert (tmp_path / "a.safetensors").stat().st_size < (
        tmp_path / "b.safetensors"
    ).stat().st_size + 2000


def test_teacher_gets_mixed_inputs():
    "Teacher and student get the same mixed inputs; with alpha=1 labels have no effect."

    class Shuffled(TinySequences):
        def batch(self, index):
            x, mask, y = super().batch(index)
            return x, mask, (y + 1) % 3

    teacher = model(9)
    a, b = (
        weights(fit(MixUp(1.0), Distill(teacher, alpha=1.0), data=data))
        for data in (TinySequences, Shuffled)
    )
    assert torch.allclose(a, b, atol=1e-6)
    assert not torch.equal(a, weights(fit(Distill(teacher, alpha=1.0), data=TinySequences)))


BAD = [
    (lambda: fit(Distill(model(classes=4))), "for the classes of the student, found [16, 4]"),
    (
        lambda: check_classes("abc", "acb"),
        "Distill: class 1: expected c, as for the student, found b for the teacher",
    ),
    (
        lambda: Distill(model(), classes=["a", "b", "c"], teacher_classes=["a", "b"]),
        "expected 3, as for the student, found 2 for the teacher",
    ),
    (lambda: Distill(model(), temperature=0), "temperature"),
    (lambda: Distill(model(), alpha=2), "alpha"),
    (
        lambda: compare(dict(a=model()), TinySequences(8), items=5),
        "items: expected at least 20, found 5",
    ),
    (
        lambda: compare(dict(a=model(), b=model(classes=2)), TinySequences(8)),
        "found 3 for a, 2 for b",
    ),
    (lambda: PhysicsLoss(law, -1), "weight"),
    (lambda: PhysicsLoss(law, rise=float("nan")), "rise"),
    (lambda: PhysicsLoss(law, delay=float("inf")), "delay"),
    (
        lambda: fit(PhysicsLoss(lambda p, *_: p.argmax(-1).float())),
        "residual: expected a result with a gradient, found one without",
    ),
    (lambda: Curriculum(start=0), "start"),
    (lambda: Curriculum(until=-1), "until"),
    (lambda: Curriculum(pacing="fast"), "expected one of linear, root, exponential, found 'fast'"),
    (lambda: Curriculum("size"), "difficulty: expected one of length, found 'size'"),
    (
        lambda: fit(Curriculum(np.zeros(3))),
        "difficulty: expected 96 values, one per training item, found 3",
    ),
    (lambda: fit(Curriculum(groups=np.zeros(3))), "groups: expected 96 values"),
    (lambda: fit(Curriculum(np.full(96, np.inf))), "difficulty: expected finite numbers"),
    (
        lambda: BatchLoader(TinySequences(8)).restrict([]),
        "at least one that takes part, found none",
    ),
    (lambda: ScheduledSampling("fast"), "found 'fast'"),
    (lambda: ScheduledSampling(k=-1.0), "k: expected a positive number"),
    (lambda: ScheduledSampling("inverse_sigmoid", 0.5), "at least 1"),
    (lambda: fit(ScheduledSampling(start=-1)), "key: expected inputs with names, found 'tokens'"),
]


@pytest.mark.parametrize("make,sentence", BAD)
def test_bad_input_is_refused(refused, make, sentence):
    "The error message names the mistake."
    assert sentence in refused(make)


def test_student_is_not_its_teacher(refused):
    "Refused whether the callback is given to the learner or to the fit."
    same = model()
    assert "a model other than the student" in refused(fit, Distill(same), model=same)
    learn = fit()
    cb = Distill(learn.model)
    assert "a model other than the student" in refused(learn.fit, 1, cbs=cb)


def test_compare():
    "Sizes, accuracies and times are correct; modes and threads are restored."
    a = model(width=4)
    b = fit(epochs=6).model.train()
    data = TinySequences(60, seed=7)
    before = torch.get_num_threads()
    table = compare(dict(small=a, large=b), BatchLoader(data, 16), items=20)
    assert a.training
    assert b.training
    assert torch.get_num_threads() == before
    assert table.parameters.tolist() == [sum(p.numel() for p in m.parameters()) for m in (a, b)]
    x, mask, y = data.batch(np.arange(60))
    for fraction, m in zip(table.accuracy, (a, b)):
        assert fraction == (m.eval()(x, mask).argmax(-1) == y).float().mean()
    assert (table.latency_ms > 0).all()
    assert (table.latency_ms <= table.latency_p95_ms).all()
    assert (table.latency_p95_ms <= table.latency_p99_ms).all()
    assert model_size(a)[1] == table.size_mb[0] < table.size_mb[1]


def test_compare_counts_labels():
    "Padded steps do not count as labels."
    torch.manual_seed(0)
    data = Steps(10)
    assert compare(dict(m=StepHead()), data, head="kind").labels[0] == data.lengths.sum()


def test_latencies_are_of_the_model():
    "A model that sleeps has a correspondingly larger latency."

    class Slow(TinyClassifier):
        def forward(self, x, mask):
            import time

            time.sleep(0.003)
            assert len(x) == 1
            assert torch.get_num_threads() == 1
            return super().forward(x, mask)

    times = latencies(dict(fast=model(), slow=Slow()), TinySequences(4), 10)
    assert times.shape == (10, 2)
    assert (times.slow >= 3).all()
    assert times.fast.median() < times.slow.median()


# -- physical laws


def law(prediction, target, inputs, mask):
    return prediction.softmax(-1)[:, 0] - 0.3


def test_physics_callback_equals_the_loss():
    "The callback equals the physics-informed loss; the validation loss excludes the penalty."
    both = PhysicsInformed(lambda p, t: law(p, t, None, None), CrossEntropy(), 1.0, 0.5)
    for p, q in zip(gradients(PhysicsLoss(law, 0.5)), gradients(loss_func=both)):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-7)
    learn = fit(PhysicsLoss(law, 0.5))
    valid_loss = learn.recorder.values[-1][1]
    out, y = learn.get_preds(act=lambda x: x)
    assert valid_loss == pytest.approx(F.cross_entropy(out, y).item(), rel=1e-4)
    assert not torch.equal(weights(learn), weights(fit()))
    assert torch.equal(weights(fit(PhysicsLoss(law, 0.0))), weights(fit()))


def test_physics_rows():
    "The history records weight, penalty and its fraction of the loss."
    table = epoch_table(fit(PhysicsLoss(law, 0.5, delay=1, rise=2), epochs=4))
    assert table.physics_weight.tolist() == pytest.approx(
        [
            0,
            np.mean([0.5 * i / 12 for i in range(1, 6)]),
            np.mean([0.5 * (6 + i) / 12 for i in range(6)]),
            0.5,
        ]
    )  # batches with weight 0 are excluded
    assert np.isnan(table.physics_loss[0])
    assert (table.physics_loss[1:] > 0).all()
    assert table.physics_share[0] == 0
    assert table.physics_share[1:].between(0, 1).all()
    assert json.dumps([ramp(e, 1, 2) for e in (0, 1, 2, 3, 9)]) == "[0.0, 0.0, 0.5, 1.0, 1.0]"


def test_physics_counts_real_steps():
    "A residual per step is averaged over real steps; padded steps have no effect."

    def at_steps(padding):
        return lambda prediction, target, inputs, mask: torch.where(
            mask, prediction.softmax(-1)[:, :1] * inputs[..., 0], padding
        )

    a, b = (gradients(PhysicsLoss(at_steps(p), 2.0)) for p in (0.0, 1e3))
    assert all(map(torch.equal, a, b))
    net = model()
    dls = tiny_learner().dls
    x, mask, y = next(iter(dls.train))
    out = net(x, mask)
    (
        F.cross_entropy(out, y) + 2 * ((out.softmax(-1)[:, :1] * x[..., 0]) ** 2)[mask].mean()
    ).backward()
    for p, q in zip(a, net.parameters()):
        torch.testing.assert_close(p, q.grad, rtol=1e-4, atol=1e-6)


def test_penalty_without_square():
    "With `square=False` the residual itself is the penalty."
    a = gradients(PhysicsLoss(lambda p, *_: law(p, *_) ** 2, 0.5, square=False))
    assert all(torch.allclose(p, q) for p, q in zip(a, gradients(PhysicsLoss(law, 0.5))))


# -- curricula


class Seen(Callback):
    "Record lengths and labels of the training items of each epoch."

    run_valid = False

    def before_fit(self):
        self.lengths, self.labels = [], []

    def before_train(self):
        self.lengths.append([])
        self.labels.append([])

    def before_batch(self):
        self.lengths[-1] += self.xb[1].sum(1).tolist()
        self.labels[-1] += self.yb[0].tolist()


@pytest.mark.parametrize("pacing", PACINGS)
def test_curriculum_grows(pacing):
    "The easiest items enter according to the pacing; after the fit the loader is restored."
    learn = fit(Curriculum("length", pacing, 0.25, 3), Seen(), epochs=5)
    lengths = sorted(learn.dls.train.dataset.lengths)
    expected = [max(1, round(96 * PACINGS[pacing](min(1, e / 3), 0.25))) for e in range(5)]
    assert (
        [len(s) for s in learn.seen.lengths]
        == expected
        == epoch_table(learn).curriculum_items.tolist()
    )
    for seen, n in zip(learn.seen.lengths, expected):
        assert sorted(seen) == lengths[:n]
    assert expected == sorted(expected)
    assert expected[0] == 24
    assert expected[3:] == [96, 96]
    assert learn.dls.train.among is None
    assert len(learn.dls.train) == 6
    assert learn.dls.train.n == 96


def test_curriculum_options():
    "Groups, reverse order, order within an epoch, difficulty by function, `until` as a fraction."
    y = TinySequences(96).targets.numpy()
    counts = np.bincount(fit(Curriculum(y, start=0.5, until=2, groups=y), Seen()).seen.labels[0])
    assert counts.tolist() == [16] * 3
    assert set(fit(Curriculum(y, start=1 / 3, until=2), Seen()).seen.labels[0]) == {0}
    assert min(fit(Curriculum(start=0.1, hardest_first=True), Seen()).seen.lengths[0]) > 35
    ordered = fit(
        Curriculum(lambda data: -data.lengths, until=0, ordered=True), Seen()
    ).seen.lengths
    assert ordered[0] == sorted(ordered[0], reverse=True) == ordered[1]
    assert [len(s) for s in fit(Curriculum(start=0.5), Seen(), epochs=4).seen.lengths] == [
        48,
        72,
        96,
        96,
    ]


def test_curriculum_after_a_stop():
    "An interrupted curriculum does not restrict the next fit."

    class Stop(Callback):
        def after_train(self):
            raise SystemError("power cut")

    learn = tiny_learner(loss_func=CrossEntropy())
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(SystemError):
            learn.fit(2, cbs=[Curriculum(start=0.1), Stop()])
        learn.fit(1, cbs=[Curriculum(start=1.0), Seen()])
        assert learn.dls.train.n == 96


def test_restricted_buckets():
    "Buckets are formed from the items in use."
    data = TinySequences(200)
    dl = BatchLoader(data, 8, shuffle=True, bucket=4)
    easy = difficulty_order(data.lengths)[:60]
    dl.restrict(easy)
    order = dl.get_idxs()
    assert sorted(order) == sorted(easy)
    assert len(dl) == 8
    assert len(list(dl)) == 8
    spread = [np.ptp(data.lengths[order[i : i + 8]]) for i in range(0, 56, 8)]
    assert np.mean(spread) < np.ptp(data.lengths[easy]) / 2


def test_item_losses():
    "One loss per item, without dropout; model and loss are not changed."
    net = model(dropout=0.5)
    data = TinySequences(40)
    loss = CrossEntropy()
    a, b = (item_losses(net, data, loss, 16) for _ in range(2))
    x, mask, y = data.batch(np.arange(40))
    net.eval()
    np.testing.assert_allclose(
        a, F.cross_entropy(net(x, mask), y, reduction="none").detach(), rtol=1e-4
    )
    assert (a == b).all()
    assert loss.reduction == "mean"
    assert item_losses(model().train(), data, loss).shape == (40,)


# -- scheduled sampling


class Lines(TinySequences):
    "Lines of up to five tokens that encode the class, with end token 2 and padding 0."

    def batch(self, index):
        x, mask, y = super().batch(index)
        position = torch.arange(6)[None]
        n = 3 + y[:, None]
        line = torch.where(
            position < n, 3 + (y[:, None] + position) % 3, torch.where(position == n, 2, 0)
        )
        return dict(x=x, tokens=F.pad(line[:, :-1], (1, 0), value=1)), mask, line


class Writer(TinyClassifier):
    "Logits of the next token from the previous token and the sequence."

    def __init__(self, dropout=0.3):
        super().__init__(classes=6, dropout=dropout)
        self.embed = nn.Embedding(6, 6)

    def forward(self, inputs, mask):
        return super().forward(inputs["x"], mask)[:, None] + self.embed(inputs["tokens"])


def line_loss(out, line):
    return F.cross_entropy(out.flatten(0, 1), line.flatten(), ignore_index=0)


class Fed(Callback):
    "Record the input tokens, the true tokens and the tokens predicted from these."

    order, run_valid = 13, False

    def before_fit(self):
        self.batches = []

    def before_batch(self):
        inputs, mask = self.xb
        line = self.yb[0]
        right = F.pad(line[:, :-1], (1, 0), value=1)
        self.model.eval()
        with torch.no_grad():
            own = self.model(dict(inputs, tokens=right), mask).argmax(-1)
        self.model.train()
        self.batches.append((inputs["tokens"], right, F.pad(own[:, :-1], (1, 0), value=1)))


def write(*cbs, seed=0, **kwargs):
    torch.manual_seed(seed)
    return fit(
        *cbs,
        **{"data": Lines, "model": Writer(), "loss_func": line_loss, "metrics": None, **kwargs},
    )


def test_all_tokens_are_replaced_at_probability_zero():
    "At probability 0 all tokens are predicted, except the first, special and predicted special ones."
    learn = write(ScheduledSampling("linear", start=-100.0), Fed())
    for fed, right, own in learn.fed.batches:
        keep = (right < 3) | (own < 3)
        assert torch.equal(fed, torch.where(keep, right, own))
        assert (fed[:, 0] == 1).all()
    assert any((fed != right).any() for fed, right, _ in learn.fed.batches)
    x = learn.dls.train.dataset.batch(np.arange(96))[0]["tokens"]
    assert torch.equal(x, Lines(96).batch(np.arange(96))[0]["tokens"])


def test_fraction_of_true_tokens_follows_the_curve():
    "The fraction of true tokens follows the decay curve."

    class Mirror(Writer):  # always predicts a wrong token
        def forward(self, inputs, mask):
            return super().forward(inputs, mask) * 0 + 9 * F.one_hot(
                torch.where(inputs["tokens"] < 3, 3, 3 + (inputs["tokens"] - 1) % 3), 6
            )

    learn = write(ScheduledSampling("linear", k=4.0), Fed(), model=Mirror(), epochs=8)
    fractions = [
        (fed != right)[(right > 2) & (own > 2) & (right != own)].float().mean().item()
        for fed, right, own in learn.fed.batches
    ]
    expected = [1 - teacher_forcing(i / 6, "linear", 4.0) for i in range(48)]
    assert fractions[0] == 0
    assert fractions[24:] == [1.0] * 24
    assert np.abs(np.array(fractions) - expected).max() < 0.35
    assert abs(np.mean(fractions) - np.mean(expected)) < 0.05
    assert epoch_table(learn).teacher_forcing.tolist() == pytest.approx(
        [max(0, 1 - (e + 5 / 6) / 4) for e in range(8)]
    )


def test_no_effect_with_true_tokens():
    "At probability 1 the callback has no effect; the same seed gives the same fit."
    assert torch.equal(weights(write(ScheduledSampling(start=99.0))), weights(write()))
    a, b, c = (weights(write(ScheduledSampling(k=2.0, greedy=False), seed=s)) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, weights(write()))


def test_gradient_under_autocast():
    "Weights cast in the first pass without a gradient are not reused by the second."

    class Cast(Callback):
        order = 11

        def before_batch(self):
            self.cast = torch.autocast("cpu", torch.bfloat16)
            self.cast.__enter__()

        def after_pred(self):
            self.learn.pred = self.pred.float()
            self.cast.__exit__(None, None, None)

    found = write(
        ScheduledSampling(start=-100.0), Cast(), FirstGradients(), epochs=1
    ).first_gradients.gradients
    assert all(g.any() for g in found)


def test_scheduled_sampling_of_the_fingerprinter():
    "Scheduled sampling works with the four heads of the line decoder through `token_scores`."
    parts = [[0, 0, 0, i] for i in range(3)] + [[1, 1, 0, 0], [2, 0, 1, 0], [3, 0, 0, 2]]

    class Windows(Lines):
        def batch(self, index):
            inputs, mask, line = super().batch(index)
            there = mask[..., None].expand_as(inputs["x"])
            return (
                dict(sensors=inputs["x"], present=there, tokens=inputs["tokens"]),
                mask,
                dict(tokens=line, operation=line[:, 0] - 3, sensors=inputs["x"], present=there),
            )

    torch.manual_seed(0)
    net = GCodeFingerprinter(
        [[0, 1]], parts, 3, d_model=16, nhead=2, num_layers=1, encoder_layers=1, dim_feedforward=16
    )

    class Changed(Callback):
        order, run_valid = 13, False

        def before_fit(self):
            self.fractions = []

        def before_batch(self):
            self.fractions.append(
                (self.xb[0]["tokens"][:, 1:] != self.yb[0]["tokens"][:, :-1]).float().mean().item()
            )

    learn = fit(
        ScheduledSampling(k=1.0, predict=lambda out: token_scores(out, net.decoder.parts)),
        Changed(),
        model=net,
        data=Windows,
        loss_func=LineLoss(torch.tensor(parts)),
        metrics=None,
    )
    assert learn.changed.fractions[0] == 0
    assert max(learn.changed.fractions[6:]) > 0.1
    assert np.isfinite(learn.recorder.values[-1]).all()


@pytest.mark.parametrize(
    "decay,k", [("linear", 4.0), ("exponential", 0.9), ("inverse_sigmoid", 3.0)]
)
def test_decays(decay, k):
    "The curves of the paper: decreasing, between the lower bound and 1."
    at = np.linspace(0, 30, 61)
    fractions = [teacher_forcing(e, decay, k, 0.1) for e in at]
    assert all(a >= b for a, b in zip(fractions, fractions[1:]))
    assert max(fractions) <= 1
    assert min(fractions) >= 0.1
    assert set(DECAYS) == {"linear", "exponential", "inverse_sigmoid"}
    expected = dict(linear=1 - at / k, exponential=k**at, inverse_sigmoid=k / (k + np.exp(at / k)))[
        decay
    ]
    np.testing.assert_allclose(fractions, expected.clip(0.1, 1))
