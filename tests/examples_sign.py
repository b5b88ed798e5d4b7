"Examples of the models of `sign` for the tests of every masked model: name -> model and the arguments of its `forward` but for the mask."

import torch

from gcode_ml.sign.models import (
    BiGRU,
    ConvBlock,
    InceptionV3GRU,
    MaskedBatchNorm,
    MotionChannels,
    SignConv,
    SignModel,
    SignTransformer,
)

ITEMS, STEPS, POINTS = 3, 7, 26
SMALL = dict(channels=2 * POINTS, glosses=4, categories=2)
HAND = [list(range(5, 26))]


def clips(points=POINTS):
    "Coordinates, a fifth of the points missing."
    seen = (torch.rand(ITEMS, STEPS, points) < 0.8).repeat_interleave(2, -1)
    return dict(inputs=dict(channels=torch.randn(ITEMS, STEPS, 2 * points), present=seen))


MODELS = {
    "sign.models.MotionChannels": lambda: (
        MotionChannels(2 * POINTS, HAND, presence=True, bones=[(0, 1), (2, 9)]),
        clips(),
    ),
    "sign.models.SignModel": lambda: (SignModel(2 * POINTS, 4, 2), clips()),
    "sign.models.SignTransformer": lambda: (
        SignTransformer(**SMALL, d_model=16, nhead=2, num_layers=2, dim_feedforward=32),
        clips(),
    ),
    "sign.models.InceptionV3GRU": lambda: (InceptionV3GRU(**SMALL), clips()),
    "sign.models.MaskedBatchNorm": lambda: (
        MaskedBatchNorm(6),
        dict(x=torch.randn(ITEMS, STEPS, 6)),
    ),
    "sign.models.ConvBlock": lambda: (ConvBlock(8), dict(x=torch.randn(ITEMS, STEPS, 8))),
    "sign.models.SignConv": lambda: (
        SignConv(
            **SMALL,
            width=16,
            num_layers=2,
            hands=HAND,
            attention=True,
            bones=[(0, 3)],
            pairs=[(1, 2)],
            centred=True,
        ),
        clips(),
    ),
    "sign.models.BiGRU": lambda: (BiGRU(**SMALL, width=8), clips()),
}


def RECIPE(folder):  # arguments of the recipe with which it fits in a second or two
    from gcode_ml.sign.simulate import simulate_clips

    return dict(
        data=str(simulate_clips(folder, glosses=3, signers=3, repetitions=2)),
        width=16,
        num_layers=2,
        frames=16,
        batch_size=8,
    )
