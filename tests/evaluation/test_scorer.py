"""Scores under a small GPT-2 of transformers: those of a plain loop, of the right tokens; folders of no use."""

import json
import math
import shutil
import socket
import sys

import numpy as np
import pytest
import tokenizers as hf
from external_lm import END, WORDS, write_external_lm

from kforcing_jax.config import DataConfig
from kforcing_jax.data.tokenizers import train_tokenizer
from kforcing_jax.errors import DataError
from kforcing_jax.evaluation.external import clean
from kforcing_jax.evaluation.scorer import Completion, Score, Scorer
from kforcing_jax.evaluation.text_metrics import new_tokens

torch = pytest.importorskip("torch", reason='torch is not installed (pip install -e ".[scorer]")')
transformers = pytest.importorskip("transformers")

CONTEXT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_external_lm(tmp_path_factory.mktemp("gpt2"), CONTEXT)


@pytest.fixture(scope="module")
def scorer(folder):
    return Scorer.load(folder, device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DataConfig(tokenizer="bpe", vocab_size=300), ["the café, the end. "] * 5)


def _copy(folder, path):
    """A copy of the folder to change."""
    return shutil.copytree(folder, path / "copy")


def _text(seed, words):
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def _completions(*lengths):
    return [Completion(_text(n, 2), " " + _text(n + 1, n)) for n in lengths]


def _ids(scorer, text):
    return scorer.encoder.encode(text).ids


def _nll_by_token(scorer, text):
    """NLL of every token given its context: one forward pass per token, no padding, softmax in f64."""
    ids, stride = [0, *_ids(scorer, text)], CONTEXT // 2
    nll = []
    for target in range(1, len(ids)):
        # The window advances in strides until its last token, which it predicts and does not read, is the target.
        strides = max(math.ceil((target - CONTEXT) / stride), 0)
        begin = max(min(CONTEXT + strides * stride, len(ids) - 1) - CONTEXT, 0)
        with torch.no_grad():
            logits = scorer.model(torch.tensor([ids[begin:target]])).logits[0, -1].double().numpy()
        nll.append(np.log(np.exp(logits).sum()) - logits[ids[target]])
    return np.array(nll)


# Scores.


def test_scores_equal_a_plain_loop_over_tokens(scorer):
    completions = _completions(1, 2, 3, 5, 8)
    for completion, score in zip(completions, scorer.score(completions), strict=True):
        expected = _nll_by_token(scorer, completion.prefix + completion.text)[len(_ids(scorer, completion.prefix)) :]
        assert score.tokens == len(expected) == len(_ids(scorer, completion.text))
        assert score.nll == pytest.approx(expected.sum(), rel=1e-5)


@pytest.mark.parametrize("words", [24, 25, 37, 60])
def test_a_text_beyond_the_context_is_read_in_windows_that_advance_by_half_of_it(scorer, words):
    text = "".join(np.random.default_rng(words).choice([" fox", " dog"], words))  # one token each
    [score] = scorer.score([Completion("", text)])
    assert score.tokens == words
    assert score.nll == pytest.approx(_nll_by_token(scorer, text).sum(), rel=1e-5)


def test_every_token_of_a_long_text_is_scored_exactly_once(folder, tmp_path):
    scorer = Scorer.load(folder, device="cpu")
    torch.nn.init.zeros_(scorer.model.lm_head.weight)  # all tokens alike, each log V
    completions = _completions(*range(20, 90, 7))
    for completion, score in zip(completions, scorer.score(completions), strict=True):
        assert score.tokens == len(_ids(scorer, completion.text))
        assert score.nll == pytest.approx(score.tokens * math.log(scorer.model.config.vocab_size), rel=1e-6)


def test_the_prefix_is_context_and_not_scored(scorer):
    [whole, first, second] = scorer.score(
        [Completion("", "the fox jumps"), Completion("", "the fox"), Completion("the fox", " jumps")]
    )
    assert whole.nll == pytest.approx(first.nll + second.nll, rel=1e-5)
    assert whole.tokens == first.tokens + second.tokens
    [other] = scorer.score([Completion("a dog", " jumps")])
    assert abs(other.nll - second.nll) > 0.1


def test_scores_depend_neither_on_the_batch_nor_on_the_order(scorer):
    completions = _completions(1, 40, 3, 17, 60)
    expected = [scorer.score([completion])[0] for completion in completions]
    for batch_size, order in ((3, slice(None)), (64, slice(None, None, -1))):
        scores = scorer.score(completions[order], batch_size)
        assert [score.tokens for score in scores] == [score.tokens for score in expected[order]]
        np.testing.assert_allclose([s.nll for s in scores], [s.nll for s in expected[order]], rtol=1e-6, atol=1e-4)


def test_an_empty_completion_has_no_tokens(scorer):
    empty, whole, nothing = scorer.score([Completion("hello", ""), Completion("", "hello"), Completion("", "")])
    assert empty == nothing == Score(0.0, 0)
    assert whole.tokens > 0
    assert scorer.score([]) == []


def test_a_token_on_both_sides_of_the_boundary_is_of_the_completion(scorer):
    assert len(_ids(scorer, "the quick")) == 2
    for prefix, text, tokens in (
        ("the qu", "ick", 1),
        ("the ", "quick", 1),
        ("th", "e quick", 2),
        ("the", " quick", 1),
    ):
        assert scorer.score([Completion(prefix, text)])[0].tokens == tokens


def test_spaces_at_the_end_of_the_prefix_are_not_scored(scorer):
    # GPT-2's own offsets leave spaces out, and put such a token after the space.
    [spaces, none] = scorer.score([Completion("the  ", "\nfox"), Completion("the", "\nfox")])
    assert spaces.tokens == none.tokens == len(_ids(scorer, "\nfox"))


def test_text_that_spells_a_special_token_is_text(scorer):
    assert scorer.score([Completion("the ", END)])[0].tokens > 1


def test_the_end_of_text_begins_a_text_where_there_is_no_bos(scorer, folder, tmp_path):
    copy = _copy(folder, tmp_path)
    _edit(copy / "tokenizer_config.json", bos_token=None)
    without = Scorer.load(copy, device="cpu")
    assert without.first_id == scorer.first_id == 0
    assert without.score(_completions(3)) == scorer.score(_completions(3))


# Cleaning.


def test_a_completion_ends_at_its_first_eos_and_has_no_special_tokens(tokenizer):
    eos, mask = tokenizer.eos_id, tokenizer.mask_id
    prompt, new = [eos, *tokenizer.encode("the end")], tokenizer.encode(", the")
    row = np.array([*prompt, *new, eos, *tokenizer.encode(" café"), eos, mask, mask])
    for length in (len(row), len(prompt) + len(new) + 1, len(prompt) + len(new)):
        assert clean(row, len(prompt), length, eos, tokenizer) == Completion("the end", ", the")
        assert new_tokens(row, len(prompt), length, eos).tolist() == new
    assert clean(row, len(prompt), len(row), None, tokenizer) == Completion("the end", ", the café")


def test_an_eos_of_the_prompt_does_not_end_the_completion(tokenizer):
    row = np.array([tokenizer.eos_id, *tokenizer.encode("the")])
    assert clean(row, 1, len(row), tokenizer.eos_id, tokenizer) == Completion("", "the")
    assert clean(row[:1], 1, 1, tokenizer.eos_id, tokenizer) == Completion("", "")


def test_a_character_cut_by_the_prompt_is_of_the_completion(tokenizer):
    row = np.array([*tokenizer.encode("a "), *tokenizer.encode("漢"), *tokenizer.encode("!")])
    assert len(row) == 6  # three bytes of the character
    for prompt_length in (2, 3, 4):
        assert clean(row, prompt_length, len(row), None, tokenizer) == Completion("a ", "漢!")
    assert clean(row, 5, len(row), None, tokenizer) == Completion("a 漢", "!")


# Folders.


def _edit(path, **fields):
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def _vocab_and_merges(folder):
    hf.Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    _remove_tokenizer(folder)


def _remove_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def _pytorch_bin(folder):
    torch.save(transformers.GPT2LMHeadModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("layout", [_vocab_and_merges, _pytorch_bin])
def test_the_layouts_of_gpt2_score_alike(scorer, folder, tmp_path, layout):
    copy = _copy(folder, tmp_path)
    layout(copy)
    assert Scorer.load(copy, device="cpu").score(_completions(3, 40)) == scorer.score(_completions(3, 40))


def test_a_half_precision_checkpoint_is_scored_in_f32(folder, tmp_path):
    copy = _copy(folder, tmp_path)
    transformers.GPT2LMHeadModel.from_pretrained(copy).half().save_pretrained(copy)
    assert {weight.dtype for weight in Scorer.load(copy, device="cpu").model.parameters()} == {torch.float32}


def _bert(folder):
    """Its tokens see later ones."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=330, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5
    )
    transformers.BertLMHeadModel(config).save_pretrained(folder)


def _t5(folder):
    transformers.T5Config(vocab_size=330, d_model=32).save_pretrained(folder)


def _classifier(folder):
    config = transformers.GPT2Config.from_pretrained(folder)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(folder)


def _without_a_weight(folder):
    weights = transformers.GPT2LMHeadModel.from_pretrained(folder).state_dict()
    del weights["transformer.h.1.mlp.c_fc.weight"]
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def _small_model(folder):
    config = transformers.GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (shutil.rmtree, "no such folder; give the local folder of a causal LM.*nothing is downloaded"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json in it; give the local folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a causal LM .*not a valid JSON file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "not a causal LM that can be loaded"),
        (_t5, "not a causal LM .*T5Config"),
        (_bert, "holds a BertLMHeadModel, which is not a causal LM"),
        (_classifier, "holds a GPT2ForSequenceClassification, which is not a causal LM"),
        (_without_a_weight, "1 weights are missing, such as transformer.h.1.mlp.c_fc.weight"),
        (_remove_tokenizer, "no tokenizer.*; add its tokenizer.json, or vocab.json and merges.txt"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "no tokenizer that can be read"),
        (_small_model, "its tokenizer has an id 3.., its model 50 ids"),
        (
            lambda folder: _edit(folder / "tokenizer_config.json", bos_token=None, eos_token=None),
            "neither BOS nor EOS",
        ),
    ],
)
def test_a_folder_that_cannot_score_is_told_in_one_line(folder, tmp_path, capfd, change, line):
    copy = _copy(folder, tmp_path)
    change(copy)
    capfd.readouterr()
    with pytest.raises(DataError, match=line) as raised:
        Scorer.load(copy)
    assert str(raised.value).startswith(f"scorer {copy}: ")
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_extra_is_told_with_what_to_install(folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=r"needs torch and transformers.*pip install 'kforcing-jax\[scorer\]'"):
        Scorer.load(folder)


def test_no_network_is_tried(folder, tmp_path, monkeypatch):
    copy, tried = _copy(folder, tmp_path), []
    _remove_tokenizer(copy)

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network")

    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (socket, "create_connection")):
        monkeypatch.setattr(owner, name, refuse)
    Scorer.load(folder).score(_completions(3))
    for path in (copy, "gpt2-large"):
        with pytest.raises(DataError):
            Scorer.load(path)
    assert not tried
