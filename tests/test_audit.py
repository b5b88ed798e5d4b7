"Splits keep sources whole, and every check of the leak audit finds its planted leak and leaves the clean set alone."

import json

import numpy as np
import pandas as pd
import pytest

from gcode_ml.core.errors import InputError
from gcode_ml.data.split import (
    check_disjoint,
    group_holdout,
    group_kfold,
    join_sources,
    leave_one_group_out,
    random_split,
)
from gcode_ml.evaluation.audit import (
    affine_copies,
    class_from_missingness,
    class_from_slow_channels,
    duplicate_rows,
    findings_json,
    findings_table,
    largest_overlap,
    leak_audit,
    lookup_by_time,
    source_table,
    window_overlap,
)

seeds = pytest.mark.parametrize("seed", range(5))


def windows(seed, size=64, stride=16):
    "Source, start and stop of overlapping windows over sources of random length."
    lengths = np.random.default_rng(seed).integers(100, 700, size=15)
    starts = [np.arange(0, n - size + 1, stride) for n in lengths]
    return (
        np.repeat(np.arange(15), [len(s) for s in starts]),
        np.concatenate(starts),
        np.concatenate(starts) + size,
    )


def random_items(seed):
    "Sources and labels of items, one or many a source, labels by source or by item."
    random = np.random.default_rng(seed)
    n = random.integers(5, 20)
    sources = np.concatenate([np.arange(n), random.integers(n, size=random.integers(0, 200))])
    random.shuffle(sources)
    labels = (
        random.integers(3, size=n)[sources] if seed % 2 else random.integers(3, size=len(sources))
    )
    return np.array([f"s{i}" for i in sources]), labels


@pytest.mark.parametrize("seed", range(40))
def test_no_source_on_two_sides(seed):
    sources, labels = random_items(seed)
    most = np.bincount(labels).max()
    for given in (None, labels):
        folds = min(5, most) if given is not None else 5
        if folds < 2:
            continue
        splits = group_kfold(sources, given, folds, seed)
        for train, test in [*splits, group_holdout(sources, given, 0.3, seed)]:
            check_disjoint(sources, train, test)
            assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(sources)))
        assert np.array_equal(
            np.sort(np.concatenate([test for _, test in splits])), np.arange(len(sources))
        )
    assert [name for name, _, _ in leave_one_group_out(sources)] == sorted(set(sources))
    for name, train, test in leave_one_group_out(sources):
        assert set(sources[test]) == {name}
        assert name not in sources[train]


def test_splits_repeat_and_shuffle():
    sources, labels = random_items(1)

    def sides(seed):
        return [test.tolist() for _, test in group_kfold(sources, labels, 3, seed)], group_holdout(
            sources, labels, 0.3, seed
        )[1].tolist()

    assert sides(3) == sides(3)
    assert len({str(sides(s)) for s in range(6)}) > 1


def test_holdout_gives_each_class_its_share():
    labels = np.repeat([0, 1, 2], [16, 16, 4])
    for seed in range(20):
        test = group_holdout(np.arange(36), labels, 0.25, seed)[1]
        assert len(test) == 9
        assert (np.abs(np.bincount(labels[test], minlength=3) - [4, 4, 1]) <= 1).all()


@pytest.mark.parametrize(
    "call,words",
    [
        (
            lambda: group_kfold(["a", "b"], folds=3),
            "folds: expected 2 to 2, the number of sources, found 3",
        ),
        (
            lambda: group_kfold(["a", "b"], [0], folds=2),
            "labels: expected 2, one per item, found 1",
        ),
        (
            lambda: group_kfold(["a", "b", "c"], [0, 1, 2], folds=2),
            "expected a class with at least 2 items, found 1 at most",
        ),
        (
            lambda: group_kfold(["a", None, "c"], folds=2),
            "expected a name for every item, found none at item 1",
        ),
        (lambda: group_holdout(["a", "b"], share=1.0), "a share between 0 and 1"),
        (lambda: leave_one_group_out([]), "expected one name per item"),
        (lambda: random_split(1), "two or more items"),
        (
            lambda: check_disjoint(["a", "a", "b"], [0], [1, 2], "split.json"),
            "split.json: sources: expected each on one side, found a on both sides",
        ),
        (lambda: join_sources(["a"], [("a", "z")]), "expected one of the sources, found 'z'"),
        (lambda: window_overlap(["a"], [0], [0], [0], [0]), "stops after starts"),
        (lambda: window_overlap(["a"], [0], [4], [0], []), "at least one window"),
        (
            lambda: window_overlap(["a", "a"], [0], [4], [0], [0]),
            "expected 2, one for each of sources, found 1",
        ),
        (
            lambda: duplicate_rows(dict(a=np.ones((3, 2)), b=np.ones((3, 3)))),
            "b: series: expected an array [T,2]",
        ),
        (lambda: duplicate_rows({}), "at least one source"),
        (lambda: class_from_missingness(np.ones((4, 2)), ["a"] * 4), "two or more classes"),
        (lambda: leak_audit(nonsense={}), "expected one of window_overlap"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(InputError) as e:
        call()
    assert words in str(e.value)
    assert "\n" not in str(e.value)


@seeds
def test_joining_is_transitive(seed):
    random = np.random.default_rng(seed)
    sources = np.array([f"s{i:02d}" for i in range(30)])[random.integers(30, size=90)]
    pairs = [tuple(random.choice(sources, 2)) for _ in range(12)]
    joined = join_sources(sources, pairs)
    group = dict(zip(sources, joined))
    for a, b in pairs:
        assert group[a] == group[b]
    reach = {s: {s} for s in group}  # closure by hand
    for _ in range(30):
        for a, b in pairs:
            reach[a] = reach[b] = reach[a] | reach[b]
    for _ in range(30):
        for s in reach:
            reach[s] = set().union(*(reach[t] for t in reach[s]))
    for s in group:
        assert group[s] == min(reach[s])
    assert np.array_equal(join_sources(np.arange(4), [(2, 1)]), [0, 1, 1, 3])


@seeds
def test_window_overlap(seed):
    sources, starts, stops = windows(seed)
    found = window_overlap(sources, starts, stops, *random_split(len(sources), 0.3, seed))
    assert found.leak
    assert found.value > 0.95
    assert 0.8 < found.details["near_share"] < found.value
    for train, test in group_kfold(sources, seed=seed):
        quiet = window_overlap(sources, starts, stops, train, test)
        assert not quiet.leak
        assert quiet.value == 0
        assert quiet.details["mean_shared"] == 0


def test_touching_windows_share_nothing():
    assert not window_overlap(["a"] * 3, [0, 10, 20], [10, 20, 30], [0, 2], [1]).leak
    found = window_overlap(["a"] * 3, [0, 10, 19], [10, 20, 30], [0, 2], [1])
    assert found.leak
    assert found.details["near_share"] == 0


@pytest.mark.parametrize("seed", range(30))
def test_most_shared_rows_by_brute_force(seed):
    random = np.random.default_rng(seed)
    start = random.integers(0, 200, 40)
    a = random.integers(0, 200, 50)
    stop = start + random.integers(1, [2, 20, 150][seed % 3], 40)
    b = a + random.integers(1, [150, 20, 2][seed % 3], 50)
    by_hand = (np.minimum(stop[:, None], b) - np.maximum(start[:, None], a)).clip(0).max(0)
    assert np.array_equal(largest_overlap(start, stop, a, b), by_hand)


def recordings(seed, copied=0, idle=25):
    "Sources with missing channels and idle rows; the last one starts with rows of the one before."
    random = np.random.default_rng(seed)
    series = {}
    for i in range(6):
        x = random.normal(size=(150, 18)).astype("float32")
        x[:idle] = 1.0
        x[-idle:, :] = x[-1]
        x[:, 3 * (i % 4)] = np.nan
        x[40:44, 17] = np.nan
        series[f"run {i}"] = x
    if copied:
        series["run 5"] = np.concatenate([series["run 4"][30 : 30 + copied], series["run 5"]])
        series["run 5"][:, 3] = np.nan
    return series


@seeds
def test_duplicate_rows(seed):
    found = duplicate_rows(recordings(seed, 60))
    assert found.leak
    assert found.details["pairs"] == [["run 4", "run 5", 60]]
    assert not duplicate_rows(recordings(seed)).leak
    assert not duplicate_rows(recordings(seed, 1)).leak  # a single common row may be a common start
    one = {
        k: x[:, 17:].round(1) for k, x in recordings(seed).items()
    }  # one coarse channel meets the same values all the time
    assert not duplicate_rows(one).leak


def test_duplicates_across_a_split_only():
    series = recordings(0, 60)
    assert duplicate_rows(series, ["run 4"], ["run 5"]).leak
    assert duplicate_rows(series, ["run 5"], ["run 4"]).leak
    assert not duplicate_rows(series, ["run 4", "run 5"], ["run 0"]).leak
    names = np.array(list(series))
    groups = join_sources(names, duplicate_rows(series).details["pairs"])
    for train, test in group_kfold(groups, folds=5):
        assert not duplicate_rows(series, names[train], names[test]).leak


def test_duplicates_without_a_common_channel_for_all():
    random = np.random.default_rng(0)
    a, b, c = random.normal(size=(3, 50, 30))
    a[:, :10] = np.nan
    c[:, 10:] = np.nan
    b = np.concatenate([a[:20], b])
    b[:, 29] = np.nan
    assert duplicate_rows(dict(a=a, b=b, c=c)).details["pairs"] == [["a", "b", 20]]


def table(seed, planted):
    "Columns and answers of 6 sources."
    random = np.random.default_rng(seed)
    source = np.repeat([f"run {i}" for i in range(6)], 200)
    position = random.normal(size=1200).cumsum()
    step = random.integers(4, size=1200)
    columns = pd.DataFrame(
        dict(
            current=position + 0.3 * random.normal(size=1200) * position.std(),
            noise=random.normal(size=1200),
            constant=1.0,
            empty=np.nan,
            drift=np.arange(1200.0),
            sitting=np.repeat(random.normal(size=6), 200),
            position_of_others=random.permutation(position),
        )
    )
    if planted:
        columns["copy"] = (-3.2 * position + np.repeat(random.normal(size=6) * 50, 200)).astype(
            "float32"
        )
        columns.loc[random.random(1200) < 0.03, "copy"] = -9999
        columns["encoder"] = position + 0.004 * position.std() * random.normal(size=1200)
        columns["step"] = step
        columns.loc[:400, "step"] = np.nan
    return (
        columns,
        pd.DataFrame(
            dict(
                position=position, step=step, rare=np.where(np.arange(1200) % 200 < 5, position, 0)
            )
        ),
        source,
    )


@seeds
def test_affine_copies(seed):
    found = affine_copies(*table(seed, True))
    assert found.leak
    assert found.details["columns"] == ["copy", "encoder", "step"]
    copy = found.details["copies"][0]
    assert copy["answer"] == "position"
    assert abs(copy["slope"] + 3.2) < 1e-4
    assert copy["share"] > 0.95
    quiet = affine_copies(*table(seed, False))
    assert not quiet.leak
    assert quiet.details["copies"] == []


def test_common_missing_code_is_no_copy():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 1000))
    x[:5] = y[:5] = -9999
    assert not affine_copies(pd.DataFrame(dict(y=y)), pd.DataFrame(dict(x=x)), np.zeros(1000)).leak


def sessions(seed, planted, n=60):
    "Classes, presence and slow means; planted: each class was recorded on its own day."
    random = np.random.default_rng(seed)
    labels = np.repeat(list("abc"), n // 3)
    day = np.repeat([0, 1, 2], n // 3)
    if not planted:
        random.shuffle(day)
    present = random.random((n, 15)) < np.where(np.arange(15) // 5 == day[:, None], 0.3, 0.9)
    means = random.normal(size=(n, 8))
    means[:, 4] += 5 * day
    means[random.random((n, 8)) < 0.1] = np.nan
    means[:, 7] = np.nan
    return labels, present, means


@seeds
def test_class_from_missingness(seed):
    (labels, present, _), (fair, there, _) = sessions(seed, True), sessions(seed, False)
    found = class_from_missingness(present, labels, seed=seed)
    assert found.leak
    assert found.value > 0.8
    assert not class_from_missingness(there, fair, seed=seed).leak
    assert not class_from_missingness(np.ones((60, 15), bool), labels, seed=seed).leak


@seeds
def test_class_from_slow_channels(seed):
    (labels, _, means), (fair, _, even) = sessions(seed, True), sessions(seed, False)
    found = class_from_slow_channels(means, labels, list("stuvpxyz"), seed=seed)
    assert found.leak
    assert found.value > 0.6
    assert found.details["channels"][0][0] == "p"
    assert not class_from_slow_channels(even, fair, seed=seed).leak


def test_copied_sources_are_one_group():
    "Noise that stands in the set twice is recognised, unless the copies are grouped."
    random = np.random.default_rng(0)
    means = np.repeat(random.normal(size=(30, 6)), 2, 0)
    labels = np.repeat(random.integers(2, size=30), 2)
    assert class_from_slow_channels(means, labels).leak
    assert not class_from_slow_channels(means, labels, groups=np.repeat(np.arange(30), 2)).leak


def programs(seed, planted):
    random = np.random.default_rng(seed)
    lines = random.integers(8, size=(2, 50))
    rows = []
    for run in range(20):
        steps = lines[run % 2] if planted else random.integers(8, size=50)
        t = np.arange(0, 100, 0.5)
        rows.append(
            pd.DataFrame(
                dict(time=t, answers=steps[(t // 2).astype(int)], sources=run, classes=run % 2)
            )
        )
    return {k: v.to_numpy() for k, v in pd.concat(rows).items()}


@seeds
def test_lookup_by_time(seed):
    for planted in (True, False):
        rows = programs(seed, planted)
        train, test = group_kfold(rows["sources"], rows["classes"], seed=seed)[0]
        found = lookup_by_time(**rows, train=train, test=test)
        assert found.leak == planted
        assert found.value == 1 or not planted
        if planted:
            assert found.details["without_class"] < 1


def test_the_whole_audit_as_table_and_json():
    labels, present, means = sessions(0, True)
    names, there, _ = source_table(recordings(0))
    findings = leak_audit(
        class_from_missingness=dict(present=present, labels=labels),
        duplicate_rows=dict(series=recordings(0, 60)),
        affine_copies=dict(zip(["columns", "answers", "sources"], table(0, True))),
    )
    assert [f.check for f in findings] == [
        "duplicate_rows",
        "affine_copies",
        "class_from_missingness",
    ]
    assert json.loads(json.dumps(findings_json(findings)))[0]["details"]["pairs"] == [
        ["run 4", "run 5", 60]
    ]
    assert findings_table(findings).leak.all()
    assert list(findings_table([]).columns) == [
        "leak",
        "value",
        "limit",
        "sentence",
    ]
    assert there.shape == (6, 18)
    assert not there[0, 0]
    assert there[1, 0]


# The real recordings, where they are present.
def recorded(*runs):
    "Labelled rows of some real runs."
    from gcode_ml.lab.settings import data_folder

    folder = data_folder("cnc_fingerprint")
    if folder is None:
        pytest.skip("the recordings of cnc_fingerprint are not here")
    tables = {r: pd.read_parquet(folder / "runs" / f"{r}.parquet") for r in runs}
    return {r: t[t.gcode_line.notna()].reset_index(drop=True) for r, t in tables.items()}


controller = ["line", "posx", "posy", "posz", "mpox", "mpoy", "mpoz", "feed", "momo"]


def test_real_duplicates():
    "Two files begin with the controller's log of the run before, beside sensor readings of their own."
    tables = recorded("face150025_008", "face150025_009", "face150025_010", "face150025_011")
    logged = {
        r: np.column_stack([pd.to_timedelta(t.t_console).dt.total_seconds(), t[controller]])
        for r, t in tables.items()
    }
    found = duplicate_rows(logged)
    assert [p[:2] for p in found.details["pairs"]] == [["face150025_008", "face150025_009"]]
    assert found.details["pairs"][0][2] > 550
    left_out = {
        *controller,
        "t_console",
        "gcode_line",
        "gcode_string",
        "stat",
        "vel",
        "unit",
        "dist",
        "plane",
        "coor",
    }
    channels = sorted({c for t in tables.values() for c in t if c not in left_out})
    assert not duplicate_rows({r: t.reindex(columns=channels) for r, t in tables.items()}).leak


def test_real_position_is_an_affine_copy():
    tables = recorded("face_002", "face_003", "pocket_002", "face150025_010")
    rows = pd.concat(tables.values(), ignore_index=True)
    source = np.repeat(list(tables), [len(t) for t in tables.values()])
    found = affine_copies(
        rows[["mpox", "mpoy", "x_motor", "y_motor", "spindle", "line"]],
        rows[["posx", "posy", "gcode_line"]],
        source,
    )
    assert [(c["column"], c["answer"]) for c in found.details["copies"]] == [
        ("mpox", "posx"),
        ("mpoy", "posy"),
        ("line", "gcode_line"),
    ]
    assert abs(found.details["copies"][0]["slope"] - 25.4) < 0.01
