"Decoding: searches against enumeration on toy models; the grammar against the parser and real lines."

import itertools

import numpy as np
import pytest
import torch

from gcode_ml.core.errors import InputError
from gcode_ml.fingerprint.decode import (
    LineGrammar,
    beam,
    filtered,
    greedy,
    line_faults,
    next_token_scores,
    sample,
    write_texts,
)
from gcode_ml.fingerprint.models import GCodeFingerprinter
from gcode_ml.fingerprint.simulate import example_programs
from gcode_ml.fingerprint.tokens import BOS, EOS, PAD, BucketTokenizer, LosslessTokenizer, canonical

CORPUS = [canonical(t) for t in "\n".join(example_programs().values()).splitlines() if canonical(t)]
TOKENIZERS = {
    "lossless": LosslessTokenizer(CORPUS),
    "lossless, usual commands": LosslessTokenizer(),
    "bucket": BucketTokenizer(CORPUS),
    "bucket, literals": BucketTokenizer(CORPUS, digits=1, trailing_dot_literal=True),
}


def toy(size, depth, seed, batch=2):
    "Scores that depend on the whole prefix: one random table per input and prefix."
    table = torch.randn(
        batch, *[size] * (depth + 1), generator=torch.Generator().manual_seed(seed)
    ).double()

    def scores(tokens, rows):
        found = []
        for t, r in zip(tokens.tolist(), rows.tolist()):
            place = (
                ([*t[1:], 0] + [0] * depth)[: depth + 1]
                if len(t) <= depth
                else t[1 : depth + 1] + [0]
            )
            cell = table[(r, *place[:depth])]
            found.append(cell.roll(len(t)))
        return torch.stack(found).log_softmax(-1)

    return scores


def enumerate_lines(scores, size, length, row):
    "Every line with its log-probability: up to EOS or `length` tokens."
    done, open_ = [], [((), 0.0)]
    for i in range(length):
        new = []
        for line, total in open_:
            logp = scores(torch.tensor([[BOS, *line]]), torch.tensor([row]))[0]
            for v in range(size):
                (done if v == EOS or i == length - 1 else new).append(
                    ((*line, v), total + float(logp[v]))
                )
        open_ = new
    return sorted(done, key=lambda x: -x[1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size,length", [(5, 2), (4, 3), (3, 4)])
def test_wide_beam_is_exhaustive(size, length, seed):
    "With as many beams as prefixes (V for two tokens) beam search finds the best lines in order."
    scores = toy(size, length, seed)
    width = size ** (length - 1)
    tokens, total = beam(scores, 2, length, width=width)
    for row in range(2):
        best = enumerate_lines(scores, size, length, row)
        for k in range(3):
            assert abs(float(total[row, k]) - best[k][1]) < 1e-9
            line = best[k][0]
            assert tokens[row, k].tolist() == [*line, *[PAD] * (length - len(line))]


def test_narrow_beam_never_beats_the_best_and_one_beam_is_greedy():
    scores = toy(5, 3, 7)
    best = [enumerate_lines(scores, 5, 3, r)[0][1] for r in range(2)]
    for width in (1, 2, 3):
        tokens, total = beam(scores, 2, 3, width=width)
        assert (total[:, 0].numpy() <= np.array(best) + 1e-9).all()
        if width == 1:
            assert (tokens[:, 0] == greedy(scores, 2, 3)[0]).all()


def test_length_penalty_ranks_by_mean():
    def scores(tokens, rows):
        return (
            torch.tensor([[-9.0, -9.0, -0.6, -0.8, -9.0]]).log_softmax(-1).expand(len(tokens), -1)
        )

    by_sum, by_mean = (
        beam(scores, 1, 4, width=25, length_penalty=p)[0][0, 0].tolist() for p in (0.0, 2.0)
    )
    assert by_sum == [EOS, 0, 0, 0]
    assert by_mean[0] == 3


def test_sampling_has_the_distribution_of_the_filter():
    "Frequencies of 20000 samples follow `filtered`, and p = 1 is plain sampling, token by token."
    logits = torch.tensor([0.0, 0.5, -1.0, 1.0, 2.0])

    def scores(tokens, rows):
        return logits.log_softmax(-1).expand(len(tokens), -1)

    for options in (
        dict(),
        dict(temperature=0.5),
        dict(top_k=2),
        dict(top_p=0.7),
        dict(temperature=2.0, top_k=4, top_p=0.9),
    ):
        sampled = sample(scores, 20000, 1, seed=0, **options)[0][:, 0]
        frequency = torch.bincount(sampled, minlength=5) / 20000
        assert (frequency - filtered(logits.log_softmax(-1), **options).exp()).abs().max() < 0.015
    assert (sample(scores, 500, 6, top_p=1.0, seed=4)[0] == sample(scores, 500, 6, seed=4)[0]).all()


def test_nucleus_is_the_smallest_set():
    "Compared with the definition on random distributions."
    random = np.random.default_rng(0)
    for _ in range(50):
        p = random.dirichlet(np.ones(7) * 0.5)
        top = random.uniform(0.05, 0.99)
        order = np.argsort(-p)
        kept = order[: np.searchsorted(p[order].cumsum(), top) + 1]
        found = filtered(torch.tensor(p).log(), top_p=float(top)).exp().numpy()
        assert set(np.flatnonzero(found)) == set(kept)
        assert np.allclose(found[kept], p[kept] / p[kept].sum())


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [3, 4, 6, 9, 20])
def test_random_legal_lines_are_accepted_by_the_parser(name, length):
    "With uniform scores only the grammar decides: every line ends in time and has no faults."
    tokenizer = TOKENIZERS[name]
    grammar = LineGrammar(tokenizer)

    def scores(tokens, rows):
        return torch.zeros(len(tokens), len(tokenizer)).log_softmax(-1)

    tokens = sample(scores, 40, length, seed=length, grammar=grammar)[0].numpy()
    assert (tokens == EOS).sum(1).min() == 1
    for text, ids in zip(tokenizer.decode_batch(tokens), tokens.tolist()):
        assert line_faults(text) == [], text
        assert grammar.accepts(ids), text


def test_constrained_beam_and_greedy_are_legal_for_any_scores():
    tokenizer = TOKENIZERS["lossless"]
    grammar = LineGrammar(tokenizer)
    table = torch.randn(40, len(tokenizer), generator=torch.Generator().manual_seed(0)) * 4

    def scores(tokens, rows):
        return table[(tokens.sum(1) + rows) % 40].log_softmax(-1)

    lines = torch.cat(
        [
            beam(scores, 10, 10, width=3, grammar=grammar)[0].flatten(0, 1),
            greedy(scores, 10, 10, grammar)[0],
        ]
    )
    assert all(line_faults(t) == [] for t in tokenizer.decode_batch(lines.numpy()))


def test_grammar_is_complete_on_short_lines():
    "For lines of up to three tokens the grammar accepts exactly those that the parser and the rules accept."
    tokenizer = LosslessTokenizer(
        tokens=[
            "PAD",
            "BOS",
            "EOS",
            "UNK",
            "MASK",
            "G1",
            "G2",
            "M3",
            "X",
            "F",
            "-",
            ".",
            *"0123456789",
        ]
    )
    grammar = LineGrammar(tokenizer)
    names = tokenizer.tokens
    for n in (1, 2, 3):
        for ids in itertools.product(range(5, 13), repeat=n):
            text = tokenizer.decode(list(ids))
            words = text.split()
            letters = [w for w in words if w[0] in "XF"]
            commands = [w for w in words if w[0] in "GM"]
            sane = (
                not line_faults(text)
                and words == commands + letters
                and "G2" not in words
                and not any(w.startswith("F-") for w in words)
                and tokenizer.encode(text)[:-1] == list(ids)
            )
            assert grammar.accepts([*ids, EOS]) == sane, (text, [names[i] for i in ids])


def test_bad_parameters_are_refused():
    grammar = LineGrammar(TOKENIZERS["lossless"])

    def scores(tokens, rows):
        return torch.zeros(len(tokens), len(TOKENIZERS["lossless"])).log_softmax(-1)

    for call in (
        lambda: beam(scores, 1, 4, width=0),
        lambda: filtered(torch.zeros(3), top_p=0.0),
        lambda: filtered(torch.zeros(3), top_k=-1),
        lambda: greedy(scores, 1, 1, grammar),
        lambda: LineGrammar(LosslessTokenizer(tokens=["PAD", "BOS", "EOS", "UNK", "MASK"])),
    ):
        with pytest.raises(InputError):
            call()


def test_greedy_equals_write_lines_and_cold_sampling():
    torch.manual_seed(1)
    tokenizer = TOKENIZERS["lossless"]
    model = GCodeFingerprinter(
        [[0, 1], [2, 3]],
        tokenizer.parts.tolist(),
        3,
        d_model=16,
        nhead=2,
        num_layers=1,
        encoder_layers=1,
        dim_feedforward=16,
    ).eval()
    inputs = dict(sensors=torch.randn(20, 8, 4), present=torch.ones(20, 8, 4, dtype=torch.bool))
    mask = torch.ones(20, 8, dtype=torch.bool)
    mask[3:, 5:] = False
    assert (
        greedy(next_token_scores(model, inputs, mask), 20, 14)[0]
        == model.write_lines(inputs, mask, 14)
    ).all()
    sharp, _ = write_texts(
        model,
        inputs,
        mask,
        tokenizer,
        14,
        "sample",
        temperatures=dict(type=1e-3, command=1e-3, param_type=1e-3, param_val=1e-3),
    )
    best, _ = write_texts(model, inputs, mask, tokenizer, 14)
    assert sharp == best
