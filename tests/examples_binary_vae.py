"Masked models of the domain with small inputs, for the contract that padding changes nothing."

import torch

from gcode_ml.binary_vae.models import (
    BernoulliVAE,
    BinaryEncoder,
    ConvolutionalEncoder,
    SequenceEncoder,
)


def pixels(n=64):
    return dict(x=torch.rand(3, n))


def tokens():
    return dict(x=torch.randint(1, 6, (3, 7)))


MODELS = {
    "binary_vae.models.BinaryEncoder": lambda: (BinaryEncoder(64, 6, 16), pixels()),
    "binary_vae.models.ConvolutionalEncoder": lambda: (
        ConvolutionalEncoder((8, 8), 6, 16, channels=4),
        pixels(),
    ),
    "binary_vae.models.SequenceEncoder": lambda: (SequenceEncoder(6, 6, 16), tokens()),
    "binary_vae.models.BernoulliVAE": lambda: (
        BernoulliVAE(
            "tokens",
            (20,),
            6,
            blocks=6,
            hidden=16,
            depth=1,
            architecture="gru",
            estimator="rloo",
            logit_scale=1e4,
        ),
        tokens(),
    ),
}


def RECIPE(
    folder,
):  # arguments of the recipe with which it fits in a second or two: texts, the kind that is padded; logits so large that a draw is a decision
    from gcode_ml.binary_vae.data import simulate

    simulate(folder)
    place = next(
        p
        for p in [folder, *folder.iterdir()]
        if p.is_dir() and any("moses" in f.name for f in p.iterdir())
    )
    return dict(
        data=f"smiles:{place}",
        latent=6,
        hidden=8,
        depth=1,
        batch_size=32,
        beta_warmup_epochs=1,
        learning_rate=1e-2,
        token_dropout=0.0,
        logit_scale=1e4,
    )
