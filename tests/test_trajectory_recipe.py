"Prediction of the path error: what filters and models promise, how they are trained, and what a bundle answers."

import numpy as np
import pandas as pd
import pytest
import torch
from nbdev.config import get_config

from gcode_ml.gcode.parts import part_program
from gcode_ml.lab.bundle import load_bundle, save_bundle
from gcode_ml.lab.spaces import read_space
from gcode_ml.training.fit import fit
from gcode_ml.trajectory.data import TrajectoryWindows
from gcode_ml.trajectory.evaluate import (
    TrajectoryLoss,
    compare_with_filters,
    contour_error,
    covered_rows,
    error_scores,
    part_scores,
    predict_rows,
)
from gcode_ml.trajectory.filters import ErrorFilter, filter_columns, fit_filter, oscillator_error
from gcode_ml.trajectory.models import MODELS, TrajectoryErrorTransformer
from gcode_ml.trajectory.recipe import (
    evaluate_bundle,
    load_series,
    part_of,
    predict_bundle,
    predict_part,
    prepare_windows,
    preprocessing,
    recipe,
    split_groups,
)
from gcode_ml.trajectory.simulate import MACHINES, exact_error


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("collection")


@pytest.fixture(scope="module")
def series(home):
    return load_series(machine="bedslinger+hard", folder=home)[0]


@pytest.fixture(scope="module")
def hard(series):
    return [s for s in series if s.machine["name"] == "hard"]


@pytest.fixture(scope="module")
def linear(series):
    return [s for s in series if s.machine["name"] == "bedslinger"]


def fitted(data, **kwargs):
    learn = recipe(data, **{"device": "cpu", "stride": 32, "max_epochs": 2, **kwargs})
    with learn.no_bar(), learn.no_logging():
        fit(learn)
    return learn


@pytest.fixture(scope="module")
def learn(hard):
    return fitted(hard, max_epochs=6)


@pytest.fixture(scope="module")
def bundle(learn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(
        folder,
        learn.model,
        learn.arguments,
        preprocessing(learn),
        dict(domain="trajectory", data={}, trained_on=[], metrics={}),
    )
    return load_bundle(folder)


def r2(scores, axis):
    return scores[scores.axis == axis]["R²"].min()


def test_linear_machine_is_a_filter(linear):
    "On a family that they were not fitted on, FIR and fitted mode explain the linear machine; a mode 10 % off does not."
    train = [s for s in linear if s.part.family != "box"]
    test = [s for s in linear if s.part.family == "box"]
    mode = fit_filter(train, "second_order")
    off = ErrorFilter("second_order", mode.rate, [[1.1 * f, z] for f, z in mode.weights])
    assert np.allclose(np.array(mode.weights)[:, 0], MACHINES["bedslinger"].frequency, rtol=0.01)
    for s in test:
        for f in (fit_filter(train, "fir"), mode):
            assert (error_scores(s.errors, f.predict(s.part))["R²"] > 0.98).all()
        assert (error_scores(s.errors, off.predict(s.part))["R²"][:2] < 0.9).all()


def test_filters_see_no_test_rows(hard):
    "Errors of test parts may be anything: neither the filter nor the scale nor the fit changes."

    def state(data):
        windows, (train, _, test), f = prepare_windows(data, stride=32)
        return f.weights, windows.scale.error_std

    import copy

    other = [copy.copy(s) for s in hard]
    for s in other:
        if s.part.family == "box":
            s.errors = s.errors + 1
    assert state(hard) == state(other)


def test_oscillator_error_is_exact():
    "A start from rest, against the closed form."
    t = np.arange(400) / 500
    np.testing.assert_allclose(
        oscillator_error(80 * t, 0.0, 55, 0.08, 500.0),
        exact_error(t, 55, 0.08, speed=80),
        atol=1e-9,
    )


def test_columns_look_back():
    "No column knows a later row."
    rng = np.random.default_rng(0)
    v, p = rng.normal(size=(2, 300))
    a = filter_columns(v, p)
    v[200:], p[200:] = 9, 9
    np.testing.assert_array_equal(a[:200], filter_columns(v, p)[:200])


def test_untrained_model_is_its_filter(hard):
    for name in MODELS:
        learn = recipe(hard, model=name, stride=64, d_model=16, heads=2, num_layers=1, device="cpu")
        said = predict_rows(learn.model, learn.windows, learn.test)
        rows = covered_rows(learn.windows, learn.test)
        base = learn.windows.extra["filter"] * torch.tensor(learn.windows.scale.error_std)
        np.testing.assert_allclose(said[rows], base.numpy()[rows], atol=1e-6)


def test_model_beats_its_filter_on_an_unseen_family(learn):
    "On the machine with play, ripple and a second mode, on each part of the family that was left out."
    w = learn.windows
    said = part_scores(w, learn.test, predict_rows(learn.model, w, learn.test))
    base = part_scores(w, learn.test, (w.extra["filter"] * torch.tensor(w.scale.error_std)).numpy())
    both = said.axis == "xy"
    assert set(said.family) == {"box"}
    assert (said[both]["RMSE"] < 0.9 * base[both]["RMSE"]).all()


def test_sizes():
    "The reference has about 5 million parameters, those for deployment at most 0.2."
    size = {k: sum(p.numel() for p in m().parameters()) for k, m in MODELS.items()}
    assert 4.8e6 < size["transformer"] < 5.3e6
    assert max(size["tcn"], size["lstm"]) < 0.2e6


def test_rows_of_windows(hard):
    "Every covered row counts once, and a chunked model answers each."
    w = TrajectoryWindows(hard, 128, 48, intervals=True)
    index = np.arange(0, len(w), 7)
    rows = covered_rows(w, index)
    again = np.zeros(len(rows), bool)
    for i in index:
        again[w.rows([i])[1][0].numpy()] = True
    assert (rows == again).all()


def test_chunks_do_not_matter(learn):
    "The transformer's answer in windows is that of a window that ends at the same row."
    w = learn.windows
    torch.manual_seed(0)
    model = TrajectoryErrorTransformer(len(w.features), 16, 2, 1).set_scale(w.scale).eval()
    torch.nn.init.normal_(model.error.weight)
    said = predict_rows(model, w, learn.test)
    i = learn.test[5]
    inputs, mask, _ = w.batch([i])
    row = w.rows([i])[1][0]
    with torch.no_grad():
        one = model(inputs, mask)["error"][0] * torch.tensor(w.scale.error_std)
    if w.start[i] == 0:
        np.testing.assert_allclose(said[row], one, atol=1e-5)
    assert np.isfinite(said[covered_rows(w, learn.test)]).all()


def test_law_moves_the_weights(linear):
    "With the law the fit ends elsewhere, and with a wrong frequency elsewhere again."
    runs = [
        fitted(
            linear,
            base="zero",
            harmonics=False,
            max_epochs=1,
            stride=128,
            lambda_physics=l,
            physics_control=c,
        ).model.error.weight
        for l, c in ((0, False), (5, False), (5, True))
    ]
    assert not torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[1], runs[2])


def test_law_holds_on_the_linear_machine(linear):
    "The simulated error violates it far less than a model with a wrong frequency would have it."

    def penalty(control):
        learn = recipe(
            linear,
            base="zero",
            lambda_physics=1.0,
            physics_control=control,
            stride=64,
            device="cpu",
        )
        law = [c for c in learn.cbs if type(c).__name__ == "PhysicsLoss"][0].law
        inputs, mask, target = learn.windows.batch(learn.train[:64])
        return law.penalty(target, (target, inputs, mask)).mean()

    assert penalty(False) < 0.05 * penalty(True)


@pytest.mark.parametrize(
    "way",
    [
        dict(model="lstm"),
        dict(model="transformer", d_model=16, num_layers=1, heads=2, dropout=0.1),
        dict(thermal=0.0),
        dict(noise_level=0.05),
        dict(mirror=0.5, harmonics=False),
        dict(measure="huber", base="second_order"),
        dict(split="random"),
        dict(split="layer"),
        dict(averaging="ema", schedule="cosine"),
    ],
)
def test_ways_of_training(hard, way):
    learn = fitted(hard[::2], stride=128, **way)
    assert np.isfinite(np.array(learn.recorder.values, float)).all()


def test_leave_a_machine_out(series):
    learn = recipe(series, split="machine", fold=1, stride=64, device="cpu")

    def machines(index):
        return set(learn.windows.run_table.machine.iloc[learn.windows.recording[index]])

    assert machines(learn.test) == {"hard"}
    assert machines(learn.train) == {"bedslinger"}
    assert split_groups(series, "machine") == ["bedslinger", "hard"]


def test_leave_a_part_on_a_machine_out(series):
    "Neither the family nor the machine occurs in training; the filter of that machine comes from the other parts."
    learn = recipe(
        series, split="both", fold=1, identify="machine", base="fir", stride=64, device="cpu"
    )
    table = learn.windows.run_table

    def at(index, c):
        return set(table[c].iloc[learn.windows.recording[index]])

    assert at(learn.test, "machine") == {"hard"}
    assert at(learn.test, "family") == {"label"}
    assert at(learn.train, "machine") == {"bedslinger"}
    assert "label" not in at(learn.train, "family")
    assert list(learn.filter.machines) == ["hard"]
    import copy

    other = [copy.copy(s) for s in series]
    for s in other:
        if s.part.family == "label" and s.machine["name"] == "hard":
            s.errors = s.errors + 1
    again = recipe(
        other, split="both", fold=1, identify="machine", base="fir", stride=64, device="cpu"
    )
    assert again.filter == learn.filter
    assert again.windows.scale == learn.windows.scale


def test_travel_only_window_has_no_thermal_loss():
    said = dict(
        error=torch.zeros(1, 4, 2, requires_grad=True),
        thermal=torch.randn(1, 4, 3, requires_grad=True),
    )
    target = dict(
        error=torch.zeros(1, 4, 2),
        thermal=torch.zeros(1, 4, 3),
        thermal_mask=torch.zeros(1, 4, dtype=torch.bool),
    )
    loss = TrajectoryLoss()(said, target)
    loss.backward()
    assert loss == 0
    assert said["thermal"].grad.isfinite().all()


def test_contour_is_searched_nearby():
    "A wall 20 µm away that is printed a second later is not taken for the path."
    x = np.concatenate([np.linspace(0, 30, 1000), np.linspace(30, 0, 1000)])
    y = np.where(np.arange(2000) < 1000, 0.0, 0.02)
    path = np.column_stack([x, y])
    off = path + [[0, 0.02]]
    np.testing.assert_allclose(contour_error(off, path)[100:800], 0.02, atol=1e-6)


def test_bundle_reads_programs_and_collections(bundle, learn, home, tmp_path):
    file = tmp_path / "tube_9.gcode"
    file.write_text(part_program("tube", 9, layers=2))
    table = predict_bundle(bundle, file)
    assert list(table) == ["t", "layer", "x", "y", "error_x", "error_y"]
    assert np.isfinite(table.to_numpy(float)).all()
    assert len(predict_bundle(bundle, home / "box_0")) == len(
        [s for s in learn.windows.series if s.part.name == "box_0"][0].errors
    )
    scores, facts = evaluate_bundle(bundle, file)
    value = scores.set_index(["name", "measure"]).value
    assert value["model", "R² x"] > value["filter", "R² x"] > value["zero", "R² x"]
    assert set(scores.split) == {"new"}


def test_modes_of_a_large_file_come_from_its_beginning(learn, tmp_path, monkeypatch):
    "A file above the limit is never planned whole, and its first block tells the same modes."
    from functools import partial

    from gcode_ml.gcode import planner
    from gcode_ml.trajectory import commands
    from gcode_ml.trajectory import recipe as recipes

    save_bundle(
        tmp_path / "bundle",
        learn.model,
        learn.arguments,
        preprocessing(learn),
        dict(domain="trajectory", data={}, trained_on=[], metrics={}),
    )
    file = tmp_path / "part.gcode"
    file.write_text(part_program("box", 2, layers=12))
    lines = len(file.read_text().splitlines())
    whole, error = commands.modes_of(tmp_path / "bundle", file)
    seen = []

    def part_seen(motion, rate):
        part = part_of(motion, rate)
        seen.append(part)
        return part

    monkeypatch.setattr(recipes, "part_of", part_seen)
    monkeypatch.setattr(
        planner, "program_blocks", partial(planner.program_blocks, lines=lines // 4)
    )
    first, none = commands.modes_of(tmp_path / "bundle", file, large=0.0)
    assert none is None
    assert len(error) > 2 * len(seen[0].position)
    assert np.allclose([f for f, _ in first], [f for f, _ in whole], rtol=0.1)


def test_bundle_refuses_another_rate(bundle, refused):
    from gcode_ml.gcode.reader import parse_gcode

    assert "500 samples per second" in refused(
        predict_part, bundle, part_of(parse_gcode(part_program("tube", 1, layers=1)), 250.0)
    )


def test_bundle_refuses_other_features(bundle, learn, refused):
    import copy

    other = copy.copy(bundle)
    other.preprocessing = dict(bundle.preprocessing, harmonics=False)
    assert "features" in refused(predict_part, other, learn.windows.series[0].part)


def test_recipe_refuses(hard, refused, tmp_path):
    assert "harmonics=False" in refused(recipe, hard, mirror=0.5)
    assert "from 0 to 2" in refused(recipe, hard, fold=3)
    assert "one of tcn" in refused(recipe, hard, model="gru")
    assert "shorter windows" in refused(recipe, hard, sequence_length=10**6)
    assert "base" in refused(recipe, hard, base="kalman")
    assert "another one to learn from" in refused(
        recipe, [s for s in hard if s.part.family == "box"]
    )
    assert "nothing of these" in refused(load_series, tmp_path)
    assert "epochs" in refused(recipe, hard, epochs=3)


def test_one_seed_meets_no_target():
    row = dict(split="part", part="p", machine="m", axis="x", fold=0)
    table = pd.DataFrame(
        [dict(row, name="tcn", seed=s, **{"R²": 0.9 + 0.001 * s}) for s in range(3)]
        + [dict(row, name="fir", seed=0, **{"R²": 0.5})]
    )
    assert compare_with_filters(table, "tcn", ["fir"]).met.all()
    assert not compare_with_filters(table[table.seed == 0], "tcn", ["fir"]).met.any()


def test_sweep_space():
    space = read_space(get_config().nbs_path / "experiments/trajectory.sweep.yaml")
    d = space.dimensions if hasattr(space, "dimensions") else space.parameters
    assert (d["learning_rate"].low, d["learning_rate"].high, d["learning_rate"].log) == (
        1e-5,
        1e-3,
        True,
    )
    assert d["batch_size"].values == [16, 32, 64]
    assert (d["dropout"].low, d["dropout"].high) == (0, 0.3)
    assert space.metric == "valid_loss"


def test_reference_model_is_exported_at_its_size():
    "256 states, 8 heads, 6 layers, LSTM decoder with attention: torch.export and TorchScript say what it says."
    from gcode_ml.lab.export import compare_program, eager_programs, make_programs, read_program

    torch.manual_seed(0)
    model = TrajectoryErrorTransformer().eval()
    torch.nn.init.normal_(model.error.weight, 0, 0.02)
    eager = eager_programs(model)["deploy"]
    assert len(model.encoder.layers) == 6
    assert model.encoder.layers[0].self_attn.num_heads == 8
    assert model.into.out_features == 256
    for kind in ("exported", "torchscript"):
        found = compare_program(
            eager,
            read_program(
                make_programs(model, "deploy", kind)[kind],
                kind,
                eager.inputs,
                eager.outputs,
                trusted=True,
            ),
        )
        assert found["within"]
        assert max(r["difference"] for r in found["compared"]) < 1e-5
