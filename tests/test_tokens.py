"The two tokenizers: exact properties, vocabulary files, bad input."

import itertools
import json

import numpy as np
import pytest

from gcode_ml.core.errors import InputError
from gcode_ml.fingerprint.tokens import (
    BOS,
    EOS,
    MASK,
    PAD,
    UNK,
    BucketTokenizer,
    LosslessTokenizer,
    Tokenizer,
    canonical,
    special_tokens,
    tokenizer,
    tokenizer_from_json,
)


def random_lines(n, seed=0):
    "Lines of random words, with numbers in every spelling of G-code."
    rng = np.random.default_rng(seed)

    def number():
        whole = str(rng.integers(0, 200))
        part = "".join(map(str, rng.integers(0, 10, rng.integers(0, 5))))
        text = rng.choice([whole, f"{whole}.", f"{whole}.{part}", f".{part or 0}"])
        return rng.choice(["", "", "-", "+"]) + text

    def line():
        command = (
            [rng.choice(["G0", "G1", "G2", "G3", "G53", "M30", "G38.2"])]
            if rng.random() < 0.4
            else []
        )
        letters = rng.choice(list("XYZRFIJKESP"), rng.integers(1 - len(command), 5), replace=False)
        return " ".join([*command, *(f"{letter}{number()}" for letter in letters)])

    return [line() for _ in range(n)]


@pytest.fixture(scope="module")
def lines():
    return random_lines(1000)


def all_tokenizers(lines):
    return [
        LosslessTokenizer(),
        LosslessTokenizer(lines),
        *(
            BucketTokenizer(lines, digits=d, trailing_dot_literal=t)
            for d in (1, 2, 4, None)
            for t in (False, True)
        ),
    ]


@pytest.mark.parametrize(
    "letter,value,digits,leading",
    [
        ("X", 1.575, 2, "15"),
        ("X", 0.157, 2, "15"),
        ("X", 0.015, 2, "15"),
        ("X", 0.005, 2, "05"),
        ("X", 0.0, 2, "00"),
        ("X", -0.0004, 2, "00"),
        ("X", -0.125, 2, "-1"),
        ("Y", -0.005, 2, "-5"),
        ("Z", -1.9, 2, "-1"),
        ("X", 1.575, 1, "1"),
        ("X", -1.575, 1, "-"),
        ("X", 1.575, 4, "1575"),
        ("X", 0.157, 4, "0157"),
        ("X", -1.575, 4, "-157"),
        ("X", -0.005, 4, "-005"),
        ("R", 0.0742, 2, "74"),
        ("I", 1.0, 2, "10"),
        ("E", 0.00012, 2, "01"),
        ("F", 22.0, 2, "22"),
        ("F", 7.3, 2, "07"),
        ("F", 558.8, 2, "55"),
        ("S", 12000.0, 2, "12"),
        ("X", 120.5, 2, "12"),
        ("X", 1.575, None, "1575"),
        ("X", -3.4725, None, "-3472"),
    ],
)
def test_bucket_of_worked_examples(letter, value, digits, leading):
    assert BucketTokenizer(digits=digits).bucket(letter, value) == leading


@pytest.mark.parametrize(
    "text,canon",
    [
        ("g1x1.5", "G1 X1.5"),
        ("G01  X1.5", "G1 X1.5"),
        ("G0", "G0"),
        ("G00", "G0"),
        (" Z0. ", "Z0."),
        ("G1 X1 (a b) Y2", "G1 X1 Y2"),
        ("(2DADAPTIVE_.15OPT_LOAD)", ""),
        ("M30;end", "M30"),
        ("X1*71", "X1"),
        ("/G0 X-.5", "G0 X-.5"),
        ("%", ""),
        ("X+1", "X+1"),
    ],
)
def test_canonical_form_of_a_line(text, canon):
    assert canonical(text) == canon
    assert canonical(canon) == canon


def test_lossless_round_trip_is_exact(lines):
    for tok in (LosslessTokenizer(), LosslessTokenizer(lines)):
        ids = tok.encode_batch(lines)
        assert not (ids == UNK).any()
        assert tok.decode_batch(ids) == lines
        assert [tok.decode(tok.encode(t)) for t in lines[:50]] == lines[:50]


def test_lossless_is_injective():
    "Any two token sequences, valid or not, have different texts, so a wrong sequence is never counted as correct."
    tok = LosslessTokenizer()
    few = [tok.vocab[t] for t in ("G1", "G3", "G17", "M3", "X", "Y", "1", "7", ".", "-")] + [UNK]
    texts = [tok.decode(ids) for n in range(5) for ids in itertools.product(few, repeat=n)]
    assert len(set(texts)) == len(texts) == sum(len(few) ** n for n in range(5))


def test_bucket_is_idempotent(lines):
    "The decoded number is in the bucket that it represents."
    for digits in (1, 2, 3, 4, None):
        tok = BucketTokenizer(lines, digits=digits)
        ids = tok.encode_batch(lines)
        assert not (ids == UNK).any()
        np.testing.assert_array_equal(
            tok.encode_batch(tok.decode_batch(ids), length=ids.shape[1]), ids
        )
        bare = BucketTokenizer(tokens=tok.tokens, digits=digits)
        np.testing.assert_array_equal(
            bare.encode_batch(bare.decode_batch(ids), length=ids.shape[1]), ids
        )


def test_bucket_tokens_of_lines():
    tok = BucketTokenizer(["G1 X1.575 Z0.", "F22.", "X1.5 Y-0.1996", "T2"])

    def named(text):
        return [tok.tokens[i] for i in tok.encode(text)]

    assert named("G1 X1.575 Z0.") == ["G1", "X", "NUM_X_15", "Z", "NUM_Z_00", "EOS"]
    assert named("X1.5 Y-0.1996") == ["X", "NUM_X_15", "Y", "NUM_Y_-2", "EOS"]
    assert named("X9.") == ["X", "UNK", "EOS"]
    assert named("G2 X1.5") == [
        "UNK",
        "X",
        "NUM_X_15",
        "EOS",
    ]
    old = BucketTokenizer(["G1 Z0.", "F22.", "X1.575"], trailing_dot_literal=True)
    assert [old.tokens[i] for i in old.encode("Z0. X1.575")] == ["Z0.", "X", "NUM_X_15", "EOS"]
    assert old.encode("Z1.") == [UNK, EOS]


def test_vocabulary_is_by_frequency_and_deterministic():
    corpus = ["X1.", "X1.", "X2. Y1.", "G1 X1."]
    tok = BucketTokenizer(corpus)
    assert tok.tokens == [*special_tokens, "X", "NUM_X_10", "G1", "NUM_X_20", "NUM_Y_10", "Y"]
    assert BucketTokenizer(corpus, min_freq=2).tokens == [*special_tokens, "X", "NUM_X_10"]
    assert LosslessTokenizer(corpus[::-1]).vocab == LosslessTokenizer("\n".join(corpus)).vocab


def test_components_are_inverse_over_the_whole_vocabulary(lines):
    for tok in all_tokenizers(lines):
        ids = np.arange(len(tok))
        parts = tok.decompose(ids)
        assert parts.dtype == np.int64
        assert parts.shape == (len(tok), 4)
        np.testing.assert_array_equal(tok.compose(parts), ids)
        assert (parts < list(tok.head_sizes.values())).all()
        assert list(tok.head_sizes) == [
            "type",
            "command",
            "param_type",
            "param_value",
        ]
        block = ids[: len(ids) // 6 * 6].reshape(2, 3, -1)
        np.testing.assert_array_equal(tok.compose(tok.decompose(block)), block)


def test_class_zero_means_none(lines):
    for tok in all_tokenizers(lines):
        kind, command, letter, value = tok.parts.T
        for i, t in enumerate(tok.tokens):
            is_command = t[0] in "GM" and t[1:2].isdigit()
            assert (command[i] > 0) == is_command == (kind[i] == 1)
        assert (kind[:5] == 0).all()
        assert value[:5].tolist() == [1, 2, 3, 4, 5]
        assert (kind[5:] > 0).all()
        assert (value[5:] > 5)[kind[5:] == 3].all()


def test_all_combinations_compose_to_a_token_or_unknown():
    tok = BucketTokenizer(["G1 X1.5", "Y-2."])
    every = np.stack(
        np.meshgrid(*(np.arange(-1, n + 1) for n in tok.head_sizes.values()), indexing="ij"), -1
    )
    ids = tok.compose(every)
    known = ids != UNK
    np.testing.assert_array_equal(tok.decompose(ids[known]), every[known])
    assert known.sum() == len(tok) - 1


def test_batches_are_padded_and_checked():
    tok = LosslessTokenizer()
    texts = ["X1", "G1 X12.5", "", "X1"]
    ids = tok.encode_batch(texts)
    assert ids.dtype == np.int64
    assert ids.shape == (4, 7)
    assert [row[row != PAD].tolist() for row in ids] == [tok.encode(t) for t in texts]
    assert tok.encode_batch(texts, length=9).shape == (4, 9)
    assert tok.encode_batch([]).shape == (
        0,
        0,
    )
    assert tok.decode([BOS, PAD, *tok.encode("X1"), *tok.encode("Y2")]) == "X1"
    assert tok.decode([]) == ""
    assert tok.decode([MASK, UNK]) == "MASK UNK"
    with pytest.raises(InputError, match="expected at most 6 tokens, found 7 with EOS"):
        tok.encode_batch(texts, length=6)
    with pytest.raises(InputError, match="row 1: expected a line of G-code, found nan"):
        tok.encode_batch(["X1", float("nan")])
    with pytest.raises(InputError, match=r"ids: expected 0 to \d+, found -100 to 5"):
        tok.decompose([5, -100])
    with pytest.raises(InputError, match="ids: expected integers, found float64 numbers"):
        tok.decode([0.5])


def test_invalid_words_become_unknown():
    for tok in (LosslessTokenizer(), BucketTokenizer(["X1"])):
        for text in (
            "5",
            "#1=3",
            "X1 é",
            "G7.7.7 X1",
            "X" + "9" * 400 if tok.name == "bucket" else "@",
            "G-1",
            "G",
        ):
            assert UNK in tok.encode(text), text


def test_vocabulary_survives_json(lines):
    for tok in all_tokenizers(lines):
        again = tokenizer_from_json(json.loads(json.dumps(tok.to_json())))
        again.check_vocabulary(tok)
        tok.check_vocabulary(again.vocab)
        ids = tok.encode_batch(lines)
        np.testing.assert_array_equal(again.encode_batch(lines), ids)
        assert again.decode_batch(ids) == tok.decode_batch(ids)
        assert again.to_json() == tok.to_json()
        assert type(again) is type(tok)
        flat = tokenizer_from_json(json.loads(json.dumps(tok.vocab)))
        np.testing.assert_array_equal(flat.encode_batch(lines), ids)


def test_older_vocabulary_files_are_read():
    "A file with the settings of the older tokenizer, without the one for trailing dots."
    vocab = {
        t: i
        for i, t in enumerate(
            [
                *special_tokens,
                "G0",
                "G1",
                "X",
                "Z",
                "Z0.",
                "F22.",
                "NUM_X_15",
                "NUM_X_-1",
                "NUM_Z_06",
            ]
        )
    }
    config = dict(
        mode="hybrid",
        precision=dict(X=0.001, Z=0.001),
        clip_bins={},
        canonical_decimal_places=4,
        ignore_for_pid=["F", "S"],
        special={t: i for i, t in enumerate(special_tokens)},
        vocab_size=50000,
        min_freq=1,
        dynamic_numbers=False,
        bucket_digits=2,
    )
    for value in (dict(config=config, vocab=vocab), vocab):
        tok = tokenizer_from_json(value)
        assert [tok.tokens[i] for i in tok.encode("G1 X1.575 Z0. F22.")] == [
            "G1",
            "X",
            "NUM_X_15",
            "Z0.",
            "F22.",
            "EOS",
        ]
        assert tok.encode("Z1.") == [UNK, EOS]
        np.testing.assert_array_equal(
            tok.compose(tok.decompose(np.arange(len(tok)))), np.arange(len(tok))
        )


special = {t: i for i, t in enumerate(special_tokens)}


@pytest.mark.parametrize(
    "value,sentence",
    [
        ([], "content: expected a dictionary, found list"),
        ({"PAD": 0}, "token BOS: expected id 1, found no such token"),
        (special | {"X": 7}, "token X: expected id 5, found id 7"),
        (special | {"X": 5, "Y": 5}, "token Y: expected id 6, found id 5"),
        (special | {"X": 5.0}, "token X: expected a whole number as id, found 5.0"),
        (
            dict(config=dict(mode="literal"), vocab=special),
            "config mode: expected hybrid or split, found 'literal'",
        ),
        (
            dict(config=dict(bucket_digits=0), vocab=special),
            "config bucket_digits: expected a whole number above 0, or null, found 0",
        ),
        (dict(config=dict(precision=[]), vocab=special), "config precision: expected a dictionary"),
        (
            dict(config=dict(tokenizer="bpe"), vocab=special),
            "config tokenizer: expected one of lossless, bucket, found 'bpe'",
        ),
    ],
)
def test_broken_vocabulary_files_are_refused(value, sentence):
    with pytest.raises(InputError, match="v.json: ") as e:
        tokenizer_from_json(value, "v.json")
    assert sentence in str(e.value)


def test_vocabulary_mismatch_names_the_first_difference():
    tok = LosslessTokenizer(["G0", "G1"])
    tok.check_vocabulary(LosslessTokenizer(["G1 X1.", "G0"]))
    with pytest.raises(
        InputError,
        match=r"vocabulary: size: expected 44 tokens, found 43; the first that differs is G1\.",
    ):
        tok.check_vocabulary(LosslessTokenizer(["G0"]))
    with pytest.raises(
        InputError, match=r"vocabulary: token G1: expected id 6, found no such token\."
    ):
        tok.check_vocabulary(LosslessTokenizer(["G0", "G2"]))
    with pytest.raises(InputError, match=r"vocabulary: token X: expected id 7, found id 8\."):
        tok.check_vocabulary(tok.vocab | {"X": 8, "Y": 7})
    with pytest.raises(
        InputError, match=r"vocabulary: tokenizer: expected lossless, found bucket\."
    ):
        tok.check_vocabulary(BucketTokenizer(["G0"]))


def test_tokenizers_are_built_by_name():
    assert isinstance(tokenizer("lossless"), LosslessTokenizer)
    assert isinstance(tokenizer("bucket", ["X1"], digits=1), BucketTokenizer)
    assert all(isinstance(tokenizer(n, ["X1"]), Tokenizer) for n in ("lossless", "bucket"))
    with pytest.raises(InputError, match="tokenizer: expected one of lossless, bucket"):
        tokenizer("bpe", [])


def test_every_text_of_the_recordings_is_encoded():
    import pandas as pd

    from gcode_ml.lab.settings import data_folder

    folder = data_folder("cnc_fingerprint")
    if folder is None:
        pytest.skip("no recordings: cnc_fingerprint is not in the data folder")
    texts = set()
    for f in (folder / "runs").glob("*.parquet"):
        texts |= set(pd.read_parquet(f, columns=["gcode_string"]).gcode_string.dropna())
    texts = sorted(t for t in texts if canonical(t))
    assert len(texts) >= 2259
    assert all(canonical(t) == t for t in texts)
    for tok in (LosslessTokenizer(), LosslessTokenizer(texts)):
        ids = tok.encode_batch(texts)
        assert not (ids == UNK).any()
        assert len(np.unique(ids, axis=0)) == len(texts)
        assert tok.decode_batch(ids) == texts
    bucket = BucketTokenizer(texts)
    ids = bucket.encode_batch(texts)
    assert not (ids == UNK).any()
    assert len(np.unique(ids, axis=0)) < 0.6 * len(texts)
    np.testing.assert_array_equal(
        bucket.encode_batch(bucket.decode_batch(ids), length=ids.shape[1]), ids
    )
    np.testing.assert_array_equal(bucket.compose(bucket.decompose(ids)), ids)
