"From files to answers: splits, options, the table of epochs, weights, resume, refusals, and simple methods against their definitions."

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from gcode_ml.core.errors import InputError
from gcode_ml.lab.bundle import load_bundle, save_bundle
from gcode_ml.lab.snapshot import Snapshot
from gcode_ml.sign.augment import FrameEdge
from gcode_ml.sign.callbacks import COLUMNS
from gcode_ml.sign.comparison import baseline_rows, without_gloss
from gcode_ml.sign.data import ClipData
from gcode_ml.sign.evaluate import (
    Occluded,
    add_gloss,
    added_sign_scores,
    baseline_predictions,
    confusion_pairs,
    dtw_distances,
    dtw_nearest_neighbour,
    fine_tune_gloss,
    fit_temperature,
    latency,
    merge_windows,
    nearest_neighbour,
    no_sign_scores,
    predict_logits,
    prediction_rows,
    reject_curve,
    sign_scores,
    signer_table,
    stream_scores,
    threshold_for,
)
from gcode_ml.sign.loading import clip_sets, load_clips
from gcode_ml.sign.models import SignConv, SignTransformer
from gcode_ml.sign.predict import (
    evaluate_bundle,
    predict_bundle,
    prediction_table,
    preprocessing_state,
)
from gcode_ml.sign.recipe import recipe, smoke_test, style_callbacks
from gcode_ml.sign.simulate import simulate_clips
from gcode_ml.sign.skeleton import Preparation, prepare_clips
from gcode_ml.sign.streams import concatenate_clips, detect_signs, stream_windows
from gcode_ml.training.callbacks import load_checkpoint
from gcode_ml.training.fit import fit

SMALL = dict(width=16, num_layers=1, max_epochs=2, batch_size=16, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    simulate_clips(folder, glosses=4, signers=3, repetitions=3, seed=1)
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return load_clips(folder)


def quiet(learn):
    with learn.no_bar(), learn.no_logging():
        fit(learn)
    return learn


@pytest.fixture(scope="module")
def fitted(source):
    return quiet(recipe(source, fold=1, **{**SMALL, "max_epochs": 12, "width": 32}))


def test_sides_share_no_signer(source):
    "For every fold and every kind of validation."
    clips, _ = source
    signer = np.array([c.signer for c in clips])
    for fold in range(3):
        for kind in ("none", "signer", "fraction"):
            train, valid, test, note = clip_sets(clips, fold=fold, validation=kind)
            assert not {*signer[train], *signer[valid]} & {*signer[test]}
            assert note.startswith("signer ")
            if kind != "none":
                assert not set(train) & set(valid)
            if kind == "signer":
                assert not {*signer[train]} & {*signer[valid]}


def test_random_split_says_so(source):
    with pytest.warns(UserWarning, match="same signers"):
        assert "leaky" in recipe(source, split="leaky", **SMALL).note


def test_a_fit_learns_and_repeats(source, fitted):
    "Better than chance on a new signer; the same seed gives the same weights."
    rows = prediction_rows(
        predict_logits(fitted.model, fitted.data, fitted.test),
        fitted.data,
        fitted.test,
        fitted.names["category_of"],
    )
    assert sign_scores(rows)["top1"] > 0.4
    one, two = (quiet(recipe(source, fold=0, **SMALL)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters()))


def test_table_of_epochs_and_weights(source, tmp_path):
    "Nine columns, epochs from 1, the loss of every clip once; last and best weights under the model's name."
    learn = quiet(
        recipe(
            source,
            validation="signer",
            log_csv=tmp_path / "log.csv",
            checkpoint_folder=str(tmp_path),
            **SMALL,
        )
    )
    log = pd.read_csv(tmp_path / "log.csv")
    assert list(log) == COLUMNS
    assert log.epoch.tolist() == [1, 2]
    assert log.notna().all().all()
    other = SignConv(**learn.arguments)
    facts = load_checkpoint(other, tmp_path / "SignConv_last.safetensors")
    assert facts["epoch"] == 2
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), learn.model.parameters()))
    best = load_checkpoint(other, tmp_path / "SignConv_best.safetensors")
    values = learn.recorder.values
    assert best["gloss_accuracy"] == pytest.approx(max(v[2] for v in values))


def test_training_loss_is_the_mean_over_clips(source, tmp_path):
    "With a learning rate of next to nothing it is the loss of the model as it is, the short last batch counted by its clips."
    learn = recipe(
        source,
        model="bigru",
        augmentation="none",
        dropout=0.0,
        learning_rate=1e-9,
        schedule="constant",
        log_csv=tmp_path / "log.csv",
        **{**SMALL, "max_epochs": 1, "batch_size": 7},
    )
    quiet(learn)
    learn.model.train()
    with torch.no_grad():
        inputs, mask, targets = learn.data.batch(learn.train)
        loss = learn.loss_func(learn.model(inputs, mask), targets).item()
    assert pd.read_csv(tmp_path / "log.csv").train_loss[0] == pytest.approx(loss, rel=1e-4)


class Stop(Exception):
    pass


def test_resume_is_bit_exact(source, tmp_path):
    "Interrupted after one epoch and in the middle of one, then carried on: the same weights and the same table, without gap or repetition."
    from fastai.callback.core import Callback

    class Interrupt(Callback):
        order, run_valid = 2000, False

        def __init__(self, epoch, batch):
            self.at = epoch, batch

        def after_batch(self):
            if (self.epoch, self.iter) == self.at:
                raise Stop("here")

    def made(name, *cbs):
        return recipe(
            source, fold=0, log_csv=tmp_path / f"{name}.csv", cbs=cbs, **{**SMALL, "max_epochs": 3}
        )

    whole = quiet(made("whole"))
    learn = made("cut", Snapshot(tmp_path / "s.safetensors", batches=1), Interrupt(1, 0))
    with pytest.raises(Stop):
        quiet(learn)
    again = quiet(made("cut", Snapshot(tmp_path / "s.safetensors", batches=1)))
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values())
    )
    a, b = (pd.read_csv(tmp_path / f"{k}.csv").drop(columns="epoch_time") for k in ("whole", "cut"))
    assert b.epoch.tolist() == [1, 2, 3]
    assert np.allclose(a, b)


def test_founding_options(source):
    "Raw points, own lengths, the original's optimiser settings; what is given wins."
    learn = recipe(source, founding=True, width=16, nhead=2, num_layers=1, device="cpu")
    o = learn.options
    assert isinstance(learn.model, SignTransformer)
    assert learn.preparation.channels == 156
    assert learn.preparation.frames is None
    assert (
        o.max_epochs,
        o.batch_size,
        o.learning_rate,
        o.weight_decay,
        o.schedule,
        o.clip,
        o.values["loss"],
    ) == (20, 32, 1e-4, 0, "constant", 0, "cross_entropy")
    assert (
        recipe(
            source, founding=True, width=16, nhead=2, num_layers=1, max_epochs=7, device="cpu"
        ).options.max_epochs
        == 7
    )
    x = learn.data.batch([0])[0]["channels"][0]
    clip = learn.clips[0]
    assert torch.equal(
        x, torch.from_numpy(np.where(clip.seen[..., None], clip.points, 0).reshape(len(clip), -1))
    )


def test_two_folders(folder, tmp_path):
    "Sides of their own; one alone is refused."
    learn = recipe(keypoints_train=folder, keypoints_val=folder, **SMALL)
    assert len(learn.train) == len(learn.valid) == 36
    assert not set(learn.train) & set(learn.valid)
    with pytest.raises(InputError, match="a folder each"):
        recipe(keypoints_val=folder)


@pytest.mark.parametrize(
    "bad,words",
    [
        (dict(gloss_weight=0.0, category_weight=0.0), "not all 0"),
        (dict(learning_rate=-1.0), "learning_rate"),
        (dict(model="lstm"), "transformer, iv3_gru"),
        (dict(max_epochs=0), "max_epochs"),
        (dict(fold=9), "one per signer"),
        (dict(augmentation="strong"), "signer, none"),
        (dict(validation="test"), "none, signer, fraction"),
        (dict(epochs=3), "epochs"),
        (dict(normalise="face"), "normalise"),
        (dict(canonical_hand="left"), "auto, yes, no"),
    ],
)
def test_options_are_checked(source, bad, words):
    with pytest.raises(InputError, match=words):
        recipe(source, **{**SMALL, **bad})


def test_one_signer_cannot_be_left_out(source):
    clips, facts = source
    alone = [c for c in clips if c.signer == clips[0].signer]
    with pytest.raises(InputError, match="two or more"):
        recipe((alone, facts), **SMALL)


def test_a_loss_that_is_no_number_names_the_clips(source):
    clips, facts = source
    clips = list(clips)
    learn = recipe((clips, facts), fold=0, **SMALL)
    with torch.no_grad():
        next(learn.model.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="with .*lower the learning rate"):
        quiet(learn)


def test_fit_and_predict_prepare_alike(source, fitted):
    "The tensor of a fit is the tensor of a prediction."
    again = Preparation.from_json(preprocessing_state(fitted)["preparation"])
    inputs, _, _ = fitted.data.batch(fitted.test)
    assert all(
        torch.equal(x, torch.from_numpy(again(fitted.clips[i])).nan_to_num(0.0))
        for x, i in zip(inputs["channels"], fitted.test)
    )


def test_bundle_predicts_and_refuses(folder, fitted, tmp_path):
    "Five answers a clip, names, the reason of a refusal; other clips are answered although one is broken."
    save_bundle(
        tmp_path / "bundle",
        fitted.model,
        fitted.arguments,
        preprocessing_state(fitted, threshold=0.0),
        dict(domain="sign", trained_on=sorted(set(fitted.data.signer[fitted.train]))),
    )
    bundle = load_bundle(tmp_path / "bundle")
    clips = tmp_path / "clips"
    clips.mkdir()
    for f in sorted(folder.rglob("*.npz"))[:4]:
        (clips / f.name).write_bytes(f.read_bytes())
    broken = sorted(clips.iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:100])
    table = predict_bundle(bundle, clips)
    assert table.reject.tolist() == [False, True, False, False]
    assert broken.name in table.reason[1]
    assert set(table.gloss1.dropna()) <= set(fitted.names["gloss"])
    assert (table.probability1.dropna() >= table.probability2.dropna()).all()
    unsure = replace(fitted.clips[0])
    state = preprocessing_state(fitted, threshold=1.1)
    assert "not sure enough" in prediction_table(fitted.model, state, [unsure]).reason[0]
    table, _ = evaluate_bundle(bundle, folder)
    assert set(table.split) == {"new", "trained on"}
    assert {"S", "macro_f1"} & set(table.measure)
    with pytest.raises(InputError, match="folder of them"):
        predict_bundle(bundle, tmp_path / "nothing")


def test_bundle_of_another_layout_is_refused(source, fitted):
    "Features are no points."
    clips, _ = source
    other = replace(clips[0], points=None, seen=None, features=np.zeros((9, 64), "float32"))
    assert (
        "expected pose78, found features"
        in prediction_table(fitted.model, preprocessing_state(fitted), [other]).reason[0]
    )


def test_channels_that_are_no_points():
    "Neither mirrored nor turned; standardised on the training clips; any length."
    from gcode_ml.sign.data import Clip

    r = np.random.default_rng(0)
    clips = [
        Clip(
            f"{s}{i}",
            channels=r.normal(i % 2, 1, (int(r.integers(3, 30)), 6)).astype("float32") * 9,
            timestamps_ms=None,
            gloss=i % 2,
            category=0,
            signer=s,
            recording=f"{s}{i}",
        )
        for s in "ABC"
        for i in range(8)
    ]
    for c in clips:
        c.timestamps_ms = np.arange(len(c)) * 40
    learn = quiet(
        recipe(
            (clips, dict(names=dict(gloss=["a", "b"], category=["c"], category_of=[0, 0]))),
            frames=0,
            **SMALL,
        )
    )
    names = [
        type(a).__name__
        for cb in learn.cbs
        if hasattr(cb, "augmentations")
        for a in cb.augmentations
    ]
    assert "CropResize" in names
    assert not {"Mirror", "Affine"} & set(names)


def test_rehearsal():
    "Both founding models, from files to an answer."
    table = smoke_test()
    assert table.model.tolist() == ["SignTransformer", "InceptionV3GRU"]
    assert (table.moved > 0).all()


def test_frames_are_read_by_the_model(tmp_path, monkeypatch):
    "Frames of the files go through the image net, which stays as it is; its weights come from a file or are random on purpose."
    import gcode_ml.sign.models as models

    class ImageNet(torch.nn.Sequential):
        def __init__(self):
            super().__init__(
                torch.nn.Conv2d(3, 2048, 3, 4),
                torch.nn.BatchNorm2d(2048),
                torch.nn.AdaptiveAvgPool2d(1),
                torch.nn.Flatten(),
            )

    monkeypatch.setattr(models, "create_backbone", lambda name: ImageNet())
    simulate_clips(tmp_path, glosses=2, signers=2, repetitions=2)
    for f in tmp_path.rglob("*.npz"):
        with np.load(f) as z:
            arrays = dict(z)
        np.savez(
            f,
            **arrays,
            frames=np.random.default_rng(0).integers(
                0, 256, (len(arrays["X"]), 12, 12, 3), dtype="uint8"
            ),
        )
    with pytest.raises(InputError, match="pretrained_backbone=false"):
        recipe(tmp_path, model="iv3_gru", backbone="inception_v3")
    learn = recipe(
        tmp_path,
        model="iv3_gru",
        backbone="inception_v3",
        pretrained_backbone=False,
        max_epochs=1,
        batch_size=2,
        device="cpu",
    )
    before = {k: v.clone() for k, v in learn.model.backbone.state_dict().items()}
    quiet(learn)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.backbone.state_dict().items())
    assert predict_logits(learn.model, learn.data, learn.test)["gloss"].shape == (4, 2)


def test_a_clip_that_shows_nobody(source):
    "Refused in training or left out there; in the test it stays, and is answered."
    clips, facts = source
    clips = list(clips)
    clips[0] = replace(clips[0], seen=np.zeros_like(clips[0].seen))
    who = sorted({c.signer for c in clips}).index(clips[0].signer)
    with pytest.raises(InputError, match="empty=skip"):
        recipe((clips, facts), fold=(who + 1) % 3, **SMALL)
    assert 0 not in recipe((clips, facts), fold=(who + 1) % 3, empty="skip", **SMALL).train
    learn = recipe((clips, facts), fold=who, **SMALL)
    assert 0 in learn.test
    assert np.isfinite(predict_logits(learn.model, learn.data, learn.test)["gloss"]).all()
    assert len(baseline_rows(learn, ("nearest",))) == len(learn.test)


def test_more_classes_than_occur(source):
    "Given numbers of classes are those of the heads."
    learn = recipe(source, num_gloss=9, num_cat=5, **SMALL)
    assert learn.model.gloss.out_features == 9
    assert learn.model.category.out_features == 5
    assert len(learn.names["category_of"]) == 9
    rows = prediction_rows(
        predict_logits(learn.model, learn.data, learn.test),
        learn.data,
        learn.test,
        learn.names["category_of"],
    )
    assert rows.category_summed.between(0, 4).all()


# --- evaluation


def test_scores_by_hand():
    rows = pd.DataFrame(
        dict(
            gloss=[0, 0, 1, 1],
            predicted=[0, 1, 1, 1],
            rank=[0, 1, 0, 0],
            category=0,
            category_predicted=[0, 0, 0, 1],
            probability=[0.6, 0.7, 0.8, 0.9],
            true_probability=[0.6, 0.3, 0.8, 0.9],
            square=[0.52, 0.58, 0.68, 0.82],
            signer=["A", "A", "B", "B"],
        )
    )
    s = sign_scores(rows)
    assert s["top1"] == 0.75
    assert s["top5"] == 1
    assert s["category"] == 0.75
    assert s["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert s["nll"] == pytest.approx(-np.log([0.6, 0.3, 0.8, 0.9]).mean())
    assert s["brier"] == pytest.approx(np.mean([0.32, 0.98, 0.08, 0.02]))
    assert signer_table(rows).index.tolist()[0] == "A"
    assert confusion_pairs(rows).iloc[0].tolist() == [0, 1, 1, 0.5]


def test_absent_gloss_is_left_out_of_the_average():
    rows = pd.DataFrame(
        dict(gloss=[0, 0], predicted=[0, 0], rank=0, category=0, category_predicted=0, signer="A")
    )
    assert sign_scores(rows)["macro_f1"] == 1
    assert sign_scores(rows)["glosses"] == 1


def test_warped_neighbours_are_the_plain_ones():
    "Band and lower bound change no answer."
    r = np.random.default_rng(0)
    base = r.normal(size=(5, 4, 24)).cumsum(2)
    x = np.stack([base[i % 5][:, np.sort(r.integers(0, 24, 24))].T for i in range(60)]).astype(
        "float32"
    ) + r.normal(0, 0.1, (60, 24, 4)).astype("float32")
    y = np.arange(60) % 5
    width = round(24 / 8)
    plain = [y[:40][np.argmin([_dtw(q, t, width) for t in x[:40]])] for q in x[40:]]
    assert dtw_nearest_neighbour(x[:40], y[:40], x[40:]).tolist() == plain
    assert dtw_distances(x[0], x[1:3], 24) == pytest.approx(
        [_dtw(x[0], t, 24) for t in x[1:3]], rel=1e-4
    )


def _dtw(a, b, width):
    d = np.full((len(a) + 1, len(b) + 1), np.inf)
    d[0, 0] = 0
    for i in range(len(a)):
        for j in range(max(0, i - width), min(len(b), i + width + 1)):
            d[i + 1, j + 1] = ((a[i] - b[j]) ** 2).sum() + min(d[i, j], d[i, j + 1], d[i + 1, j])
    return d[-1, -1]


def test_missing_values_of_neighbours():
    "A point that is missing everywhere changes nothing."
    r = np.random.default_rng(0)
    x = r.normal(size=(30, 8, 4))
    y = np.arange(30) % 3
    z = x.copy()
    z[:, :, 3] = np.nan
    assert (
        nearest_neighbour(z[:20], y[:20], z[20:])
        == nearest_neighbour(x[:20, :, :3], y[:20], x[20:, :, :3])
    ).all()


def test_minirocket_is_named_where_it_is_absent():
    try:
        import aeon  # noqa: F401

        pytest.skip("aeon is installed")
    except ImportError:
        pass
    with pytest.raises(InputError, match="not installed"):
        baseline_predictions(
            "minirocket", np.zeros((4, 10, 2)), np.array([0, 1, 0, 1]), np.zeros((1, 10, 2))
        )


def test_temperature_threshold_and_no_sign():
    r = np.random.default_rng(0)
    z = r.normal(size=(3000, 4)) * 2
    p = np.exp(z - np.logaddexp.reduce(z, 1)[:, None])
    y = (p.cumsum(1) > r.random((3000, 1))).argmax(1)
    assert fit_temperature(z * 0.5, y) == pytest.approx(0.5, rel=0.1)
    sure = p.max(1)
    right = p.argmax(1) == y
    limit = threshold_for(sure, right, 0.9)
    assert right[sure >= limit].mean() >= 0.9
    assert reject_curve(sure, right).coverage.iloc[-1] == 1
    assert no_sign_scores([0.9, 0.8], [0.1, 0.2])["auroc"] == 1
    assert no_sign_scores([0.5] * 4, [0.5] * 4)["auroc"] == 0.5


def test_occlusion_hides_what_it_says(source, fitted):
    "A share of the frames in one run, nothing else, the same every time; what is hidden has no value."
    hidden = Occluded(fitted.data, [15, 16], 0.3)
    inputs, mask, _ = fitted.data.batch(fitted.test[:4])
    a = hidden.batch(fitted.test[:4])
    b = hidden.batch(fitted.test[:4])
    gone = inputs["present"] & ~a[0]["present"]
    assert torch.equal(a[0]["present"], b[0]["present"])
    assert set(gone.any(1).any(0).nonzero().ravel().tolist()) <= {30, 31, 32, 33}
    assert (gone[..., 30].sum(1) == 12).all()
    assert (a[0]["channels"][gone] == 0).all()


def test_a_new_sign(source):
    "A prototype leaves the old rows alone, tuning leaves the model alone that it comes from."
    torch.manual_seed(0)
    model = SignConv(8, 3, 2, width=8)
    centre = torch.randn(4, 16)
    states = centre.repeat_interleave(10, 0) * 3 + 0.1 * torch.randn(40, 16)
    gloss = torch.arange(4).repeat_interleave(10)
    more = add_gloss(model, states[30:35], states[:30])
    assert torch.equal(more.gloss.weight[:3], model.gloss.weight)
    assert model.gloss.out_features == 3
    tuned = fine_tune_gloss(more, torch.cat([states[:35]]), gloss[:35])
    assert (tuned.gloss(states).argmax(1) == gloss).float().mean() > 0.95
    with pytest.raises(InputError, match="hidden layer"):
        add_gloss(SignTransformer(12, 3, 2, 16, 2, 1, 16), states[:5])


def test_windows_become_signs():
    assert merge_windows(
        np.arange(0, 60, 10), 20, [1, 1, 2, 2, 2, 0], [0.9, 0.9, 0.3, 0.9, 0.9, 0.9]
    )[["start", "stop", "gloss"]].values.tolist() == [[0, 30, 1], [30, 60, 2]]
    assert not len(merge_windows([], 20, [], []))


def test_stream_finds_nobody_in_an_empty_room(fitted):
    clip = fitted.clips[0]
    empty = replace(clip, seen=np.zeros_like(clip.seen))
    assert not len(detect_signs(fitted.model, preprocessing_state(fitted), empty, threshold=0.1))


def test_a_stream_of_known_signs(source, fitted):
    "Windows cover the stream in equal steps; a clip in the stream is prepared as it is alone; a wrong word, a word between two signs and a word said twice count as they should."
    clips = [source[0][i] for i in fitted.test[:4]]
    long, truth = concatenate_clips(clips)
    assert len(long) == sum(map(len, clips)) == truth.stop.iloc[-1]
    assert (np.diff(long.timestamps_ms) > 0).all()
    assert truth.gloss.tolist() == [c.gloss for c in clips]
    second = slice(truth.start[1], truth.stop[1])
    part = replace(
        long,
        points=long.points[second],
        seen=long.seen[second],
        timestamps_ms=long.timestamps_ms[second],
    )
    np.testing.assert_allclose(
        np.nan_to_num(fitted.preparation(part)),
        np.nan_to_num(fitted.preparation(clips[1])),
        atol=1e-3,
    )
    arrays, starts, size = stream_windows(fitted.preparation, long, 1.0, 0.2)
    period = np.median(np.diff(long.timestamps_ms)) / 1000
    assert size == round(1 / period)
    assert set(np.diff(starts)) == {round(0.2 / period)}
    assert starts[-1] + size <= len(long)
    assert all(len(a) == 40 for a in arrays if a is not None)
    truth = pd.DataFrame(dict(start=[0, 50, 100], stop=[40, 90, 140], gloss=[1, 2, 1]))
    predicted = pd.DataFrame(
        dict(start=[0, 20, 40, 60, 100], stop=[20, 40, 50, 80, 130], gloss=[1, 1, 1, 1, 1])
    )
    assert stream_scores(predicted, truth) == dict(signs=3, predicted=5, found=2 / 3, right=0.6)
    assert stream_scores(predicted[:0], truth)["found"] == 0


def test_the_mirror_image_is_looked_at_where_there_is_one(source):
    "Points in the frame of a body that is not turned around already; neither as they are stored nor with `canonical_hand`."

    def pairs(**options):
        return recipe(source, **{**SMALL, **options}).arguments

    assert len(pairs()["pairs"]) > 20
    assert len(pairs()["bones"]) == 11
    assert pairs()["centred"]
    assert not pairs(centred=False)["centred"]
    assert not pairs(normalise="none", aspect=False)["centred"]
    assert not pairs(mirror_image=False)["pairs"]
    assert not pairs(directions=False)["bones"]
    assert not pairs(canonical_hand="yes")["pairs"]
    stored = pairs(normalise="none", aspect=False)
    assert not stored["pairs"]
    assert not stored["bones"]


def test_without_a_gloss(source):
    clips, facts = without_gloss(*source, 2)
    assert {c.gloss for c in clips} == {0, 1, 2}
    assert facts["names"]["gloss"] == [
        n for i, n in enumerate(source[1]["names"]["gloss"]) if i != 2
    ]


def test_several_new_glosses_are_asked_one_by_one(source):
    "Clips of the other glosses that the model does not know take no part, and recordings are those of the training side."
    clips, facts = source
    out = [0, 2]
    learn = quiet(recipe(without_gloss(clips, facts, out), fold=1, **SMALL))
    assert learn.model.gloss.out_features == 2
    whole = ClipData(prepare_clips(clips, learn.preparation), clips)
    here = whole.signer != "S02"
    for new in out:
        t = added_sign_scores(
            learn.model,
            whole,
            np.flatnonzero(here),
            np.flatnonzero(~here),
            new,
            known=[1, 3],
            augmentations=style_callbacks(learn.preparation, "signer")[0].augmentations,
        ).set_index("way")
        assert list(t.index) == ["before", "prototype", "fine-tuned", "fine-tuned, varied"]
        assert t.new_sign["before"] == 0
        right = predict_logits(
            learn.model, whole, np.flatnonzero(~here & np.isin(whole.gloss, [1, 3]))
        )["gloss"].argmax(1) == np.searchsorted(
            [1, 3], whole.gloss[~here & np.isin(whole.gloss, [1, 3])]
        )
        assert t.known_signs["before"] == pytest.approx(right.mean())


def test_the_edge_of_a_picture(source):
    "Nothing is below the edge, nothing above it moves, and it is drawn only where units are shoulder widths."
    x = torch.randn(50, 6, 8) * 3
    mask = torch.ones(50, 6, dtype=torch.bool)
    y = FrameEdge(1.0, 2.0, p=1.0)(x, mask)
    low = y[..., 1::2].amax((1, 2))
    assert (low <= 2.0).all()
    assert low.std() > 0.1
    assert torch.equal(y[..., ::2], x[..., ::2])
    assert torch.equal(y[..., 1::2], torch.minimum(x[..., 1::2], low[:, None, None]))

    def edges(**options):
        return "FrameEdge" in str(
            [
                a.augmentations
                for a in style_callbacks(Preparation(**options).fit(source[0]), "signer", edge=0.4)
            ]
        )

    assert edges()
    assert not edges(normalise="none", aspect=False)


def test_small_model_is_faster():
    "A quarter of the transformer's time, a tenth of its parameters."
    torch.manual_seed(0)
    small = SignConv(50)
    large = SignTransformer()
    assert sum(p.numel() for p in small.parameters()) * 10 < sum(
        p.numel() for p in large.parameters()
    )
    assert latency(small, 60, 10) * 2 < latency(
        large, 60, 10
    )  # the goal is 4; half of it here, where other work runs beside the test
