"Texts of a binary latent space: exact bounds, the control that sees no word, n-grams by hand, molecules written anew, programs, classic files, and refusals before a run."

import gzip
import itertools
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gcode_ml.binary_vae.augment import SmilesAugment
from gcode_ml.binary_vae.data import (
    Images,
    Texts,
    check,
    load_data,
    read_idx,
    simulate,
    smiles_tokens,
)
from gcode_ml.binary_vae.evaluate import (
    audit_bounds,
    bound_violations,
    exact_bounds,
    loop_scores,
    raw_bit_scores,
    score_model,
    texts_over_channel,
    word_ablation,
)
from gcode_ml.binary_vae.models import BernoulliVAE
from gcode_ml.binary_vae.ngram import WittenBell
from gcode_ml.binary_vae.recipe import check_parameters, fit, recipe

needs_rdkit = pytest.mark.skipif(
    find_spec("rdkit") is None, reason="not installed: rdkit (pip install 'gcode_ml[chem]')"
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("sets"), rows=80)


SMALL = dict(
    latent=4,
    hidden=16,
    depth=1,
    logit_scale=1.0,
    token_dropout=0.0,
    beta_warmup_epochs=0,
    consistency=0.0,
    batch_size=32,
    max_epochs=4,
    learning_rate=1e-2,
    seed=1,
)


@pytest.fixture(scope="module")
def trained(sets):
    learn = recipe(f"gcode:{sets}/gcode", **{**SMALL, "free_bits": 0.2})
    with learn.no_bar(), learn.no_logging():
        fit(learn)
    return learn


def test_bounds_of_texts(trained):
    "ELBO, importance bounds and likelihood by all words stand in their order on a trained model of texts; every word's likelihood is the sum over its tokens."
    model = trained.model.eval()
    items = trained.sets.items
    x, mask, _ = items.batch(trained.test[:20])
    assert bound_violations(audit_bounds(model, x, mask)) == []
    ll, _ = model.log_likelihood_table(x, mask)
    code = model.code.joint_codebook()[5]
    logits, _ = model.decoder(code.expand(len(x), -1), torch.nn.functional.pad(x, (1, -1), value=1))
    by_hand = torch.stack(
        [
            sum(logits[i, t].log_softmax(-1)[x[i, t]] for t in range(int(mask[i].sum())))
            for i in range(len(x))
        ]
    )
    assert torch.allclose(ll[:, 5], by_hand, atol=1e-3)


def test_blind_decoder_is_a_language_model(sets):
    "No divergence, the same likelihood under every word, and it learns."
    learn = recipe(f"gcode:{sets}/gcode", **SMALL, blind=True)
    model = learn.model.eval()
    items = learn.sets.items
    before = learn.validate()[0]
    with learn.no_bar(), learn.no_logging():
        fit(learn)
    model.eval()
    x, mask, _ = items.batch(learn.test[:10])
    out = model(x, mask)
    ll, _ = model.log_likelihood_table(x, mask)
    assert out["kl"].abs().max() < 1e-6
    assert torch.allclose(ll, ll[:, :1].expand_as(ll), atol=1e-4)
    assert learn.validate()[0] < before - 1
    exact = exact_bounds(model, items, learn.test[:10])
    assert np.allclose(exact.elbo, exact.log_likelihood, atol=1e-3)
    assert set(word_ablation(model, items, learn.test[:10]).values()) == {0.0}
    assert "nats a token" in set(score_model(model, items, learn.test[:10], samples=1).measure)


def test_word_and_channel(trained):
    "A channel without noise changes nothing; words that are drawn anew at every bit cost what a random word costs, within sampling."
    model = trained.model.eval()
    items = trained.sets.items
    index = trained.test
    t = texts_over_channel(model, items, index, (0.0, 0.5))
    assert t.BER[0] == 0
    assert abs(t.BER[1] - 0.5) < 0.1
    raw = raw_bit_scores(model, items, index)
    assert raw["raw words that are code words"] == 1
    assert (
        raw["nats a token, raw bits"]
        == pytest.approx(t["nats a token"][0], rel=1e-5)
        == pytest.approx(raw["nats a token, code word"], rel=1e-5)
    )
    loop = loop_scores(model, 200)
    assert loop["wrong"].shape == (200, 4)
    assert 0 <= loop["wrong"].mean() <= 1


def brute(rows, context, width, before, token):
    "Witten and Bell by dictionaries."
    p = 1 / (width - 2)
    for n in range(context + 1):
        follow = {}
        for row in rows:
            padded = [1] * context + [t for t in row if t]
            for i in range(context, len(padded)):
                follow.setdefault(tuple(padded[i - n : i]), []).append(padded[i])
        seen = follow.get(tuple(before[len(before) - n :]), [])
        if seen:
            kinds = len(set(seen))
            p = (seen.count(token) + kinds * p) / (len(seen) + kinds)
    return p


@pytest.mark.parametrize("context", [0, 1, 3])
def test_ngram_by_hand(context):
    rng = np.random.default_rng(0)
    width = 6
    rows = np.zeros((12, 9), np.int64)
    for r in rows:
        n = rng.integers(1, 8)
        r[:n] = rng.integers(3, width, n)
        r[n] = 2
    model = WittenBell(rows, width, context)
    for before in itertools.islice(itertools.product((1, 3, 4, 5), repeat=context), 30):
        found = model.probability(
            np.tile(np.array(before, np.int64).reshape(1, context), (4, 1)), np.array([2, 3, 4, 5])
        )
        assert np.allclose(
            found, [brute(rows.tolist(), context, width, list(before), t) for t in (2, 3, 4, 5)]
        )


def test_ngram_draws_its_probabilities():
    rows = np.array([[3, 4, 2], [3, 3, 2], [4, 3, 2], [3, 4, 2]])
    model = WittenBell(rows, 5, 2)
    drawn = model.sample(20_000, 6, 1)
    p = model.probability(np.array([[1, 3]] * 3), np.array([2, 3, 4]))
    second = drawn[drawn[:, 0] == 3, 1]
    found = np.bincount(second, minlength=5)[2:] / len(second)
    assert np.all(abs(found - p) < 4 * np.sqrt(p * (1 - p) / len(second)) + 1e-9)


@needs_rdkit
def test_molecules_stay_the_same(sets):
    "What `SmilesAugment` writes is the same molecule, known tokens, not too long; without a share nothing changes; the fit runs with it."
    from gcode_ml.binary_vae.properties import canonical_smiles

    items = load_data(f"smiles:{sets}/molecules", "full").items
    x, mask, _ = items.batch(np.arange(40))
    callback = SmilesAugment(items, 1.0)
    callback.learn = SimpleNamespace(xb=(x, mask))
    torch.manual_seed(0)
    callback.before_batch()
    new, m = callback.learn.xb
    assert canonical_smiles(items.decode(new)) == canonical_smiles(items.decode(x))
    assert items.decode(new) != items.decode(x)
    assert torch.equal(m, new != 0)
    learn = recipe(f"smiles:{sets}/molecules", **{**SMALL, "max_epochs": 1}, randomise=0.5)
    with learn.no_bar(), learn.no_logging():
        fit(learn)


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_programs_of_images(architecture):
    "Encoder and decoder as TorchScript and torch.export programs, at a second batch; words come in as whole numbers and leave as the code's words."
    from gcode_ml.lab.export import compare_program, eager_programs, make_programs, read_program

    torch.manual_seed(0)
    model = BernoulliVAE(
        generator=[
            [1, 0, 0, 0, 1, 1, 0],
            [0, 1, 0, 0, 1, 0, 1],
            [0, 0, 1, 0, 0, 1, 1],
            [0, 0, 0, 1, 1, 1, 1],
        ],
        blocks=2,
        hidden=8,
        architecture=architecture,
        estimator="rloo",
    ).eval()
    programs = eager_programs(model)
    assert set(programs) == {"read", "picture"}
    for method, eager in programs.items():
        for kind in ("exported", "torchscript"):
            found = compare_program(
                eager,
                read_program(
                    make_programs(model, method, kind)[kind],
                    kind,
                    eager.inputs,
                    eager.outputs,
                    trusted=True,
                ),
            )
            assert found["within"], (method, kind, found)
    words = torch.randint(0, 2, (5, 8))
    assert torch.equal(model.code.encode_integers(words), model.code.encode(words.float()))


def test_refused_before_a_run(command, tmp_path, monkeypatch):
    "A code that does not fill the latent space, a code for the wrong number of bits, data that is not there: one sentence, no kernel, no folder."
    from gcode_ml.lab import experiment

    monkeypatch.setattr(experiment, "execute", lambda *a, **k: pytest.fail("a kernel was started"))
    cases = {
        (
            "binary_vae",
            "ecc_type=repetition",
            "ecc_R=3",
        ): "latent: expected a size that is divisible by ecc_R=3, found 100; use 99 or 102, or parameter_set 5 or 7",
        (
            "binary_vae",
            "ecc_type=golay_24_12",
        ): "latent: expected a size that is divisible by the 24 code bits of golay_24_12, found 100; use 96 or 120",
        (
            "compare_ecc",
            "information_bits=6",
            "ecc_type=hamming_8_4",
            "ecc_R=1",
        ): "information_bits: expected a number that is divisible by the 4 information bits of hamming_8_4, found 6; use 4 or 8",
        (
            "binary_vae",
            "data=fmnist",
        ): "fmnist with its folder fmnist below the root of the data, found no such folder",
        ("binary_vae", "estimator=exact"): "at most 12 information bits with exact, found 100",
        ("binary_vae", "data=digit"): "data: expected one of digits",
        ("binary_vae", "subset=8"): "at least one batch of 32",
        ("binary_vae", "randomise=.5"): "only molecules can be written in another order",
        ("binary_vae", "architecture=gru"): "architecture: expected one of auto, mlp, conv",
        ("compare_ecc", "ecc_type=golay"): "ecc_type: expected one of golay",
    }
    for (name, *given), sentence in cases.items():
        code, out, err = command(
            "run", name, *(w for g in given for w in ("-p", g)), "--name", "never"
        )
        assert code == 2 and sentence in err and err.count("\n") == 1, (given, err)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("never"))


def molecules(folder, text):
    for f in ("moses_train_50k", "moses_test_10k", "moses_scaffold_5k"):
        (folder / f"{f}.csv.gz").write_bytes(
            gzip.compress((text if f == "moses_train_50k" else "smiles\nCCO\n").encode())
        )


BAD_FILES = {
    "truncated gzip": (
        lambda d: (d / "x.gz").write_bytes(gzip.compress(b"\0\0\x08\1\0\0\0\5abcde")[:-4]),
        lambda d: read_idx(d / "x.gz"),
        "x.gz: content: expected a whole gzip file",
    ),
    "wrong magic": (
        lambda d: (d / "x.gz").write_bytes(gzip.compress(b"\1\0\x08\1\0\0\0\5abcde")),
        lambda d: read_idx(d / "x.gz"),
        "x.gz: magic number: expected 0x0000 08 (bytes), found 01000801",
    ),
    "fewer bytes than the header tells": (
        lambda d: (d / "x.gz").write_bytes(gzip.compress(b"\0\0\x08\1\0\0\0\5abc")),
        lambda d: read_idx(d / "x.gz"),
        "expected 5 bytes, as the header tells, found 3",
    ),
    "packed width": (
        lambda d: np.savez(
            d / "binarized_mnist_packed.npz",
            train=np.zeros((4, 97), np.uint8),
            valid=np.zeros((4, 98), np.uint8),
            test=np.zeros((4, 98), np.uint8),
        ),
        lambda d: load_data(f"bmnist:{d}"),
        "train: expected [N,98] packed bytes, found [4, 97]",
    ),
    "no column of molecules": (
        lambda d: molecules(d, "smile\nCCO\n"),
        lambda d: load_data(f"smiles:{d}", "full"),
        "columns: expected smiles",
    ),
    "an empty row": (
        lambda d: molecules(d, "smiles,qed\nCCO,1\n,2\n"),
        lambda d: load_data(f"smiles:{d}", "full"),
        "line 3: expected a molecule, found nothing",
    ),
    "a table that is no gzip": (
        lambda d: (molecules(d, "smiles\nC\n"), (d / "moses_train_50k.csv.gz").write_bytes(b"no")),
        lambda d: load_data(f"smiles:{d}", "full"),
        "expected a gzipped CSV table",
    ),
    "no programs": (
        lambda d: None,
        lambda d: load_data(f"gcode:{d}"),
        "expected programs (.gcode, .ngc, .nc), found none",
    ),
    "an unknown token": (
        lambda d: None,
        lambda d: Texts(
            ["CCO", "CC[Si]"], ["", "<start>", "<end>", "C", "O"], smiles_tokens, file="x.smi"
        ),
        "x.smi: line 2: expected a token of the vocabulary, found '[Si]'",
    ),
    "too many tokens": (
        lambda d: None,
        lambda d: Texts(["CCCC"], ["", "<start>", "<end>", "C"], smiles_tokens, 4, "x.smi"),
        "x.smi: line 1: expected at most 3 tokens, found 4",
    ),
    "a pixel of 1.5": (
        lambda d: None,
        lambda d: Images(np.full((1, 4), 1.5), (2, 2), "x.npy"),
        "x.npy: pixel 0 of image 0: expected a number from 0 to 1, found 1.5",
    ),
    "a pixel that is no number": (
        lambda d: None,
        lambda d: Images(np.full((1, 4), np.nan), (2, 2), "x.npy"),
        "found nan",
    ),
    "more words than can be counted": (
        lambda d: None,
        lambda d: exact_bounds(BernoulliVAE(blocks=13, estimator="rloo"), None, [0]),
        "at most 12 information bits, found 13",
    ),
    "a share above one": (
        lambda d: None,
        lambda d: check_parameters(f"smiles:{d}", randomise=1.5),
        "randomise: expected 0 to 1, found 1.5",
    ),
    "a matrix without full rank": (
        lambda d: (d / "g.csv").write_text("1,0,1\n1,0,1\n"),
        lambda d: check_parameters(latent=6, ecc_type="matrix", generator=str(d / "g.csv")),
        "rank",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_FILES))
def test_bad_files(case, refused, tmp_path):
    make, use, sentence = BAD_FILES[case]
    make(tmp_path)
    found = refused(use, tmp_path)
    assert sentence in found
    assert "\n" not in found


def test_real_molecules_are_read():
    "The real files, where they are: sizes, vocabulary, no unknown token, nothing shared."
    from gcode_ml.lab.settings import data_folder

    if not data_folder("molecules"):
        pytest.skip("no folder molecules")
    s = load_data(f"smiles:{data_folder('molecules')}", "full")
    assert [len(p) for p in (s.train, s.valid, s.test, s.extra_tests["scaffold"])] == [
        45_000,
        5_000,
        10_000,
        5_000,
    ]
    assert len(s.items.vocabulary) == 26
    assert s.items.lengths.max() == 51
    assert check(f"smiles:{data_folder('molecules')}") == []
