"The sign domain: reading, preparing and checking clips, and clips of like length in one batch."

import functools
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from bench import benchmark
from gcode_ml.data.batch import BatchLoader
from gcode_ml.sign.augment import signer_style
from gcode_ml.sign.checks import check
from gcode_ml.sign.data import Clip, ClipData, read_clips
from gcode_ml.sign.evaluate import dtw_distances, dtw_nearest_neighbour
from gcode_ml.sign.models import InceptionV3GRU, SignConv, SignTransformer
from gcode_ml.sign.simulate import simulate_clips
from gcode_ml.sign.skeleton import Preparation, prepare_clips
from gcode_ml.signals.augment import augment


@functools.cache
def folder(count):
    "A temporary folder of simulated clips that lives as long as the process."
    home = tempfile.TemporaryDirectory()
    folder.homes.append(home)
    return simulate_clips(home.name, glosses=25, signers=8, repetitions=count // 200)


folder.homes = []


def with_numpy(path):
    "Every array of every file by `numpy.load`."
    clips = []
    for f in sorted((Path(path) / "npz").glob("*.npz")):
        with np.load(f, allow_pickle=False) as z:
            clips.append({k: z[k] for k in ("X", "mask", "timestamps_ms", "meta")})
    return clips


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


@benchmark(
    "reading 2,000 clips, every array compared with its header, coordinates, masks and labels checked",
    "numpy.load of the same arrays, unchecked",
)
def read_2000_clips(quick):
    path = folder(200 if quick else 2000)
    return (
        lambda: read_clips(path),
        lambda: with_numpy(path),
        dict(clips=200 if quick else 2000, seconds_allowed=3),
    )


@benchmark(
    "all 12 checks of 2,000 clips, near copies included", "numpy.load of the same arrays, unchecked"
)
def check_2000_clips(quick):
    path = folder(200 if quick else 2000)
    return lambda: quiet(check, path), lambda: with_numpy(path), dict(clips=200 if quick else 2000)


@benchmark(
    "prepared clips from the cache, found by the hash of coordinates and settings",
    "preparing them anew",
    1 / 10,
)
def cached_clips(quick):
    clips = read_clips(folder(200 if quick else 2000))
    preparation = Preparation().fit(clips)
    home = tempfile.TemporaryDirectory()
    folder.homes.append(home)
    prepare_clips(clips, preparation, home.name)
    return lambda: prepare_clips(clips, preparation, home.name), lambda: prepare_clips(
        clips, preparation
    )


def alphabet_clips(count):
    "Clips as long as those of the Nepali alphabet: 19 to 187 frames, a median of 79."
    random = np.random.default_rng(0)
    lengths = np.interp(
        random.random(count), [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], [19, 47, 59, 79, 102, 121, 187]
    ).astype(int)
    return ClipData(
        [random.normal(size=(n, 156)).astype("float32") for n in lengths],
        [Clip(str(i), gloss=0, category=0) for i in range(count)],
    )


def epoch(model, loader, longest=0):
    "Forward and backward over all clips; with `longest` every batch is as long as the longest clip."
    for inputs, mask, _ in loader:
        if longest:
            inputs = {
                k: torch.nn.functional.pad(v, (0, 0, 0, longest - v.shape[1]))
                for k, v in inputs.items()
            }
            mask = torch.nn.functional.pad(mask, (0, longest - mask.shape[1]))
        model(inputs, mask)["gloss"].sum().backward()
        model.zero_grad()


def bucket_pair(quick, longest):
    data = alphabet_clips(32 if quick else 128)
    model = SignTransformer(156, 25, 5, num_layers=1 if quick else 2)
    buckets, random = (BatchLoader(data, 16, shuffle=True, bucket=b) for b in (8, 0))
    frames = [sum(m.numel() for _, m, _ in l) - int(data.lengths.sum()) for l in (buckets, random)]
    return (
        lambda: epoch(model, buckets),
        lambda: epoch(model, random, data.lengths.max() if longest else 0),
        dict(padded_frames=frames[0], padded_frames_random=frames[1]),
    )


@benchmark(
    "an epoch of the transformer over clips of 19 to 187 frames, clips of like length together",
    "every batch as long as the longest clip",
    1 / 1.5,
)
def buckets_longest(quick):
    return bucket_pair(quick, True)


@benchmark("the same", "random order, every batch as long as its longest clip", 1.0)
def buckets_random(quick):
    return bucket_pair(quick, False)


def one(model, channels, steps=60):
    "A call of a model with one clip."
    x = torch.randn(1, steps, channels)
    model = model.eval()
    inputs = dict(channels=x, present=torch.ones_like(x, dtype=torch.bool))
    mask = torch.ones(1, steps, dtype=torch.bool)

    def call():
        with torch.inference_mode():
            for _ in range(5):
                model(inputs, mask)

    return call


def small_net():
    "The net that a run trains: 25 points, directions, two views, a clip and its mirror image."
    preparation = Preparation(points=list(range(25)), skeleton="pose78", normalise="body")
    return SignConv(50, bones=preparation.bones, pairs=preparation.pairs, centred=True)


def two_nets(small, large, steps):
    def count(m):
        return sum(p.numel() for p in m.parameters())

    return (
        one(small, 50, steps),
        one(large, 156),
        dict(
            parameters=count(small),
            parameters_transformer=count(large),
            share=count(small) / count(large),
        ),
    )


@benchmark(
    "a clip of 60 frames as the small net reads it: 40 frames, and its mirror image",
    "through the keypoint transformer, frame by frame",
    1 / 4,
)
def small_net_one_clip(quick):
    torch.manual_seed(0)
    return two_nets(small_net(), SignTransformer(), 40)


@benchmark(
    "60 frames through the small net, without the mirror image",
    "through the keypoint transformer",
    1 / 4,
)
def small_net_60_frames(quick):
    torch.manual_seed(0)
    net = small_net()
    net.pairs = []
    return two_nets(net, SignTransformer(), 60)


@benchmark(
    "nearest neighbour by time warping: band, lower bounds, ascending search",
    "the same band, every training clip",
    1 / 5,
)
def warped_neighbours(quick):
    clips = read_clips(folder(200 if quick else 2000))
    preparation = Preparation(points=list(range(25))).fit(clips)
    x = np.stack(prepare_clips(clips, preparation))
    last = np.array([c.signer == "S08" for c in clips])
    train, test = x[~last], x[last][::12]
    number = np.arange(len(train))
    filled = np.nan_to_num(train)

    def ours():
        return dtw_nearest_neighbour(train, number, test)

    def theirs():
        return np.array([dtw_distances(q, filled, 5).argmin() for q in np.nan_to_num(test)])

    return ours, theirs, dict(same_neighbours=bool((ours() == theirs()).all()))


@benchmark("augmentation of a batch of 64 clips", "the same, clip by clip", 1 / 5)
def augment_batch(quick):
    p = Preparation(points=list(range(25)), skeleton="pose78", normalise="body")
    style = signer_style(p.pairs)
    x = torch.randn(16 if quick else 64, 40, 50)
    mask = torch.ones(16 if quick else 64, 40, dtype=torch.bool)
    return lambda: augment(style, x, mask), lambda: [
        augment(style, x[i : i + 1], mask[i : i + 1]) for i in range(len(x))
    ]


@benchmark("a step of the GRU over frames, image net frozen", "the same, image net learning", 0.6)
def frozen_image_net(quick):
    def net(freeze):
        torch.manual_seed(0)
        m = InceptionV3GRU(64, 25, 7)
        m.backbone = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 3, 2),
            torch.nn.BatchNorm2d(32),
            torch.nn.ReLU(),
            torch.nn.Conv2d(32, 64, 3, 2),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        ).requires_grad_(not freeze)
        m.frozen = freeze
        return m.train()

    frames = torch.randn(2, 4 if quick else 16, 3, 64, 64)
    mask = torch.ones(2, 4 if quick else 16, dtype=torch.bool)

    def step(m):
        return lambda: m(dict(frames=frames), mask)["gloss"].sum().backward()

    return step(net(True)), step(net(False))


def exported_pair(clips, times):
    "The exported program of the small net beside the net, and facts about their answers."
    torch.manual_seed(0)
    net = small_net().eval()
    x = torch.randn(clips, 40, 50)
    inputs = dict(channels=x, present=torch.ones_like(x, dtype=torch.bool))
    mask = torch.ones(clips, 40, dtype=torch.bool)
    program = torch.export.export(net, (inputs, mask)).module()
    ours, theirs = (f(inputs, mask)["gloss"].detach() for f in (program, net))

    def calls(f):
        def call():
            with torch.inference_mode():
                for _ in range(times):
                    f(inputs, mask)

        return call

    return (
        calls(program),
        calls(net),
        dict(
            largest_difference=float((ours - theirs).abs().max()),
            same_top1=bool((ours.argmax(1) == theirs.argmax(1)).all()),
        ),
    )


@benchmark("100 clips through the exported program of the small net", "through the net itself", 1.1)
def exported_small_net(quick):
    return exported_pair(8 if quick else 100, 1)


@benchmark("the same, one clip", "through the net itself")
def exported_one_clip(quick):
    return exported_pair(1, 5)
