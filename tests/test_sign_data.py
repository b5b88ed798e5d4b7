"Clips of signs: broken files and labels, splits, the steps of the preparation against plain definitions, the simulator, and every check of a folder."

import io
import json
import shutil
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbdev.config import get_config

from gcode_ml.data.batch import BatchLoader, Subset
from gcode_ml.lab.settings import data_folder
from gcode_ml.sign.checks import CHECKS, check
from gcode_ml.sign.data import (
    SKELETON78,
    SKELETONS,
    Clip,
    ClipData,
    class_names,
    read_clip,
    read_clips,
    read_labels,
    read_npz,
    read_nsl49,
    split_clips,
)
from gcode_ml.sign.simulate import (
    Style,
    simulate_clips,
    simulated_clip,
    simulated_gloss,
    write_clips,
)
from gcode_ml.sign.skeleton import (
    NobodySeen,
    Preparation,
    fill_gaps,
    hand_coordinates,
    mirror_points,
    prepare_clips,
    reference_frame,
    resample_points,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return simulate_clips(tmp_path_factory.mktemp("clips"), glosses=4, signers=3, repetitions=3)


@pytest.fixture(scope="module")
def clips(folder):
    return read_clips(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def files(folder):
    return sorted((folder / "npz").glob("*.npz"))


def change(file, **arrays):
    "Write `file` anew with other arrays; `None` takes one out."
    a = {**read_npz(file), **arrays}
    np.savez(file, **{k: v for k, v in a.items() if v is not None})
    return file


def quiet(function, *args, **kwargs):
    "The answer and the warnings of a call."
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        answer = function(*args, **kwargs)
    return answer, [str(w.message) for w in messages]


def with_nan(x, at=(4, 3), value=np.nan):
    x = x.copy()
    x[at] = value
    return x


BROKEN = dict(
    nan=(lambda a: dict(X=with_nan(a["X"])), "at frame 4, column 3"),
    infinite=(lambda a: dict(X=with_nan(a["X"], (2, 0), np.inf)), "found inf at frame 2, column 0"),
    no_frame=(lambda a: dict(X=a["X"][:0]), "T at least 1, found [0, 156]"),
    narrow=(lambda a: dict(X=a["X"][:, :155]), "expected shape [T,156] with T at least 1, found"),
    integers=(lambda a: dict(X=(a["X"] * 100).astype(int)), "expected float32, found int64"),
    mask_length=(lambda a: dict(mask=a["mask"][1:]), "array mask: expected shape"),
    mask_numbers=(lambda a: dict(mask=a["mask"] * 0.5), "True and False"),
    absent=(lambda a: dict(X=None), "array X: expected an array [T,156], found no such array"),
    backwards=(lambda a: dict(timestamps_ms=a["timestamps_ms"][::-1]), "times that do not go back"),
    negative=(lambda a: dict(timestamps_ms=a["timestamps_ms"] - 5), "times from 0 on, found -5"),
    float_times=(lambda a: dict(timestamps_ms=a["timestamps_ms"] / 1.0), "integers, found float64"),
    no_json=(lambda a: dict(meta=np.array("{")), "array meta: expected JSON"),
    json_list=(lambda a: dict(meta=np.array("[1]")), "a JSON object, found list"),
    size=(
        lambda a: dict(meta=np.array('{"source_width": "wide"}')),
        "meta source_width: expected a number",
    ),
    pickle=(lambda a: dict(X=np.array([{}], object)), "never loaded"),
    meta_pickle=(lambda a: dict(meta=np.array({}, object)), "never loaded"),
)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_one_sentence(name, copy, refused):
    "File, field, expected and found; the folder is refused before its first clip is used, and `check` finds it as well."
    make, says = BROKEN[name]
    file = files(copy)[3]
    messages = refused(read_clip, change(file, **make(read_npz(file))))
    assert str(file) in messages
    assert says in messages
    assert "\n" not in messages
    assert says in refused(read_clips, copy)
    faults, _ = quiet(check, copy)
    assert any(says in f.replace("; ", ", found ") or says.split(", found")[0] in f for f in faults)


def test_bytes_that_are_no_clip(tmp_path, refused):
    "Half a file, other bytes, a header that lies about the size, and one that announces more than memory holds."
    good = tmp_path / "good.npz"
    np.savez_compressed(good, X=np.random.default_rng(0).random((50, 156)).astype("float32"))
    whole = good.read_bytes()
    for n in (0, 10, 100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "half.npz").write_bytes(whole[:n])
        assert "half.npz: content: expected a whole .npz file" in refused(
            read_clip, tmp_path / "half.npz"
        )
    (tmp_path / "flipped.npz").write_bytes(whole[:900] + bytes([whole[900] ^ 255]) + whole[901:])
    assert "expected" in refused(read_clip, tmp_path / "flipped.npz")
    for shape in ((10**12, 156), (3, 156), (2**62, 2**62)):
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            head, dict(descr="<f4", fortran_order=False, shape=shape)
        )
        with zipfile.ZipFile(tmp_path / "lie.npz", "w") as z:
            z.writestr("X.npy", head.getvalue() + bytes(16))
        assert "found 16 bytes" in refused(read_clip, tmp_path / "lie.npz")
    assert "nothing there" in refused(read_clip, tmp_path / "none.npz")


def test_other_number_types(clips, copy):
    "float64 is converted with a notice, and a clip is the same whatever order its array is stored in."
    file = files(copy)[0]
    a = read_npz(file)
    clip, messages = quiet(read_clip, change(file, X=np.asfortranarray(a["X"].astype(float))))
    assert any("converted from float64" in message for message in messages)
    assert np.array_equal(clip.points.reshape(len(clip), -1), a["X"])


def test_missing_is_not_the_corner(copy):
    "With and without a mask a point at (0,0) is missing; a NaN where the mask says missing is nobody's business."
    file = files(copy)[0]
    X = read_npz(file)["X"].copy()
    X[2, 10:12] = 0
    assert not read_clip(change(file, X=X, mask=None)).seen[2, 5]
    assert not read_clip(change(file, X=X, mask=np.ones((len(X), 78), bool))).seen[2, 5]
    X[2, 10:12] = np.nan
    mask = np.ones((len(X), 78), bool)
    mask[2, 5] = False
    assert not read_clip(change(file, X=X, mask=mask)).seen[2, 5]


def test_keys_by_parameter(tmp_path, refused):
    "Points and features under other names; `X` serves as features where it is 2048 wide."
    x = np.random.default_rng(0).random((7, 156)).astype("float32")
    f = np.ones((7, 1280), "float32")
    np.savez(tmp_path / "a.npz", points=x, X1280=f)
    np.savez(tmp_path / "b.npz", X=np.ones((5, 2048), "float32"))
    assert read_clip(tmp_path / "a.npz", kp_key="points").points.shape == (7, 78, 2)
    assert read_clip(tmp_path / "a.npz", feature_key="X1280", read="features").features.shape == (
        7,
        1280,
    )
    assert read_clip(tmp_path / "b.npz", read="features").features.shape == (5, 2048)
    assert "array X2048" in refused(read_clip, tmp_path / "a.npz", "points", read="both")
    np.savez(tmp_path / "c.npz", X=x, X2048=np.ones((6, 2048), "float32"))
    assert "7 frames, found 6" in refused(read_clip, tmp_path / "c.npz", read="both")


LABELS = dict(
    word=("a,zwei,0", "column gloss: expected a whole number from 0 on, found 'zwei'"),
    negative=("a,-1,0", "found '-1'"),
    half=("a,1.5,0", "found '1.5'"),
    empty=("a,,0", "column gloss: expected a whole number from 0 on, found nothing"),
    category=("a,0,", "column cat"),
    up=("../a,0,0", "a name inside the folder, found '../a'"),
    absolute=("/a,0,0", "a name inside the folder"),
    drive=("C:\\a,0,0", "a name inside the folder"),
    twice=("b,0,0", "a name of its own, found 'b', which row 2 has as well"),
    nameless=(",0,0", "a name inside the folder"),
)


@pytest.mark.parametrize("name", LABELS)
def test_faulty_label_names_its_row(name, tmp_path, refused):
    "One bad row."
    row, says = LABELS[name]
    (tmp_path / "labels.csv").write_text(f"file,gloss,cat\nb,0,0\n{row}\n")
    messages = refused(read_labels, tmp_path / "labels.csv")
    assert "row 3" in messages
    assert says in messages


def test_labels_as_spreadsheets_write_them(tmp_path, refused):
    "A byte-order mark, backslashes, a label NA; no rows, no column, other bytes; a class beyond the given number."
    f = tmp_path / "labels.csv"
    f.write_text("\ufefffile,gloss,cat,signer\nsub\\ação 1.npz,0,0,NA\n", encoding="utf-8")
    assert read_labels(f).to_dict("records") == [
        dict(file="sub/ação 1", gloss=0, cat=0, signer="NA", recording="sub/ação 1")
    ]
    f.write_text("file,gloss,cat\na,3,0\n")
    assert "from 0 to 2, found '3'" in refused(read_labels, f, 3)
    f.write_text("file,gloss,cat\n")
    assert "rows: expected at least one, found 0" in refused(read_labels, f)
    f.write_text("file,gloss\na,3\n")
    assert "column cat: expected to be there" in refused(read_labels, f)
    f.write_bytes("file,gloss,cat\nação,0,0\n".encode("latin1"))
    assert "UTF-8" in refused(read_labels, f)
    f.write_text("file,gloss,cat\na,0,0\nb,0,1\n")
    assert "gloss 0 has the categories [0, 1]" in quiet(read_labels, f)[1][0]


def test_row_without_file(copy, refused):
    "Refused by default, skipped with a warning on demand."
    files(copy)[0].unlink()
    assert "nothing there" in refused(read_clips, copy)
    found, messages = quiet(read_clips, copy, missing="skip")
    assert len(found) == 35
    assert any("1 of 36 rows have no file" in message for message in messages)


def test_names_of_classes(folder, clips, tmp_path):
    "From glosses.csv, and numbers without it."
    assert class_names(folder, clips) == dict(
        gloss=[f"sign {i}" for i in range(4)],
        category=["place 0", "place 1", "place 2"],
        category_of=[0, 1, 2, 0],
    )
    assert class_names(tmp_path, clips)["gloss"] == ["0", "1", "2", "3"]


def test_split_keeps_signers_and_recordings(clips, refused):
    "Every signer is left out once; a random split keeps recordings whole and says that it is leaky; a clip on two sides is refused."
    for fold in range(3):
        a, b, note = split_clips(clips, fold=fold)
        assert {clips[i].signer for i in b} == {f"S0{fold + 1}"}
        assert len(a) + len(b) == 36
        assert f"S0{fold + 1}" in note
    pairs = [replace(c, recording=f"{c.signer} {c.gloss} {i % 2}") for i, c in enumerate(clips)]
    tested = []
    for fold in range(3):
        (a, b, note), messages = quiet(split_clips, pairs, "leaky", fold, 3)
        assert not {pairs[i].recording for i in a} & {pairs[i].recording for i in b}
        assert "leaky" in note
        assert any("leaky" in message for message in messages)
        tested += b.tolist()
    assert sorted(tested) == list(range(36))
    assert (
        "is not measured"
        in quiet(split_clips, [replace(c, signer="") for c in clips], "leaky")[0][2]
    )
    assert "on both sides" in refused(
        split_clips, clips, "given", train=[0, 1, 2, 3, 4, 5], test=[5]
    )
    assert "none for" in refused(split_clips, [replace(c, signer="") for c in clips])
    assert "fold: expected 0 to 2" in refused(split_clips, clips, fold=3)
    assert "none of gloss 1" in refused(
        split_clips, [c for c in clips if c.gloss != 1 or c.signer == "S01"]
    )
    twins = [replace(c, recording="same" if c.gloss == 0 else c.recording) for c in clips]
    assert "same on both sides" in refused(split_clips, twins)


def test_gaps_against_interp():
    "Every filled coordinate lies on the line that `numpy.interp` draws; longer runs and ends stay missing."
    random = np.random.default_rng(0)
    for T in (1, 2, 9, 60):
        p = random.random((T, 6, 2)).astype("float32")
        seen = random.random((T, 6)) < 0.6
        time = np.cumsum(random.integers(20, 90, T))
        filled, state = fill_gaps(p, seen, time, 3)
        again, _ = fill_gaps(np.where(seen[..., None], p, np.nan), seen, time, 3)
        assert np.array_equal(filled, again)
        assert (filled[state == 0] == 0).all()
        assert np.array_equal(filled[seen], p[seen])
        for k in range(6):
            there = np.flatnonzero(seen[:, k])
            wanted = [
                i for a, b in zip(there, there[1:]) if b - a - 1 <= 3 for i in range(a + 1, b)
            ]
            assert np.flatnonzero(state[:, k] == 2).tolist() == wanted
            for axis in range(2):
                np.testing.assert_allclose(
                    filled[wanted, k, axis],
                    np.interp(time[wanted], time[there], p[there, k, axis]) if wanted else [],
                    atol=1e-5,
                )


def test_resample_against_interp():
    "Fully seen clips are read as `numpy.interp` reads them, by time and not by frame."
    random = np.random.default_rng(1)
    time = np.cumsum(random.integers(10, 100, 30))
    x = random.random((30, 4, 2)).astype("float32")
    y, _ = resample_points(x, np.ones((30, 4)), time, 17)
    at = np.linspace(time[0], time[-1], 17)
    np.testing.assert_allclose(y[:, 2, 1], np.interp(at, time, x[:, 2, 1]), atol=1e-5)
    same, state = resample_points(x, np.ones((30, 4)), np.arange(30) * 66, 30)
    np.testing.assert_allclose(same, x, atol=1e-5)
    np.testing.assert_allclose(
        resample_points(x, np.ones((30, 4)), np.full(30, 7), 30)[0], x, atol=1e-5
    )


def test_masked_values_change_nothing(clips):
    "Whatever stands at a missing point, the prepared clip is the same, bit for bit."
    for settings in (
        dict(),
        dict(frames=None, normalise="none", trim=False),
        dict(canonical_hand=True, normalise="hand", rate=20.0, frames=None),
    ):
        preparation = Preparation(**settings).fit(clips)
        for c in clips[::5]:
            seen = c.seen & (np.random.default_rng(len(c)).random(c.seen.shape) < 0.8)
            one = replace(c, seen=seen)
            other = replace(
                one,
                points=np.where(
                    seen[..., None],
                    c.points,
                    np.random.default_rng(0).normal(size=c.points.shape) * 1e3,
                ).astype("float32"),
            )
            assert np.array_equal(preparation(one), preparation(other), equal_nan=True)


def test_framing_tempo_and_side_are_taken_out():
    "Two framings give the same array; the mirror image gives it after `canonical_hand`; another frame rate nearly."
    quiet_style = Style()
    base = simulated_clip(1, style=quiet_style, sway=0)
    prepared = Preparation().fit([base])(base)
    for other in (
        Style(x=0.35, y=0.5, shoulders=0.13, width=1280, height=720),
        Style(x=0.6, y=0.3, shoulders=0.25, width=500, height=1000),
    ):
        np.testing.assert_allclose(
            np.nan_to_num(Preparation().fit([base])(simulated_clip(1, style=other, sway=0))),
            np.nan_to_num(prepared),
            atol=1e-5,
        )
    number = next(g for g in range(9) if not simulated_gloss(g).both)
    right, left = (
        replace(c, seen=c.seen & (np.arange(78) < 25))
        for c in (simulated_clip(number, style=Style(left=l), sway=0) for l in (False, True))
    )
    turned = Preparation(canonical_hand=True, points=["pose"]).fit([right])
    assert [turned.facts(c)["mirrored"] for c in (right, left)] == [False, True]
    np.testing.assert_allclose(np.nan_to_num(turned(left)), np.nan_to_num(turned(right)), atol=1e-5)
    fast = Preparation(points=["pose"]).fit([base])(simulated_clip(1, style=Style(rate=60), sway=0))
    assert np.nanmean(abs(fast - Preparation(points=["pose"]).fit([base])(base))) < 0.05


def test_mirror_is_its_own_inverse():
    "Of points and state, for both layouts; left names become right names."
    random = np.random.default_rng(0)
    for s in SKELETONS.values():
        p = random.normal(size=(5, len(s), 2)).astype("float32")
        state = random.integers(0, 3, (5, len(s)))
        q, t = mirror_points(*mirror_points(p, state, s.pairs), s.pairs)
        assert np.array_equal(p, q)
        assert np.array_equal(state, t)
        assert sorted(i for pair in s.pairs for i in pair) == sorted(
            {i for pair in s.pairs for i in pair}
        )


def test_normalisation_falls_back():
    "Without shoulders, without hips, with shoulders in one place, and with one point only; never a division by nothing."
    c = simulated_clip(0, style=Style(), sway=0)

    def how(*hidden, points=None):
        seen = c.seen.copy()
        seen[:, list(hidden)] = False
        return reference_frame(
            c.points if points is None else points, seen.astype("int8"), SKELETON78
        )[2]

    one = c.points.copy()
    one[:, 12] = one[:, 11]
    assert [how(), how(11), how(11, 0), how(11, 23), how(points=one)] == [
        "shoulders",
        "torso",
        "box",
        "box",
        "torso",
    ]
    lone = np.zeros((3, 78), "int8")
    lone[:, 4] = 1
    center, width, name = reference_frame(np.ones((3, 78, 2), "float32"), lone, SKELETON78)
    assert (name, width) == ("none", 1.0)


def test_lengths_from_one_to_thousands(clips, refused):
    "One frame works; five thousand follow the rule, with a notice; a clip with nobody is refused or kept as NaN."

    def resized(n):
        c = clips[0]
        return replace(
            c,
            points=np.resize(c.points, (n, 78, 2)),
            seen=np.ones((n, 78), bool),
            timestamps_ms=np.arange(n) * 33,
        )

    assert np.isfinite(Preparation().fit(clips)(resized(1))).all()
    for rule in ("resample", "truncate"):
        arrays, messages = quiet(
            prepare_clips,
            [resized(5000)],
            Preparation(frames=None, trim=False, long_clips=rule).fit(clips),
        )
        assert len(arrays[0]) == 300
        assert any(f"more than 300 frames: {rule}" in message for message in messages)
    assert "at most 300, found 5000" in refused(
        prepare_clips,
        [resized(5000)],
        Preparation(frames=None, trim=False, long_clips="refuse").fit(clips),
    )
    nobody = replace(clips[0], seen=0 * clips[0].seen > 0)
    preparation = Preparation().fit(clips)
    with pytest.raises(NobodySeen):
        preparation(nobody)
    arrays, _ = quiet(prepare_clips, [nobody, clips[1]], preparation, empty="keep")
    assert ClipData(arrays, clips[:2]).empty.tolist() == [True, False]


def test_layouts_do_not_mix(clips, refused):
    "A preparation refuses clips of another layout or width, and names both."
    glove = Clip("glove", channels=np.ones((9, 7), "float32"), timestamps_ms=np.arange(9))
    preparation = Preparation().fit(clips)
    assert "layout: expected pose78, found channels" in refused(preparation, glove)
    own = Preparation().fit(
        [glove, replace(glove, channels=np.arange(63, dtype="float32").reshape(9, 7))]
    )
    assert (own.normalise, own.channels) == ("channels", 7)
    assert "expected 7 channels per frame, found 8" in refused(
        own, replace(glove, channels=np.ones((9, 8), "float32"))
    )
    feature = Clip("f", features=np.ones((9, 1280), "float32"), timestamps_ms=np.arange(9))
    assert Preparation(frames=None).fit([feature])(feature).shape == (9, 1280)


def test_standardised_channels():
    "Mean 0 and spread 1 over the training clips; a channel that never moves stays finite."
    random = np.random.default_rng(0)
    made = [
        Clip(
            str(i),
            channels=np.concatenate([random.normal(5, 3, (n, 3)), np.full((n, 1), 2.0)], 1).astype(
                "float32"
            ),
            timestamps_ms=np.arange(n),
        )
        for i, n in enumerate((4, 1, 3000))
    ]
    rows = np.concatenate([Preparation(frames=None, max_length=5000).fit(made)(c) for c in made])
    np.testing.assert_allclose(rows[:, :3].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(rows[:, :3].std(0), 1, atol=1e-3)
    assert (rows[:, 3] == 0).all()


def test_cache_follows_content_and_settings(clips, tmp_path, monkeypatch):
    "The same arrays without preparing; other points, masks or settings are prepared anew."
    preparation = Preparation().fit(clips)
    first = prepare_clips(clips, preparation, tmp_path)
    monkeypatch.setattr(Preparation, "prepare", lambda *a: 1 / 0)
    assert all(
        np.array_equal(a, b, equal_nan=True)
        for a, b in zip(first, prepare_clips(clips, preparation, tmp_path))
    )
    seen = clips[2].seen.copy()
    seen[0] = False
    for others in (
        [*clips[:2], replace(clips[2], seen=seen), *clips[3:]],
        [replace(clips[0], width=1.0), *clips[1:]],
        clips[:-1],
    ):
        with pytest.raises(ZeroDivisionError):
            prepare_clips(others, preparation, tmp_path)
    with pytest.raises(ZeroDivisionError):
        prepare_clips(clips, replace(preparation, gaps=4), tmp_path)


def test_batches_are_the_clips(clips):
    "Padding, lengths, presence and targets; buckets waste fewer frames and lose no clip."
    preparation = Preparation(frames=None).fit(clips)
    arrays = prepare_clips(clips, preparation)
    data = ClipData(arrays, clips)
    seen = []
    for inputs, mask, targets in BatchLoader(data, 8, shuffle=True, bucket=4):
        for x, p, m, g in zip(inputs["channels"], inputs["present"], mask, targets["gloss"]):
            i = next(
                j
                for j, a in enumerate(arrays)
                if len(a) == m.sum() and np.array_equal(np.nan_to_num(a), x[m].numpy())
            )
            seen.append(i)
            assert clips[i].gloss == g
            assert np.array_equal(p[m].numpy(), ~np.isnan(arrays[i]))
            assert not p[~m].any()
            assert not x[~m].any()
    assert sorted(seen) == list(range(36))

    def padded(bucket):
        return sum(
            m.numel()
            for _, m, _ in BatchLoader(Subset(data, np.arange(36)), 6, shuffle=True, bucket=bucket)
        )

    assert padded(6) < padded(0)


def test_simulator(folder, tmp_path):
    "The same bytes for the same seed, others for another; what is written is what is read; features on demand."
    one, two = (simulate_clips(tmp_path / n, 4, 3, 3, seed=s) for n, s in (("a", 0), ("b", 1)))
    assert all(f.read_bytes() == (folder / "npz" / f.name).read_bytes() for f in files(one))
    assert any(f.read_bytes() != (one / "npz" / f.name).read_bytes() for f in files(two))
    assert (one / "labels.csv").read_bytes() == (folder / "labels.csv").read_bytes()
    c = simulated_clip(2, 1, 1)
    (back,) = read_clips(
        write_clips(
            tmp_path / "c",
            [replace(c, gloss=0, category=0)],
            dict(gloss=["x"], category=["y"], category_of=[0]),
        )
    )
    assert np.array_equal(back.points, c.points)
    assert np.array_equal(back.seen, c.seen)
    assert np.array_equal(back.timestamps_ms, c.timestamps_ms)
    assert (back.width, back.height, back.signer) == (c.width, c.height, c.signer)
    features = read_clips(simulate_clips(tmp_path / "d", 2, 2, 1, features=2048), read="features")
    assert features[0].features.shape[1] == 2048
    assert features[0].points is None


def test_adapters_are_short():
    "The three adapters of the lesson have at most 30 lines each."
    cells = [
        c.source
        for c in nbformat.read(get_config().nbs_path / "sign" / "00_data.ipynb", 4).cells
        if c.cell_type == "code"
    ]
    adapters = [c for c in cells if "yield Clip(" in c and "#|" not in c]
    assert len(adapters) == 3
    assert max(len(c.splitlines()) for c in adapters) <= 30


def relabel(copy, change_row):
    "Rewrite the rows of labels.csv."
    head, *rows = (copy / "labels.csv").read_text(encoding="utf-8").splitlines()
    (copy / "labels.csv").write_text(
        "\n".join(
            [
                head,
                *(
                    r
                    for i, row in enumerate(rows)
                    if (r := change_row(i, row.split(","))) is not None
                ),
            ]
        )
        + "\n",
        encoding="utf-8",
    )


def corner(a):
    X = a["X"].copy()
    X[0, 10:12] = 0
    return dict(X=X, mask=np.ones_like(a["mask"]))


def jump(a):
    X = a["X"].copy()
    X[5, 30:34] = 0.99
    return dict(X=X)


def swapped(a):
    X = a["X"].copy()
    X[:, [22, 24]] = X[:, [24, 22]]
    return dict(X=X)


def hole(a):
    t = a["timestamps_ms"].copy()
    t[5:] += 900
    return dict(timestamps_ms=t)


def meta(**changes):
    return lambda a: dict(meta=np.array(json.dumps({**json.loads(str(a["meta"])), **changes})))


def features(n=0, constant=False):
    return lambda a: dict(
        X2048=np.ones((len(a["X"]) + n, 2048), "float32")
        if constant or n
        else np.random.default_rng(0).random((len(a["X"]), 2048)).astype("float32")
    )


ONE_FILE = [
    ("file", True, "array X", lambda a: dict(X=None)),
    ("file", False, "converted", lambda a: dict(X=a["X"].astype(float))),
    ("values", True, "finite", lambda a: dict(X=with_nan(a["X"]))),
    ("values", False, "outside 0 and 1", lambda a: dict(X=with_nan(a["X"], (3, 4), 1.2))),
    ("mask", False, "stand at (0,0)", corner),
    ("mask", False, "denies", lambda a: dict(mask=with_nan(a["mask"], (0, 5), False))),
    ("times", True, "go back", lambda a: dict(timestamps_ms=a["timestamps_ms"][::-1])),
    ("times", False, "holes", hole),
    ("times", False, "differ from meta", meta(target_fps=99)),
    ("meta", True, "JSON", lambda a: dict(meta=np.array("{"))),
    ("meta", True, "meta order", meta(order="face11,pose25")),
    ("meta", True, "keypoints_total", meta(keypoints_total=75)),
    ("meta", False, "does not name", meta(blocks_present=["pose25"])),
    ("meta", False, "without meta", lambda a: dict(meta=None)),
    ("presence", True, "is seen", lambda a: dict(mask=0 * a["mask"] > 0)),
    (
        "presence",
        False,
        "without left hand",
        lambda a: dict(
            mask=np.where((np.arange(78) >= 25) & (np.arange(78) < 46), False, a["mask"])
        ),
    ),
    (
        "motion",
        False,
        "nothing moves",
        lambda a: dict(
            X=np.repeat(a["X"][:1], len(a["X"]), 0), mask=np.repeat(a["mask"][:1], len(a["X"]), 0)
        ),
    ),
    ("motion", False, "jump", jump),
    ("motion", False, "changed sides", swapped),
    ("motion", True, "pixels", lambda a: dict(X=a["X"] * 900)),
    (
        "features",
        True,
        "finite",
        lambda a: dict(X2048=np.full((len(a["X"]), 2048), np.nan, "float32")),
    ),
    ("features", True, "frames", features(1)),
    ("features", True, "change", features(constant=True)),
]


@pytest.mark.parametrize(
    "name,fault,says,make", ONE_FILE, ids=[f"{n}-{s.replace(' ', '_')}" for n, _, s, _ in ONE_FILE]
)
def test_check_of_a_file(name, fault, says, make, copy):
    "Each check finds what it is for, under its own name, as a fault or as a warning."
    file = files(copy)[3]
    change(file, **make(read_npz(file)))
    faults, told = quiet(check, copy)
    found = faults if fault else faults.warnings
    assert any(f.startswith(f"[{name}]") and says in f for f in found), (faults, faults.warnings)
    assert bool(faults) == fault
    assert faults.summary == f"Checked 36 files; {int(fault)} with issues."


def test_check_of_features(copy):
    "Required features that are there pass, required features that are absent are faults."
    assert len(quiet(check, copy, require_x2048=True)[0]) == 36
    for f in files(copy):
        change(f, **features()(read_npz(f)))
    assert quiet(check, copy, require_x2048=True)[0] == []


SET = [
    (
        "labels",
        True,
        "whole number",
        lambda c: relabel(
            c, lambda i, r: ",".join([r[0], "zwei", *r[2:]]) if i == 0 else ",".join(r)
        ),
    ),
    (
        "labels",
        True,
        "found nothing",
        lambda c: relabel(c, lambda i, r: ",".join([r[0], "", *r[2:]]) if i == 0 else ",".join(r)),
    ),
    (
        "labels",
        False,
        "two categories",
        lambda c: relabel(
            c, lambda i, r: ",".join([*r[:2], "1", *r[3:]]) if i == 0 else ",".join(r)
        ),
    ),
    (
        "labels",
        False,
        "without a clip",
        lambda c: relabel(c, lambda i, r: ",".join([r[0], str(int(r[1]) + 1), *r[2:]])),
    ),
    (
        "labels",
        False,
        "never signs",
        lambda c: relabel(c, lambda i, r: None if r[3] == "S01" and r[1] == "0" else ",".join(r)),
    ),
    (
        "labels",
        False,
        "without a name",
        lambda c: (c / "glosses.csv").write_text("gloss,name,cat,cat_name\n0,a,0,b\n"),
    ),
    ("rows", True, "which is not there", lambda c: files(c)[0].unlink()),
    ("rows", False, "without a row", lambda c: shutil.copy(files(c)[0], c / "npz" / "more.npz")),
    (
        "duplicates",
        True,
        "label: expected the same",
        lambda c: shutil.copy(files(c)[0], files(c)[4]),
    ),
    (
        "duplicates",
        True,
        "signer: expected the same",
        lambda c: shutil.copy(files(c)[0], files(c)[12]),
    ),
    ("duplicates", False, "there twice", lambda c: shutil.copy(files(c)[0], files(c)[1])),
    (
        "signers",
        False,
        "without a signer",
        lambda c: relabel(c, lambda i, r: ",".join([*r[:3], "", *r[4:]])),
    ),
    (
        "signers",
        False,
        "one signer only",
        lambda c: relabel(c, lambda i, r: ",".join(r) if r[3] == "S01" else None),
    ),
    ("signers", False, "information", lambda c: None),
]


@pytest.mark.parametrize(
    "name,fault,says,make", SET, ids=[f"{n}-{s.replace(' ', '_')}" for n, _, s, _ in SET]
)
def test_check_of_a_folder(name, fault, says, make, copy):
    "What only the whole set shows."
    make(copy)
    faults, _ = quiet(check, copy)
    assert any(
        f.startswith(f"[{name}]") and says in f for f in (faults if fault else faults.warnings)
    ), (faults, faults.warnings)
    assert bool(faults) == fault


def test_check_finds_near_copies(copy):
    "A clip encoded anew and cropped otherwise is the same motion; under a random split another recording of it is a fault."
    first, second = files(copy)[:2]
    a = read_npz(first)
    X = a["X"].reshape(-1, 78, 2)
    change(
        second,
        **{
            **a,
            "X": np.where(
                a["mask"][..., None], X * np.float32([0.9, 0.9]) + np.float32([0.03, 0.02]), 0
            )
            .reshape(len(X), -1)
            .astype("float32"),
        },
    )
    faults, _ = quiet(check, copy)
    assert faults == []
    assert any("same motion" in w for w in faults.warnings)
    faults, _ = quiet(check, copy, split="leaky")
    assert any("recording: expected the same for the same clip" in f for f in faults)
    assert set(CHECKS) == {n for n, *_ in ONE_FILE + SET}


def test_check_of_no_folder(tmp_path, command):
    "Nothing there, no labels, one file; the command ends with 2 on faults and with 0 on warnings."
    assert "nothing there" in quiet(check, tmp_path / "none")[0][0]
    assert "labels.csv" in quiet(check, tmp_path)[0][0]
    folder = simulate_clips(tmp_path / "c", 2, 2, 2)
    assert quiet(check, files(folder)[0])[0] == []
    assert command("check", "sign", folder)[0] == 0
    change(files(folder)[0], X=np.zeros((0, 156), "float32"))
    code, out, _ = command("check", "sign", folder)
    assert code == 2
    assert "T at least 1" in out


def test_hands_layout(tmp_path, refused):
    "Faults of the layout with separate hands, an empty letter, and cropped twins whatever the case of the suffix."
    good = dict(
        lh=np.zeros((4, 21, 3), "float32"),
        rh=np.random.default_rng(0).random((4, 21, 3)).astype("float32"),
        lh_meta=np.zeros((4, 4), "float32"),
        rh_meta=np.ones((4, 4), "float32"),
        video_info=np.array([50.0, 10, 10], "float32"),
    )

    def write(table, **arrays):
        rows = ["\ufeffrelative_path,char,roman_label,signer,type"]
        for name, char, kind in table:
            f = tmp_path / (name.replace("\\", "/") + ".npz")
            f.parent.mkdir(parents=True, exist_ok=True)
            np.savez(
                f,
                **{
                    **good,
                    "rh": np.random.default_rng(ord(char[:1] or "x"))
                    .random((4, 21, 3))
                    .astype("float32"),
                    **arrays,
                },
            )
            rows.append(f"{name}.npz,{char},,{name[:2]},{kind}")
        (tmp_path / "master_metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")

    write(
        [
            ("S1_vowel\\A", "अ", "sign"),
            ("S1_vowel_cropped\\A", "अ", "sign"),
            ("S2_CONSONANT_Multi_Cropped\\K", "क", "sign"),
            ("S2_CONSONANT_Multi\\k", "क", "sign"),
            ("S1_vowel\\trans_A", "अ", "transition"),
        ]
    )
    clips = read_clips(tmp_path)
    assert [c.recording for c in clips] == ["s1_vowel/a"] * 2 + ["s2_consonant_multi/k"] * 2
    assert [c.category for c in clips] == [1, 1, 0, 0]
    assert [c.gloss for c in read_nsl49(tmp_path, drop_cropped=True, transitions=True)] == [
        0,
        1,
        -1,
    ]
    faults, _ = quiet(check, tmp_path)
    assert faults == []
    assert any("empty fields in column roman_label: row 2" in w for w in faults.warnings)
    for arrays, says in (
        (dict(rh=good["rh"][:3]), "equal numbers of frames"),
        (dict(rh=with_nan(good["rh"], (2, 4, 0))), "finite"),
        (dict(video_info=np.zeros(3)), "frames per second"),
        (dict(lh=np.zeros((4, 20, 3))), "array lh: expected shape ['T', 21, 3]"),
    ):
        write([("S1_vowel\\A", "अ", "sign")], **arrays)
        assert says in refused(read_clips, tmp_path)
    write([("S1_vowel\\A", "", "sign")])
    assert "row 2, column char: expected a letter, found nothing" in refused(read_clips, tmp_path)


def test_hands_seen_from_the_wrist():
    "Moving, turning the size and placing a hand changes nothing but the log of its size."
    h = np.random.default_rng(0).normal(size=(5, 21, 2)).astype("float32")
    state = np.ones((5, 21), "int8")
    scale = np.array([1, 2, 4, 0.5, 1], "float32")[:, None, None]
    a, _ = hand_coordinates(h, state)
    b, size = hand_coordinates(h * scale + 3, state)
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert not a[:, 0].any()
    assert np.allclose(np.linalg.norm(a[:, 9], axis=1), 1, atol=1e-5)


REAL = data_folder("sign")


@pytest.mark.skipif(REAL is None, reason="the real clips are not here")
def test_real_sets():
    "What is known of both sets: sizes, parts of the body, signers, twins, and copies."
    clips = read_clips(REAL / "libras25")
    preparation = Preparation().fit(clips)
    assert (
        len(clips),
        preparation.channels,
        len({c.signer for c in clips}),
        max(len(c) for c in clips),
    ) == (2001, 50, 8, 164)
    assert len({c.recording for c in clips}) == 1990
    assert all(len(split_clips(clips, fold=f)[1]) in (250, 251) for f in range(8))
    letters = read_clips(REAL / "nsl49")
    names = class_names(REAL / "nsl49", letters)
    assert (
        len(letters),
        len({c.recording for c in letters}),
        len(names["gloss"]),
        names["category_of"].count(1),
    ) == (637, 441, 49, 13)
    assert np.bincount([c.gloss for c in letters]).tolist() == [13] * 49
    assert len(read_nsl49(REAL / "nsl49", transitions=True)) == 872
