"Gradients by full enumeration, bounds on trained models, and what the models promise."

import itertools
import math

import numpy as np
import pytest
import torch

from gcode_ml.binary_vae import models
from gcode_ml.binary_vae.callbacks import EncoderGradient, consistency
from gcode_ml.binary_vae.codes import channel_logits, hamming_8_4, repetition, simplex
from gcode_ml.binary_vae.data import bars_log_likelihood, load_data
from gcode_ml.binary_vae.evaluate import (
    audit_bounds,
    bound_violations,
    exact_bounds,
    importance_bound,
    latent_usage,
    paired_difference,
    raw_bit_scores,
    snr_db,
)
from gcode_ml.binary_vae.models import (
    BernoulliVAE,
    BlockCode,
    NegativeELBO,
    all_words,
    resolve_estimator,
)
from gcode_ml.binary_vae.recipe import fit, recipe

K = 3


class Table(torch.nn.Module):
    "A decoder whose likelihood of a word is a number from a table, the same for all items."

    def __init__(self):
        super().__init__()
        self.f = torch.nn.Parameter(torch.randn(2**K, dtype=torch.float64))

    def log_likelihood(self, x, mask, codes):
        return self.f[(codes @ torch.tensor([4.0, 2.0, 1.0], dtype=codes.dtype)).round().long()]

    def log_likelihood_table(self, x, mask, codes):
        return self.f[None].expand(len(x), -1)


def small(samples=2):
    "A model with a fixed logit a bit and a table for a decoder."
    torch.manual_seed(3)
    model = BernoulliVAE(blocks=K, estimator="rloo", samples=samples).double()
    model.decoder = Table()
    model.logits = torch.nn.Parameter(torch.randn(1, K, dtype=torch.float64))
    return model


def true_gradient(model):
    "Gradient of `-E f` by summing over all words."
    log_q = model.code.joint_log_posterior(model.logits)
    return torch.autograd.grad(
        -(log_q.exp() * model.decoder.f).sum(), [model.logits, model.decoder.f]
    )


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("name", ["rloo", "vimco"])
def test_estimators_by_enumeration(name, samples, monkeypatch):
    "The expectation over every combination of samples equals the gradient to 1e-12: no estimator is sampled here."
    model = small(samples)
    words = all_words(K).double()
    total = None
    expected = torch.zeros((), dtype=torch.float64)
    log_q = model.code.joint_log_posterior(model.logits)[0]
    for combination in itertools.product(range(2**K), repeat=samples):
        # `[S,1,K]`: each bit is a block.
        index = torch.stack([words[i].long() for i in combination])[:, None]
        monkeypatch.setattr(BlockCode, "sample", lambda self, q, s=1, index=index: index)
        q = model.code.log_posterior(model.logits)
        loss = models.ESTIMATOR_FUNCTIONS[name](
            model, torch.zeros(1, 1), None, model.logits, q
        ).sum()
        if name == "vimco":
            loss = loss + model.code.kl(q).sum()
        g = torch.autograd.grad(loss, [model.logits, model.decoder.f])
        weight = log_q[list(combination)].sum().exp().detach()
        total = [weight * a if total is None else t + weight * a for a, t in zip(g, total or g)]
        bound = torch.stack(
            [model.decoder.f[i] - K * math.log(2) - log_q[i] for i in combination]
        ).logsumexp(0) - math.log(samples)
        expected = expected - log_q[list(combination)].sum().exp() * bound
    wanted = (
        true_gradient(model)
        if name == "rloo"
        else torch.autograd.grad(expected, [model.logits, model.decoder.f])
    )
    for a, b in zip(total, wanted):
        assert torch.allclose(a, b, atol=1e-12)


def test_disarm():
    "Within four standard errors of the true gradient."
    model = small()
    n = 200_000
    torch.manual_seed(0)
    l = model.logits.expand(n, K).detach().requires_grad_()
    loss = models.disarm(model, torch.zeros(n, 1), None, l, model.code.log_posterior(l))
    g = torch.autograd.grad(loss.sum(), l)[0]
    assert ((g.mean(0) - true_gradient(model)[0][0]).abs() < 4 * g.std(0) / math.sqrt(n)).all()


def test_exact_is_the_gradient():
    model = small()
    q = model.code.log_posterior(model.logits)
    for a, b in zip(
        torch.autograd.grad(
            models.exact(model, torch.zeros(1, 1), None, model.logits, q).sum(),
            [model.logits, model.decoder.f],
        ),
        true_gradient(model),
    ):
        assert torch.allclose(a, b, atol=1e-12)


def test_wake_phase():
    "With `wake` the loss has the gradient of the likelihood for the decoder and of KL(p||q) for the encoder, and the value of the negative ELBO."
    model = small()
    model.wake = 1.0
    q = model.code.log_posterior(model.logits)
    out = dict(
        fit=models.exact(model, torch.zeros(1, 1), None, model.logits, q), kl=model.code.kl(q)
    )
    loss = NegativeELBO()(out)
    g = torch.autograd.grad(loss, [model.logits, model.decoder.f])
    f = model.decoder.f
    log_q = model.code.joint_log_posterior(model.logits)[0]
    wanted = (
        torch.autograd.grad(
            (f.softmax(0).detach() * (f.log_softmax(0).detach() - log_q)).sum(), model.logits
        )[0],
        torch.autograd.grad(-f.logsumexp(0), f)[0],
    )
    for a, b in zip(g, wanted):
        assert torch.allclose(a, b, atol=1e-12)
    assert torch.isclose(loss, -(log_q.exp() * (f - log_q)).sum() + K * math.log(2))


@pytest.mark.parametrize(
    "estimator", ["straight_through", "concrete", "rloo", "disarm", "vimco", "exact", "wake"]
)
def test_reconstruction_reaches_the_encoder(estimator):
    "The gradient of the fit at the encoder's last layer is not zero."
    torch.manual_seed(0)
    model = BernoulliVAE(blocks=4, hidden=16, estimator=estimator, mean=torch.full((64,), 0.3))
    model(torch.rand(20, 64).round(), torch.ones(20, 1, dtype=torch.bool))["fit"].mean().backward()
    assert model.encoder.layers[-1].weight.grad.abs().max() > 1e-6


def test_decided_bits_are_found(refused):
    "An encoder without a gradient from the reconstruction is refused by name."

    class Decided(BernoulliVAE):
        def forward(self, x, mask):
            out = super().forward(x, mask)
            return dict(
                out, fit=-self.decoder.log_likelihood(x, mask, (out["logits"] > 0).float()[None])[0]
            )

    learn = recipe("bars", latent=4, hidden=8, max_epochs=1, cbs=[EncoderGradient()])
    learn.model.__class__ = Decided
    with learn.no_bar(), learn.no_logging():
        assert "a gradient from the reconstruction, found none" in refused(fit, learn)


ARMS = {
    "uncoded": dict(latent=8),
    "repetition": dict(latent=24, ecc_type="repetition", ecc_R=3),
    "(8,4)": dict(latent=16, ecc_type="hamming_8_4"),
    "all words": dict(latent=255, ecc_type="simplex_8", wake=1.0),
    "concrete": dict(latent=8, estimator="concrete"),
    "straight": dict(latent=16, ecc_type="hamming_8_4", estimator="straight_through"),
    "vimco": dict(latent=8, estimator="vimco"),
    "rloo": dict(latent=16, ecc_type="hamming_8_4", estimator="rloo"),
    "noise": dict(latent=8, channel="bsc"),
}


def trained(**more):
    learn = recipe(
        "bars",
        **{
            **dict(
                hidden=32,
                max_epochs=4,
                beta_warmup_epochs=1,
                learning_rate=3e-3,
                batch_size=64,
                subset=1000,
                seed=0,
            ),
            **more,
        },
    )
    with learn.no_bar(), learn.no_logging():
        fit(learn)
    return learn


@pytest.mark.parametrize("name", sorted(ARMS))
def test_bounds_stand_in_order(name):
    "Exact ELBO <= IWAE_k <= exact log likelihood <= truth of the generator, on a trained model of each kind."
    learn = trained(**ARMS[name])
    items, index = learn.sets.items, learn.test
    table = audit_bounds(learn.model, *items.batch(index)[:2])
    assert bound_violations(table) == []
    each = exact_bounds(learn.model, items, index)
    truth = bars_log_likelihood(items.pixels[index])
    assert (each.elbo <= each.log_likelihood + 1e-6).all()
    assert each.log_likelihood.mean() < truth.mean()
    assert latent_usage(learn.model, items, index)["KL"] <= 8 * math.log(2) + 1e-4


def test_independent_copies_fail():
    "Copies that are drawn one by one report more than the log likelihood; valid copies of the same model do not."
    arms = {
        c: trained(
            latent=80,
            ecc_type="repetition",
            ecc_R=10,
            estimator="concrete",
            copies=c,
            max_epochs=15,
            subset=0,
            logit_scale=1.0,
            consistency=0.0,
            seed=1,
        )
        for c in ("independent", "valid")
    }
    broken = {
        c: bound_violations(audit_bounds(a.model, *a.sets.items.batch(a.test)[:2]))
        for c, a in arms.items()
    }
    assert broken["valid"] == []
    assert "reported objective" in broken["independent"][0]


def test_two_copies_are_one_bit():
    "Repetition and the plain model with summed logits are the same family: equal KL and equal bounds."
    torch.manual_seed(0)
    l = torch.randn(5, 12)
    plain = BlockCode(blocks=6)
    two = BlockCode(repetition(2), blocks=6)
    assert torch.allclose(
        two.kl(two.log_posterior(l)),
        plain.kl(plain.log_posterior(l.unflatten(-1, (6, 2)).sum(-1))),
        atol=1e-5,
    )


def test_simplex_posterior_is_any_posterior():
    "Logits of a simplex code can be solved for any posterior over words; those of free bits cannot."
    torch.manual_seed(0)
    code = BlockCode(simplex(4)).double()
    wanted = torch.randn(16, dtype=torch.float64).log_softmax(0)
    l = torch.linalg.lstsq(
        code.codebook - code.codebook.mean(0), (wanted - wanted.mean())[:, None]
    ).solution[:, 0]
    assert torch.allclose(code.log_posterior(l)[0], wanted)


def test_importance_bound_of_many_bits():
    "Without enumeration the bound grows with the samples; drawn words and tables agree where both can be had."
    learn = trained(latent=8)
    x, mask, _ = learn.sets.items.batch(learn.test[:100])
    true = exact_bounds(learn.model, learn.sets.items, learn.test[:100]).log_likelihood.mean()
    assert abs(importance_bound(learn.model, x, mask, 2000).mean() - true) < 0.1
    wide = trained(latent=30)
    a, b = (importance_bound(wide.model, x, mask, k).mean() for k in (1, 50))
    assert a < b


def test_consistency_gradient():
    l = torch.randn(4, 16, requires_grad=True)
    code = BlockCode(hamming_8_4(), blocks=2)
    consistency(code, l).backward()
    assert l.grad.abs().max() > 0
    l = torch.randn(4, 16)
    assert consistency(BlockCode(blocks=16), l).abs() < 1e-6


def test_refusals(refused):
    hamming = BlockCode(hamming_8_4(), blocks=2, name="(8,4)")
    assert "the bits of (8,4) are dependent given x; use rloo" in refused(
        resolve_estimator, "disarm", hamming
    )
    assert "at most 12 information bits with exact, found 13; use disarm" in refused(
        resolve_estimator, "exact", BlockCode(blocks=13)
    )
    assert "1 with vimco" in refused(resolve_estimator, "vimco", hamming, "image", 0.5)
    assert "one of auto" in refused(resolve_estimator, "reinforce", hamming)
    other = BernoulliVAE(generator=hamming_8_4().tolist(), blocks=2)
    wrong = dict(other.state_dict())
    wrong["code.generator"] = 1 - wrong["code.generator"]
    assert "weights: code" in refused(other.load_state_dict, wrong)


def test_paired_difference():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 5, (3, 500))
    d = paired_difference(a + 0.3, a)
    assert d.low < d.value + 1e-9
    assert abs(d.value - 0.3) < 1e-9
    assert d.low > 0.29


def test_raw_bits_and_code_words():
    "By hand, word by word: the nearest code word by correlation, the share of raw words that are one, and both pictures."
    torch.manual_seed(0)
    sets = load_data("bars")
    index = sets.test[:40]
    model = BernoulliVAE(
        "image", (8, 8), 64, hidden=16, generator=hamming_8_4().tolist(), blocks=1, logit_scale=3.0
    ).eval()
    x, mask, _ = sets.items.batch(index)
    book = [
        [int(sum(a * b for a, b in zip(w, c)) % 2) for c in hamming_8_4().T]
        for w in itertools.product((0, 1), repeat=4)
    ]
    same = []
    error = dict(raw=0.0, word=0.0)
    with torch.no_grad():
        for image, l in zip(x, model.encode(x, mask).tolist()):
            raw = [int(v > 0) for v in l]
            word = max(book, key=lambda c: sum(v for v, b in zip(l, c) if b))
            same.append(raw == word)
            for k, c in dict(raw=raw, word=word).items():
                error[k] += (
                    ((model.decoder(torch.tensor([c]).float()).sigmoid()[0] - image) ** 2)
                    .sum()
                    .item()
                )
    found = raw_bit_scores(model, sets.items, index)
    assert found["raw words that are code words"] == pytest.approx(np.mean(same))
    assert found["PSNR raw bits"] == pytest.approx(
        -10 * math.log10(error["raw"] / x.numel()), abs=1e-3
    )
    assert found["PSNR code word"] == pytest.approx(
        -10 * math.log10(error["word"] / x.numel()), abs=1e-3
    )


def test_signal_to_noise():
    "The ratio of squared signal to variance of what a receiver sees, and the share of wrong signs."
    random = torch.Generator().manual_seed(0)
    for p in (0.2, 0.05):
        l = channel_logits(torch.ones(200_000), "awgn", p, random)
        assert 10 * math.log10(l.mean() ** 2 / l.var()) == pytest.approx(float(snr_db(p)), abs=0.05)
        assert (l < 0).float().mean() == pytest.approx(p, rel=0.03)
