"The binary latent space: exact numbers, decoding, training steps, loaders and writing, beside the plain ways."

import itertools
import math
import tempfile
import time

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bench import benchmark
from gcode_ml.binary_vae.codes import SyndromeDecoder, bch, golay_24_12, hamming_8_4, reed_muller
from gcode_ml.binary_vae.data import load_data, simulate
from gcode_ml.binary_vae.models import BernoulliVAE, BlockCode, NegativeELBO, SequenceDecoder
from gcode_ml.binary_vae.recipe import fit, recipe
from gcode_ml.data.batch import BatchLoader, Subset


def model(**more):
    torch.manual_seed(0)
    return BernoulliVAE("image", (28, 28), 784, hidden=256, **{"blocks": 8, **more})


def images(n):
    return torch.rand(n, 784, generator=torch.Generator().manual_seed(0)).round(), torch.ones(
        n, 1, dtype=torch.bool
    )


@benchmark(
    "exact log likelihood of 2,000 images, 256 words",
    "an importance bound of 64 words, one sample of all images after the other",
    1 / 20,
)
def exact_likelihood(quick):
    m = model().eval()
    (x, mask) = images(200 if quick else 2000)

    @torch.no_grad()
    def ours():
        return m.log_likelihood_table(x, mask)[0].logsumexp(-1) - 8 * math.log(2)

    @torch.no_grad()
    def loop():
        q = m.code.log_posterior(m.encode(x, mask))
        total = []
        for _ in range(8 if quick else 64):
            i = m.code.sample(q)
            total.append(
                m.decoder.log_likelihood(x, mask, m.code.codebook[i].flatten(-2))[0]
                - m.code.log_probability(q, i)[0]
            )
        return torch.stack(total).logsumexp(0)

    return ours, loop


@benchmark(
    "log likelihood of all images under all words by one product",
    "two products, with the logarithms of both probabilities",
    1 / 1.3,
)
def one_product(quick):
    (x, _), o = images(200 if quick else 2000), torch.randn(256, 784)
    return (
        lambda: x @ o.T - F.softplus(o).sum(-1),
        lambda: x @ F.logsigmoid(o).T + (1 - x) @ F.logsigmoid(-o).T,
    )


def word_by_word(generator, l):
    "Posterior of each word of each block in plain Python."
    k, n = generator.shape
    columns = generator.T.tolist()

    def code_bit(word, column):
        return sum(a * b for a, b in zip(word, column)) % 2

    words = itertools.product((0, 1), repeat=k)
    book = [[code_bit(w, column) for column in columns] for w in words]
    found = []
    for row in l.tolist():
        for b in range(0, len(row), n):
            s = [sum(x for x, c in zip(row[b : b + n], w) if c) for w in book]
            top = max(s)
            e = [math.exp(v - top) for v in s]
            found.append([v / sum(e) for v in e])
    return found


@benchmark(
    "soft decoding of 512 words of 25 blocks of the (8,4) code",
    "a Python loop over the same blocks and words",
    1 / 100,
)
def soft_blocks(quick):
    code = BlockCode(hamming_8_4(), 25)
    l = torch.randn(16 if quick else 512, 200)
    return lambda: code.bit_probability(code.log_posterior(l)), lambda: word_by_word(
        hamming_8_4(), l
    )


@benchmark(
    "soft decoding of 200 words of the (24,12) Golay code, in one batch",
    "the same words one by one in Python, on the same codebook with NumPy",
    1 / 20,
)
def soft_golay(quick):
    code = BlockCode(golay_24_12())
    l = torch.randn(4 if quick else 200, 24)
    book = code.codebook.numpy().astype(int)
    words = code.words.numpy().astype(int)

    def one(row):
        s = np.array([row[c == 1].sum() for c in book])
        p = np.exp(s - s.max())
        p /= p.sum()
        return p @ words

    return lambda: code.bit_probability(code.log_posterior(l)), lambda: [one(r) for r in l.numpy()]


@benchmark(
    "hard decoding of 2,000 words of BCH(15,7) by a table of syndromes",
    "galois.BCH.decode of the same words, warm",
    1 / 100,
)
def hard_bch(quick):
    decoder = SyndromeDecoder(bch(15, 7))
    import galois

    outer = galois.BCH(15, 7)
    bits = np.random.default_rng(0).integers(0, 2, (200 if quick else 2000, 15), dtype=np.uint8)
    field = galois.GF2(bits)
    outer.decode(field[:10])
    return lambda: decoder(bits), lambda: outer.decode(field)


def step(m, x, mask):
    "One training step as a function."
    optimizer = torch.optim.Adam(m.parameters(), 1e-4)
    loss = NegativeELBO()
    m.train()

    def run():
        optimizer.zero_grad()
        loss(m(x, mask)).backward()
        optimizer.step()

    return run


def steps(quick, ours, other):
    x, mask = images(128)
    one = step(model(**ours), x, mask)
    two = step(model(**other), x, mask)
    times = 1 if quick else 8
    return lambda: [one() for _ in range(times)], lambda: [two() for _ in range(times)]


@benchmark(
    "a training step with the (8,4) code, 16 code bits, straight-through",
    "the same of 8 free bits",
    1.3,
)
def coded_step(quick):
    return steps(
        quick,
        dict(generator=hamming_8_4().tolist(), blocks=2, estimator="straight_through"),
        dict(estimator="straight_through"),
    )


@benchmark(
    "a training step with the code RM(1,7), 128 code bits, exact",
    "the same of 8 free bits, exact",
    1.3,
)
def coded_exact_step(quick):
    return steps(
        quick,
        dict(generator=reed_muller(7).tolist(), blocks=1, estimator="exact"),
        dict(estimator="exact"),
    )


def relative(key, name, goal, **more):
    def f(quick):
        return steps(quick, more, dict(estimator="straight_through"))

    f.__name__ = f"step_{key}"
    benchmark(f"a training step of 8 bits with {name}", "the same with straight-through", goal)(f)


relative("concrete", "binary concrete", 1.3, estimator="concrete")
relative("disarm", "DisARM", 1.5 * 1.3, estimator="disarm")
relative("rloo_2", "RLOO of 2 words", 1.4 * 1.3, estimator="rloo", samples=2)
relative("rloo_4", "RLOO of 4 words", 2.2 * 1.3, estimator="rloo", samples=4)
relative("exact", "all 256 words", 1.4 * 1.3, estimator="exact")


@benchmark("a training step of 12 bits with all 4,096 words", "the same with RLOO of 64 words", 1.0)
def exact_12(quick):
    return steps(
        True, dict(blocks=12, estimator="exact"), dict(blocks=12, estimator="rloo", samples=64)
    )


@benchmark(
    "an epoch of batches of 8,000 images, gathered by indexing",
    "PyTorch's DataLoader, item by item",
    1 / 2,
)
def batches(quick):
    sets = load_data("bars", "full")
    n = 800 if quick else 8000
    ours = BatchLoader(Subset(sets.items, sets.train[:n]), 128, shuffle=True)
    other = DataLoader(TensorDataset(sets.items.batch(sets.train[:n])[0]), 128, shuffle=True)
    return lambda: [x for x, _, _ in ours], lambda: [x for (x,) in other]


def seconds(n):
    "Keep one core busy for so long."
    end = time.process_time() + n
    while time.process_time() < end:
        pass


@benchmark(
    "15 epochs of 10,000 images of 784 pixels on one core: RM(1,7), 8 bits, all words, wake and sleep phase, with callbacks and validation",
    "counting for .6 s; a ratio of 100 is a minute of one core",
    100.0,
    repetitions=1,
)
def fifteen_epochs(quick):
    with tempfile.TemporaryDirectory() as folder:
        sets = load_data(f"fmnist:{simulate(folder, 60 if quick else 6000)}/fmnist")

    def ours():
        learn = recipe(
            sets,
            ecc_type="reed_muller_7",
            latent=128,
            hidden=256,
            estimator="exact",
            wake=1.0,
            sleep=1.0,
            consistency=0.0,
            beta_warmup_epochs=0.0,
            max_epochs=1 if quick else 15,
            learning_rate=2e-3,
            batch_size=16 if quick else 128,
            device="cpu",
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with learn.no_bar(), learn.no_logging():
            fit(learn)
        torch.set_num_threads(threads)

    return ours, lambda: seconds(0.6)


@benchmark(
    "a training step of texts with the (8,4) code, 16 code bits", "the same of 8 free bits", 1.3
)
def coded_text_step(quick):
    torch.manual_seed(0)
    x = torch.randint(3, 40, (64, 30))
    mask = torch.ones(64, 30, dtype=torch.bool)

    def make(**more):
        return BernoulliVAE(
            "tokens",
            (40,),
            40,
            hidden=64 if quick else 192,
            depth=1,
            architecture="gru",
            logit_scale=1.0,
            estimator="straight_through",
            **more,
        )

    one = step(make(generator=hamming_8_4().tolist(), blocks=2), x, mask)
    two = step(make(blocks=8), x, mask)
    times = 1 if quick else 4
    return lambda: [one() for _ in range(times)], lambda: [two() for _ in range(times)]


@benchmark("200 texts written in one batch", "one by one", 1 / 8)
def writing(quick):
    torch.manual_seed(0)
    writer = SequenceDecoder(26, 32, 128).eval()
    codes = torch.randint(0, 2, (20 if quick else 200, 32)).float()
    return lambda: writer.generate(codes, 40), lambda: [writer.generate(c[None], 40) for c in codes]


@benchmark(
    "an epoch on the digits through the recipe, with its callbacks and its validation",
    "the same model in a bare PyTorch loop",
    1.5,
)
def epoch(quick):
    learn = recipe("digits", latent=8, max_epochs=2, beta_warmup_epochs=0)
    m = recipe("digits", latent=8).model
    optimizer = torch.optim.AdamW(m.parameters(), 1e-3)
    loss = NegativeELBO()

    def ours():
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)

    def bare():
        m.train()
        for x, mask, _ in learn.dls.train:
            optimizer.zero_grad()
            loss(m(x, mask)).backward()
            optimizer.step()
        m.eval()
        with torch.no_grad():
            return sum(loss(m(x, mask)).item() for x, mask, _ in learn.dls.valid)

    return ours, bare
