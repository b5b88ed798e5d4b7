"Every way of training that a guide lists is a parameter, every search runs, and what cannot be is one sentence."

import numpy as np
import pandas as pd
import pytest
import torch

from gcode_ml.bearing import search as se
from gcode_ml.bearing.data import Record, RecordWindows, check, write_records
from gcode_ml.bearing.features import window_features
from gcode_ml.bearing.recipe import preprocessing, recipe
from gcode_ml.bearing.simulate import journal_record, rolling_record, rolling_set
from gcode_ml.lab.bundle import save_bundle
from gcode_ml.signals.augment import SpecAugment
from gcode_ml.training.fit import fit
from gcode_ml.training.losses import Distillation, create_loss
from gcode_ml.training.physics import PhysicsLoss
from gcode_ml.training.speed import ProgressiveLength


@pytest.fixture(scope="module")
def records():
    return rolling_set(seconds=0.5, snr=0.0)[::2]


def fitted(records, **kwargs):
    learn = recipe(
        **{
            "data": records,
            "device": "cpu",
            "workers": 0,
            "window": 2048,
            "split": "leak",
            "max_epochs": 1,
            **kwargs,
        }
    )
    with learn.no_bar(), learn.no_logging():
        fit(learn)
    return learn


@pytest.fixture(scope="module")
def teacher(records, tmp_path_factory):
    "The bundle of a larger network."
    learn = fitted(records, model="resnet")
    folder = tmp_path_factory.mktemp("teacher")
    save_bundle(
        folder,
        learn.model,
        learn.arguments,
        preprocessing(learn),
        dict(domain="bearing", data={}, trained_on=[], metrics={}),
    )
    return str(folder)


def has(learn, kind):
    return any(isinstance(cb, kind) for cb in learn.cbs)


GUIDE = {  # row of the guide -> parameters, and what has to be there
    "standard, LSTM": (dict(model="lstm"), lambda l: isinstance(l.model.lstm, torch.nn.LSTM)),
    "standard, MLP": (
        dict(model="mlp"),
        lambda l: (
            not any(isinstance(m, (torch.nn.Conv1d, torch.nn.LSTM)) for m in l.model.modules())
        ),
    ),
    "CNN, best weights kept": (
        dict(model="cnn", max_epochs=2, save_best="valid_loss", restore_best=True),
        lambda l: isinstance(l.model.blocks[0], torch.nn.Conv1d),
    ),
    "physics-informed": (dict(model="cnn", physics_weight=0.1), lambda l: has(l, PhysicsLoss)),
    "spectrogram and SpecAugment": (
        dict(model="spectrogram", spec_augment=True),
        lambda l: isinstance(l.model.augment, SpecAugment),
    ),
    "STFT alone": (
        dict(model="spectrogram", representation="stft"),
        lambda l: len(l.model.pictures) == 1,
    ),
    "CWT alone": (
        dict(model="spectrogram", representation="cwt"),
        lambda l: len(l.model.pictures) == 1,
    ),
    "WVD alone": (
        dict(model="spectrogram", representation="wigner"),
        lambda l: len(l.model.pictures) == 1,
    ),
    "all three": (
        dict(model="spectrogram", representation="stft+cwt+wigner"),
        lambda l: l.model.blocks[0].in_channels == 3,
    ),
    "mixed precision": (
        dict(model="cnn", precision="bf16"),
        lambda l: all(p.dtype == torch.float32 for p in l.model.parameters()),
    ),
    "distillation": (
        dict(model="cnn", teacher="?", temperature=4.0, alpha=0.7),
        lambda l: has_loss(l, Distillation),
    ),
    "lengths that grow": (
        dict(model="cnn", progressive="1024:1, 2048:1", max_epochs=2),
        lambda l: has(l, ProgressiveLength),
    ),
}


def has_loss(learn, kind):
    return any(
        isinstance(m, kind) for m in [learn.loss_func, *getattr(learn.loss_func, "modules", list)()]
    )


@pytest.mark.parametrize("row", GUIDE)
def test_every_row_of_the_guide(records, teacher, tmp_path, row):
    "Is a parameter of the recipe, trains with finite losses, and does what its name says."
    way, there = GUIDE[row]
    learn = fitted(
        records,
        **{
            **way,
            **(dict(teacher=teacher) if "teacher" in way else {}),
            **(dict(checkpoint_folder=str(tmp_path)) if "save_best" in way else {}),
        },
    )
    assert np.isfinite(np.array(learn.recorder.values, float)).all()
    assert there(learn)


@pytest.mark.parametrize(
    "way",
    [dict(loss=l) for l in ("cross_entropy", "focal", "label_smoothing")]
    + [dict(optimizer=o, learning_rate=1e-3) for o in ("adamw", "sgd", "rmsprop")]
    + [
        dict(preset=p)
        for p in ("default", "fast_convergence", "strong_regularization", "sgd_baseline")
    ]
    + [
        dict(schedule=s, max_epochs=2)
        for s in (
            "constant",
            "cosine",
            "one_cycle",
            "plateau",
            "warm_restarts",
            "warmup_cosine",
            "warmup_linear",
            "noam",
            "polynomial",
            "flat_cosine",
        )
    ],
    ids=lambda w: "-".join(map(str, w.values())),
)
def test_losses_optimisers_and_schedules_by_name(records, way):
    learn = fitted(records[:9], model="cnn", window=1024, batch_size=32, **way)
    assert np.isfinite(np.array(learn.recorder.values, float)).all()


def test_contrast_of_features(records, teacher, refused):
    "As a parameter it draws the features of one fault together; it needs features, and no teacher."

    def apart(weight):
        learn = fitted(records, model="cnn", window=1024, max_epochs=4, contrastive=weight, seed=3)
        model = learn.model.eval()
        model.keep_features = True
        inputs, mask, labels = learn.windows.batch(learn.train)
        z = torch.nn.functional.normalize(model(inputs, mask)["features"].detach(), dim=-1)
        alike = labels[:, None] == labels
        return float((z @ z.T)[alike].mean() - (z @ z.T)[~alike].mean())

    assert apart(5.0) > apart(0.0)
    assert "a network with features" in refused(recipe, records, window=2048, contrastive=0.1)
    assert "beside a teacher" in refused(
        recipe, records, model="cnn", window=2048, contrastive=0.1, teacher=teacher
    )


def test_contrast_without_a_positive():
    "A batch in which no two windows have one class has no pair to draw together: the loss is 0, and so is its gradient."
    z = torch.randn(3, 8, requires_grad=True)
    value = create_loss("supervised_contrastive", temperature=0.1)(z, torch.tensor([0, 1, 2]))
    value.backward()
    assert value.item() == 0
    assert z.grad.isfinite().all()
    assert not z.grad.any()
    one = create_loss("supervised_contrastive")(torch.randn(1, 8), torch.tensor([0]))
    assert one.item() == 0
    mixed = create_loss("supervised_contrastive", reduction="none")(
        torch.randn(4, 8), torch.tensor([0, 0, 1, 2])
    )
    assert (mixed[:2] > 0).all()
    assert not mixed[2:].any()


# searches


@pytest.fixture(scope="module")
def windows():
    return RecordWindows(rolling_set(seconds=0.5, snr=-6), 3000)


SMALL = dict(
    random_forest=dict(n_estimators=[3, 6], max_depth=[2, None]),
    svm=dict(C=[0.1, 10.0], gamma=["scale", 0.01]),
    boosting=dict(learning_rate=[0.1, 0.3], max_iter=[2, 4]),
)


@pytest.mark.parametrize("method", ["grid", "random", "bayes"])
@pytest.mark.parametrize("kind", SMALL)
def test_every_search_of_every_classical_model(windows, kind, method):
    "Sizes are left out as a whole; the history has all trials; importance and the pictures can be drawn."
    import matplotlib

    matplotlib.use("Agg")
    if method == "bayes":
        pytest.importorskip("optuna")
    assert set(SMALL[kind]) <= set(se.SPACES[kind])
    objective = se.classifier_objective(
        kind, window_features(windows), windows.labels, windows.diameters
    )
    found = se.search(objective, SMALL[kind], method, 4, seed=1)
    assert len(found.history) == 4
    assert not found.leak
    assert {"score", "best", "seconds", *SMALL[kind]} <= set(found.history)
    assert found.score == found.history.score.max() <= 1
    assert objective(found.best) == pytest.approx(found.score)
    weight = se.parameter_importance(found)
    assert (
        set(weight.index) == set(SMALL[kind])
        and weight.sum() == pytest.approx(1, abs=1e-6)
        or not weight.any()
    )
    for draw in (
        lambda: se.plot_searches(found.history),
        lambda: se.plot_importance(weight),
        lambda: se.plot_settings(found, *SMALL[kind]),
    ):
        assert draw().figure
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("method", ["grid", "random", "bayes"])
def test_every_search_of_a_net(method):
    "The validation side is a defect size that the net has not trained on; the test fold is not looked at."
    if method == "bayes":
        pytest.importorskip("optuna")
    records = rolling_set(seconds=0.5, snr=0.0)
    seen = []

    def make(learning_rate, judge):
        learn = recipe(
            records,
            fold=2,
            inner=0,
            window=3000,
            max_epochs=1,
            learning_rate=learning_rate,
            judge=judge,
            device="cpu",
            workers=0,
        )
        seen.append(
            ({*learn.windows.diameters[learn.train]}, {*learn.windows.diameters[learn.valid]})
        )
        return learn

    def quiet(learn):
        with learn.no_bar(), learn.no_logging():
            fit(learn)

    found = se.search(
        se.learner_objective(make, quiet),
        dict(learning_rate=[0.003, 0.03], judge=["monotone", "free"]),
        method,
        3,
        seed=0,
    )
    assert len(found.history) == 3
    assert np.isfinite(found.history.score).all()
    assert all(a == {"014"} and b == {"007"} for a, b in seen)


# bad input


def test_names_that_are_not_known(records, refused):
    "One sentence with what there is."
    for bad, words in (
        (dict(model="gru"), "one of order_net"),
        (dict(loss="hinge"), "cross_entropy"),
        (dict(optimizer="lamb"), "adamw"),
        (dict(schedule="step"), "one_cycle"),
        (dict(preset="best"), "fast_convergence"),
        (dict(model="spectrogram", representation="gabor"), "stft, cwt, wigner"),
        (dict(split="random"), "bearing, load, leak"),
        (dict(precision="fp8"), "bf16"),
        (dict(mixing="cut"), "cutmix"),
        (dict(augment="stretch"), "time_warp"),
    ):
        sentence = refused(recipe, records, window=2048, **bad)
        assert words in sentence
        assert "\n" not in sentence


def test_windows_shorter_than_the_network(records, refused):
    "Both lengths are said; what a network needs is not filled up silently."
    assert "window: expected at least 1024 samples, for model=cnn, found 512" in refused(
        recipe, records, model="cnn", window=512
    )
    assert "at least 512 samples, for model=spectrogram, found 300" in refused(
        recipe, records, model="spectrogram", window=300
    )
    assert "at least a window of 99999 samples, found 6000" in refused(
        recipe, records, window=99999
    )


def test_bad_folders_are_one_sentence_each(tmp_path):
    "Missing speed and rate, a wrong rate, clipped, constant, short, unknown faults and MATLAB 7.3, all in one folder."
    good = rolling_record("outer", seed=0, seconds=2.0)
    t = np.arange(96000) / 48000
    lines = sum(
        np.sin(2 * np.pi * 29 * k * t + k) / k for k in range(1, 9)
    ) + 0.2 * np.random.default_rng(0).standard_normal(96000)
    write_records(
        tmp_path,
        [
            Record(n, x, 12000.0, 1740.0, f, "007", "0", n, good.orders)
            for n, x, f in (
                ("speed", good.signal, "outer"),
                ("rate", good.signal, "inner"),
                ("fast", lines, "ball"),
                ("clipped", good.signal.clip(-0.5, 0.5), "outer"),
                ("still", np.ones(6000), "inner"),
                ("gear", good.signal, "ball"),
                ("new", good.signal, "outer"),
            )
        ],
    )
    table = pd.read_csv(tmp_path / "labels.csv", dtype=dict(diameter=str)).set_index("file")
    table.loc["speed.npy", "rpm"] = np.nan
    table.loc["rate.npy", "fs"] = np.nan
    table.loc["gear.npy", "fault"] = "gear"
    (tmp_path / "new.mat").write_bytes(
        b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124)
        + b"\x00\x02IM"
        + b"\x89HDF\r\n\x1a\n"
        + bytes(400)
    )
    table.rename(index={"new.npy": "new.mat"}).reset_index().to_csv(
        tmp_path / "labels.csv", index=False
    )
    found = [s for s in check(tmp_path) if "only the bearing" not in s]
    for words in (
        "rpm of speed.npy",
        "fs of rate.npy",
        "fit 48000 Hz better than 12000 Hz",
        "as if clipped",
        "the same value 1",
        "one of outer, inner, ball",
        "version 7.3",
    ):
        assert sum(words in s for s in found) == 1, (words, found)
    assert all("\n" not in s and s.endswith(".") for s in found)
    assert len(found) == 7


def test_one_bearing_for_a_class(tmp_path):
    "Nothing can be said about another one, which the check says."
    write_records(tmp_path, rolling_set(seconds=0.2)[::9])
    assert sum("only the bearing" in s for s in check(tmp_path)) == 3


def test_journal_records_take_a_net_and_refuse_the_lines(refused):
    "The eleven conditions need no geometry, and a model of lines has none to go by."
    journal = [
        journal_record(f, s, seed=i, seconds=0.5, name=f"{f}{s}")
        for i, (f, s) in enumerate(
            (f, s) for f in ("healthy", "wear", "oil_whirl") for s in ("mild", "severe")
        )
    ]
    learn = fitted(journal, model="cnn")
    assert learn.windows.classes == ["healthy", "wear", "oil_whirl"]
    assert learn.model.fault.out_features == 3
    assert "without bearing geometry" in refused(recipe, journal, window=2048)
