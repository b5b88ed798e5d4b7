"""Contract of every masked model: invariance to padding and missing channels. Contract of every
recipe: reproducibility, gradients for all parameters, bit-exact resumption. Models and recipes are
discovered; the examples of a domain are in `examples_<domain>.py`."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from examples_fingerprint import PARTS
from fastai.callback.core import Callback
from torch import nn

import gcode_ml
from gcode_ml.core.domain import domain_names, find_domain
from gcode_ml.data.windows import length_mask
from gcode_ml.fingerprint.models import LineLoss
from gcode_ml.lab.snapshot import Snapshot
from gcode_ml.signals.layers import MaskedLSTM, masked_max, masked_mean, reverse_padded
from gcode_ml.training.fit import fit
from gcode_ml.training.tiny import TinyClassifier

ITEMS, STEPS, EXTRA = 3, 7, 5  # no other axis of an example is STEPS long
LENGTHS = torch.tensor([7, 4, 1])


def masked_models():
    "Every module of the models pages and shared layers with a mask, keyed by name."
    pages = [
        f"{p.parent.name}.models"
        for p in sorted(Path(gcode_ml.__file__).parent.glob("*/models.py"))
    ] + ["signals.layers", "training.tiny"]
    return {
        f"{page}.{name}": cls
        for page in pages
        for name, cls in vars(importlib.import_module(f"gcode_ml.{page}")).items()
        if inspect.isclass(cls)
        and issubclass(cls, nn.Module)
        and cls.__module__ == f"gcode_ml.{page}"
        and "mask" in inspect.signature(cls.forward).parameters
    }


def numbers(*shape):
    return torch.randn(ITEMS, *shape)


def examples():
    return {
        p.stem.removeprefix("examples_"): importlib.import_module(p.stem)
        for p in sorted(Path(__file__).parent.glob("examples_*.py"))
    }


EXAMPLES = {  # name in the package -> model and arguments of `forward`, except the mask
    "signals.layers.MaskedLSTM": lambda: (MaskedLSTM(6, 8), dict(x=numbers(STEPS, 6))),
    "training.tiny.TinyClassifier": lambda: (
        TinyClassifier(channels=6, dropout=0.5),
        dict(x=numbers(STEPS, 6)),
    ),
    **{
        name: make
        for module in examples().values()
        for name, make in getattr(module, "MODELS", {}).items()
    },
}


def each(change, value):
    "Apply `change` to every tensor of nested containers."
    if torch.is_tensor(value):
        return change(value)
    if isinstance(value, dict):
        return {k: each(change, v) for k, v in value.items()}
    return type(value)(each(change, v) for v in value)


def leaves(value):
    "All tensors of nested containers."
    found = []
    each(found.append, value)
    return found


def in_time(t, mask):
    return t.dim() > 1 and t.shape[:2] == mask.shape


def garbage(like, steps):
    "Large random values with the type of `like` and `steps` steps."
    t = 1e3 * torch.randn(len(like), steps, *like.shape[2:])
    if like.dtype == torch.bool:
        return t > 0
    if like.dtype == torch.long:
        return t.abs().long() % 6
    return t


def padded(value, mask, extra):
    "Fill padded steps and `extra` further steps with garbage."

    def change(t):
        if not in_time(t, mask):
            return t
        real = mask.reshape(mask.shape + (1,) * (t.dim() - 2))
        return torch.cat([torch.where(real, t, garbage(t, mask.shape[1])), garbage(t, extra)], 1)

    return each(change, value)


def real(out, mask):
    "Outputs at the real steps; outputs without a time axis as a whole."
    return [t[mask] if in_time(t, mask) else t for t in leaves(out)]


@torch.no_grad()
def padding_matters(model, inputs):
    "Largest relative change of an output when padded steps contain garbage."
    mask = length_mask(LENGTHS, STEPS)
    longer = length_mask(LENGTHS, STEPS + EXTRA)
    return difference(model, inputs, mask, longer)


def difference(model, inputs, mask, longer):
    short = real(model(**inputs, mask=mask), mask)
    long = real(model(**padded(inputs, mask, longer.shape[1] - mask.shape[1]), mask=longer), longer)
    return max(
        ((a - b).abs().max() / (1 + a.abs().max())).item() for a, b in zip(short, long, strict=True)
    )


def test_every_masked_model_has_an_example():
    "Every masked model has an example, and every example its model."
    assert set(masked_models()) == set(EXAMPLES)


@pytest.mark.parametrize("name", sorted(masked_models()))
def test_padding_invariance(name):
    "In evaluation mode, content and amount of padding change outputs only by rounding."
    assert name in EXAMPLES, f"add {name} to MODELS in tests/examples_<domain>.py"
    torch.manual_seed(0)
    model, inputs = EXAMPLES[name]()
    assert type(model) is masked_models()[name]
    assert padding_matters(model.eval(), inputs) < 1e-5


class Forgetful(nn.Module):
    "Ignores the mask."

    def forward(self, x, mask):
        return dict(mean=x.mean(1), steps=x)


class Leaky(nn.Module):
    "Applies the mask only after a convolution over padding."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 4, 3, padding=1)

    def forward(self, x, mask):
        return (masked_mean(self.conv(x.mT).mT, mask),)


@pytest.mark.parametrize("model", [Forgetful, Leaky])
def test_dependence_on_padding_is_detected(model):
    "`padding_matters` detects models that depend on padding."
    torch.manual_seed(0)
    assert padding_matters(model(), dict(x=numbers(STEPS, 6))) > 0.1


@pytest.mark.parametrize(
    "pool", [masked_mean, masked_max, lambda h, mask: reverse_padded(h, mask)[:, 0]]
)
def test_pooling_is_invariant_to_padding(pool):
    "The pooling functions are invariant to padding."

    class Pool(nn.Module):
        def forward(self, x, mask):
            return pool(x, mask)

    assert padding_matters(Pool(), dict(x=numbers(STEPS, 6))) < 1e-6


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "name", ["fingerprint.models.MMDTAELSTM", "fingerprint.models.GCodeFingerprinter"]
)
def test_missing_channels(name, train):
    "Values of absent channels have no effect, in training too; all channels may be absent."
    torch.manual_seed(0)
    model, args = EXAMPLES[name]()
    model.train(train)
    inputs = args["inputs"]
    mask = length_mask(LENGTHS, STEPS)
    inputs["present"][0, :, 2] = False
    inputs["present"][1] = False

    def out(sensors):
        torch.manual_seed(1)
        return model(dict(inputs, sensors=sensors), mask)

    there = inputs["sensors"]
    absent = torch.where(inputs["present"], inputs["sensors"], garbage(inputs["sensors"], STEPS))
    for a, b, c in zip(*(leaves(out(x)) for x in (there, absent, there + 1))):
        assert a.isfinite().all()
        assert torch.equal(a, b)
        assert not torch.equal(a, c)  # present channels do have an effect


def test_loss_of_missing_channels():
    "Padded tokens and absent channels do not contribute to the loss."
    torch.manual_seed(0)
    model, args = EXAMPLES["fingerprint.models.GCodeFingerprinter"]()
    model.eval()
    inputs = args["inputs"]
    loss = LineLoss(torch.tensor(PARTS))
    inputs["present"] &= length_mask(LENGTHS, STEPS)[..., None]
    targets = dict(
        tokens=torch.tensor([[3, 4, 5, 2, 0], [3, 2, 0, 0, 0], [4, 5, 5, 5, 2]]),
        operation=torch.tensor([0, 1, 3]),
        sensors=inputs["sensors"],
        present=inputs["present"],
    )
    out = model(inputs, length_mask(LENGTHS, STEPS))
    other = {
        **out,
        **{
            k: torch.where((targets["tokens"] != 0)[..., None], out[k], 9.0)
            for k in ("type", "command", "param_type", "param_val")
        },
    }
    wrong = dict(targets, sensors=torch.where(inputs["present"], inputs["sensors"], 1e3))
    assert loss(out, targets).isfinite()
    assert torch.equal(loss(out, targets), loss(other, wrong))


WITH_RECIPE = [d for d in domain_names() if hasattr(examples().get(d), "RECIPE")]


def test_every_recipe_has_sizes():
    "Every domain has a small configuration of its recipe."
    assert domain_names() == WITH_RECIPE, "give tests/examples_<domain>.py a RECIPE"


@pytest.fixture(scope="module", params=WITH_RECIPE)
def recipe(request, tmp_path_factory):
    "Recipe of a domain with small sizes; `RECIPE` is a dictionary or a function of a folder."
    sizes = examples()[request.param].RECIPE
    sizes = sizes(tmp_path_factory.mktemp(request.param)) if callable(sizes) else sizes

    def make(**kwargs):
        return find_domain(request.param).recipe(
            **{"seed": 1, "device": "cpu", "max_epochs": 2, **sizes, **kwargs}
        )

    make.domain = request.param
    return make


def fitted(learn):
    with learn.no_bar(), learn.no_logging():
        fit(learn)
    return learn


def weights(learn):
    return [v.clone() for v in learn.model.state_dict().values()]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


class Reached(Callback):
    "Record the parameters with a non-zero gradient."

    order = 5

    def before_fit(self):
        self.names = set()

    def before_step(self):
        self.names |= {
            k for k, p in self.model.named_parameters() if p.grad is not None and p.grad.any()
        }


class PowerCut(Callback):
    order = 2000

    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 0):
            raise SystemError("power cut")


@pytest.fixture(scope="module")
def once(recipe):
    return fitted(recipe(cbs=[Reached()]))


def test_seed_determines_the_weights(recipe, once):
    "The same seed gives bit-identical weights, another seed different ones."
    assert same(weights(once), weights(fitted(recipe())))
    assert not same(weights(once), weights(fitted(recipe(seed=2))))


def test_every_parameter_learns(recipe, once):
    "Every trainable parameter gets a non-zero gradient."
    assert {
        k for k, p in once.model.named_parameters() if p.requires_grad
    } - once.reached.names == set()


def test_recipe_resumes(recipe, once, tmp_path):
    "A fit interrupted in the second epoch and resumed has the same final weights."
    with pytest.raises(SystemError):
        fitted(recipe(cbs=[Snapshot(tmp_path / "fit.safetensors", batches=1), PowerCut()]))
    assert same(
        weights(once),
        weights(fitted(recipe(cbs=[Snapshot(tmp_path / "fit.safetensors", batches=1)]))),
    )


def test_recipe_respects_the_mask(recipe, once):
    "Garbage at padded steps changes no prediction."
    if getattr(examples()[recipe.domain], "FIXED_LENGTH", False):
        pytest.skip("items of one length")
    inputs, mask, _ = once.dls.valid.one_batch()
    longer = torch.nn.functional.pad(mask, (0, EXTRA))

    class Named(nn.Module):
        def forward(self, inputs, mask):
            return once.model(inputs, mask)

    once.model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        assert difference(Named(), dict(inputs=inputs), mask, longer) < 1e-4
