"Small models of `gcode_ml.trajectory` for the tests that run over all models."

import torch

from gcode_ml.trajectory import models as m
from gcode_ml.trajectory.recipe import load_series

ITEMS, STEPS = 3, 7


def batch():
    "Inputs of every model of the domain."
    return dict(
        inputs=dict(
            features=torch.randn(ITEMS, STEPS, 15),
            filter=torch.randn(ITEMS, STEPS, 2),
            static=torch.randn(ITEMS, 2),
        )
    )


def awake(model):
    "A model whose answer is more than its filter's."
    torch.nn.init.normal_(model.error.weight, 0, 0.3)
    return model


MODELS = {
    "trajectory.models.ErrorModel": lambda: (Stateless(), batch()),
    "trajectory.models.ErrorTCN": lambda: (awake(m.ErrorTCN(size=8, layers=3)), batch()),
    "trajectory.models.ErrorLSTM": lambda: (awake(m.ErrorLSTM(size=8)), batch()),
    "trajectory.models.TrajectoryErrorTransformer": lambda: (
        awake(m.TrajectoryErrorTransformer(size=16, heads=2, layers=1, steps=16)),
        batch(),
    ),
    "trajectory.models.OscillatorLaw": lambda: (
        m.OscillatorLaw([[1, -1.9, 0.95]] * 2),
        dict(
            prediction=dict(error=torch.randn(ITEMS, STEPS, 2)),
            target=torch.zeros(ITEMS),
            inputs=dict(drive=torch.randn(ITEMS, STEPS, 2)),
        ),
    ),
}
FIXED_LENGTH = True  # windows of one length


def Stateless():
    "The base class with no states of its own."
    model = m.ErrorModel(size=8)
    model.states = lambda h, past=None: (h, past)
    return awake(model)


def RECIPE(folder):  # arguments of the recipe with which it fits in a second or two
    return dict(
        data=str(load_series(machine="bedslinger", folder=folder)[1]["folder"]),
        machine="bedslinger",
        base="fir",
        sequence_length=32,
        stride=64,
        d_model=8,
        num_layers=2,
        learning_rate=1e-2,
    )
