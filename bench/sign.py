"The sign domain: reading, preparing and checking clips, and clips of like length in one batch."
import functools, tempfile, warnings
from pathlib import Path
import numpy as np, torch
from bench import benchmark
from gcode_ml.core.batch import BatchLoader
from gcode_ml.sign.checks import check
from gcode_ml.sign.data import Clip, ClipData, read_clips
from gcode_ml.sign.models import SignTransformer
from gcode_ml.sign.simulate import simulate_clips
from gcode_ml.sign.skeleton import Preparation, prepare_clips

@functools.cache
def folder(count):
    "A temporary folder of simulated clips that lives as long as the process."
    home = tempfile.TemporaryDirectory(); folder.homes.append(home)
    return simulate_clips(home.name, glosses=25, signers=8, repetitions=count//200)
folder.homes = []

def with_numpy(path):
    "Every array of every file by `numpy.load`."
    clips = []
    for f in sorted((Path(path)/'npz').glob('*.npz')):
        with np.load(f, allow_pickle=False) as z: clips.append({k: z[k] for k in ('X','mask','timestamps_ms','meta')})
    return clips

def quiet(function, *args, **kwargs):
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); return function(*args, **kwargs)

@benchmark('reading 2,000 clips, every array compared with its header, coordinates, masks and labels checked', 'numpy.load of the same arrays, unchecked')
def read_2000_clips(quick):
    path = folder(200 if quick else 2000)
    return lambda: read_clips(path), lambda: with_numpy(path)

@benchmark('all 12 checks of 2,000 clips, near copies included', 'numpy.load of the same arrays, unchecked')
def check_2000_clips(quick):
    path = folder(200 if quick else 2000)
    return lambda: quiet(check, path), lambda: with_numpy(path), dict(clips=200 if quick else 2000)

@benchmark('prepared clips from the cache, found by the hash of coordinates and settings', 'preparing them anew', 1/10)
def cached_clips(quick):
    clips = read_clips(folder(200 if quick else 2000)); preparation = Preparation().fit(clips); home = tempfile.TemporaryDirectory(); folder.homes.append(home)
    prepare_clips(clips, preparation, home.name)
    return lambda: prepare_clips(clips, preparation, home.name), lambda: prepare_clips(clips, preparation)

def alphabet_clips(count):
    "Clips as long as those of the Nepali alphabet: 10 to 187 frames, a median of 64."
    random = np.random.default_rng(0); lengths = np.interp(random.random(count), [0,.25,.5,.75,1], [10,37,64,93,187]).astype(int)
    return ClipData([random.normal(size=(n,156)).astype('float32') for n in lengths], [Clip(str(i), gloss=0, category=0) for i in range(count)])

def epoch(model, loader, longest=0):
    "Forward and backward over all clips; with `longest` every batch is as long as the longest clip."
    for inputs,mask,_ in loader:
        if longest: inputs,mask = {k: torch.nn.functional.pad(v, (0,0,0,longest-v.shape[1])) for k,v in inputs.items()},torch.nn.functional.pad(mask, (0,longest-mask.shape[1]))
        model(inputs, mask)['gloss'].sum().backward(); model.zero_grad()

def bucket_pair(quick, longest):
    data = alphabet_clips(32 if quick else 128); model = SignTransformer(156, 25, 5, num_layers=1 if quick else 2)
    buckets,random = (BatchLoader(data, 16, shuffle=True, bucket=b) for b in (8,0))
    frames = [sum(m.numel() for _,m,_ in l)-int(data.lengths.sum()) for l in (buckets,random)]
    return lambda: epoch(model, buckets), lambda: epoch(model, random, data.lengths.max() if longest else 0), dict(padded_frames=frames[0], padded_frames_random=frames[1])

@benchmark('an epoch of the transformer over clips of 10 to 187 frames, clips of like length together', 'every batch as long as the longest clip', 1/1.5)
def buckets_longest(quick): return bucket_pair(quick, True)

@benchmark('the same', 'random order, every batch as long as its longest clip', 1.)
def buckets_random(quick): return bucket_pair(quick, False)
