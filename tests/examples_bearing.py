"Small models of `gcode_ml.bearing` for the tests that run over all models."

import torch

from gcode_ml.bearing import models as m
from gcode_ml.bearing.simulate import rolling_set

ITEMS, STEPS = 3, 7


def batch():
    "Inputs of every model of the domain."
    return dict(
        inputs=dict(
            signal=torch.randn(ITEMS, STEPS, 1),
            shaft=torch.tensor([20.0, 29.0, 31.0]),
            rate=torch.full((ITEMS,), 12000.0),
            orders=torch.tensor([[3.58, 5.42, 4.71, 0.4]] * ITEMS),
        )
    )


MODELS = {
    "bearing.models.SignalModel": lambda: (m.SignalModel(4), batch()),
    "bearing.models.CNN1d": lambda: (m.CNN1d(widths=(4, 4, 4, 4, 4)), batch()),
    "bearing.models.AttentionCNN": lambda: (m.AttentionCNN(widths=(4, 4, 8)), batch()),
    "bearing.models.CNNLSTM": lambda: (m.CNNLSTM(widths=(4, 4, 8), hidden=8), batch()),
    "bearing.models.SignalLSTM": lambda: (m.SignalLSTM(hidden=8, layers=1), batch()),
    "bearing.models.ResNet1d": lambda: (m.ResNet1d(width=4), batch()),
    "bearing.models.PatchTransformer": lambda: (
        m.PatchTransformer(size=8, heads=2, layers=1),
        batch(),
    ),
    "bearing.models.SpectrogramCNN": lambda: (
        m.SpectrogramCNN(representations=("stft", "wigner"), widths=(4, 4, 4)),
        batch(),
    ),
    "bearing.models.OrderNet": lambda: (m.OrderNet(severities=2), batch()),
    "bearing.models.LinePenalty": lambda: (
        m.LinePenalty(),
        dict(prediction=dict(fault=torch.randn(ITEMS, 3)), target=torch.zeros(ITEMS), **batch()),
    ),
    "bearing.models.BandPenalty": lambda: (
        m.BandPenalty(["healthy", "imbalance"]),
        dict(prediction=dict(fault=torch.randn(ITEMS, 2)), target=torch.zeros(ITEMS), **batch()),
    ),
    "bearing.models.FeatureMLP": lambda: (m.FeatureMLP(hidden=8), batch()),
}


def RECIPE(folder):  # arguments of the recipe with which it fits in a second or two
    return dict(data=rolling_set(seconds=0.5, snr=0.0), window=3000, batch_size=8)
