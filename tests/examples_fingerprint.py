"Small examples of the fingerprint domain for the contracts in test_contracts.py."

import torch

from gcode_ml.fingerprint.models import MMDTAELSTM, GCodeFingerprinter, MultiHeadGCodeLM
from gcode_ml.fingerprint.recipe import load_recordings

ITEMS, STEPS = 3, 7
PARTS = [[0, 0, 0, i] for i in range(3)] + [[1, 1, 0, 0], [2, 0, 1, 0], [3, 0, 0, 2]]
SMALL = dict(d_model=16, nhead=2, dim_feedforward=32)
MODALITIES = [[0, 1], [2], [3, 4, 5]]


def numbers(*shape):
    return torch.randn(ITEMS, *shape)


def tokens():
    return torch.randint(0, 6, (ITEMS, 5))


def sensors():
    return dict(sensors=numbers(STEPS, 6), present=torch.rand(ITEMS, STEPS, 6) < 0.8)


MODELS = {  # name in the package -> model, and the arguments of its `forward` except the mask
    "fingerprint.models.MMDTAELSTM": lambda: (
        MMDTAELSTM(MODALITIES, **SMALL),
        dict(inputs=sensors()),
    ),
    "fingerprint.models.MultiHeadGCodeLM": lambda: (
        MultiHeadGCodeLM(PARTS, num_layers=2, **SMALL),
        dict(tokens=tokens(), memory=numbers(STEPS, 16)),
    ),
    "fingerprint.models.GCodeFingerprinter": lambda: (
        GCodeFingerprinter(MODALITIES, PARTS, 4, num_layers=2, **SMALL),
        dict(inputs=dict(sensors(), tokens=tokens())),
    ),
}


def RECIPE(folder):  # recipe arguments for a fit of one or two seconds
    return dict(
        data=load_recordings(runs=3, seed=5)[0],
        folds=3,
        window=32,
        stride=64,
        d_model=8,
        nhead=1,
        num_layers=1,
        encoder_layers=1,
        dim_feedforward=8,
        batch_size=8,
    )
