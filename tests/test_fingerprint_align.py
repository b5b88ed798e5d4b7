"Forward-backward, Viterbi and the stream against enumeration of all paths; the library and the emission against their definitions."
import itertools
import time as clock

import numpy as np
import pytest
from scipy.stats import norm

from gcode_ml.core.errors import InputError
from gcode_ml.fingerprint.align import (GaussianEmission, NeuralEmission, ProgramChains, StreamAligner, build_library, fit_emission,
                                        trailing_features)
from gcode_ml.fingerprint.data import align_channels, fit_scale, modality, programs, recording_from_table, select_channels
from gcode_ml.fingerprint.simulate import simulate_recordings

CASES = [dict(lengths=[3, 2]), dict(lengths=[4], known_start=True), dict(lengths=[2, 3], rates=(.5, 1.5), leave=.1, enter=.3), dict(lengths=[1, 3], leave=.05)]


def dense(chains, seconds):
    "Transition matrix over the inside states of all chains and the state of no program, from the definition."
    kernel = chains.kernel(seconds); starts = np.cumsum(chains.lengths)-chains.lengths; n = chains.lengths.sum()
    a = np.zeros((n+1, n+1))
    for c, length in enumerate(chains.lengths):
        for s in range(length):
            for k in range(kernel.shape[1]): a[starts[c]+s, starts[c]+min(s+k, length-1)] += kernel[c, k]*(1-chains.leave)
    a[:n, n] = chains.leave
    a[n, :n], a[n, n] = chains.entry[chains.inside]*chains.enter, 1-chains.enter
    return a


def enumerated(chains, logp, background, time):
    "Every path with its probability: posterior of each state, likelihood, best path."
    n = chains.lengths.sum(); inside = np.broadcast_to(chains.flat, chains.inside.shape)[chains.inside]
    emission = np.exp(np.c_[logp[:, inside], background])
    begin = np.r_[chains.entry[chains.inside]*(1-chains.none), chains.none]
    matrices = [dense(chains, g) for g in np.diff(time)]
    posterior, total, best = np.zeros(emission.shape), 0., (0., None)
    for path in itertools.product(range(n+1), repeat=len(logp)):
        p = begin[path[0]]*emission[0, path[0]]
        for t in range(1, len(path)): p *= matrices[t-1][path[t-1], path[t]]*emission[t, path[t]]
        total += p; posterior[np.arange(len(path)), path] += p
        if p > best[0]: best = p, path
    place = np.r_[inside, -1]
    return posterior/total, np.log(total), [place[s] for s in best[1]], np.log(best[0]), inside


def example(case, rows=4, seed=0):
    random = np.random.default_rng(seed); chains = ProgramChains(step=.25, **case)
    states = sum(case['lengths'])
    return chains, random.normal(size=(rows, states))*2, random.normal(size=rows), np.r_[0, np.cumsum(random.uniform(.1, .6, rows-1))]


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('seed', range(3))
def test_smoothing_and_viterbi_are_enumeration(case, seed):
    chains, logp, background, time = example(case, seed=seed)
    posterior, likelihood, path, best, inside = enumerated(chains, logp, background, time)
    found = chains.smooth(logp, background, time)
    summed = np.stack([np.bincount(inside, p[:-1], logp.shape[1]) for p in posterior])
    assert np.allclose(found.posterior, summed, atol=1e-6) and np.allclose(found.none, posterior[:, -1], atol=1e-9)
    assert np.isclose(found.log_likelihood, likelihood)
    found_path, score = chains.best_path(logp, background, time)
    assert np.isclose(score, best) and found_path.tolist() == path
    by_rate = np.stack([np.bincount(np.repeat(np.tile(np.arange(len(chains.rates)), len(case['lengths'])), chains.lengths), p[:-1], len(chains.rates)) for p in posterior])
    assert np.allclose(found.rates, by_rate, atol=1e-9)


class Lib:
    "As much of a library as the stream needs."
    def __init__(self, states): self.states = states
    def clock(self, time): return np.zeros((len(time), self.states))


class Replay:
    "An emission whose log-probabilities are the features."
    def log_probabilities(self, f): return f[:, :-1], f[:, -1]


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('lag', [0, 1, 2])
def test_stream_is_smoothing_of_what_it_has_seen(case, lag):
    "The answer for row t is the enumerated posterior of row t given rows 0 to t+lag."
    chains, logp, background, time = example(case, rows=5, seed=5)
    stream = StreamAligner(Lib(logp.shape[1]), Replay(), chains, width=1, lag=lag, features=lambda rows, width: rows)
    answers = [a for row, t in zip(np.c_[logp, background], time) if (a := stream.step(row, t)) is not None]
    assert len(answers) == 5-lag
    answers += stream.finish(); assert len(answers) == 5
    for t, (p, none) in enumerate(answers):
        seen = min(t+lag, 4)+1
        found = chains.smooth(logp[:seen], background[:seen], time[:seen])
        assert np.allclose(p, found.posterior[t], atol=1e-6) and np.isclose(none, found.none[t])


@pytest.mark.parametrize('seconds', [0., .05, .257, .51, 40.])
def test_kernel_is_a_rounded_normal(seconds):
    chains = ProgramChains([300, 50], rates=(.9, 1., 1.1)); kernel = chains.kernel(seconds)
    assert np.allclose(kernel.sum(1), 1) and kernel.shape[1] <= 300
    mean = chains.rate*seconds/.25; spread = np.maximum(.2*mean, .3)
    for c in range(6):
        for k in range(1, kernel.shape[1]-1): assert np.isclose(kernel[c, k], norm.cdf((k+.5-mean[c])/spread[c])-norm.cdf((k-.5-mean[c])/spread[c]), atol=1e-12)


def test_features_look_back_only():
    "Against a loop; rows that come later change nothing."
    random = np.random.default_rng(0); x = random.normal(size=(25, 3)); x[:, 1] = np.nan; x[9:14, 2] = np.nan
    f = trailing_features(x, 6)
    for t in range(25):
        w = x[max(t-5, 0):t+1, 0]; new, old = w[-3:], w[:-3]
        assert np.allclose(f[t, [0, 3, 6]], [w.mean(), w.std(), new.mean()-old.mean() if len(old) else 0.], atol=1e-5)
        assert np.allclose(trailing_features(x[:t+1], 6)[-1], f[t], atol=1e-5, equal_nan=True)
    assert np.isnan(f[:, 1]).all()


@pytest.fixture(scope='module')
def fitted():
    recordings = [recording_from_table(t, n) for n, t in simulate_recordings(runs=4, seed=1).items()]
    train, test = [r for r in recordings if not r.name.endswith('4')], [r for r in recordings if r.name.endswith('4')]
    library, of = build_library(train), programs(recordings)
    channels = [c for c in select_channels(train) if modality(c) in ('current', 'acceleration', 'rotation', 'magnetic', 'sound')]
    scale = fit_scale([align_channels(r, channels) for r in train], channels)
    rows = {r.name: scale.apply(align_channels(r, channels)) for r in recordings}
    states = {r.name: library.states(r, of[r.operation]) for r in recordings}
    emission = fit_emission(library, [trailing_features(rows[r.name]) for r in train], [states[r.name] for r in train])
    return library, emission, rows, states, train, test, of


def test_library_says_what_the_runs_show(fitted):
    library, *_, train, test, of = fitted
    assert len(library) == len(library.seconds) == len(library.program) == library.text_votes.shape[0]
    assert np.allclose(library.text_votes.sum(1), 1) and np.allclose(library.line_votes.sum(1), 1)
    assert (np.diff(library.line_votes @ library.lines)[np.diff(library.program) == 0] >= 0).all()
    r = train[0]; p = library.names.index(of[r.operation]); at = library.first[p]+20
    runs = [x for x in train if of[x.operation] == of[r.operation]]
    votes = [x.texts[np.abs(x.time-20*library.step).argmin()] for x in runs]
    for text in set(votes): assert np.isclose(library.text_votes[at, list(library.texts).index(text)], votes.count(text)/len(votes))


def test_emission_is_the_normal_distribution(fitted):
    library, emission, rows, states, train, *_ = fitted
    x = trailing_features(rows[train[0].name])[50:53]; logp, background = emission.log_probabilities(x)
    limit = emission.most*np.sqrt(emission.spread); cut = np.clip(x, emission.middle-limit, emission.middle+limit)
    for state in (0, 77, len(library)-1):
        by_hand = np.nansum(norm.logpdf(cut, emission.mean[state], np.sqrt(emission.variance[state]))+.5*np.log(2*np.pi), 1)
        assert np.allclose(logp[:, state], by_hand/emission.temperature, atol=1e-2)
    plain = np.nansum(norm.logpdf(cut, emission.middle, np.sqrt(emission.spread))+.5*np.log(2*np.pi), 1)
    assert np.allclose(background, plain/emission.temperature+emission.offset, atol=1e-2)


def test_unsmoothed_means_are_the_means(fitted):
    library, _, rows, states, train, *_ = fitted
    fs = [trailing_features(rows[r.name]) for r in train]; ss = [states[r.name] for r in train]
    emission = GaussianEmission(library, smooth=0).fit(fs, ss); x, s = np.concatenate(fs), np.concatenate(ss)
    for state in np.unique(s)[::97]:
        own = x[s == state]; real = np.isfinite(own).any(0)
        assert np.allclose(emission.mean[state][real], np.nanmean(own[:, real], 0), atol=1e-4)
        assert np.allclose(emission.mean[state][~real], emission.middle[~real])


def test_simulated_runs_are_found(fitted):
    "Unknown start, from the middle of a run: every run's program by every row, the place within a second."
    library, emission, rows, states, train, test, of = fitted
    chains = ProgramChains(library.lengths)
    for r in test:
        x, time, true = rows[r.name][60:], r.time[60:], states[r.name][60:]
        found = chains.smooth(*emission.log_probabilities(trailing_features(x)), time)
        said = library.describe(found.posterior, found.none)
        assert (said.program == of[r.operation]).mean() > .95 and np.median(abs(said.seconds-time)) < 1 and found.none.mean() < .2
        assert (said.text == r.texts[60:]).mean() > .7
        path, score = chains.best_path(*emission.log_probabilities(trailing_features(x)), time)
        assert score <= found.log_likelihood+1e-6 and np.median(abs(library.seconds[path]-time)) < 1


def test_stream_goes_on_without_boards_and_is_fast(fitted):
    "Boards fall silent half-way; the program is still found, memory stays, and a row takes a small part of its 0.25 s."
    library, emission, rows, states, train, test, of = fitted
    r = test[1]; x = rows[r.name].copy(); x[len(x)//2:, ::2] = np.nan; x[-20:] = np.nan
    stream = StreamAligner(library, emission, ProgramChains(library.lengths), lag=8)
    began = clock.perf_counter(); answers = []
    for row, t in zip(x, r.time):
        answers.append(stream.step(row, t)); assert len(stream.steps) <= 9 and len(stream.rows) <= 6
    spent = clock.perf_counter()-began
    answers = [a for a in answers if a is not None]+stream.finish()
    said = library.describe(np.array([p for p, _ in answers]), np.array([n for _, n in answers]))
    assert (said.program == of[r.operation])[10:].mean() > .9 and np.isfinite(said.program_probability).all()
    assert spent < r.time[-1]/10


def test_two_programs_in_one_recording(fitted):
    library, emission, rows, states, train, test, of = fitted
    a, b = (next(r for r in test if r.operation == n) for n in ('pocket', 'contour'))
    keep = sorted(set(range(rows[a.name].shape[1])))
    x = np.concatenate([rows[a.name], rows[b.name]])[:, keep]; time = np.r_[a.time, b.time+a.time[-1]+.5]
    found = ProgramChains(library.lengths, leave=1e-3).smooth(*emission.log_probabilities(trailing_features(x)), time)
    said = library.describe(found.posterior, found.none).program
    assert (said[:len(a)] == 'pocket').mean() > .9 and (said[len(a)+10:] == 'contour').mean() > .85


def test_neural_emission_is_bayes():
    "Posterior over prior is the likelihood up to a factor that all states share."
    random = np.random.default_rng(0); likelihood, prior = random.random((6, 4)), random.dirichlet(np.ones(4))
    posterior = likelihood*prior/(likelihood*prior).sum(1, keepdims=True)
    logp, background = NeuralEmission(lambda f: np.log(posterior), prior*100, offset=-1.).log_probabilities(np.zeros((6, 1)))
    assert np.allclose(np.diff(logp), np.diff(np.log(likelihood))) and (background == -1).all()


def test_bad_input(fitted):
    library, emission, rows, states, train, test, of = fitted
    chains = ProgramChains(library.lengths)
    stream = StreamAligner(library, emission, chains); stream.step(rows[test[0].name][0], 5.)
    for call in (lambda: build_library([]), lambda: library.states(train[0], 'boat'), lambda: chains.kernel(float('nan')), lambda: chains.kernel(-.1),
                 lambda: stream.step(rows[test[0].name][1], 4.), lambda: fit_emission(library, [np.zeros((3, 2))], [np.zeros(3, int)]),
                 lambda: chains.smooth(np.zeros((0, len(library))), np.zeros(0), np.zeros(0))):
        with pytest.raises(InputError): call()
