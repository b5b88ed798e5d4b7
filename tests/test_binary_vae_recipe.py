"From parameters to a bundle: early stopping, records, resume, commands, refusals."

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from gcode_ml.binary_vae.recipe import (
    PARAMETER_SETS,
    evaluate_bundle,
    fit,
    predict_bundle,
    preprocessing,
    recipe,
    run_name,
    sample_bundle,
    write_config,
)
from gcode_ml.lab.bundle import load_bundle, save_bundle
from gcode_ml.training.callbacks import epoch_table

TINY = dict(
    data="bars",
    latent=8,
    hidden=16,
    max_epochs=4,
    beta_warmup_epochs=2,
    learning_rate=5e-3,
    batch_size=100,
    subset=400,
    seed=3,
)


def trained(cbs=(), **more):
    learn = recipe(**{**TINY, **more}, cbs=cbs)
    with learn.no_bar(), learn.no_logging():
        fit(learn)
    return learn


def test_parameter_sets():
    "The eight sets, their sizes in the model, and depth as a number of layers that counts."
    for i, s in enumerate(PARAMETER_SETS):
        learn = recipe(parameter_set=i)
        model = learn.model
        assert model.code.code_bits == s["latent"]
        assert model.encoder.layers[0].out_features == s["hidden"]
        assert sum(isinstance(m, torch.nn.Linear) for m in model.encoder.layers) == s["depth"] + 1
    assert (
        run_name(1, beta_max=1.0, learning_rate=1e-3, seed=42)
        == "hidden_size_200_latent_size_100_depth_2_beta_1.0_lr_0.001_seed_42"
    )


def test_mean_is_subtracted_and_first():
    "Before training a zero hidden layer would give the mean image, and the encoder sees differences from it."
    learn = recipe("bars", latent=8)
    mean = torch.tensor(learn.sets.items.mean(learn.train))
    assert torch.allclose(
        learn.model.decoder.layers[-1].bias.sigmoid(), mean.clamp(0.002, 0.998), atol=1e-5
    )
    assert torch.allclose(learn.model.encoder.mean, mean)


def test_best_epoch_comes_back(tmp_path):
    "What is left in the model scores as the best row of the history; no epoch of the warm-up counts."
    learn = trained(max_epochs=8, patience=2, learning_rate=0.03, schedule="constant")
    table = epoch_table(learn)
    assert table.score.isna().sum() == 1
    assert math.isclose(learn.validate()[0], table.score.min(), rel_tol=1e-5)
    assert table.beta.iloc[-1] == 1
    assert table.beta.iloc[0] < 1


def test_patience_counts_from_the_end_of_the_warmup():
    "With a score that never improves after its first epoch the fit ends `patience` epochs later."
    learn = trained(max_epochs=30, patience=3, beta_warmup_epochs=5, min_delta=1e9)
    assert len(epoch_table(learn)) == 5 + 3


def test_loss_record(tmp_path):
    trained(checkpoint_folder=str(tmp_path), save_every_epoch=True)
    data = np.loadtxt(tmp_path / "loss_record_with.txt")
    assert data.shape == (4, 4)
    assert np.isfinite(data).all()
    assert (tmp_path / "loss_record_with.txt").read_text().startswith("# loss val_loss kl beta")
    assert sorted(f.name for f in tmp_path.glob("epochs_*.safetensors")) == [
        f"epochs_{i:04d}.safetensors" for i in range(1, 5)
    ]


def test_same_seed_same_result():
    a = trained()
    b = trained()
    c = trained(seed=4)

    def same(x, y):
        return all(torch.equal(p, q) for p, q in zip(x.model.parameters(), y.model.parameters()))

    assert same(a, b)
    assert not same(a, c)


def test_resume_is_exact(tmp_path):
    "A fit that is cut off and carried on ends with the weights and the record of one that was not."
    from fastai.callback.core import Callback

    from gcode_ml.lab.snapshot import Snapshot

    class Cut(Callback):
        order, run_valid = 99, False

        def after_batch(self):
            if self.epoch == 2 and self.iter == 1:
                raise KeyboardInterrupt

    whole = trained(estimator="rloo")
    with pytest.raises(KeyboardInterrupt):
        trained([Snapshot(tmp_path / "s.safetensors", batches=1), Cut()], estimator="rloo")
    again = trained([Snapshot(tmp_path / "s.safetensors", batches=1)], estimator="rloo")
    assert all(
        torch.equal(p, q) for p, q in zip(whole.model.parameters(), again.model.parameters())
    )
    assert np.allclose(epoch_table(whole).kl, epoch_table(again).kl)
    assert np.allclose(epoch_table(whole).score, epoch_table(again).score, equal_nan=True)


def bundled(folder, **more):
    learn = trained(**more)
    save_bundle(
        folder,
        learn.model,
        learn.arguments,
        preprocessing(learn),
        dict(domain="binary_vae", trained_on=["bars"]),
    )
    write_config(folder / "config.json", learn)
    return learn, load_bundle(folder)


def test_bundle(tmp_path, refused):
    "A bundle gives the words, scores and samples of its model; one whose parts disagree is refused."
    learn, bundle = bundled(tmp_path / "b", latent=16, ecc_type="hamming_8_4")
    x, mask, _ = learn.sets.items.batch(learn.test[:20])
    np.save(tmp_path / "x.npy", x.numpy())
    table = predict_bundle(bundle, tmp_path / "x.npy")
    words = learn.model.infer(x, mask).int()
    assert list(table.word) == ["".join(map(str, w)) for w in words.tolist()]
    assert (table.word == table.code_word.str[:4] + table.code_word.str[8:12]).all()
    scores, facts = evaluate_bundle(bundle, "bars")
    assert {"-ELBO, exact", "NLL, exact", "loop BER", "ECE"} <= set(scores.measure)
    assert facts["facts"]["rows"]
    made = sample_bundle(bundle, 7)
    assert made["images"].shape == (7, 64)
    assert made["code_words"].shape == (7, 16)
    assert np.array_equal(made["words"], sample_bundle(bundle, 7)["words"])
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["information_bits"] == 8
    assert len(config["mean"]) == 64
    assert np.array_equal(config["generator"], learn.model.code.generator)
    about = json.loads((tmp_path / "b" / "bundle.json").read_text())
    about["arguments"]["generator"][0][5] ^= 1
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(about))
    assert "generator" in refused(load_bundle, tmp_path / "b")
    np.save(tmp_path / "bad.npy", np.full((2, 64), np.nan))
    assert "bad.npy: pixel 0 of image 0: expected a number from 0 to 1" in refused(
        predict_bundle, bundle, tmp_path / "bad.npy"
    )


def test_warnings():
    with pytest.warns(UserWarning, match="ecc_R=4 corrects by hard votes what ecc_R=3 does"):
        recipe("bars", latent=8, ecc_type="repetition", ecc_R=4)
    with pytest.warns(UserWarning, match="no epoch counts as best"):
        recipe("bars", latent=8, beta_warmup_epochs=10, max_epochs=5)


BAD = {
    "ecc_R=3, found 100": dict(ecc_type="repetition", ecc_R=3),
    "0 to 7, found 8": dict(parameter_set=8),
    "at most 12 information bits with exact": dict(estimator="exact"),
    "use rloo": dict(latent=16, ecc_type="hamming_8_4", estimator="disarm"),
    "one of auto": dict(estimator="reinforced"),
    "ecc_type: expected one of hamming_7_4": dict(ecc_type="hamming74"),
    "subset: expected at least 0": dict(subset=-1),
    "subset: expected 1 to": dict(subset=10**6),
    "at least one batch of 32, found 8": dict(subset=8),
    "patience": dict(patience=0),
    "learning_rate": dict(learning_rate=0.0),
    "batch_size": dict(batch_size=0),
    "beta_max": dict(beta_max=-1.0),
    "channel_rate": dict(channel_rate=0.6),
    "relaxation": dict(relaxation=0.0),
    "one of none, bsc, awgn": dict(channel="laplace"),
    "with vimco": dict(estimator="vimco", beta_max=0.5),
    "beside a wake phase": dict(latent=8, wake=1.0, beta_max=0.5),
    "the exact estimator, found disarm": dict(wake=0.5),
    "those augmentations are for signals": dict(augment="noise"),
    "shift: expected 0 to 7, found 9": dict(shift=9),
    "pixel_flips": dict(pixel_flips=0.7),
    "one of position, leaky": dict(split="shuffle"),
    "copies": dict(copies="some"),
    "a checkpoint_folder": dict(save_every_epoch=True),
    "architecture": dict(architecture="gru"),
    "an option that this recipe follows": dict(class_weights=True),
    "device": dict(device="tpu"),
}


@pytest.mark.parametrize("sentence", sorted(BAD))
def test_bad_parameters(sentence, refused):
    assert sentence in refused(recipe, **BAD[sentence])


def test_conv_and_texts(tmp_path, refused):
    "The other architectures train: a convolution on 8x8 images, recurrent layers on texts, with free bits."
    from gcode_ml.binary_vae.data import simulate

    assert math.isfinite(
        epoch_table(
            trained(architecture="conv", shift=1, redraw=True, pixel_flips=0.01)
        ).valid_loss.iloc[-1]
    )
    simulate(tmp_path)
    folder = next(
        p
        for p in [tmp_path, *tmp_path.iterdir()]
        if p.is_dir() and any("moses" in f.name for f in p.iterdir())
    )
    learn, bundle = bundled(
        tmp_path / "t", data=f"smiles:{folder}", latent=12, depth=1, subset=0, free_bits=0.1
    )
    texts = sample_bundle(bundle, 9)["texts"]
    assert len(texts) == 9
    (tmp_path / "x.smi").write_text("\n".join(learn.sets.items.texts[:3]) + "\n")
    assert len(predict_bundle(bundle, tmp_path / "x.smi")) == 3
    (tmp_path / "y.smi").write_text("CCO\nCC[Xx]\n")
    assert refused(predict_bundle, bundle, tmp_path / "y.smi").endswith(
        "y.smi: line 2: expected a token of the vocabulary, found '[Xx]'."
    )
    (tmp_path / "z.smi").write_text("CCO\n\nC\n")
    assert "z.smi: line 2: expected a text, found nothing" in refused(
        predict_bundle, bundle, tmp_path / "z.smi"
    )
    assert "nothing there" in refused(predict_bundle, bundle, tmp_path / "none.smi")


def test_sample_command(command, tmp_path):
    "`gcode_ml run`, `gcode_ml sample` and `gcode_ml export --format classic` on simulated data."
    code, out, err = command(
        "run",
        "binary_vae",
        "-p",
        "data=bars",
        "-p",
        "latent=4",
        "-p",
        "hidden=8",
        "-p",
        "max_epochs=3",
        "-p",
        "subset=128",
        "-p",
        "beta_warmup_epochs=2",
        "-p",
        "leaky=false",
        "-p",
        "baselines=false",
        "-p",
        "made=20",
        "--name",
        "a",
    )
    assert code == 0, err
    folder = tmp_path / "runs" / "binary_vae" / "a"
    assert {"result.json", "history.csv", "log.txt"} <= {f.name for f in folder.iterdir()}
    assert (folder / "bundle" / "config.json").exists()
    assert (folder / "figures" / "samples.png").exists()
    code, out, err = command("sample", "a", "-n", "30")
    assert code == 0 and "samples" in out, err
    assert np.load(folder / "samples" / "samples.npz")["images"].shape == (30, 64)
    code, out, err = command("export", "a", "--format", "classic", "-o", tmp_path / "w")
    assert code == 0, err
    check_classic(folder, *(tmp_path / "w").iterdir())
    assert command("export", "a", "--format", "classics")[0] == 2


def check_classic(run, folder):
    "The four files of a run; losses are columns for `np.loadtxt`, the model a flat dictionary of the bundle's tensors."
    from safetensors.torch import load_file

    assert folder.name.startswith("hidden_size_8_latent_size_4_depth_2_beta_1.0_lr_0.001")
    assert {f.name for f in folder.iterdir()} == {
        "bvae_best_model_with.pt",
        "loss_record_with.txt",
        "config.json",
        "training_log.txt",
    }
    kept = load_file(run / "bundle" / "model.safetensors")
    told = torch.load(folder / "bvae_best_model_with.pt", weights_only=True)
    assert set(kept) == set(told)
    assert all(torch.equal(kept[k], told[k]) for k in kept)
    history = pd.read_csv(run / "history.csv")
    history = history[history.fit == history.fit.iloc[0]]
    data = np.loadtxt(folder / "loss_record_with.txt")
    assert np.allclose(data, history[["train_loss", "valid_loss", "kl", "beta"]], atol=1e-5)
    assert json.loads((folder / "config.json").read_text())["code_bits"] == 4
    lines = [
        l for l in (folder / "training_log.txt").read_text().splitlines() if l.startswith("Epoch ")
    ]
    assert len(lines) == 3
    assert all(k in lines[-1] for k in ("loss=", "kl=", "beta=1.000", "val_loss=", "patience="))
    assert "beta=0." in lines[0]


def test_progress_keeps_the_name_of_the_fit(tmp_path):
    "The bar shows name and line; what is recorded of an epoch has the name alone."
    from gcode_ml.lab.runs import RunProgress

    told = []

    class Run:
        def progress(self, text, *a):
            told.append(text)

        def report_epoch(self, fit, **values):
            told.append(fit)

    trained([RunProgress(Run(), "seed-7")], max_epochs=1, beta_warmup_epochs=0)
    assert told[-1] == "seed-7"
    assert told[-2].startswith("seed-7 loss=")
    assert all(k in told[-2] for k in ("kl=", "beta=", "patience=0/10"))
