"Codes: structure, decoding by exhaustion, and error rates against closed forms."

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from gcode_ml.binary_vae.codes import (
    CODES,
    LATENT_SIZES,
    SyndromeDecoder,
    bch,
    channel_logits,
    check_generator,
    coset_leaders,
    create_code,
    direct_sum,
    error_probability,
    golay_23_12,
    golay_24_12,
    hamming_7_4,
    hamming_8_4,
    named_generator,
    parity,
    parity_check,
    plotkin,
    random_code,
    random_coding_bound,
    rank,
    read_generator,
    reed_muller,
    repetition,
    simplex,
    soft_word_error,
    weight_distribution,
)
from gcode_ml.binary_vae.models import BlockCode, all_words

P = np.array([0.01, 0.02, 0.055, 0.1])
Q = 1 - P
SMALL = {
    "R=3": repetition(3),
    "parity(5)": parity(5),
    "(7,4)": hamming_7_4(),
    "(8,4)": hamming_8_4(),
    "RM(1,3)": reed_muller(3),
    "simplex(3)": simplex(3),
    "random": random_code(4, 9, 5),
    "sum": direct_sum(parity(3), repetition(3)),
}


def polynomial(coefficients, n, start=0):
    return sum(a * P**w * Q ** (n - w) for w, a in enumerate(coefficients, start))


def test_weights():
    "Distances and weights that every textbook prints."
    assert weight_distribution(hamming_7_4()) == {3: 7, 4: 7, 7: 1}
    assert weight_distribution(hamming_8_4()) == {4: 14, 8: 1}
    assert weight_distribution(golay_24_12()) == {8: 759, 12: 2576, 16: 759, 24: 1}
    assert weight_distribution(reed_muller(4)) == {8: 30, 16: 1}
    assert weight_distribution(simplex(5)) == {16: 31}
    assert weight_distribution(parity(6)) == {2: 15, 4: 15, 6: 1}
    for g in (hamming_8_4(), golay_24_12()):
        assert not (g @ g.T % 2).any()


@pytest.mark.parametrize("name", sorted(SMALL))
def test_parity_checks(name):
    "The checks are zero on all code words, and on nothing else."
    g = SMALL[name]
    h = parity_check(g)
    n = g.shape[1]
    every = all_words(n).numpy().astype(int)
    inside = {tuple(c) for c in BlockCode(g).codebook.int().tolist()}
    assert {tuple(c) for c in every[~(every @ h.T % 2).any(1)]} == inside
    assert rank(g) == len(g)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_posterior_by_enumeration(name):
    "Marginals, KL and the decision agree with a plain loop over code words, two blocks side by side."
    torch.manual_seed(0)
    g = SMALL[name]
    code = BlockCode(g, blocks=2)
    l = torch.randn(3, code.code_bits, dtype=torch.float64)
    code = code.double()
    q = code.log_posterior(l)
    words = np.array(list(itertools.product((0, 1), repeat=code.k)))
    book = words @ g % 2
    for b in range(3):
        for block in range(2):
            lb = l[b].numpy().reshape(2, -1)[block]
            weight = np.array(
                [
                    np.prod(
                        [1 / (1 + np.exp(-x)) if c else 1 / (1 + np.exp(x)) for x, c in zip(lb, w)]
                    )
                    for w in book
                ]
            )
            weight /= weight.sum()
            assert np.allclose(q[b, block].exp(), weight)
            assert np.isclose(
                code.kl(q)[b, block].item(), (weight * np.log(weight * 2**code.k)).sum()
            )
            assert np.allclose(code.bit_probability(q)[b].reshape(2, -1)[block], weight @ words)
            assert np.allclose(
                code.bit_probability(q, True)[b].reshape(2, -1)[block], weight @ book
            )
            assert (code.decode(l)[b].reshape(2, -1)[block].numpy() == words[weight.argmax()]).all()


@pytest.mark.parametrize("name", ["R=3", "(7,4)", "(8,4)", "RM(1,3)", "random"])
def test_law_by_exhaustion(name):
    "The counted polynomials are those of trying every error, with ties shared out."
    g = SMALL[name]
    k, n = g.shape
    book = BlockCode(g).codebook.numpy()
    words = all_words(k).numpy()
    law = error_probability(g)
    correct = np.zeros(n + 1)
    wrong = np.zeros(n + 1)
    for e in all_words(n).numpy():
        distance = (book != e).sum(1)
        nearest = np.flatnonzero(distance == distance.min())  # the zero word was sent
        correct[int(e.sum())] += (0 in nearest) / len(nearest)
        wrong[int(e.sum())] += words[nearest].mean()
    assert np.allclose(law.correct, correct)
    assert np.allclose(law.wrong, wrong)


def test_closed_forms():
    "Laws that are printed somewhere."
    assert np.allclose(error_probability(hamming_7_4()).word_error(P), 1 - Q**7 - 7 * P * Q**6)
    assert np.allclose(
        error_probability(hamming_7_4()).bit_error(P), polynomial([9, 19, 16, 12, 7, 1], 7, 2)
    )
    assert np.allclose(
        error_probability(hamming_8_4()).bit_error(P),
        polynomial([0, 0, 10.5, 28, 35, 28, 17.5, 8, 1], 8),
    )
    assert np.allclose(
        error_probability(hamming_8_4()).word_error(P),
        error_probability(hamming_7_4()).word_error(P),
    )  # a parity bit gains nothing
    for R in (2, 3, 4, 5, 10):  # an even number of copies is as good as one less
        assert np.allclose(
            error_probability(repetition(R)).bit_error(P),
            stats.binom.sf((R - 1) // 2 if R % 2 else (R - 2) // 2, R - 1 + R % 2, P),
        )
    n = 6
    assert np.allclose(
        error_probability(parity(n)).bit_error(P),
        P + ((1 - (1 - 2 * P) ** n) / 2 - P * (1 + (1 - 2 * P) ** (n - 1))) / n,
    )
    assert np.allclose(
        error_probability(reed_muller(4)).correct[:7], [1, 16, 120, 560, 875, 448, 28]
    )
    assert np.allclose(error_probability(repetition(2)).word_error(P), P)


def test_golay():
    "All cosets of the Golay codes."
    law = error_probability(golay_23_12())
    assert np.allclose(law.correct[:5], [1, 23, 253, 1771, 0])
    assert np.allclose(
        law.wrong[4:] * 1.0,
        [
            2695,
            11473,
            31339,
            84029,
            188848,
            341440,
            519288,
            657944,
            694134,
            624778,
            475750,
            301466,
            161128,
            69608,
            22176,
            6160,
            1771,
            253,
            23,
            1,
        ],
    )
    errors, syndromes = coset_leaders(golay_24_12())
    weight = np.bitwise_count(errors)
    assert len(np.unique(syndromes)) == 4096
    assert weight.max() == 4
    assert [(weight == w).sum() for w in range(5)] == [1, 24, 276, 2024, 1771 * 6]
    words = all_words(12).numpy().astype(np.uint8)
    sent = words @ golay_23_12() % 2
    for _ in range(3):
        sent[np.arange(4096), np.random.default_rng(_).integers(0, 23, 4096)] ^= (
            1  # at most three errors
        )
    assert (SyndromeDecoder(golay_23_12())(sent) == words).all()


@pytest.mark.parametrize("name", ["R=2", "R=3", "(7,4)", "(8,4)", "golay"])
def test_decoder_obeys_its_law(name):
    "Monte Carlo within four standard errors of word and bit error law, hard and soft."
    g = dict(SMALL, **{"R=2": repetition(2), "golay": golay_24_12()})[name]
    code = BlockCode(g)
    torch.manual_seed(1)
    n, p = 6000, 0.055
    words = torch.randint(0, 2, (n, code.k)).float()
    law = error_probability(g)
    for logits in (channel_logits(code.encode(words), "bsc", p),):
        wrong = (code.decode(logits) != words).numpy()
        true = law.word_error(p)
        assert abs(wrong.any(1).mean() - true) < 4 * np.sqrt(true / n) + 1e-9
        assert abs(wrong.mean() - law.bit_error(p)) < 4 * wrong.mean(1).std() / np.sqrt(n) + 1e-9
    soft = (
        (code.decode(channel_logits(code.encode(words), "awgn", p)) != words)
        .any(1)
        .float()
        .mean()
        .item()
    )
    bound, kind = soft_word_error(g, p)
    assert soft < bound[0] + 4 * np.sqrt(bound[0] / n) + 1e-9
    assert kind != "exact" or soft > bound[0] - 4 * np.sqrt(bound[0] / n) - 1e-9


def test_soft_is_hard_over_a_symmetric_channel():
    "All reliabilities alike: soft and hard decisions of the same word agree where there is no tie."
    torch.manual_seed(0)
    code = BlockCode(hamming_7_4(), blocks=5)
    words = torch.randint(0, 2, (500, 20)).float()
    logits = channel_logits(code.encode(words), "bsc", 0.1)
    assert torch.equal(code.decode(logits), code.decode(logits, hard=True))
    assert torch.equal(
        code.decode(logits),
        torch.tensor(
            SyndromeDecoder(hamming_7_4())((logits > 0).int().numpy().reshape(-1, 7)).reshape(
                500, 20
            )
        ).float(),
    )


def test_ties():
    "Fair ties are fair on zeros and ones alike; the two fixed rules are an OR and an AND."
    torch.manual_seed(0)
    two = BlockCode(repetition(2))
    tie = torch.tensor([[1.0, -1.0]]).expand(4000, 2)
    assert abs(two.decode(tie).mean() - 0.5) < 0.04
    assert two.decode(tie, tie="one").all()
    assert not two.decode(tie, tie="zero").any()


def test_bounds():
    assert random_coding_bound(12, 24, 0.055) > error_probability(golay_24_12()).word_error(0.055)
    assert soft_word_error(repetition(4), P)[0].max() < P.max()


def test_bch():
    "BCH(15,7) of the package galois corrects two errors."
    pytest.importorskip("galois")
    g = bch(15, 7)
    words = all_words(7).numpy().astype(np.uint8)
    sent = words @ g % 2
    rng = np.random.default_rng(0)
    for row in sent:
        row[rng.choice(15, 2, replace=False)] ^= 1
    assert min(weight_distribution(g)) == 5
    assert (SyndromeDecoder(g)(sent) == words).all()


def test_compatibility_table():
    "Which parameter set takes which code."

    def fits(name, R=1):
        return [l % named_generator(name, R).shape[1] == 0 for l in LATENT_SIZES]

    assert fits("repetition", 2) == [True] * 8
    assert fits("repetition", 3) == [False] * 5 + [
        True,
        False,
        True,
    ]
    assert fits("hamming_8_4") == [l % 8 == 0 for l in LATENT_SIZES]
    assert not any(fits("hamming_7_4") + fits("golay_24_12") + fits("reed_muller_4"))


def test_refusals(refused, tmp_path):
    "Every fault of a code is one sentence."
    assert (
        refused(create_code, "repetition", 100, 3)
        == "parameter: latent: expected a size that is divisible by ecc_R=3, found 100; use 99 or 102, or parameter_set 5 or 7."
    )
    assert "the 7 code bits of hamming_7_4, found 100; use 98 or 105" in refused(
        create_code, "hamming_7_4", 100
    )
    assert "one of hamming_8_4" in refused(create_code, "hamming_84", 8)
    assert "an integer of at least 1, found 0" in refused(named_generator, "repetition", 0)
    assert "rank: expected 3, the number of rows, found 2" in refused(
        check_generator, [[1, 1, 0], [0, 1, 1], [1, 0, 1]]
    )
    assert "at most 12 information bits per block, found 13" in refused(check_generator, np.eye(13))
    for text, sentence in {
        "": "rows and columns",
        "1 2\n": "row 1, column 2: expected 0 or 1, found '2'",
        "11\n1\n": "row 2: expected 2 entries as in row 1, found 1",
    }.items():
        (tmp_path / "g.txt").write_text(text)
        assert sentence in refused(read_generator, tmp_path / "g.txt")
    (tmp_path / "g.npy").write_bytes(b"no array")
    assert "g.npy" in refused(read_generator, tmp_path / "g.npy")
    np.save(tmp_path / "o.npy", np.array([[1, None]], dtype=object))
    assert "o.npy" in refused(read_generator, tmp_path / "o.npy")
    assert "channel_rate: expected 0 to 0.5, found 0.7" in refused(
        channel_logits, torch.zeros(1), "bsc", 0.7
    )
    for name in CODES:
        if name != "bch_15_7":
            check_generator(named_generator(name))
    assert (plotkin(parity(4), repetition(4)).shape, rank(plotkin(parity(4), repetition(4)))) == (
        (4, 8),
        4,
    )
