"What every augmentation and every callback that changes training batches promises. They are found, not listed."

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

import gcode_ml
from gcode_ml.data.batch import dataloaders
from gcode_ml.data.windows import length_mask
from gcode_ml.lab.snapshot import Snapshot
from gcode_ml.signals.augment import AUGMENTATIONS, Augment, Augmentation, create_augmentation
from gcode_ml.training.mixing import AdversarialTraining, CutMix, MixUp
from gcode_ml.training.tiny import TinyClassifier, TinySequences, tiny_learner

PAGES = sorted(
    f"{p.parent.name}.{p.stem}"
    for f in ("augment.py", "mixing.py")
    for p in Path(gcode_ml.__file__).parent.glob(f"*/{f}")
)
MODULES = [
    importlib.import_module(f"gcode_ml.{p}") for p in PAGES
]  # a domain's page fills the registry too

OPTIONS = {  # for two points, or four channels, where the defaults would change nothing
    "mirror": dict(pairs=[(0, 1)]),
    "part_affine": dict(parts=dict(arm=(0, [0, 1]))),
    "occlusion": dict(groups=dict(left=[0], right=[1]), share=0.5),
    "spec_augment": dict(time_axis=1, time_width=3, frequency_width=2),
}
OWN_BATCH = {
    "ImageAugment",
    "ReflectAxes",
    "SlowDown",
    "SmilesAugment",
}  # change images, molecules, or several things of a signal together: see test_other_batches
CALLBACKS = {  # an example that changes something, and one that changes nothing
    "Augment": (
        lambda: Augment("random_policy"),
        lambda: Augment(
            [create_augmentation(n, **OPTIONS.get(n, {}), p=0.0) for n in AUGMENTATIONS]
        ),
    ),
    "MixUp": (lambda: MixUp(), lambda: MixUp(weight=1.0)),
    "CutMix": (lambda: CutMix(), lambda: CutMix(weight=1.0)),
    "AdversarialTraining": (
        lambda: AdversarialTraining(0.1),
        lambda: AdversarialTraining(0.1, share=0.0),
    ),
}


def callbacks():
    "Every callback class of the pages that is not a base of another, by its name."
    found = [
        c
        for m in MODULES
        for c in vars(m).values()
        if inspect.isclass(c) and issubclass(c, Callback) and c.__module__ == m.__name__
    ]
    return {
        c.__name__: c
        for c in found
        if c.__name__ not in OWN_BATCH and not any(c in d.__bases__ for d in found)
    }


NAMES = sorted(AUGMENTATIONS)
CBS = sorted(callbacks())
ITEMS, STEPS, CHANNELS = 16, 14, 4
LENGTHS = torch.tensor([14, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 14])


def make(name, **options):
    return create_augmentation(name, **{**OPTIONS.get(name, {}), **options})


def batch(lengths=LENGTHS, steps=STEPS):
    "Inputs with something in the padding, and their mask."
    return torch.randn(
        len(lengths), steps, CHANNELS, generator=torch.Generator().manual_seed(0)
    ) + 1, length_mask(lengths, steps)


def called(augmentation, x, mask, seed=0):
    "What an augmentation, or a function like one, makes of a batch: `(x, mask)`."
    torch.manual_seed(seed)
    out = augmentation(x, mask)
    return out if isinstance(out, tuple) else (out, mask)


def learner(cbs=None, model=None, **kwargs):
    torch.manual_seed(0)
    learn = tiny_learner(cbs=cbs, model=model or TinyClassifier(channels=CHANNELS), **kwargs)
    learn.dls = dataloaders(TinySequences(48, CHANNELS), TinySequences(24, CHANNELS, seed=1), 16)
    return learn


def fit(cbs=None, epochs=2, **kwargs):
    learn = learner(cbs, **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs)
    return learn


def through(cb):
    "The batch that `cb` makes of a training batch, as a function like an augmentation."
    learn = learner(cb)
    learn.training = True

    def change(x, mask):
        learn.xb = (x, mask)
        learn.yb = (torch.arange(len(x)) % 3,)
        cb("before_batch")
        return learn.xb

    return change


def changers():
    return {
        **{n: lambda n=n: make(n) for n in NAMES},
        **{n: lambda n=n: through(CALLBACKS[n][0]()) for n in CBS if n in CALLBACKS},
    }


CHANGERS = changers()
each = pytest.mark.parametrize("name", sorted(CHANGERS))

# --- measures ---


def in_place(change):
    "Whether the batch that comes in is written to."
    x, mask = batch()
    was = x.clone(), mask.clone()
    for seed in range(3):
        called(change, x, mask, seed)
    return not (torch.equal(x, was[0]) and torch.equal(mask, was[1]))


def touches_padding(change):
    "Whether steps are changed that are padded before and after."
    x, mask = batch()
    y, real = called(change, x, mask)
    return not torch.equal(x[~mask & ~real], y[~mask & ~real])


def padding_leaks(change, worst=torch.inf):
    "Whether what stands in the padding changes a real step, under the same seed."
    x, mask = batch()
    y, real = called(change, x, mask)
    for garbage in (1e3 * torch.randn(x.shape), torch.full(x.shape, worst)):
        z, same = called(change, torch.where(mask[..., None], x, garbage), mask)
        if not (torch.equal(real, same) and torch.equal(y[real], z[same])):
            return True
    return False


def draws_differ(change):
    "Whether samples that are alike come out unlike."
    x, mask = batch(torch.full((ITEMS,), STEPS))
    x = x[:1].repeat(ITEMS, 1, 1)
    y, real = called(change, x, mask)
    return len(torch.where(real[..., None], y, -9.0).flatten(1).unique(dim=0)) > 1


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# --- augmentations and callbacks alike ---


def test_everything_is_found():
    "A new callback cannot be forgotten, nor an example outlive what it is an example of."
    assert set(CBS) == set(CALLBACKS)
    assert {"signals.augment", "training.mixing"} <= set(PAGES)
    assert set(OPTIONS) <= set(NAMES)
    assert len(NAMES) > 20
    assert all(
        p.default is not p.empty
        for n in NAMES
        for p in inspect.signature(AUGMENTATIONS[n]).parameters.values()
    )


@each
def test_not_in_place(name):
    assert not in_place(CHANGERS[name]())


@each
def test_padding(name):
    "Padding is left alone and reaches nothing; the model that an attack asks multiplies it by zero, so there it is finite."
    assert not touches_padding(CHANGERS[name]())
    assert not padding_leaks(CHANGERS[name](), 1e30 if name == "AdversarialTraining" else torch.inf)


@each
def test_seeds(name):
    "The same seed gives the same batch, most other seeds another one, and the global state of NumPy and Python has no part in it."
    x, mask = batch()
    first = called(CHANGERS[name](), x, mask)
    assert same(first, called(CHANGERS[name](), x, mask))
    assert (
        sum(not same(first, called(CHANGERS[name](), x, mask, seed)) for seed in range(1, 6)) >= 4
    )


@each
def test_draws(name):
    "Each sample has a draw of its own; mixtures of samples that are alike are alike, so there the partners are looked at."
    if name in ("MixUp", "CutMix"):
        x, mask = batch()
        y, _ = called(CHANGERS[name](), x, mask)
        assert len({round(float(d), 4) for d in (y - x).abs().amax((1, 2))}) > 3
    else:
        assert draws_differ(CHANGERS[name]())


@each
def test_shape(name):
    "Shape and type stay, real steps stand first, and something does change."
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64 and name == "AdversarialTraining":
            continue  # the model is of single precision
        x, mask = batch()
        x = x.to(dtype)
        y, real = called(CHANGERS[name](), x, mask)
        assert (y.shape, y.dtype, real.shape, real.dtype) == (
            x.shape,
            dtype,
            mask.shape,
            torch.bool,
        )
        assert torch.equal(real, length_mask(real.sum(1), STEPS))
        assert torch.equal(real.any(1), mask.any(1))
        assert not torch.equal(x, y)
        assert y[real].isfinite().all()


@each
def test_short(name):
    "Sequences of 0 to 3 steps, alone or together."
    for steps in (1, 2, 3):
        for lengths in ([steps], [steps] * 2, [steps, 1], [steps, 0]):
            x, mask = batch(torch.tensor(lengths), steps)
            for seed in range(4):
                y, real = called(CHANGERS[name](), x, mask, seed)
                assert y.shape == x.shape
                assert y.isfinite().all()
                assert torch.equal(real.any(1), mask.any(1))
                assert torch.equal(y[~mask & ~real], x[~mask & ~real])


@pytest.mark.parametrize("name", NAMES)
def test_no_chance(name):
    "With `p=0` nothing happens."
    x, mask = batch()
    assert same(called(make(name, p=0.0), x, mask), (x, mask))


@pytest.mark.parametrize("name", NAMES)
def test_chance(name):
    "With `p` between, some samples are changed and some are not."
    x, mask = batch(torch.full((64,), STEPS))
    y, real = called(make(name, p=0.5), x, mask)
    changed = ((x != y).flatten(1).any(1) | (real != mask).any(1)).sum()
    assert 0 < changed < 48


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name):
    "A gradient reaches the inputs, and is finite."
    x, mask = batch()
    x.requires_grad_()
    y, real = called(make(name), x, mask)
    y[real].sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[mask].any()
    assert not x.grad[~mask].any()


@pytest.mark.parametrize("name", NAMES)
def test_missing(name):
    "A point that is missing in one sample is missing there still, once at each step, and nowhere else."
    x, mask = batch()
    x[0, :, 2:] = torch.nan
    for seed in range(3):
        y, real = called(make(name), x, mask, seed)
        assert y[1:][real[1:]].isfinite().all()
        assert (y[0][real[0]].isnan().sum(1) == 2).all()


@pytest.mark.parametrize("name", CBS)
def test_missing_in_dictionary(name):
    "Channels that are not present stay zero, whatever was there, and the other inputs are let through."
    options = dict(key="points")
    cb = (
        Augment(["noise", make("mirror", p=1.0)], **options)
        if name == "Augment"
        else callbacks()[name](**options)
    )

    class Model(TinyClassifier):
        def forward(self, inputs, mask):
            return super().forward(inputs["points"] * inputs["present"], mask)

    x, mask = batch()
    present = mask[..., None].repeat(1, 1, CHANNELS)
    present[:, :, 2:] = False
    learn = learner(cb, Model(channels=CHANNELS))
    learn.training = True
    outs = []
    for absent in (0.0, 7.0):
        learn.xb = (
            dict(points=torch.where(present, x, absent), present=present, tokens=x[..., 0]),
            mask,
        )
        learn.yb = (torch.arange(ITEMS) % 3,)
        torch.manual_seed(0)
        cb("before_batch")
        inputs, real = learn.xb
        assert inputs["tokens"] is not None
        assert inputs["present"].shape == present.shape
        assert (inputs["present"][real].sum(1) == 2).all()
        outs.append(inputs["points"][inputs["present"]])
    assert torch.equal(*outs)
    assert set(learn.xb[0]) == {"points", "present", "tokens"}


# --- in a fit ---


@pytest.fixture(scope="module")
def plain():
    return fit()


def weights(learn):
    return [p.detach() for p in learn.model.state_dict().values()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))


def changes_validation(cb, model):
    "Whether predictions in validation are other ones with `cb`."
    learn = learner(model=model)
    with learn.no_bar(), learn.no_logging():
        torch.manual_seed(0)
        a = learn.get_preds(dl=learn.dls.valid, reorder=False)[0], learn.validate()
        learn.add_cb(cb)
        torch.manual_seed(0)
        b = learn.get_preds(dl=learn.dls.valid, reorder=False)[0], learn.validate()
    return not torch.equal(a[0], b[0]) or list(a[1]) != list(b[1])


FITS = {
    **{n: lambda n=n: Augment(make(n)) for n in NAMES},
    **{n: c[0] for n, c in CALLBACKS.items()},
}


@pytest.mark.parametrize("name", sorted(FITS))
def test_training_only(name, plain):
    assert not changes_validation(FITS[name](), plain.model)


class PowerCut(Callback):
    order = 2000

    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 1):
            raise SystemError("power cut")


@pytest.mark.parametrize("name", sorted(FITS))
def test_fit_and_resume(name, plain, tmp_path):
    "The tiny learner trains on other batches than without, with a finite loss; interrupted in the middle of an epoch, it ends in the same weights."
    whole = fit(FITS[name]())
    assert torch.stack(whole.recorder.losses).isfinite().all()
    assert not equal(whole, plain)

    def kept():
        return Snapshot(tmp_path / "fit.safetensors", batches=1)

    with pytest.raises(SystemError):
        fit([FITS[name](), kept(), PowerCut()])
    continued = fit([FITS[name](), kept()])
    assert equal(whole, continued)
    assert list(whole.recorder.values) == list(continued.recorder.values)


@pytest.mark.parametrize("name", CBS)
def test_idle_callback(name, plain):
    assert equal(fit(CALLBACKS[name][1]()), plain)


@pytest.mark.parametrize("cb", [MixUp, CutMix])
def test_mixing_nobody(cb, plain):
    "Without partners the two losses are the same one."
    for p, q in zip(weights(fit(cb(p=0.0))), weights(plain)):
        assert torch.allclose(p, q, atol=1e-5)


class Normed(TinyClassifier):
    "With batch norm, a frozen one too, and dropout that must not be drawn."

    def __init__(self):
        super().__init__(channels=CHANNELS)
        self.norm = nn.BatchNorm1d(CHANNELS)
        self.frozen = nn.BatchNorm1d(CHANNELS)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x, mask):
        return super().forward(self.frozen(self.norm(x.mT)).mT, mask)


class Trace(Callback):
    "What an attack leaves behind."

    order = AdversarialTraining.order + 1

    def __init__(self):
        self.seen = []

    def before_batch(self):
        if self.training:
            self.seen.append(
                (
                    self.model.training,
                    self.model.frozen.training,
                    self.xb[0].requires_grad,
                    any(p.grad is not None and p.grad.any() for p in self.model.parameters()),
                )
            )


def test_attack_leaves_no_trace():
    "Modes, gradients, and the statistics of batch norm, which are those of a fit without attack when the step is zero."
    torch.manual_seed(0)
    models = [Normed() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    alone = fit(model=models[0])
    attacked = fit([AdversarialTraining(0.0, 1.0), Trace()], model=models[1])
    assert set(attacked.trace.seen) == {(True, False, False, False)}
    assert len(attacked.trace.seen) == 6
    assert models[1].norm.num_batches_tracked == 6
    assert models[1].frozen.num_batches_tracked == 0
    assert equal(alone, attacked)


def test_attack_of_a_mixture():
    "The gradient is that of the mixed loss."
    learn = learner([MixUp(weight=0.6), AdversarialTraining(0.1, 1.0)])
    learn.training = True
    x, mask = batch()
    learn.xb = (x, mask)
    learn.yb = (torch.arange(ITEMS) % 3,)
    learn.mix_up("before_batch")
    mixed, union = learn.xb
    mixed = mixed.clone().requires_grad_()
    learn.mix_up.mixed_loss(
        pred := learn.model(mixed, union), learn.loss_func(pred, *learn.yb)
    ).backward()
    learn.adversarial_training("before_batch")
    assert torch.allclose(
        learn.xb[0],
        torch.where(union[..., None], mixed + 0.1 * mixed.grad.sign(), mixed),
        atol=1e-6,
    )


# --- the measures can fail ---


class Overwrite(Augmentation):
    def __call__(self, x, mask):
        x[0] *= 2
        return x


class Forgetful(Augmentation):
    def __call__(self, x, mask):
        return x + 1


class Leaky(Augmentation):
    def change(self, x, mask):
        return x - x.mean(1, keepdim=True)


class OneDraw(Augmentation):
    def change(self, x, mask):
        return x * torch.rand(1)


class Always(Augment):
    run_valid = True


def test_bad_ones_are_found(plain):
    "Each measure sees what breaks its promise."
    assert in_place(Overwrite())
    assert touches_padding(Forgetful())
    assert padding_leaks(Leaky())
    assert not draws_differ(OneDraw())
    assert changes_validation(Always("noise"), plain.model)
    assert not any(f(make("noise")) for f in (in_place, touches_padding, padding_leaks))


@pytest.mark.parametrize("name", sorted(OWN_BATCH))
def test_other_batches(name):
    "Callbacks for batches of another kind: training only, a draw for each sample, the same seed the same batch, never in place."
    from types import SimpleNamespace as Of

    from gcode_ml.bearing.augment import SlowDown
    from gcode_ml.binary_vae.augment import ImageAugment, SmilesAugment
    from gcode_ml.binary_vae.data import Texts, build_vocabulary, smiles_tokens
    from gcode_ml.trajectory.augment import ReflectAxes

    if name == "SmilesAugment":
        pytest.importorskip("rdkit")
    mask = torch.ones(8, 40, dtype=torch.bool)
    images = torch.rand(8, 36)
    signal = torch.randn(1, 40, 1).repeat(8, 1, 1)
    molecules = Texts(
        ["CC(=O)Oc1ccccc1C(=O)O"] * 8,
        build_vocabulary([smiles_tokens("CC(=O)Oc1ccccc1C(=O)O")]),
        smiles_tokens,
        40,
    )
    windows = Of(features=["vx", "vy", "speed"], scale=Of(mean=[0.0] * 3, std=[1.0] * 3))
    path = signal[..., :1].repeat(1, 1, 3)
    cb, xb, yb = dict(
        ImageAugment=(ImageAugment((6, 6), shift=1, flips=0.2), (images, mask[:, :1]), ()),
        SmilesAugment=(
            SmilesAugment(molecules, 1.0) if name == "SmilesAugment" else None,
            (molecules.tokens, molecules.tokens != 0),
            (),
        ),
        ReflectAxes=(
            ReflectAxes(windows),
            (dict(features=path), mask),
            (dict(error=path[..., :2]),),
        ),
        SlowDown=(SlowDown(0.4), (dict(signal=signal, shaft=torch.full((8,), 30.0)), mask), ()),
    )[name]
    assert not cb.run_valid

    def said(seed):
        torch.manual_seed(seed)
        cb.learn = type("Learn", (), dict(xb=xb, yb=yb))()
        if name == "ReflectAxes":
            cb.before_fit()
        cb.before_batch()
        x = cb.learn.xb[0]
        return x.get("signal", x.get("features")) if isinstance(x, dict) else x

    before = (images.clone(), signal.clone(), molecules.tokens.clone())
    one = said(0)
    assert torch.equal(one, said(0))
    assert not (one.shape == said(1).shape and torch.equal(one, said(1)))
    assert all(map(torch.equal, (images, signal, molecules.tokens), before))
    if name != "ImageAugment":
        assert len({tuple(row.flatten().tolist()) for row in one}) > (
            2 if name == "ReflectAxes" else 4
        )  # the samples were alike
