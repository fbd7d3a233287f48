"""Completing a file of prefixes: what is read, what is reported, and what is written."""

import json

import numpy as np
import pytest

from kforcing_jax.cli.prompts import read_prefixes, room_for, write_completions
from kforcing_jax.config import DataConfig
from kforcing_jax.data.tokenizers import markov_tokenizer, train_tokenizer
from kforcing_jax.decoding import generate
from kforcing_jax.decoding.completions import Prefix, complete
from kforcing_jax.errors import ConfigError, DataError, RunError


@pytest.fixture(scope="module")
def tokenizer():
    """<unk>, <eos>, ten characters, <mask>: 13 ids, as the tiny models have."""
    tokenizer = train_tokenizer(DataConfig(vocab_size=13), ["abcdefghij" * 3])
    assert tokenizer.vocab_size == 13
    return tokenizer


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prefixes.jsonl"
    lines = [
        b'{"prefix": "abcde"}',
        b"",
        b"just text",
        b'{"prefix": "abc"}',
        b'{"text": "abcde"}',
        b'{"prefix": 5}',
        b"\xff\xfe",
        b'["abcde"]',
        b"  \t",
        b'{"prefix": "<eos>fghij", "more": 1}',
        b'{"prefix": "\\ud800abcde"}',
        b"[" * 200_000,
    ]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n")
    return path


def test_usable_lines_give_their_first_tokens_and_the_others_a_sentence(file, tokenizer):
    prefixes, problems = read_prefixes(file, tokenizer, 4)
    assert [prefix.line for prefix in prefixes] == [1, 10]
    assert list(prefixes[0].tokens) == tokenizer.encode("abcd")
    assert list(prefixes[1].tokens) == [tokenizer.eos_id, *tokenizer.encode("fgh")]
    said = {
        2: "blank",
        3: "not JSON",
        4: "3 tokens, too short for a prefix of 4 (--prefix_length)",
        5: 'no string field "prefix"',
        6: 'no string field "prefix"',
        7: "not UTF-8",
        8: 'no string field "prefix"',
        9: "blank",
        11: "half of a surrogate pair, which is no character",
        12: "not JSON",
    }
    assert problems == [f"{file}, line {number}: {problem}; left out" for number, problem in said.items()]


def test_a_file_without_a_usable_line_is_an_error(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("abc\n")
    with pytest.raises(DataError, match=r"has no usable line .*; .*a\.jsonl, line 1: not JSON; left out"):
        read_prefixes(tmp_path / "a.jsonl", tokenizer, 4)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_prefixes(tmp_path / "b.jsonl", tokenizer, 4)


PREFIXES = [Prefix(line, tuple(tokens)) for line, tokens in enumerate([(2, 3, 4), (5, 6, 7), (8, 2, 3)], start=1)]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_completions_do_not_depend_on_the_batches(push_forward_lm, batch_size):
    model, params = push_forward_lm
    done = complete(
        model, params, PREFIXES, max_new_tokens=7, k=2, batch_size=batch_size, samples_per_prefix=2, seed=5, eos_id=3
    )
    prompts = [prefix.tokens for prefix in PREFIXES for _ in range(2)]
    expected = generate(model, params, prompts, max_new_tokens=7, k=2, seeds=range(5, 11))
    np.testing.assert_array_equal(done.tokens, expected.tokens)
    assert done.prefix_of(3) == PREFIXES[1]
    for row, length in zip(done.tokens, done.lengths, strict=True):
        new = row[3:].tolist()
        assert length - 3 == (new.index(3) + 1 if 3 in new else 7)


def test_throughput_counts_what_was_decoded_and_what_is_useful(push_forward_lm):
    model, params = push_forward_lm
    done = complete(model, params, PREFIXES, max_new_tokens=7, k=2, batch_size=2, eos_id=3)
    figures = done.throughput
    assert (figures["model"], figures["K_per_step"], figures["num_samples"]) == ("pflm", 2, 3)
    assert (figures["n_batches"], figures["total_nfe"]) == (2, 3 * 4)
    # Two batches of two: one text is decoded again to fill the last one.
    assert figures["throughput_tok_per_sec_total"] == pytest.approx(4 * 7 / figures["total_elapsed_sec"])
    useful = (done.lengths - 3).sum()
    assert figures["useful_tok_per_sec"] == pytest.approx(useful / 3 * 4 / figures["total_elapsed_sec"])


def test_an_ar_model_takes_one_token_a_pass_whatever_k_is_asked(causal_lm):
    model, params = causal_lm
    done = complete(model, params, PREFIXES, max_new_tokens=5, k=4, batch_size=3)
    assert (done.throughput["model"], done.throughput["K_per_step"]) == ("ar", 1)
    assert done.throughput["nfe_per_token"] == 1


def test_samples_and_throughput_are_written_whole(push_forward_lm, tokenizer, tmp_path):
    model, params = push_forward_lm
    eos_id = tokenizer.eos_id
    done = complete(model, params, PREFIXES, max_new_tokens=30, k=2, batch_size=3, eos_id=eos_id)
    write_completions(tmp_path / "new" / "out", done, tokenizer, {"more.json": {"a": 1}})
    assert sorted(path.name for path in (tmp_path / "new/out").iterdir()) == [
        "more.json",
        "samples.jsonl",
        "throughput.json",
    ]
    samples = [json.loads(line) for line in (tmp_path / "new/out/samples.jsonl").read_text().splitlines()]
    assert [sample["line"] for sample in samples] == [1, 2, 3]
    for sample, prefix in zip(samples, PREFIXES, strict=True):
        assert tuple(sample["tokens"][:3]) == prefix.tokens
        assert sample["prefix"] == tokenizer.decode(prefix.tokens)
        assert eos_id not in sample["tokens"][3:-1]
        assert sample["completion"].endswith("<eos>") == (sample["tokens"][-1] == eos_id)
    assert json.loads((tmp_path / "new/out/throughput.json").read_text()) == done.throughput


def test_a_folder_that_cannot_be_written_is_named(push_forward_lm, tokenizer, tmp_path):
    model, params = push_forward_lm
    done = complete(model, params, PREFIXES, max_new_tokens=2, k=2, batch_size=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--output_dir=.*file cannot be written"):
        write_completions(tmp_path / "file", done, tokenizer)


def test_new_tokens_are_what_fits_or_what_is_asked():
    assert room_for(6, 128, None) == 122
    assert room_for(6, 128, 10) == 10
    assert room_for(6, 131_072, None) == 1024 and room_for(6, 131_072, 2000) == 2000
    assert room_for(6, None, 10) == 10
    with pytest.raises(DataError, match="6 tokens and 123 new ones exceed the cache of 128"):
        room_for(6, 128, 123)
    with pytest.raises(ConfigError, match="--max_new_tokens is missing"):
        room_for(6, None, None)


def test_a_word_outside_the_vocabulary_is_reported(tmp_path):
    (tmp_path / "states.jsonl").write_text('{"prefix": "0"}\n{"prefix": "9"}\n')
    prefixes, problems = read_prefixes(tmp_path / "states.jsonl", markov_tokenizer(3), 1)
    assert [prefix.line for prefix in prefixes] == [1]
    assert len(problems) == 1 and "line 2: not text of this vocabulary" in problems[0]
