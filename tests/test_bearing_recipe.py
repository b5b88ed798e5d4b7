"Diagnosis of bearings: what the models promise, how they are trained, and that they work on another rig."

import numpy as np
import pandas as pd
import pytest
import torch

from gcode_ml.bearing.data import BEARINGS, FAULTS, Geometry, Record, RecordWindows, write_records
from gcode_ml.bearing.evaluate import (
    class_table,
    coverage_curve,
    fold_scores,
    outcome_table,
    predict_windows,
    record_votes,
    score_table,
)
from gcode_ml.bearing.models import (
    MODELS,
    NOISE_EVIDENCE,
    BandPenalty,
    LinePenalty,
    OrderNet,
    OrderSpectrumFrontEnd,
    SpectrogramCNN,
    defect_line_orders,
)
from gcode_ml.bearing.recipe import (
    MODEL_DEFAULTS,
    evaluate_bundle,
    predict_bundle,
    preprocessing,
    recipe,
)
from gcode_ml.bearing.simulate import rolling_record, rolling_records, rolling_set
from gcode_ml.lab.bundle import load_bundle, save_bundle
from gcode_ml.training.fit import fit


def fitted(**kwargs):
    learn = recipe(**{"device": "cpu", "window": 6000, **kwargs})
    with learn.no_bar(), learn.no_logging():
        fit(learn)
    return learn


@pytest.fixture(scope="module")
def records():
    return rolling_set(seconds=1.0, snr=-3.0)


@pytest.fixture(scope="module")
def learn(records):
    return fitted(data=records, max_epochs=30)


@pytest.fixture(scope="module")
def bundle(learn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(
        folder,
        learn.model,
        learn.arguments,
        preprocessing(learn),
        dict(
            domain="bearing",
            data={},
            trained_on=sorted(set(learn.windows.bearings[learn.train])),
            metrics={},
        ),
    )
    return load_bundle(folder)


def windows_of(records, size=12000):
    w = RecordWindows(records, size)
    return w.batch(range(len(w)))


def test_evidence_follows_the_definition():
    "The evidence is log(peak/median) of the padded envelope spectrum of a prewhitened band, computed here with NumPy."
    r = rolling_record("outer", seed=1, snr=0.0)
    inputs, mask, _ = windows_of([r])
    x = inputs["signal"][0, :, 0].double().numpy()
    n = len(x)
    X = np.fft.rfft(x - x.mean())
    x = np.fft.irfft(X / (np.abs(X) + 1e-9), n)
    Z = np.fft.fft(x)
    f = np.fft.fftfreq(n, 1 / 12000)
    Z[(f < 2800) | (f >= 4200)] = 0
    e = np.abs(np.fft.ifft(2 * Z)) ** 2
    E = np.abs(np.fft.rfft((e - e.mean()) * np.hanning(n), 4 * n))
    F = np.arange(len(E)) * 12000 / (4 * n)
    front = OrderSpectrumFrontEnd(bands=((2800.0, 4200.0),), sharpness=200.0)
    q = front(inputs["signal"][..., 0], inputs["shaft"], inputs["rate"], inputs["orders"])[0, 0]
    for h in range(3):
        for k in range(1, 4):
            f0 = k * r.orders[h] * r.shaft
            near, far = (np.abs(F - f0) <= w for w in (max(0.012 * f0, 0.75), 25))
            assert abs(np.log(E[near].max() / np.median(E[far])) - q[h, k - 1]) < 0.15


def test_evidence_moves_with_speed_and_geometry():
    "The right orders find the lines of any bearing at any speed and rate; wrong ones find nothing."
    for geometry, shaft, rate in (
        (Geometry(8, 1.0, 5.0, 15.0), 47.0, 12000.0),
        (Geometry(13, 1.0, 7.0), 17.0, 20000.0),
        (BEARINGS["6205"], 29.0, 25600.0),
    ):
        r = rolling_record("outer", geometry, shaft, rate, snr=0.0, seed=2)
        inputs, mask, _ = windows_of([r], len(r))
        model = OrderNet().eval()
        q = model.evidence(inputs, mask)[0].amax(0).mean(-1)
        assert q.argmax() == 0
        assert q[0] > q[1:].max() + 0.3
        wrong = (
            model.evidence(dict(inputs, orders=inputs["orders"][:, [1, 2, 0, 3]]), mask)[0]
            .amax(0)
            .mean(-1)
        )
        assert wrong.argmax() == 2


def test_hypotheses_share_their_judge():
    "Exchanging the orders of two hypotheses exchanges their scores, for both judges."
    inputs, mask, _ = windows_of(rolling_records(3, seed=0))
    for judge in ("monotone", "free"):
        torch.manual_seed(0)
        model = OrderNet(judge=judge).eval()
        a = model(inputs, mask)["fault"]
        b = model(dict(inputs, orders=inputs["orders"][:, [2, 1, 0, 3]]), mask)["fault"]
        torch.testing.assert_close(a[:, [2, 1, 0]], b, atol=1e-4, rtol=1e-4)


def test_monotone():
    "More evidence for a hypothesis never lowers its score, and leaves the others alone."
    torch.manual_seed(0)
    model = OrderNet().eval()
    q = torch.randn(40, 5, 3, 4)
    more = q.clone()
    more[:, :, 1] += torch.rand(40, 5, 4)
    a = model.score_evidence(q)["fault"]
    b = model.score_evidence(more)["fault"]
    assert (b[:, 1] >= a[:, 1] - 1e-6).all()
    torch.testing.assert_close(a[:, [0, 2]], b[:, [0, 2]])


def test_bands_and_lines_beyond_the_rate():
    "Of what a signal cannot hold there is no evidence, neither for nor against; nothing folds back."
    inputs, mask, _ = windows_of([rolling_record("inner", rate=6000.0, seed=0)], 6000)
    q = OrderSpectrumFrontEnd()(
        inputs["signal"][..., 0], inputs["shaft"], inputs["rate"], inputs["orders"]
    )
    assert (q[:, 2:4] != NOISE_EVIDENCE).any()
    assert (q[:, 3] == NOISE_EVIDENCE).all()
    assert q.isfinite().all()
    q = OrderSpectrumFrontEnd(harmonics=20)(
        inputs["signal"][..., 0], inputs["shaft"], inputs["rate"], inputs["orders"]
    )
    beyond = defect_line_orders(inputs["orders"], 20)[0] * inputs["shaft"][0] > 1000
    assert (q[0, 0][beyond] == NOISE_EVIDENCE).all()


def test_learned_bands_get_gradients(records):
    learn = fitted(data=records[::3], learn_bands=True, max_epochs=1)
    before = OrderNet(learn_bands=True).front.bands
    assert not torch.equal(before, learn.model.front.bands)


def test_laws_move_the_answer():
    "The gradient of the law raises the class whose lines are there; the control raises another; the law of the journal bearing too."
    inputs, mask, labels = windows_of(
        [rolling_record(f, snr=3.0, seed=i) for i, f in enumerate(FAULTS)]
    )
    for law, right in ((LinePenalty(), True), (LinePenalty(permute=True), False)):
        logits = torch.zeros(3, 3, requires_grad=True)
        law(dict(fault=logits), labels, inputs, mask).sum().backward()
        assert (logits.grad.argmin(1) == labels).all() == right
        assert logits.grad.abs().sum() > 0
    t = torch.arange(20480) / 20480
    x = torch.sin(2 * np.pi * 60 * t)[None, :, None]
    logits = torch.zeros(1, 2, requires_grad=True)
    BandPenalty(["misalignment", "imbalance"])(
        dict(fault=logits),
        None,
        dict(
            signal=x,
            shaft=torch.tensor([60.0]),
            rate=torch.tensor([20480.0]),
            orders=torch.zeros(1, 4),
        ),
        torch.ones(1, 20480, dtype=torch.bool),
    ).sum().backward()
    assert logits.grad[0].argmin() == 1


def test_unseen_bearings_are_named(learn):
    "At -3 dB every record of the size that was left out."
    p = predict_windows(learn.model, learn.windows, learn.test)
    o = outcome_table(learn.windows, learn.test, p, name="m", split="bearing", fold=0, seed=0)
    scores = fold_scores(o)
    assert scores["records"] == 1
    assert scores["windows"] > 0.9


def test_other_rig(bundle, tmp_path):
    "Another bearing at another speed and rate, from a folder with labels.csv alone; shorter and longer records."
    rig = [
        rolling_record(
            f,
            Geometry(13, 1.0, 6.0, 30.0),
            21.0,
            20000.0,
            s,
            0.0,
            seed=i,
            name=f"{f}{s}",
            diameter="x",
        )
        for i, f in enumerate(FAULTS)
        for s in (0.4, 2.0)
    ]
    write_records(tmp_path, rig)
    table, facts = evaluate_bundle(bundle, tmp_path)
    value = table.set_index("measure").value
    assert value["records"] >= 5 / 6
    assert set(table.split) == {"new"}
    assert 0 < facts["answered"] <= 1
    said = predict_bundle(bundle, tmp_path / "outer2.0.npy")
    assert (said.fault == "outer").mean() > 0.5
    assert list(said)[:4] == [
        "record",
        "seconds",
        "fault",
        "probability",
    ]


def test_bundle_refuses(bundle, tmp_path, refused):
    "No geometry, a fault that the model does not know, no label to score."
    r = rolling_record("ball", seed=0)
    for change, words in (
        (dict(orders=None), "geometry"),
        (dict(fault="healthy"), "healthy"),
        (dict(fault=""), "fault of"),
    ):
        folder = tmp_path / words.split()[0]
        write_records(folder, [Record(**{**vars(r), **change})])
        assert words in refused(evaluate_bundle, bundle, folder)


def test_programs_are_the_model(learn):
    "torch.export, ONNX and TorchScript answer as the model does, at other batches and lengths, down to long windows of real-sized records."
    pytest.importorskip("onnxruntime")
    from gcode_ml.lab.export import compare_program, eager_programs, make_programs, read_program

    model = learn.model.cpu().eval()
    eager = eager_programs(model)["diagnose"]
    assert list(eager.inputs) == ["signal", "shaft", "rate", "orders"]
    assert eager.outputs == ["fault"]
    windows = {
        n: RecordWindows(rolling_records(1, seed=3), n).batch([0, 1])[0] for n in (3001, 12000)
    }
    for kind, data in make_programs(model, "diagnose").items():
        program = read_program(data, kind, eager.inputs, eager.outputs, trusted=True)
        assert compare_program(eager, program)["within"]
        for inputs in windows.values():
            arrays = {k: v.numpy() for k, v in inputs.items()}
            wanted = eager(arrays)["fault"]
            np.testing.assert_allclose(
                program(arrays)["fault"], wanted, atol=1e-4 * max(1, abs(wanted).max())
            )


def test_decimated_envelopes_are_whole(records):
    "Evidence from few points of the envelope is that of all points."
    x, shaft, rate, orders, _ = RecordWindows(records, 6000).signals([0, 9, 18])
    front = OrderSpectrumFrontEnd()
    quick = front(x, shaft, rate, orders)
    slow = front(
        x, shaft, torch.cat([rate[:2], rate[2:] + 1e-3]), orders
    )  # rates that differ: the plain way
    torch.testing.assert_close(quick, slow, atol=2e-3, rtol=0)


def journal(seconds=1.0):
    "Some records of the simulated journal bearing, two severities."
    from gcode_ml.bearing.simulate import journal_record

    return [
        journal_record(f, v, seed=10 * i + j, seconds=seconds, name=f"{f}-{v}")
        for i, f in enumerate(("healthy", "wear", "imbalance"))
        for j, v in enumerate(("mild", "severe"))
    ]


def test_temporal_law_calms_the_answers(records):
    "With a large weight, windows of one record get like answers; without it they differ more."

    def jumps(weight):
        learn = fitted(
            data=records, model="cnn", window=1500, max_epochs=3, temporal_weight=weight, seed=1
        )
        w = learn.windows
        p = predict_windows(learn.model, w, range(len(w)))
        same = w.record[1:] == w.record[:-1]
        return np.square(np.diff(p, axis=0)[same]).sum(1).mean()

    assert jumps(50.0) < jumps(0.0)


def test_sommerfeld_law_moves_the_severity(tmp_path):
    "The severity head follows the Sommerfeld number, also from a folder; with a severity head and such a column only."
    from gcode_ml.bearing.recipe import sommerfeld_severity

    write_records(tmp_path, journal())

    def expected(weight):
        learn = fitted(
            data=str(tmp_path),
            split="leak",
            model="cnn",
            window=2000,
            max_epochs=25,
            severity=0.001,
            sommerfeld_weight=weight,
            seed=1,
        )
        levels = torch.tensor([0.575, 0.95])
        inputs, mask, _ = learn.windows.batch(range(len(learn.windows)))
        with torch.no_grad():
            said = (
                (learn.model.eval()(inputs, mask)["diameter"].softmax(-1) * levels).sum(-1).numpy()
            )
        asked = np.array([sommerfeld_severity(r) for r in learn.windows.records])[
            learn.windows.record
        ]
        return np.maximum(abs(said - asked) - 0.1, 0).mean()

    assert expected(20.0) < expected(0.0)


def test_laws_refuse(records, refused):
    assert "severity above 0" in refused(recipe, records, sommerfeld_weight=0.1, window=6000)
    assert "sommerfeld: expected a number" in refused(
        recipe, records, sommerfeld_weight=0.1, severity=1.0, window=6000
    )


def test_half_precision_without_a_device(records):
    "Where the device has no such numbers: a warning, single precision, and the same weights."
    if torch.cuda.is_available():
        pytest.skip("the device has them")
    from gcode_ml.training.speed import check_mixed_precision

    if check_mixed_precision("cpu")["fp16"]:
        pytest.skip("the processor has them")
    with pytest.warns(UserWarning):
        half = fitted(data=records[::2], window=3000, max_epochs=1, precision="fp16")
    for a, b in zip(
        half.model.parameters(),
        fitted(data=records[::2], window=3000, max_epochs=1).model.parameters(),
    ):
        assert torch.equal(a, b)


def test_teacher_with_other_classes(records, bundle, tmp_path, refused):
    "The teacher's classes in another order are refused, not learned."
    import json
    import shutil

    folder = tmp_path / "teacher"
    shutil.copytree(bundle.folder, folder)
    about = json.loads((folder / "bundle.json").read_text())
    about["preprocessing"]["classes"] = about["preprocessing"]["classes"][::-1]
    (folder / "bundle.json").write_text(json.dumps(about))
    assert "class 0: expected outer, as for the student, found ball for the teacher" in refused(
        recipe, records, model="cnn", window=3000, teacher=str(folder)
    )


@pytest.mark.parametrize("way", [dict(), dict(mixing="mixup"), dict(mixing="cutmix")])
def test_a_last_batch_of_one(records, way):
    "A last batch with a single window, or an odd number of them, trains with finite losses."
    learn = fitted(
        data=records[::3],
        model="cnn",
        window=3000,
        max_epochs=2,
        batch_size=11,
        split="leak",
        **way,
    )
    assert np.isfinite(np.array(learn.recorder.values, float)).all()


def test_recipe_refuses(records, refused):
    "What cannot be done is said."
    journal = [
        Record(f"{f}{d}", np.random.default_rng(0).standard_normal(7000), 20480.0, 3600.0, f, d)
        for f in ("healthy", "wear")
        for d in "ab"
    ]
    assert "without bearing geometry" in refused(recipe, journal, window=6000)
    assert "one of order_net" in refused(recipe, records, model="net")
    assert "geometry" in refused(
        recipe, [Record(**{**vars(r), "orders": None}) for r in records], window=6000
    )
    assert "one of stft" in refused(
        recipe, records, model="spectrogram", representation="wavelet", window=6000
    )
    assert "model=spectrogram" in refused(recipe, records, spec_augment=True, window=6000)
    assert "epochs" in refused(recipe, records, epochs=3, window=6000)
    assert "a teacher" in refused(recipe, records, severity=1.0, teacher="x", window=6000)


@pytest.mark.parametrize(
    "way",
    [
        dict(model="cnn", mixing="mixup"),
        dict(model="cnn", loss="focal", preset="sgd_baseline"),
        dict(model="resnet", progressive="512:1, 2000:1"),
        dict(model="patch_transformer", schedule="noam", augment="light"),
        dict(model="spectrogram", representation="stft+wigner", spec_augment=True),
        dict(severity=0.5, physics_weight=0.1),
        dict(model="lstm", averaging="ema"),
        dict(model="cnn", adversarial=0.05),
        dict(simulated=2, class_weights=True),
    ],
)
def test_ways_of_training(records, way):
    "Each goes, with finite losses and the number of classes that the data has."
    learn = fitted(**{"data": records[::2], "window": 3000, "max_epochs": 2, **way})
    assert np.isfinite(np.array(learn.recorder.values, float)).all()
    inputs, mask, _ = learn.dls.valid.one_batch()
    assert learn.model.eval()(inputs, mask)["fault"].shape == (len(mask), 3)


def test_distillation(records, bundle, learn):
    "A network learns from the bundle's answers."
    student = fitted(
        data=records[::2],
        window=3000,
        model="cnn",
        max_epochs=1,
        teacher=str(bundle.folder),
        alpha=0.9,
    )
    assert np.isfinite(student.recorder.values[-1][0])


def test_spec_augment_only_in_training():
    "Pictures are masked while training, differently for each sample, and not when predicting."
    from gcode_ml.signals.augment import SpecAugment

    inputs, mask, _ = windows_of(rolling_records(1, seed=0), 6000)
    model = SpectrogramCNN(augment=SpecAugment(time_axis=-1), dropout=0.0).eval()
    assert torch.equal(model(inputs, mask)["fault"], model(inputs, mask)["fault"])
    model.train()
    a = model.augment(torch.ones(4, 1, 64, 96), torch.ones(4, 96, dtype=torch.bool))
    assert len({float(x.sum()) for x in a}) > 1


def test_every_model_has_defaults():
    assert set(MODEL_DEFAULTS) == set(MODELS)


def outcomes(said, faults, records, confidence=None):
    "A table as `outcome_table` makes it."
    p = np.eye(3)[[FAULTS.index(s) for s in said]]
    return pd.DataFrame(
        dict(
            record=records,
            bearing="b",
            diameter="",
            load="",
            fault=faults,
            said=said,
            confidence=confidence or 1.0,
            name="m",
            split="bearing",
            fold=0,
            seed=0,
            **{f"p_{c}": p[:, i] for i, c in enumerate(FAULTS)},
        )
    )


def test_votes_and_scores():
    "Counted by hand: four of six windows, one of two records."
    o = outcomes(
        ["outer", "outer", "ball", "inner", "inner", "ball"],
        ["outer"] * 3 + ["ball"] * 3,
        ["a"] * 3 + ["b"] * 3,
    )
    v = record_votes(o).set_index("record")
    assert v.said.to_dict() == dict(a="outer", b="inner")
    assert v.majority.to_dict() == dict(a="outer", b="inner")
    s = fold_scores(o)
    assert s["windows"] == 0.5
    assert s["records"] == 0.5
    t = class_table(o).set_index("fault")
    assert t.recall["outer"] == pytest.approx(2 / 3)
    assert t.precision["ball"] == 0.5
    assert t.record_recall["ball"] == 0


def test_coverage_takes_equal_confidence_together():
    o = outcomes(
        ["outer", "ball", "ball"], ["outer", "outer", "ball"], list("abc"), [0.9, 0.5, 0.5]
    )
    c = coverage_curve(o)
    assert c.coverage.tolist() == pytest.approx([1 / 3, 1])
    assert c.accuracy.tolist() == pytest.approx([1, 2 / 3])


def test_spread_is_over_seeds():
    a = outcomes(["outer"] * 2, ["outer"] * 2, list("ab"))
    b = outcomes(["ball", "outer"], ["outer"] * 2, list("ab")).assign(seed=1)
    t = score_table(pd.concat([a, b])).set_index("measure").loc["windows"]
    assert t.value == 0.75
    assert t.seeds == 2
    assert t.high - t.value == pytest.approx(np.std([1, 0.5], ddof=1))
