"The shared pages: the training loop, snapshots, loaders, imports, augmentations."

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

import gcode_ml
from bench import benchmark
from gcode_ml.data.batch import dataloaders
from gcode_ml.data.windows import RowTable, Windows
from gcode_ml.lab.snapshot import Snapshot
from gcode_ml.signals.augment import Noise, SpecAugment, TimeShift
from gcode_ml.signals.layers import masked_mean, use_byte_dropout
from gcode_ml.training.callbacks import FiniteLoss, History, TextLog
from gcode_ml.training.learner import Learner, set_seed
from gcode_ml.training.mixing import CutMix
from gcode_ml.training.monitors import GradientMonitor, Timing
from gcode_ml.training.schedules import create_optimizer

CHANNELS, CLASSES = 8, 4


class Cuts:
    "Labelled windows of random recordings, gathered by the batch."

    def __init__(self, items, steps=64, seed=0):
        rng = np.random.default_rng(seed)
        self.table = RowTable(
            [rng.standard_normal((items * 4 + steps, CHANNELS), dtype="float32") for _ in range(4)]
        )
        which = np.arange(items)
        start = 4 * (which // 4) * 4
        self.windows = Windows(self.table, which % 4, start, start + steps)
        self.lengths = self.windows.lengths
        self.targets = torch.from_numpy(which % CLASSES)

    def __len__(self):
        return len(self.targets)

    def batch(self, index):
        return *self.windows.batch(index), self.targets[torch.as_tensor(index)]


class Encoder(nn.Module):
    "A transformer encoder of the size that the domains use, with a head on the mean."

    def __init__(self, size=64, layers=2):
        super().__init__()
        self.enter = nn.Linear(CHANNELS, size)
        self.head = nn.Linear(size, CLASSES)
        layer = nn.TransformerEncoderLayer(
            size, 4, 2 * size, 0.1, "gelu", batch_first=True, norm_first=True
        )
        self.layers = use_byte_dropout(
            nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        )

    def forward(self, x, mask):
        return self.head(masked_mean(self.layers(self.enter(x), src_key_padding_mask=~mask), mask))


def callbacks(folder):
    "What a recipe's fit has by default."
    return [
        FiniteLoss(),
        GradientMonitor(alert=1e9),
        Timing(),
        History(folder / "history.csv"),
        TextLog(folder / "train_log.txt"),
    ]


def learner(items, batch_size, cbs=(), **sizes):
    "A learner on windows."
    set_seed(0)
    dls = dataloaders(Cuts(items), Cuts(batch_size, seed=1), batch_size)
    learn = Learner(
        dls,
        Encoder(**sizes),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=create_optimizer("adamw", 1e-3),
        cbs=list(cbs),
    )
    return learn


def quiet(learn, epochs=1):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs)


def bare(learn, optimizer):
    "An epoch of the same model on the same batches in plain PyTorch, validation included."
    model, loss_func = learn.model, learn.loss_func
    model.train()
    total = 0.0
    for x, mask, y in learn.dls.train:
        loss = loss_func(model(x, mask), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    model.eval()
    with torch.no_grad():
        for x, mask, y in learn.dls.valid:
            total += loss_func(model(x, mask), y).item()
    return total


def loop(least, quick, **sizes):
    "Our loop and the bare one, with batches so large that a bare step takes `least` seconds."
    size, step = 2, 0.0
    while step < least:
        size += max(1, size // 4)
        learn = learner(size, size, **sizes)
        optimizer = torch.optim.AdamW(learn.model.parameters(), 1e-3, weight_decay=1e-2)
        bare(learn, optimizer)
        began = time.process_time()
        bare(learn, optimizer)
        step = (time.process_time() - began) * 3 / 4  # the validation is a quarter of it
        if quick:
            break
    steps = 2 if quick else max(50, int(1 / step))  # an epoch of a second at least
    folder = Path(tempfile.mkdtemp())
    ours, plain = (learner(steps * size, size, cbs, **sizes) for cbs in (callbacks(folder), []))
    optimizer = torch.optim.AdamW(plain.model.parameters(), 1e-3, weight_decay=1e-2)
    return (
        lambda: quiet(ours),
        lambda: bare(plain, optimizer),
        dict(
            steps=steps,
            batch_size=size,
            step_ms=1e3 * step,
            tensors=len(list(ours.model.parameters())),
        ),
    )


@benchmark(
    "an epoch of 5 ms steps by the Learner with its default callbacks",
    "the same model and batches in a bare PyTorch loop",
)
def loop_5ms(quick):
    return loop(0.005, quick)


@benchmark(
    "an epoch of 20 ms steps by the Learner with its default callbacks",
    "the same model and batches in a bare PyTorch loop",
    goal=1.05,
)
def loop_20ms(quick):
    return loop(0.02, quick)


@benchmark(
    "an epoch of 40 ms steps by the Learner with its default callbacks, a deep model of many small weights",
    "the same model and batches in a bare PyTorch loop",
    goal=1.05,
)
def loop_deep(quick):
    return loop(0.04, quick, layers=8)


@benchmark("one snapshot of a fit", "an epoch of 50 steps of 20 ms", goal=0.05)
def snapshot(quick):
    kept, other = (
        learner(4 * 24 if quick else 50 * 24, 24, cbs)
        for cbs in ([Snapshot(Path(tempfile.mkdtemp()) / "fit.safetensors", seconds=1e9)], [])
    )
    quiet(kept)
    return (
        lambda: kept.snapshot.save(1, 0),
        lambda: quiet(other),
        dict(size_mb=kept.snapshot.path.stat().st_size / 1e6),
    )


class Items(Dataset):
    "The same windows item by item."

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return (
            self.data.windows[i],
            torch.ones(self.data.lengths[i], dtype=torch.bool),
            self.data.targets[i],
        )


def through(loader):
    "Go through an epoch."
    for _batch in loader:
        pass


def loaders(quick, alternative):
    "An epoch of our loader and of another one."
    set_seed(0)
    data = Cuts(256 if quick else 8192)
    ours = dataloaders(data, Cuts(64), 64).train
    other = alternative(data)
    return lambda: through(ours), lambda: through(other), dict(items=len(data))


def whole(data):
    return TensorDataset(*data.batch(np.arange(len(data))))  # every window in memory


@benchmark(
    "an epoch of BatchLoader, windows cut from the recordings",
    "TensorDataset of all windows in memory and DataLoader",
    goal=1.0,
)
def loader_tensors(quick):
    return loaders(quick, lambda data: DataLoader(whole(data), 64, shuffle=True))


@benchmark(
    "an epoch of BatchLoader, windows cut from the recordings",
    "TensorDataset of all windows in memory, indexed by a BatchSampler",
)
def loader_indexed(quick):
    return loaders(
        quick,
        lambda data: DataLoader(
            whole(data), None, sampler=BatchSampler(RandomSampler(range(len(data))), 64, False)
        ),
    )


@benchmark(
    "an epoch of BatchLoader, windows cut from the recordings",
    "a data set of single windows and DataLoader",
    goal=1.0,
)
def loader_items(quick):
    return loaders(quick, lambda data: DataLoader(Items(data), 64, shuffle=True))


def imports(statement, goal):
    "Register the import of a module in a fresh process beside that of torch."

    def fresh(statement):
        return lambda: subprocess.run(
            [sys.executable, "-c", statement], check=True, cwd=Path(gcode_ml.__file__).parents[1]
        )

    def function(quick):
        return fresh(f"import {statement}"), fresh("import torch")

    function.__name__ = "import_" + statement.removeprefix("gcode_ml.").replace(".", "_")
    function.__module__ = __name__
    benchmark(f"import {statement} in a fresh process", "import torch", goal)(function)


imports("gcode_ml", 0.2)
for page in sorted(Path(gcode_ml.__file__).parent.glob("*/models.py")):
    imports(f"gcode_ml.{page.parent.name}.models", 1.1)


def batch(quick, *shape):
    torch.manual_seed(0)
    return torch.randn(8 if quick else 64, *shape)


def augmentation(change, single, x, steps):
    "An augmentation of a whole batch beside a loop over its samples."
    mask = torch.ones(len(x), steps, dtype=torch.bool)
    return (
        lambda: change(x, mask),
        lambda: torch.stack([single(s) for s in x]),
        dict(shape=list(x.shape)),
    )


@benchmark("SpecAugment of a batch of 64", "slices of one sample after the other", goal=1.0)
def spec_augment(quick):
    def single(s):
        s = s.clone()
        for axis, width in ((0, 20), (0, 20), (1, 40), (1, 40)):
            w = int(torch.randint(0, width + 1, ()))
            at = int(torch.randint(0, s.shape[axis] - w + 1, ()))
            s.narrow(axis, at, w).zero_()
        return s

    return augmentation(SpecAugment(), single, batch(quick, 129, 161), 161)


@benchmark("noise on a batch of 64", "one sample after the other", goal=1.0)
def noise(quick):
    return augmentation(
        Noise(), lambda s: s + 0.01 * torch.randn_like(s), batch(quick, 2048, 2), 2048
    )


@benchmark(
    "a time shift of each sample of a batch of 64", "roll, one sample after the other", goal=1.0
)
def time_shift(quick):
    return augmentation(
        TimeShift(),
        lambda s: s.roll(int(torch.randint(-204, 205, ())), 0),
        batch(quick, 2048, 2),
        2048,
    )


@benchmark("CutMix of a batch of 64", "slices of one sample after the other", goal=1.0)
def cut_mix(quick):
    x = batch(quick, 2048, 2)
    y = torch.arange(len(x)) % CLASSES
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    learn = learner(4, 2)
    learn.xb, learn.yb = (x, mask), (y,)
    cut = CutMix(p=0.5)
    cut.learn = learn

    def ours():
        learn.xb = x, mask
        cut.before_batch()

    def loop():
        share = float(torch.distributions.Beta(1.0, 1.0).sample())
        width = round(x.shape[1] * (1 - share))
        mixed = []
        for s, k in zip(x, torch.randperm(len(x)).tolist()):
            s = s.clone()
            if torch.rand(()) < 0.5:
                at = int(torch.randint(0, x.shape[1] - width + 1, ()))
                s[at : at + width] = x[k][at : at + width]
            mixed.append(s)
        torch.stack(mixed)

    return ours, loop, dict(shape=list(x.shape))
