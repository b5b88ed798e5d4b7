"Alignment: forward-backward, Viterbi and streaming against enumeration of all paths; library, emission, clocks and locator against their definitions."

import itertools
import time as clock
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

from gcode_ml.core.errors import InputError
from gcode_ml.fingerprint.align import (
    GaussianEmission,
    NeuralEmission,
    ProgramHMM,
    StreamAligner,
    build_library,
    fit_emission,
    posterior,
    trailing_features,
)
from gcode_ml.fingerprint.clocks import (
    clock_table,
    line_bound,
    line_lags,
    on_sensor_clock,
    sensor_lags,
)
from gcode_ml.fingerprint.data import (
    Recording,
    align_channels,
    fit_scale,
    modality,
    programs,
    recording_from_table,
    select_channels,
)
from gcode_ml.fingerprint.emission import emission_recipe, network_emission
from gcode_ml.fingerprint.evaluate import selective_curve
from gcode_ml.fingerprint.locate import (
    ScoreCalibration,
    build_locator,
    gaussian_locator,
    line_shape,
    locate_rows,
    locate_windows,
    open_set_auroc,
    score_windows,
)
from gcode_ml.fingerprint.simulate import simulate_recordings
from gcode_ml.fingerprint.templates import program_templates, split_segments
from gcode_ml.training.fit import fit

CASES = [
    dict(lengths=[3, 2]),
    dict(lengths=[4], known_start=True),
    dict(lengths=[2, 3], rates=(0.5, 1.5), leave=0.1, enter=0.3),
    dict(lengths=[1, 3], leave=0.05),
]


def dense(chains, seconds):
    "Transition matrix over the states of all chains and the background, from the definition."
    kernel = chains.kernel(seconds)
    starts = np.cumsum(chains.lengths) - chains.lengths
    n = chains.lengths.sum()
    a = np.zeros((n + 1, n + 1))
    for c, length in enumerate(chains.lengths):
        for s in range(length):
            for k in range(kernel.shape[1]):
                a[starts[c] + s, starts[c] + min(s + k, length - 1)] += kernel[c, k] * (
                    1 - chains.leave
                )
    a[:n, n] = chains.leave
    a[n, :n], a[n, n] = chains.entry[chains.inside] * chains.enter, 1 - chains.enter
    return a


def enumerated(chains, logp, background, time):
    "Enumerate all paths: posterior of each state, likelihood, best path."
    n = chains.lengths.sum()
    inside = np.broadcast_to(chains.flat, chains.inside.shape)[chains.inside]
    emission = np.exp(np.c_[logp[:, inside], background])
    begin = np.r_[chains.entry[chains.inside] * (1 - chains.none), chains.none]
    matrices = [dense(chains, g) for g in np.diff(time)]
    posterior = np.zeros(emission.shape)
    total = 0.0
    best = (0.0, None)
    for path in itertools.product(range(n + 1), repeat=len(logp)):
        p = begin[path[0]] * emission[0, path[0]]
        for t in range(1, len(path)):
            p *= matrices[t - 1][path[t - 1], path[t]] * emission[t, path[t]]
        total += p
        posterior[np.arange(len(path)), path] += p
        if p > best[0]:
            best = p, path
    place = np.r_[inside, -1]
    return posterior / total, np.log(total), [place[s] for s in best[1]], np.log(best[0]), inside


def example(case, rows=4, seed=0):
    random = np.random.default_rng(seed)
    chains = ProgramHMM(step=0.25, **case)
    states = sum(case["lengths"])
    return (
        chains,
        random.normal(size=(rows, states)) * 2,
        random.normal(size=rows),
        np.r_[0, np.cumsum(random.uniform(0.1, 0.6, rows - 1))],
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_smoothing_and_viterbi_equal_enumeration(case, seed):
    chains, logp, background, time = example(case, seed=seed)
    posterior, likelihood, path, best, inside = enumerated(chains, logp, background, time)
    found = chains.smooth(logp, background, time)
    summed = np.stack([np.bincount(inside, p[:-1], logp.shape[1]) for p in posterior])
    assert np.allclose(found.posterior, summed, atol=1e-6)
    assert np.allclose(found.none, posterior[:, -1], atol=1e-9)
    assert np.isclose(found.log_likelihood, likelihood)
    found_path, score = chains.best_path(logp, background, time)
    assert np.isclose(score, best)
    assert found_path.tolist() == path
    by_rate = np.stack(
        [
            np.bincount(
                np.repeat(
                    np.tile(np.arange(len(chains.rates)), len(case["lengths"])), chains.lengths
                ),
                p[:-1],
                len(chains.rates),
            )
            for p in posterior
        ]
    )
    assert np.allclose(found.rates, by_rate, atol=1e-9)


class TinyLibrary:
    "The part of a library that the stream needs."

    def __init__(self, states):
        self.states = states

    def clock(self, time):
        return np.zeros((len(time), self.states))


class Replay:
    "An emission whose log-probabilities are the features."

    def log_probabilities(self, f):
        return f[:, :-1], f[:, -1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_stream_equals_smoothing_of_the_rows_so_far(case, lag):
    "The result for row t is the posterior of row t given rows 0 to t+lag."
    chains, logp, background, time = example(case, rows=5, seed=5)
    stream = StreamAligner(
        TinyLibrary(logp.shape[1]),
        Replay(),
        chains,
        width=1,
        lag=lag,
        features=lambda rows, width: rows,
    )
    posteriors = [
        a for row, t in zip(np.c_[logp, background], time) if (a := stream.step(row, t)) is not None
    ]
    assert len(posteriors) == 5 - lag
    posteriors += stream.finish()
    assert len(posteriors) == 5
    for t, (p, none) in enumerate(posteriors):
        seen = min(t + lag, 4) + 1
        found = chains.smooth(logp[:seen], background[:seen], time[:seen])
        assert np.allclose(p, found.posterior[t], atol=1e-6)
        assert np.isclose(none, found.none[t])


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.257, 0.51, 40.0])
def test_kernel_is_a_rounded_normal_distribution(seconds):
    chains = ProgramHMM([300, 50], rates=(0.9, 1.0, 1.1))
    kernel = chains.kernel(seconds)
    assert np.allclose(kernel.sum(1), 1)
    assert kernel.shape[1] <= 300
    mean = chains.rate * seconds / 0.25
    spread = np.maximum(0.2 * mean, 0.3)
    for c in range(6):
        for k in range(1, kernel.shape[1] - 1):
            assert np.isclose(
                kernel[c, k],
                norm.cdf((k + 0.5 - mean[c]) / spread[c])
                - norm.cdf((k - 0.5 - mean[c]) / spread[c]),
                atol=1e-12,
            )


def test_features_are_causal():
    "Compared with a loop; later rows change nothing."
    random = np.random.default_rng(0)
    x = random.normal(size=(25, 3))
    x[:, 1] = np.nan
    x[9:14, 2] = np.nan
    f = trailing_features(x, 6)
    for t in range(25):
        w = x[max(t - 5, 0) : t + 1, 0]
        new, old = w[-3:], w[:-3]
        assert np.allclose(
            f[t, [0, 3, 6]],
            [w.mean(), w.std(), new.mean() - old.mean() if len(old) else 0.0],
            atol=1e-5,
        )
        assert np.allclose(trailing_features(x[: t + 1], 6)[-1], f[t], atol=1e-5, equal_nan=True)
    assert np.isnan(f[:, 1]).all()


@pytest.fixture(scope="module")
def fitted():
    recordings = [
        recording_from_table(t, n) for n, t in simulate_recordings(runs=4, seed=1).items()
    ]
    train = [r for r in recordings if not r.name.endswith("4")]
    test = [r for r in recordings if r.name.endswith("4")]
    library = build_library(train)
    of = programs(recordings)
    channels = [
        c
        for c in select_channels(train)
        if modality(c) in ("current", "acceleration", "rotation", "magnetic", "sound")
    ]
    scale = fit_scale([align_channels(r, channels) for r in train], channels)
    rows = {r.name: scale.apply(align_channels(r, channels)) for r in recordings}
    states = {r.name: library.states(r, of[r.operation]) for r in recordings}
    emission = fit_emission(
        library, [trailing_features(rows[r.name]) for r in train], [states[r.name] for r in train]
    )
    return library, emission, rows, states, train, test, of


def test_library_votes_are_fractions_of_the_recordings(fitted):
    library, *_, train, test, of = fitted
    assert (
        len(library) == len(library.seconds) == len(library.program) == library.text_votes.shape[0]
    )
    assert np.allclose(library.text_votes.sum(1), 1)
    assert np.allclose(library.line_votes.sum(1), 1)
    assert (np.diff(library.line_votes @ library.lines)[np.diff(library.program) == 0] >= 0).all()
    r = train[0]
    p = library.names.index(of[r.operation])
    at = library.first[p] + 20
    runs = [x for x in train if of[x.operation] == of[r.operation]]
    votes = [x.texts[np.abs(x.time - 20 * library.step).argmin()] for x in runs]
    for text in set(votes):
        assert np.isclose(
            library.text_votes[at, list(library.texts).index(text)], votes.count(text) / len(votes)
        )


def test_emission_equals_the_normal_log_density(fitted):
    library, emission, rows, states, train, *_ = fitted
    x = trailing_features(rows[train[0].name])[50:53]
    logp, background = emission.log_probabilities(x)
    limit = emission.max_deviation * np.sqrt(emission.spread)
    cut = np.clip(x, emission.middle - limit, emission.middle + limit)
    for state in (0, 77, len(library) - 1):
        by_hand = np.nansum(
            norm.logpdf(cut, emission.mean[state], np.sqrt(emission.variance[state]))
            + 0.5 * np.log(2 * np.pi),
            1,
        )
        assert np.allclose(logp[:, state], by_hand / emission.temperature, atol=1e-2)
    plain = np.nansum(
        norm.logpdf(cut, emission.middle, np.sqrt(emission.spread)) + 0.5 * np.log(2 * np.pi), 1
    )
    assert np.allclose(background, plain / emission.temperature + emission.offset, atol=1e-2)


def test_without_smoothing_the_means_are_state_means(fitted):
    library, _, rows, states, train, *_ = fitted
    fs = [trailing_features(rows[r.name]) for r in train]
    ss = [states[r.name] for r in train]
    emission = GaussianEmission(library, smooth=0).fit(fs, ss)
    x = np.concatenate(fs)
    s = np.concatenate(ss)
    for state in np.unique(s)[::97]:
        own = x[s == state]
        real = np.isfinite(own).any(0)
        assert np.allclose(emission.mean[state][real], np.nanmean(own[:, real], 0), atol=1e-4)
        assert np.allclose(emission.mean[state][~real], emission.middle[~real])


def test_simulated_recordings_are_located(fitted):
    "Unknown start, from the middle of a recording: program at every row, position within a second."
    library, emission, rows, states, train, test, of = fitted
    chains = ProgramHMM(library.lengths)
    for r in test:
        x = rows[r.name][60:]
        time = r.time[60:]
        found = chains.smooth(*emission.log_probabilities(trailing_features(x)), time)
        predicted = library.describe(found.posterior, found.none)
        assert (predicted.program == of[r.operation]).mean() > 0.95
        assert np.median(abs(predicted.seconds - time)) < 1
        assert found.none.mean() < 0.2
        assert (predicted.text == r.texts[60:]).mean() > 0.7
        path, score = chains.best_path(*emission.log_probabilities(trailing_features(x)), time)
        assert score <= found.log_likelihood + 1e-6
        assert np.median(abs(library.seconds[path] - time)) < 1


def test_stream_continues_without_boards_in_real_time(fitted):
    "Boards drop out half-way: the program is still found, memory is constant, and a row takes a fraction of its 0.25 s."
    library, emission, rows, states, train, test, of = fitted
    r = test[1]
    x = rows[r.name].copy()
    x[len(x) // 2 :, ::2] = np.nan
    x[-20:] = np.nan
    stream = StreamAligner(library, emission, ProgramHMM(library.lengths), lag=8)
    began = clock.perf_counter()
    posteriors = []
    for row, t in zip(x, r.time):
        posteriors.append(stream.step(row, t))
        assert len(stream.steps) <= 9
        assert len(stream.rows) <= 6
    spent = clock.perf_counter() - began
    posteriors = [a for a in posteriors if a is not None] + stream.finish()
    predicted = library.describe(
        np.array([p for p, _ in posteriors]), np.array([n for _, n in posteriors])
    )
    assert (predicted.program == of[r.operation])[10:].mean() > 0.9
    assert np.isfinite(predicted.program_probability).all()
    assert spent < r.time[-1] / 10


def test_two_programs_in_one_recording_are_separated(fitted):
    library, emission, rows, states, train, test, of = fitted
    a, b = (next(r for r in test if r.operation == n) for n in ("pocket", "contour"))
    keep = sorted(set(range(rows[a.name].shape[1])))
    x = np.concatenate([rows[a.name], rows[b.name]])[:, keep]
    time = np.r_[a.time, b.time + a.time[-1] + 0.5]
    found = ProgramHMM(library.lengths, leave=1e-3).smooth(
        *emission.log_probabilities(trailing_features(x)), time
    )
    predicted = library.describe(found.posterior, found.none).program
    assert (predicted[: len(a)] == "pocket").mean() > 0.9
    assert (predicted[len(a) + 10 :] == "contour").mean() > 0.85


def test_neural_emission_follows_bayes_rule():
    "Posterior divided by prior is the likelihood up to a common factor."
    random = np.random.default_rng(0)
    likelihood = random.random((6, 4))
    prior = random.dirichlet(np.ones(4))
    posterior = likelihood * prior / (likelihood * prior).sum(1, keepdims=True)
    logp, background = NeuralEmission(
        lambda f: np.log(posterior), prior * 100, offset=-1.0
    ).log_probabilities(np.zeros((6, 1)))
    assert np.allclose(np.diff(logp), np.diff(np.log(likelihood)))
    assert (background == -1).all()


def test_bad_input_is_refused(fitted):
    library, emission, rows, states, train, test, of = fitted
    chains = ProgramHMM(library.lengths)
    stream = StreamAligner(library, emission, chains)
    stream.step(rows[test[0].name][0], 5.0)
    for call in (
        lambda: build_library([]),
        lambda: library.states(train[0], "boat"),
        lambda: chains.kernel(float("nan")),
        lambda: chains.kernel(-0.1),
        lambda: stream.step(rows[test[0].name][1], 4.0),
        lambda: fit_emission(library, [np.zeros((3, 2))], [np.zeros(3, int)]),
        lambda: chains.smooth(np.zeros((0, len(library))), np.zeros(0), np.zeros(0)),
    ):
        with pytest.raises(InputError):
            call()


# ---- segments, the two clocks, the network and the locator


def test_match_is_the_sum_along_the_diagonal(fitted):
    "Compared with a loop over rows; programs are held at their ends and do not mix."
    library = fitted[0]
    random = np.random.default_rng(0)
    time = np.cumsum(random.uniform(0.1, 0.6, 9))
    logp = random.normal(size=(9, len(library)))
    for row in (None, 0, 8):
        score = library.match(logp, time, row)
        middle = 4 if row is None else row
        for s in (0, 5, library.lengths[0] - 1, library.lengths[0], len(library) - 1):
            first = library.first[library.program[s]]
            last = first + library.lengths[library.program[s]] - 1
            places = [
                min(max(s + int(np.rint((t - time[middle]) / library.step)), first), last)
                for t in time
            ]
            assert np.isclose(score[s], sum(logp[t, p] for t, p in enumerate(places)))
    p = posterior(score, 3.0)
    assert np.isclose(p.sum(), 1)
    assert np.allclose(np.diff(np.log(p)), np.diff(score) / 3)


def test_match_is_the_limit_of_the_hidden_markov_model():
    "For a deterministic advance, smoothing a segment equals matching it."

    class Exact(ProgramHMM):
        def kernel(self, seconds):
            k = np.zeros((len(self.lengths), 3))
            k[:, int(np.rint(seconds / self.step))] = 1.0
            return k

    library = build_library(
        [
            recording_from_table(t, n)
            for n, t in simulate_recordings(runs=1, seed=0, classes=["face", "pocket"]).items()
        ]
    )
    random = np.random.default_rng(1)
    time = 0.25 * np.r_[0, 1, 2, 4, 5, 6]
    logp = random.normal(size=(6, len(library)))
    chains = Exact(library.lengths, none=0.0, leave=0.0, enter=0.0)
    found = chains.smooth(logp, np.full(6, -50.0), time).posterior[0]
    score = library.match(logp, time, 0) + np.log(1 / np.repeat(library.lengths, library.lengths))
    assert np.allclose(found, posterior(score), atol=1e-6)


def moved(r, seconds=0.0, rows=0):
    "A recording with labels delayed by `seconds` or sensors delayed by `rows`."
    return Recording(
        r.name,
        r.operation,
        r.time + seconds,
        r.lines,
        r.texts,
        r.channels,
        np.roll(r.sensors, rows, axis=0),
        r.controller,
    )


def test_lags_of_both_clocks_are_recovered(fitted):
    "Introduced shifts are recovered, up to a constant of the group."
    *_, train, test, of = fitted
    runs = [r for r in train + test if r.operation == "pocket"]
    assert np.allclose(
        line_lags([moved(r, s) for r, s in zip(runs, (0, 0.8, 0, -1.2))]),
        [0, 0.8, 0, -1.2],
        atol=0.15,
    )
    step = np.median(np.diff(runs[0].time))
    lags, agreement = sensor_lags(
        [moved(r, rows=k) for r, k in zip(runs, (0, 8, 0, 0))], max_lag=4.0
    )
    assert np.allclose(lags, [0, 8 * step, 0, 0], atol=0.5)
    assert (agreement > 0).all()
    with pytest.raises(InputError):
        sensor_lags(runs[:2])


def test_training_recordings_are_moved_to_the_clock_of_their_sensors(fitted):
    "Only times change, by the lags; the states of the recipe follow them."
    *_, train, test, of = fitted
    pockets = [r for r in train + test if r.operation == "pocket"]
    others = [r for r in train if r.operation == "face"][:2]
    late = [moved(r, rows=k) for r, k in zip(pockets, (0, 8, 0, 0))]
    step = np.median(np.diff(pockets[0].time))
    placed = on_sensor_clock(late + others)
    assert np.allclose(
        [p.time[0] - r.time[0] for p, r in zip(placed, late)], [0, -8 * step, 0, 0], atol=0.5
    )
    for p, r in zip(placed, late + others):
        assert (p.name, p.lines is r.lines, p.sensors is r.sensors) == (
            r.name,
            True,
            True,
        )
        assert np.allclose(np.diff(p.time), np.diff(r.time))
    assert all(
        (p.time == r.time).all() for p, r in zip(placed[4:], others)
    )  # two recordings are too few for a common clock
    rows = [r for r in train if r.operation != "pocket"] + late
    learn = emission_recipe(rows, max_epochs=1)
    plain = emission_recipe(rows, max_epochs=1, clocks=False)
    name = late[1].name
    assert abs(learn.placed[name].time[0] + 8 * step) < 0.6
    assert plain.placed[name] is late[1]
    assert all(learn.placed[r.name].lines is r.lines for r in learn.inner + learn.held)
    assert {r.name for r in learn.inner} == {r.name for r in plain.inner}
    assert (
        not emission_recipe(rows, modalities=("environment", "light"), max_epochs=1)
        .placed[name]
        .time[0]
    )


def test_clock_table_equals_its_definition(fitted):
    "Gaussian weights over the rows of a class; the nearest row if none is near."
    *_, train, test, of = fitted
    table = clock_table(train, 0.05)
    k = table.operations.index("face")
    time = np.r_[10.01, 33.3, 1e4]
    votes = table.votes(time, np.eye(len(table.operations))[k]).toarray()
    t = np.concatenate([r.time for r in train if r.operation == "face"])
    x = np.concatenate([r.texts for r in train if r.operation == "face"])
    for at, row in zip(time[:2], votes):
        near = abs(t - at) < 0.15
        weight = np.exp(-0.5 * ((t[near] - at) / 0.05) ** 2)
        if not near.any():
            near = np.arange(len(t)) == abs(t - at).argmin()
            weight = np.ones(1)
        for text in set(x[near]):
            assert np.isclose(
                row[list(table.texts).index(text)],
                weight[x[near] == text].sum() / weight.sum(),
                atol=1e-9,
            )
    assert np.allclose(votes.sum(1), 1)
    assert table.texts[votes[2].argmax()] == x[t.argmax()]
    both = table.votes(time, np.full(len(table.operations), 1 / len(table.operations)))
    assert np.allclose(np.asarray(both.sum(1)).ravel(), 1)


def test_bound_decreases_with_the_disagreement_of_the_clocks(fitted):
    *_, train, test, of = fitted
    a, b = ([r for r in part if r.operation == "pocket"] for part in (train, test))
    exact = [
        np.concatenate(
            line_bound(a, b, {r.name: s * k for r, k in zip(a + b, (1.0, -1.0, 0.5, -2.0))})
        ).mean()
        for s in (0, 1, 4)
    ]
    assert exact[0] > exact[1] > exact[2]


@pytest.fixture(scope="module")
def placed(fitted):
    *_, train, test, of = fitted
    learn = emission_recipe(train, max_epochs=9, batch_size=64, hidden=64, rank=32, silence=0.1)
    with learn.no_bar(), learn.no_logging():
        fit(learn)
    return build_locator(learn, network_emission(learn)), learn, train, test, of


def test_network_ignores_missing_features_and_slow_channels(placed):
    "Dropped features stay zero in training; the state scores do not depend on the slow channels."
    locator, learn, *_ = placed
    network = learn.model
    x = torch.from_numpy(learn.features(learn.held[0]))
    slow = x.clone()
    slow[:, network.motion :] = 9.0
    assert torch.equal(network.eval()(x)["states"], network(slow)["states"])
    assert not torch.equal(network(x)["operation"], network(slow)["operation"])
    x[:, 3] = 0.0
    augmented = network.augmented(x)
    assert (augmented[:, 3] == 0).all()
    for board in network.boards.unique():
        own = network.boards == board
        silent = (augmented[:, own] == 0).all(1).float().mean()
        assert 0 < silent < 0.5 if (x[:, own] != 0).any() else silent == 1


def test_locator_locates_windows_and_rows(placed):
    "Program and text of test recordings, with valid probabilities."
    locator, learn, train, test, of = placed
    assert len(learn.inner) + len(learn.held) == len(train)
    assert not {r.name for r in learn.inner} & {r.name for r in learn.held}
    for r in test[:3]:
        start = np.arange(0, len(r) - 64, 32)
        predicted = locate_windows(locator, r, start, start + 64)
        assert (predicted.program_predicted == of[r.operation]).mean() > 0.8
        for c in ("text", "program", "operation"):
            assert predicted[f"{c}_probability"].between(0, 1 + 1e-6).all()
        rows = locate_rows(locator, r)
        assert len(rows) == len(r)
        assert (rows.known_start_text == r.texts).mean() > 0.7
        assert rows.known_start_text_probability.between(0, 1 + 1e-6).all()


def test_normal_distributions_can_replace_the_network(placed):
    "Same library and clock table, the Gaussian emission, and no information on the operation."
    locator, learn, train, test, of = placed
    other = gaussian_locator(learn)
    assert other.library is learn.library
    assert (other.table.texts == locator.table.texts).all()
    assert other.program_of == locator.program_of
    x = other.features(test[0])
    logp, background, operation = other.emission.both(x)
    n = 3 * sum(learn.features.motion)
    assert x.shape[1] == n
    assert np.allclose(np.nan_to_num(x), learn.features(test[0])[:, :n])
    assert np.isnan(x).any()
    assert not operation.any()
    assert np.array_equal(logp, other.emission.log_probabilities(x)[0])
    assert np.isfinite(logp).all()
    right = []
    for r in test:
        start = np.arange(0, len(r) - 64, 32)
        predicted = locate_windows(other, r, start, start + 64)
        assert predicted.text_probability.between(0, 1 + 1e-6).all()
        right += (predicted.program_predicted == of[r.operation]).tolist()
    assert np.mean(right) > 0.6


def test_window_scores_of_a_hand_made_table():
    "An empty prediction is wrong; the vote is over the windows of a recording."
    o = pd.DataFrame(
        dict(
            source=["a", "a", "a", "b"],
            text=["X1", "X2", "Y1", "G1 X1"],
            operation=["p", "p", "p", "q"],
            text_predicted=["X1", "X3", "X1", "G1 X1"],
            text_probability=1.0,
            shape_predicted=["X", "X", "X", "G1 X"],
            program_predicted=["p", "q", "p", "q"],
            operation_predicted=["p", "q", "p", "q"],
            text_lookup=["X1", "", "Y1", "X1"],
        )
    )
    t = score_windows(o, "hand", dict(p="p", q="q")).set_index(["name", "measure"]).value
    assert t["model", "text at the middle row"] == 0.5
    assert t["model", "shape at the middle row"] == 0.75
    assert t["model", "operation"] == 0.75
    assert t["model", "operation, vote of a run"] == 1
    assert t["lookup", "text at the middle row"] == 0.5
    assert t["lookup", "shape at the middle row"] == 0.5
    assert np.allclose(selective_curve([0.2, 0.9, 0.5], [0, 1, 0]).accuracy, [1, 0.5, 1 / 3])
    assert line_shape("G53 G0 Z0.") == "G53 G0 Z"


def test_open_set_auroc_is_the_area_under_the_curve():
    a = pd.DataFrame(dict(source=list("xxyy"), fit=[3.0, 2.0, 5.0, 4.0]))
    b = pd.DataFrame(dict(source=list("zz"), fit=[2.5, 1.0]))
    found = open_set_auroc(a, b)
    assert found["window"] == np.mean([u > v for u in a.fit for v in b.fit])
    assert found["run"] == 1.0


def remounted(r, size=3.0, seed=0):
    "The same recording with every board remounted: other offsets and gains."
    random = np.random.default_rng(seed)
    n = r.sensors.shape[1]
    spread = np.nanstd(r.sensors, 0)
    return replace(
        r,
        sensors=(
            r.sensors * random.uniform(0.6, 1.6, n)
            + random.normal(0, size * np.where(np.isfinite(spread), spread, 1), n)
        ).astype("float32"),
    )


def test_templates_ignore_offset_and_gain(placed):
    "Offset and positive gain change nothing; an inverted sensor scores lower; without motion all scores are zero."
    locator, learn, train, test, of = placed
    t = locator.templates
    assert not {r.name for r in learn.held} & {r.name for r in learn.inner}
    for r in test[:3]:
        rows = align_channels(r, t.channels)[40:104]
        time = r.time[40:104]
        score = t.match(rows, time)
        assert score.shape == (len(locator.library),)
        assert (score >= 0).all()
        assert np.allclose(t.match(7 * rows - 300, time), score, rtol=2e-2, atol=0.5)
        assert t.match(-rows, time)[score.argmax()] < score.max()
        assert not t.match(np.ones_like(rows), time).any()
        assert not t.match(np.full_like(rows, np.nan), time).any()
    with pytest.raises(InputError, match="at least one channel"):
        program_templates(locator.library, train, ("nothing",))


def test_segments_of_whole_recordings_identify_the_program(placed):
    "Segments cover all rows; only the margin of the true program is positive, even when sensors drift."
    locator, *_, test, of = placed
    t = locator.templates
    lib = locator.library
    for n in (1, 40, 64, 200, 777):
        start, stop = split_segments(n)
        assert start[0] == 0
        assert stop[-1] == n
        assert (start[1:] == stop[:-1]).all()
        assert n < 96 or 48 < (stop - start).min() <= (stop - start).max() < 96
    for r in test:
        rows = align_channels(r, t.channels)
        drift = np.linspace(0, 1, len(rows))[:, None] * np.nanstd(rows, 0)
        for x in (rows, rows + drift):
            margin = t.margins(x, r.time)
            assert [of[n] for n, m in zip(lib.names, margin) if m > 0] == [of[r.operation]]


def test_the_stream_with_a_known_start_is_causal(placed):
    locator, *_, test, of = placed
    for r in test[:2]:
        n = 3 * len(r) // 4
        part = replace(
            r,
            time=r.time[:n],
            lines=r.lines[:n],
            texts=r.texts[:n],
            sensors=r.sensors[:n],
            controller=None,
        )
        a = locate_rows(locator, r)
        b = locate_rows(locator, part)
        first = split_segments(len(r))[1][0]
        same = 64 * ((n - 32) // 64)
        assert (a.known_start_stream_text[:same] == b.known_start_stream_text[:same]).all()
        assert (a.known_start_stream_text == r.texts)[first:].mean() > 0.9


def test_an_unseen_day_is_detected_and_left_to_the_filter(placed):
    locator, learn, train, test, of = placed
    own = []
    lost = []
    whole = []
    for r in test:
        start = np.arange(0, len(r) - 64, 32)
        unseen = locate_windows(locator, remounted(r), start, start + 64, each_model=True)
        own += (unseen.program_predicted == of[r.operation]).tolist()
        lost += (unseen.operation_network.map(of) == of[r.operation]).tolist()
        whole.append(
            of[locate_rows(locator, remounted(r)).operation_predicted[0]] == of[r.operation]
        )
    assert np.mean(own) > 0.75
    assert np.mean(own) > np.mean(lost)
    assert np.mean(whole) >= 0.8


def test_readings(placed):
    "Probabilities; an infinite temperature silences a reader; the spread stays within a program."
    locator, *_ = placed
    lib = locator.library
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 3, len(lib)))
    for r in (
        ScoreCalibration(4.0, 8.0, 1.0),
        ScoreCalibration(4.0),
        ScoreCalibration(float("inf"), 2.0, 0.5),
    ):
        p = r.state_probabilities(lib, r.score(a, b))
        assert np.allclose(p.sum(-1), 1)
        assert p.shape == a.shape
    assert np.array_equal(ScoreCalibration(4.0).score(a, b), a / 4)
    assert np.array_equal(ScoreCalibration(float("inf"), 2.0).score(a, b), b / 2)
    one = np.full((1, len(lib)), -1e6)
    one[0, lib.first[1]] = 0.0
    p = ScoreCalibration(1.0, spread=2.0).state_probabilities(lib, one)[0]
    assert np.isclose(p[lib.program == 1].sum(), 1)
    assert p[lib.first[1]] > p[lib.first[1] + 3] > 0
    combined = locator.operation(
        np.eye(len(lib.names))[0], random.normal(size=len(locator.operations))
    )
    assert np.isclose(combined[np.array(locator.program_of) == 0].sum(), 1)
