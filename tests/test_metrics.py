"Metrics, baselines and plots of `core` against closed forms and slow loops."

import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from gcode_ml.core.errors import InputError
from gcode_ml.evaluation.baselines import (
    BASELINES,
    TimeLookup,
    baseline,
    score_baselines,
    window_statistics,
)
from gcode_ml.evaluation.metrics import *


def test_independent_items_give_the_binomial_interval():
    correct = np.arange(400) < 280
    interval = bootstrap_interval(correct, resamples=8000)
    np.testing.assert_allclose(interval[1:], binom.ppf([0.025, 0.975], 400, 0.7) / 400, atol=0.005)


def test_one_item_a_source_is_the_plain_bootstrap():
    x = np.random.default_rng(0).normal(size=50)
    picks = np.random.default_rng(3).integers(0, 50, (1000, 50))
    plain = np.quantile(x[picks].mean(1), [0.025, 0.975])
    for sources in (None, np.arange(50)):
        np.testing.assert_allclose(bootstrap_interval(x, sources, seed=3)[1:], plain)
        np.testing.assert_allclose(
            bootstrap_interval(x, sources, lambda v: v.mean(), seed=3)[1:], plain
        )


def test_sources_that_agree_widen_the_interval():
    "m equal items a source are one: the interval is sqrt(m) wider than that of items taken for independent."
    source_means = np.random.default_rng(0).normal(size=200)
    x = np.repeat(source_means, 16)
    sources = np.repeat(np.arange(200), 16)

    def width(i):
        return i.high - i.low

    assert width(bootstrap_interval(x, sources, resamples=4000)) / width(
        bootstrap_interval(x, resamples=4000)
    ) == pytest.approx(4, rel=0.08)
    assert bootstrap_interval(x, sources) == pytest.approx(bootstrap_interval(source_means))


def test_unequal_sources_in_any_order():
    rng = np.random.default_rng(0)
    sources = rng.choice(list("abcdefg"), 300, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
    x = rng.normal(size=300)
    slow = bootstrap_interval(x, sources, lambda v: v.mean(), resamples=200)
    np.testing.assert_allclose(bootstrap_interval(x, sources, resamples=200), slow)
    order = rng.permutation(300)
    np.testing.assert_allclose(bootstrap_interval(x[order], sources[order], resamples=200), slow)


def test_chunks_of_draws_are_one_stream(monkeypatch):
    "Three draws a step, and a last step that is not full."
    n = 1_300_000
    x = np.random.default_rng(0).normal(size=n)
    rng = np.random.default_rng(0)
    whole = [x[rng.integers(0, n, n)].mean() for _ in range(4)]
    np.testing.assert_allclose(
        bootstrap_interval(x, resamples=4)[1:], np.quantile(whole, [0.025, 0.975])
    )


def test_statistic_of_several_columns():
    pairs = np.random.default_rng(0).normal(size=(60, 2))
    pairs[:, 1] += pairs[:, 0]
    interval = bootstrap_interval(
        pairs, np.arange(60) // 3, lambda v: np.corrcoef(v.T)[0, 1], resamples=200
    )
    assert interval.low < interval.value == np.corrcoef(pairs.T)[0, 1] < interval.high


def test_one_source_has_no_bounds():
    interval = bootstrap_interval([1, 0, 1], ["a"] * 3)
    assert np.isnan(interval.low)
    assert interval.to_json() == dict(value=2 / 3, low=None, high=None)


def test_bad_input_is_one_sentence():
    for f in (
        lambda: bootstrap_interval([]),
        lambda: bootstrap_interval([1, 2], [1]),
        lambda: vote([1, 2], [1]),
        lambda: reliability_table([0.5, np.nan], [1, 1]),
        lambda: classification_scores([], []),
        lambda: token_accuracy([1, 2], [[1, 2]]),
        lambda: TimeLookup().fit([], [], []),
        lambda: TimeLookup().fit([np.nan], [1], [1]),
        lambda: window_statistics([]),
        lambda: window_statistics([np.ones((2, 3)), np.ones((2, 2))]),
        lambda: window_statistics([np.ones((0, 3))]),
        lambda: score_baselines(np.ones((4, 2)), [0, 1, 0, 1], [0, 1], []),
        lambda: score_baselines(np.ones((4, 2)), [0, 1, 0, 1], [0, 1], [4]),
    ):
        with pytest.raises(InputError):
            f()


def test_vote_against_a_loop():
    rng = np.random.default_rng(0)
    predicted = rng.integers(0, 4, 200)
    sources = rng.integers(0, 30, 200)
    names, label = vote(predicted, sources)
    for n, l in zip(names, label):
        assert l == np.bincount(predicted[sources == n]).argmax()


def random_rows(rng, n=80, length=9, vocabulary=5):
    rows = rng.integers(1, vocabulary, (n, length))
    ends = rng.integers(0, length + 1, n)
    return np.where(np.arange(length) < ends[:, None], rows, 0)


def strip(row):
    row = list(row)
    while row and row[-1] == 0:
        row.pop()
    return row


def levenshtein(a, b):
    d = np.add.outer(np.arange(len(a) + 1), np.arange(len(b) + 1))
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            d[i, j] = min(
                d[i - 1, j] + 1, d[i, j - 1] + 1, d[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            )
    return d[-1, -1] / max(len(a), len(b), 1)


@pytest.mark.parametrize("width", [4, 9, 12])
def test_token_scores_against_loops(width):
    rng = np.random.default_rng(width)
    target = random_rows(rng)
    predicted = np.zeros((80, width), int)
    k = min(width, 9)
    predicted[:, :k] = np.where(
        rng.random((80, k)) < 0.85, target[:, :k], rng.integers(0, 5, (80, k))
    )
    predicted[::2, 9:] = rng.integers(0, 3, predicted[::2, 9:].shape)
    pairs = [
        (p[j] == t[j] if j < width else False)
        for p, t in zip(predicted, target)
        for j in range(9)
        if t[j]
    ]
    assert token_accuracy(predicted, target) == pytest.approx(np.mean(pairs))
    np.testing.assert_array_equal(
        exact_lines(predicted, target, per_item=True),
        [strip(p) == strip(t) for p, t in zip(predicted, target)],
    )
    np.testing.assert_allclose(
        edit_distances(predicted, target),
        [levenshtein(strip(p), strip(t)) for p, t in zip(predicted, target)],
    )


def test_per_item_token_accuracy():
    share = token_accuracy([[1, 2], [1, 0], [3, 3]], [[1, 3], [1, 0], [0, 0]], per_item=True)
    np.testing.assert_array_equal(share, [0.5, 1, np.nan])
    assert np.isnan(token_accuracy([[1]], [[0]]))


def test_another_padding_token():
    assert (
        token_accuracy([[0, -1]], [[0, -1]], ignore=-1)
        == exact_lines([[0]], [[0, -1]], ignore=-1)
        == 1
    )
    assert edit_distances([[0, -1, -1]], [[0, 0]], ignore=-1) == 0.5


def test_edit_distance_of_anything():
    assert edit_distance("", "") == 0
    assert edit_distance("", "abc") == 1
    assert edit_distance("abc", "") == 1
    assert edit_distance(["G1", "X10"], ("G1", "X20")) == 0.5


def test_calibration_against_a_loop():
    rng = np.random.default_rng(0)
    confidence = np.r_[0, 1, 1 / 3, rng.random(500)]
    correct = rng.random(503) < 0.5
    error = 0
    for k in range(15):
        low, high = k / 15, (k + 1) / 15
        inside = (confidence > low) & (confidence <= high) if k else confidence <= high
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert expected_calibration_error(confidence, correct) == pytest.approx(error)


@pytest.mark.parametrize("with_classes", [False, True])
def test_time_lookup_against_a_double_loop(with_classes):
    "Times in tenths, so that queries half way between two rows, rows at one time and tied votes all occur."
    rng = np.random.default_rng(0)
    n = 400
    time = rng.integers(0, 60, n) / 4
    answers = rng.choice(list("qwerty"), n)
    sources = rng.integers(0, 12, n)
    classes = rng.integers(0, 3, n)
    query = rng.integers(-20, 150, 150) / 8
    asked = rng.integers(0, 5, 150)
    first = {a: list(answers).index(a) for a in set(answers)}
    expected = []
    for t, c in zip(query, asked):
        rows = np.flatnonzero(classes == c) if with_classes and c < 3 else np.arange(n)
        votes = []
        for s in np.unique(sources[rows]):
            own = rows[sources[rows] == s]
            votes.append(answers[min(own, key=lambda i: (abs(time[i] - t), time[i], i))])
        expected.append(min(set(votes), key=lambda a: (-votes.count(a), first[a])))
    lookup = TimeLookup().fit(time, answers, sources, classes if with_classes else None)
    np.testing.assert_array_equal(lookup.predict(query, asked if with_classes else None), expected)


def test_time_lookup_of_token_rows():
    lines = np.array([[3, 1, 0], [3, 2, 0], [3, 1, 0], [3, 2, 0], [4, 1, 5]])
    lookup = TimeLookup().fit([0, 1, 0, 1, 1], lines, [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(lookup.predict([0, 0.9]), lines[[0, 1]])
    assert lookup.predict([]).shape == (0, 3)


def nan_table(windows):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = []
        for w in windows:
            row = []
            for x in np.asarray(w, float).T:
                real = x[~np.isnan(x)]
                row += (
                    [np.nanmean(x), np.nanstd(x), np.nanmin(x), np.nanmax(x), real[-1] - real[0]]
                    if len(real)
                    else [np.nan] * 5
                )
            rows.append(row)
    return np.array(rows)


@pytest.mark.filterwarnings("error")
def test_window_statistics_against_loops():
    rng = np.random.default_rng(0)
    windows = [
        1000 + rng.normal(size=(rng.integers(1, 12), 4)).astype("float32") for _ in range(50)
    ]
    for w in windows[::2]:
        w[rng.random(w.shape) < 0.5] = np.nan
    windows[4][:] = np.nan
    table = window_statistics(windows, chunk=7)
    assert table.shape == (50, 20)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, nan_table(windows), rtol=1e-5, atol=2e-4)
    np.testing.assert_array_equal(window_statistics(windows, chunk=50), table)
    array = rng.normal(size=(9, 6, 3))
    array[2, :, 1] = np.nan
    np.testing.assert_allclose(window_statistics(array), nan_table(array), atol=1e-5)
    np.testing.assert_array_equal(
        window_statistics(array, ("change", "mean")),
        window_statistics(array).reshape(9, 3, 5)[..., [4, 0]].reshape(9, -1),
    )


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_baselines_take_missing_columns_and_values():
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = rng.normal(size=(90, 5)) + 4 * (y[:, None] == np.arange(5))
    x[rng.random(x.shape) < 0.1] = np.nan
    x[:, 4] = np.nan
    x[:, 3] = 1
    table = score_baselines(
        x, y, y.cumsum() % 2 == 0, y.cumsum() % 2 == 1, np.arange(90) // 5, n_jobs=1
    )
    assert list(table.columns) == [
        "name",
        "accuracy",
        "low",
        "high",
        "macro_f1",
        "seconds",
    ]
    assert list(table.name) == list(BASELINES[:-1])
    assert (table.accuracy[1:] > 0.6).all()
    assert ((table.low <= table.accuracy) & (table.accuracy <= table.high)).all()


def test_baselines_repeat_and_obey():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4))
    y = rng.integers(0, 2, 60)
    for name in ("extra_trees", "hist_gradient_boosting"):
        few = dict(extra_trees=dict(n_estimators=5), hist_gradient_boosting=dict(max_iter=5))[name]
        a, b = (
            baseline(name, seed=1, n_jobs=1, **few).fit(x, y).predict_proba(x) for _ in range(2)
        )
        np.testing.assert_array_equal(a, b)
    assert len(baseline("extra_trees", n_estimators=5).fit(x, y)[-1].estimators_) == 5
    with pytest.raises(InputError, match="majority"):
        baseline("forest")


def test_minirocket():
    pytest.importorskip(
        "aeon", reason="the optional package aeon is not installed: pip install gcode_ml[rocket]"
    )
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = rng.normal(size=(60, 40, 3))
    x[:, :, 1] += 1.5 * np.sin(
        np.arange(40) * np.where(y, 0.5, 1.0)[:, None] + rng.uniform(0, 6, (60, 1))
    )
    x[rng.random(x.shape) < 0.05] = np.nan
    assert baseline("minirocket_ridge", n_jobs=1).fit(x[:40], y[:40]).score(x[40:], y[40:]) > 0.9


def test_minirocket_without_aeon(monkeypatch):
    monkeypatch.setitem(sys.modules, "aeon.transformations.collection.convolution_based", None)
    monkeypatch.setitem(sys.modules, "aeon", None)
    with pytest.raises(InputError, match=r"pip install gcode_ml\[rocket\]"):
        baseline("minirocket_ridge")


def test_metrics_and_baselines_draw_nothing():
    code = "import sys, gcode_ml.evaluation.metrics, gcode_ml.evaluation.baselines; print([m for m in ('matplotlib.pyplot','seaborn','torch','aeon') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_plots_return_their_axes(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from gcode_ml.evaluation.plots import (
        plot_confusion,
        plot_history,
        plot_lengths,
        plot_reliability,
        plot_scores,
    )

    history = pd.DataFrame(
        dict(
            fit=["a", "a", "b"],
            epoch=[0, 1, 0],
            train_loss=[3.0, 2, 1],
            valid_loss=[3.0, np.nan, 2],
        )
    )
    scores = pd.DataFrame(
        [("cnn", "by run", 0.5, np.nan, np.nan), ("majority", "by run", 0.2, 0.1, 0.3)],
        columns=["name", "split", "value", "low", "high"],
    )
    draw = [
        lambda ax: plot_history(history, ax=ax),
        lambda ax: plot_confusion(["a", "b"], ["a", "a"], ax=ax),
        lambda ax: plot_scores(scores, ax=ax),
        lambda ax: plot_reliability([0.9, 0.8], [1, 0], ax=ax),
        lambda ax: plot_lengths([3, 4, 5], [[0, 1], [2]], ax=ax),
    ]
    for f in draw:
        given = plt.subplots()[1]
        assert f(given) is given
        own = f(None)
        own.figure.canvas.draw()
        assert own.get_xlabel() and own.get_ylabel() or f is draw[2]
        assert own.get_title()
        assert own.figure.get_figwidth() == 6
    plt.close("all")
