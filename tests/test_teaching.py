"Teachers, laws, easy items first, and a decoder's own tokens: each against what it says it computes."

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
from gcode_ml.training.schedules import MoreTargets, teacher_answers
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
    "Stop the gradient of the first training batch for inspection."

    order, run_valid = 900, False

    def after_backward(self):
        if "gradients" not in vars(self):
            self.gradients = [p.grad.clone() for p in self.model.parameters()]


def gradients(*cbs, **kwargs):
    return fit(*cbs, FirstGradients(), epochs=1, **kwargs).first_gradients.gradients


# -- teachers


@pytest.mark.parametrize("alpha,temperature", [(0.7, 4.0), (0.0, 2.0), (1.0, 1.0)])
def test_distill_is_the_loss(alpha, temperature):
    "With cross entropy the callback has the gradient of the loss of the paper; validation keeps the learner's loss."
    teacher = model(9, width=8)
    a = gradients(Distill(teacher, temperature, alpha))
    b = gradients(MoreTargets(teacher_answers(teacher)), loss_func=Distillation(temperature, alpha))
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    learn = fit(Distill(teacher, temperature, alpha))
    assert learn.validate()[0] == pytest.approx(
        F.cross_entropy(*learn.get_preds(act=lambda x: x)).item(), rel=1e-4
    )


class Steps(TinySequences):
    "The class at every step, -100 behind the end, as one of two targets."

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
    "A named head; steps without a label count neither for the labels nor for the teacher."
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


def test_distill_leaves_the_teacher(tmp_path):
    "The teacher is frozen, never trained, in evaluation mode, and not kept in a snapshot."
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


def test_distill_on_mixtures():
    "A mixture is shown to the teacher as well: with its answers alone the labels, mixed or not, do not matter."

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
    (lambda: fit(Distill(model(classes=4))), "of the classes of the student, found [16, 4]"),
    (
        lambda: check_classes("abc", "acb"),
        "Distill: class 1: expected c as in the student, found b in the teacher",
    ),
    (
        lambda: Distill(model(), classes=["a", "b", "c"], teacher_classes=["a", "b"]),
        "expected 3, as the student has, found 2 of the teacher",
    ),
    (lambda: Distill(model(), temperature=0), "temperature"),
    (lambda: Distill(model(), alpha=2), "alpha"),
    (
        lambda: compare(dict(a=model()), TinySequences(8), items=5),
        "items: expected at least 20, found 5",
    ),
    (
        lambda: compare(dict(a=model(), b=model(classes=2)), TinySequences(8)),
        "found 3 of a, 2 of b",
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
        "difficulty: expected 96 values, one a training item, found 3",
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
def test_bad_input(refused, make, sentence):
    assert sentence in refused(make)


def test_student_is_not_its_teacher(refused):
    "Neither given to the learner nor to the fit."
    same = model()
    assert "another model than the student" in refused(fit, Distill(same), model=same)
    learn = fit()
    cb = Distill(learn.model)
    assert "another model than the student" in refused(learn.fit, 1, cbs=cb)


def test_compare():
    "Sizes, accuracy and times of what was given; modes and threads are left as they were."
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
    for share, m in zip(table.accuracy, (a, b)):
        assert share == (m.eval()(x, mask).argmax(-1) == y).float().mean()
    assert (table.latency_ms > 0).all()
    assert (table.latency_ms <= table.latency_p95_ms).all()
    assert (table.latency_p95_ms <= table.latency_p99_ms).all()
    assert model_size(a)[1] == table.size_mb[0] < table.size_mb[1]


def test_compare_counts_labels():
    "Padded steps are no labels."
    torch.manual_seed(0)
    data = Steps(10)
    assert compare(dict(m=StepHead()), data, head="kind").labels[0] == data.lengths.sum()


def test_latencies_are_of_the_model():
    "A model that waits is slower by as much."

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


# -- laws


def law(prediction, target, inputs, mask):
    return prediction.softmax(-1)[:, 0] - 0.3


def test_physics_is_the_loss():
    "The gradient of the loss on data and the squared residual; validation has the data alone."
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
    "The history tells the weight of each epoch and what the law took."
    table = epoch_table(fit(PhysicsLoss(law, 0.5, delay=1, rise=2), epochs=4))
    assert table.physics_weight.tolist() == pytest.approx(
        [
            0,
            np.mean([0.5 * i / 12 for i in range(1, 6)]),
            np.mean([0.5 * (6 + i) / 12 for i in range(6)]),
            0.5,
        ]
    )  # a batch without weight is left out
    assert np.isnan(table.physics_loss[0])
    assert (table.physics_loss[1:] > 0).all()
    assert table.physics_share[0] == 0
    assert table.physics_share[1:].between(0, 1).all()
    assert json.dumps([ramp(e, 1, 2) for e in (0, 1, 2, 3, 9)]) == "[0.0, 0.0, 0.5, 1.0, 1.0]"


def test_physics_counts_real_steps():
    "A residual at every step is averaged over real steps; what it says of padding has no effect."

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


def test_penalty_that_is_none_yet():
    "Without the square, a penalty counts as it is."
    a = gradients(PhysicsLoss(lambda p, *_: law(p, *_) ** 2, 0.5, square=False))
    assert all(torch.allclose(p, q) for p, q in zip(a, gradients(PhysicsLoss(law, 0.5))))


# -- curricula


class Seen(Callback):
    "Which lengths and labels were trained on."

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
    "The easiest items, as many as the pacing says; then all; then the loader is as it was."
    learn = fit(Curriculum("length", pacing, 0.25, 3), Seen(), epochs=5)
    lengths = sorted(learn.dls.train.dataset.lengths)
    wanted = [max(1, round(96 * PACINGS[pacing](min(1, e / 3), 0.25))) for e in range(5)]
    assert (
        [len(s) for s in learn.seen.lengths]
        == wanted
        == epoch_table(learn).curriculum_items.tolist()
    )
    for seen, n in zip(learn.seen.lengths, wanted):
        assert sorted(seen) == lengths[:n]
    assert wanted == sorted(wanted)
    assert wanted[0] == 24
    assert wanted[3:] == [96, 96]
    assert learn.dls.train.among is None
    assert len(learn.dls.train) == 6
    assert learn.dls.train.n == 96


def test_curriculum_options():
    "Groups enter at one rate; the opposite order; an order within the epoch; a function as difficulty; a share of the fit."
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
    "A fit that was stopped leaves nothing behind for the next."

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
    "Buckets are made of the items that take part."
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
    "One value an item, with a mean of the loss; dropout is off, and the model and the loss stay as they are."
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


# -- own tokens


class Lines(TinySequences):
    "Lines of up to five tokens that tell the class, ended by 2 and padded by 0."

    def batch(self, index):
        x, mask, y = super().batch(index)
        place = torch.arange(6)[None]
        n = 3 + y[:, None]
        line = torch.where(place < n, 3 + (y[:, None] + place) % 3, torch.where(place == n, 2, 0))
        return dict(x=x, tokens=F.pad(line[:, :-1], (1, 0), value=1)), mask, line


class Writer(TinyClassifier):
    "Logits of the next token from the last one and from the sequence."

    def __init__(self, dropout=0.3):
        super().__init__(classes=6, dropout=dropout)
        self.embed = nn.Embedding(6, 6)

    def forward(self, inputs, mask):
        return super().forward(inputs["x"], mask)[:, None] + self.embed(inputs["tokens"])


def line_loss(out, line):
    return F.cross_entropy(out.flatten(0, 1), line.flatten(), ignore_index=0)


class Fed(Callback):
    "What the model is fed, and what it would have written on the right line."

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


def test_own_tokens():
    "Without right tokens each place has the model's own, but for the first, special ones, and places where it would write a special one."
    learn = write(ScheduledSampling("linear", start=-100.0), Fed())
    for fed, right, own in learn.fed.batches:
        keep = (right < 3) | (own < 3)
        assert torch.equal(fed, torch.where(keep, right, own))
        assert (fed[:, 0] == 1).all()
    assert any((fed != right).any() for fed, right, _ in learn.fed.batches)
    x = learn.dls.train.dataset.batch(np.arange(96))[0]["tokens"]
    assert torch.equal(x, Lines(96).batch(np.arange(96))[0]["tokens"])


def test_share_of_own_tokens():
    "The share of places that may change falls as the curve says."

    class Mirror(Writer):  # always writes another token than the right one
        def forward(self, inputs, mask):
            return super().forward(inputs, mask) * 0 + 9 * F.one_hot(
                torch.where(inputs["tokens"] < 3, 3, 3 + (inputs["tokens"] - 1) % 3), 6
            )

    learn = write(ScheduledSampling("linear", k=4.0), Fed(), model=Mirror(), epochs=8)
    shares = [
        (fed != right)[(right > 2) & (own > 2) & (right != own)].float().mean().item()
        for fed, right, own in learn.fed.batches
    ]
    wanted = [1 - teacher_forcing(i / 6, "linear", 4.0) for i in range(48)]
    assert shares[0] == 0
    assert shares[24:] == [1.0] * 24
    assert np.abs(np.array(shares) - wanted).max() < 0.35
    assert abs(np.mean(shares) - np.mean(wanted)) < 0.05
    assert epoch_table(learn).teacher_forcing.tolist() == pytest.approx(
        [max(0, 1 - (e + 5 / 6) / 4) for e in range(8)]
    )


def test_first_pass_is_silent():
    "As long as all tokens are right, nothing differs from a fit without; the same seed repeats, another does not."
    assert torch.equal(weights(write(ScheduledSampling(start=99.0))), weights(write()))
    a, b, c = (weights(write(ScheduledSampling(k=2.0, greedy=False), seed=s)) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, weights(write()))


def test_gradient_under_autocast():
    "What the first pass casts without a gradient does not keep the second from having one."

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


def test_fingerprinter_reads_its_own_tokens():
    "The four heads of the line decoder, through `token_scores`; targets stay."
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
            self.share = []

        def before_batch(self):
            self.share.append(
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
    assert learn.changed.share[0] == 0
    assert max(learn.changed.share[6:]) > 0.1
    assert np.isfinite(learn.recorder.values[-1]).all()


@pytest.mark.parametrize(
    "decay,k", [("linear", 4.0), ("exponential", 0.9), ("inverse_sigmoid", 3.0)]
)
def test_decays(decay, k):
    "Falling, between 0 and 1, never below the least; the curves of the paper."
    at = np.linspace(0, 30, 61)
    shares = [teacher_forcing(e, decay, k, 0.1) for e in at]
    assert all(a >= b for a, b in zip(shares, shares[1:]))
    assert max(shares) <= 1
    assert min(shares) >= 0.1
    assert set(DECAYS) == {"linear", "exponential", "inverse_sigmoid"}
    wanted = dict(linear=1 - at / k, exponential=k**at, inverse_sigmoid=k / (k + np.exp(at / k)))[
        decay
    ]
    np.testing.assert_allclose(shares, wanted.clip(0.1, 1))
