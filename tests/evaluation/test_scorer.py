import json
import logging
import math
import shutil
import socket
import sys
import types

import numpy as np
import pytest
import tokenizers as hf
from external_lm import END, WORDS, write_external_lm
from scipy import stats

from kforcing_jax.config import DataConfig
from kforcing_jax.data.tokenizers import train_tokenizer
from kforcing_jax.errors import DataError
from kforcing_jax.evaluation.intervals import bootstrap, gen_ppl, text_report
from kforcing_jax.evaluation.scorer import Completion, Score, Scorer, clean, mauve_score, new_tokens
from kforcing_jax.evaluation.text_metrics import distinct_n, repetition, token_entropy

torch = pytest.importorskip("torch")
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


@pytest.mark.parametrize("words", [22, 23, 24, 25, 35, 36, 37, 80])
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


def test_a_prefix_longer_than_the_context_leaves_the_completion_scored(scorer):
    prefix, text = _text(0, 60), " hello world"
    [score] = scorer.score([Completion(prefix, text)])
    assert score.tokens == len(_ids(scorer, text))
    assert score.nll == pytest.approx(_nll_by_token(scorer, prefix + text)[-score.tokens :].sum(), rel=1e-5)


def test_the_prefix_is_context_and_not_scored(scorer):
    [whole, first, second] = scorer.score(
        [Completion("", "the fox jumps"), Completion("", "the fox"), Completion("the fox", " jumps")]
    )
    assert whole.nll == pytest.approx(first.nll + second.nll, rel=1e-5)
    assert whole.tokens == first.tokens + second.tokens
    [other] = scorer.score([Completion("a dog", " jumps")])
    assert abs(other.nll - second.nll) > 0.1


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_depend_neither_on_the_batch_nor_on_the_order(scorer, batch_size):
    completions = _completions(1, 40, 3, 17, 2, 60, 5)
    expected = [scorer.score([completion])[0] for completion in completions]
    for order in (slice(None), slice(None, None, -1)):
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


# Figures.


def test_gen_ppl_weighs_tokens_and_not_texts():
    report = gen_ppl([Score(2.0, 1), Score(3.0, 3), Score(0.0, 0)])
    assert report["gen_ppl"] == pytest.approx(math.exp(5 / 4))
    assert report["gen_ppl"] != pytest.approx((math.exp(2) + math.exp(1)) / 2)
    assert (report["scored_tokens"], report["scored_completions"], report["empty_completions"]) == (4, 2, 1)
    low, high = report["gen_ppl_interval"]
    assert math.exp(1) <= low <= report["gen_ppl"] <= high <= math.exp(2)


def test_what_cannot_be_measured_is_null():
    empty = gen_ppl([Score(0.0, 0)] * 3)
    assert empty["gen_ppl"] is empty["gen_ppl_interval"] is None
    assert empty["empty_completions"] == 3
    assert gen_ppl([])["gen_ppl"] is None
    one_prompt = gen_ppl([Score(2.0, 1), Score(3.0, 1)], prompt_of=["a", "a"])
    assert one_prompt["gen_ppl"] == pytest.approx(math.exp(2.5))
    assert one_prompt["gen_ppl_interval"] is None
    report = text_report([[], [1]])
    assert report["distinct_3"] == 0
    assert report["distinct_3_interval"] is report["repetition_4_interval"] is None
    json.dumps([empty, one_prompt, report], allow_nan=False)


def test_the_bootstrap_draws_whole_prompts():
    values = bootstrap([0.0] * 50 + [1.0] * 50, [1] * 100, prompt_of=["a"] * 50 + ["b"] * 50)
    assert set(values) == {0, 0.5, 1}
    assert np.mean(values == 0.5) == pytest.approx(0.5, abs=0.05)


def test_the_bootstrap_is_a_function_of_its_seed():
    totals, counts = np.arange(30.0), np.arange(1, 31)
    np.testing.assert_array_equal(bootstrap(totals, counts, seed=1), bootstrap(totals, counts, seed=1))
    assert (bootstrap(totals, counts, seed=1) != bootstrap(totals, counts, seed=2)).any()
    assert len(bootstrap(totals, counts, resamples=17)) == 17


def test_prompts_must_be_as_many_as_samples():
    with pytest.raises(ValueError, match="1 entries for 2"):
        gen_ppl([Score(1.0, 1)] * 2, prompt_of=[0])


def test_the_interval_of_gen_ppl_covers_the_truth_only_when_prompts_are_resampled():
    rng, truth, prompts, samples = np.random.default_rng(0), 3.0, 50, 4
    covered = {"prompts": 0, "samples": 0}
    for _ in range(200):
        mean_nll = truth + np.repeat(rng.normal(size=prompts), samples) + 0.3 * rng.normal(size=prompts * samples)
        tokens = rng.integers(5, 20, prompts * samples)
        scores = [Score(float(nll * n), int(n)) for nll, n in zip(mean_nll, tokens, strict=True)]
        for name, prompt_of in (("prompts", np.repeat(np.arange(prompts), samples)), ("samples", None)):
            low, high = gen_ppl(scores, prompt_of, resamples=200)["gen_ppl_interval"]
            covered[name] += low <= math.exp(truth) <= high
    assert covered["prompts"] >= 0.9 * 200
    assert covered["samples"] <= 0.8 * 200


def test_the_text_report_has_the_figures_of_text_metrics_inside_their_intervals(rng):
    rows = [rng.integers(0, 9, length) for length in (0, 1, 3, 6, 20, 30, 30)]
    report = text_report(rows)
    expected = {"token_entropy": token_entropy(rows), "repetition_4": repetition(rows, 4)}
    expected |= {f"distinct_{n}": distinct_n(rows, n) for n in (1, 2, 3)}
    assert {name: value for name, value in report.items() if not name.endswith("_interval")} == expected
    for name, value in expected.items():
        low, high = report[f"{name}_interval"]
        assert low < value < high or value == 0
    assert text_report(rows) == report


def test_rows_that_are_left_out_of_a_mean_are_left_out_of_its_interval():
    rows = [[7] * 8, list(range(8))] * 5
    report, with_short = text_report(rows), text_report([*rows, [], [1, 2]], prompt_of=[*range(10), 9, 9])
    assert with_short["repetition_4_interval"] == report["repetition_4_interval"]
    assert text_report([*rows, []], prompt_of=[*range(10), 9])["token_entropy_interval"] == pytest.approx(
        report["token_entropy_interval"]
    )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_interval_of_distinct_n_is_a_jackknife_over_prompts(rng, n):
    prompt_of = np.repeat(np.arange(6), 3)
    rows = [rng.integers(0, 5, rng.integers(0, 15)) for _ in prompt_of]  # far from 1, where it would be clipped
    without = [distinct_n([r for r, p in zip(rows, prompt_of, strict=True) if p != out], n) for out in range(6)]
    error = math.sqrt(5 / 6 * sum((value - np.mean(without)) ** 2 for value in without))
    low, high = text_report(rows, prompt_of)[f"distinct_{n}_interval"]
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 5) * error)
    assert (low + high) / 2 == pytest.approx(distinct_n(rows, n))


def test_the_interval_of_distinct_n_covers_what_samples_of_this_size_have(rng):
    share = 1 / np.arange(1, 301)
    samples = [rng.choice(300, (30, 20), p=share / share.sum()) for _ in range(150)]
    expected = np.mean([distinct_n(rows, 2) for rows in samples])
    intervals = [text_report(rows, resamples=1)["distinct_2_interval"] for rows in samples]
    assert np.mean([low <= expected <= high for low, high in intervals]) > 0.9


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


def _bert(class_name):
    def replace(folder):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=330, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5
        )
        getattr(transformers, class_name)(config).save_pretrained(folder)

    return replace


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


def _custom_code(folder):
    _edit(
        folder / "config.json", model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    )
    (folder / "code.py").write_text("raise SystemExit('ran')")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (shutil.rmtree, "no such folder; give the local folder of a causal LM such as GPT-2.*nothing is downloaded"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json; give the local folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a causal LM .*not a valid JSON file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "not a causal LM .*no file named .*model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "not a causal LM that can be loaded"),
        (_t5, "not a causal LM .*T5Config"),
        (_custom_code, "not a causal LM that can be loaded"),
        (_bert("BertForMaskedLM"), "holds a BertForMaskedLM, which is not a causal LM"),
        (_bert("BertLMHeadModel"), "the tokens of BertLMHeadModel see later ones"),
        (_classifier, "holds a GPT2ForSequenceClassification, which is not a causal LM"),
        (_without_a_weight, "1 weights are missing, such as transformer.h.1.mlp.c_fc.weight"),
        (_remove_tokenizer, "no tokenizer.*; add its tokenizer.json, or vocab.json and merges.txt"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "no tokenizer that can be read"),
        (_small_model, "its tokenizer has an id 3.., its model only 50 ids"),
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
    with pytest.raises(DataError, match=r'needs torch and transformers.*pip install -e "\.\[scorer\]"'):
        Scorer.load(folder)


def test_loading_and_scoring_are_silent_and_leave_the_settings_of_transformers(folder, tmp_path, capfd, talkative):
    library, records = talkative
    copy = _copy(folder, tmp_path)
    _bert("BertLMHeadModel")(copy)
    records.clear(), capfd.readouterr()
    with pytest.raises(DataError):
        Scorer.load(copy)  # a model that transformers warns of
    Scorer.load(folder).score([Completion("", _text(0, 100))])
    assert records == []
    assert capfd.readouterr() == ("", "")
    assert library.get_verbosity() == library.INFO
    assert library.is_progress_bar_enabled()


@pytest.fixture
def talkative():
    """The logging of transformers at its most talkative, and what it says."""
    library, records = transformers.utils.logging, []
    before, handler = library.get_verbosity(), logging.Handler()
    handler.emit = records.append
    library.set_verbosity_info()
    logging.getLogger("transformers").addHandler(handler)
    yield library, records
    logging.getLogger("transformers").removeHandler(handler)
    library.set_verbosity(before)


@pytest.mark.parametrize("layout", [lambda folder: None, _vocab_and_merges, _pytorch_bin, _remove_tokenizer])
def test_no_network_is_tried(folder, tmp_path, monkeypatch, layout):
    copy = _copy(folder, tmp_path)
    layout(copy)
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network")

    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (socket, "create_connection")):
        monkeypatch.setattr(owner, name, refuse)
    try:
        Scorer.load(copy).score(_completions(3))
    except DataError:
        assert layout is _remove_tokenizer
    with pytest.raises(DataError, match="no such folder"):
        Scorer.load("gpt2-large")
    assert not tried


# MAUVE.


def test_features_are_the_last_hidden_state_of_each_text_alone(scorer):
    completions = _completions(1, 40, 3)
    features = scorer.features(completions, batch_size=2)
    for feature, completion in zip(features, completions, strict=True):
        ids = [0, *_ids(scorer, completion.prefix + completion.text)][:CONTEXT]
        with torch.no_grad():
            hidden = scorer.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        np.testing.assert_allclose(feature, hidden[0, -1].numpy(), rtol=1e-4, atol=1e-4)


def test_mauve_compares_references_and_samples_by_the_scorers_features(scorer, monkeypatch):
    given = {}

    def compute_mauve(**arguments):
        given.update(arguments)
        return types.SimpleNamespace(mauve=np.float32(0.5))

    monkeypatch.setitem(sys.modules, "mauve", types.SimpleNamespace(compute_mauve=compute_mauve))
    samples, references = _completions(2, 5), _completions(3, 4, 6)
    assert mauve_score(scorer, samples, references) == 0.5
    np.testing.assert_array_equal(given["p_features"], scorer.features(references))
    np.testing.assert_array_equal(given["q_features"], scorer.features(samples))
    with pytest.raises(ValueError, match="0 samples and 3 references"):
        mauve_score(scorer, [], references)


def test_mauve_is_none_when_it_is_not_installed(scorer, monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    assert mauve_score(scorer, _completions(2), _completions(3)) is None


def test_mauve_tells_equal_texts_from_others(scorer):
    pytest.importorskip("mauve")
    texts = [Completion("", _text(seed, 6)) for seed in range(120)]
    others = [Completion("", " ".join(["fox"] * (2 + seed % 5))) for seed in range(60)]
    same, different = mauve_score(scorer, texts[:60], texts[60:]), mauve_score(scorer, others, texts[60:])
    assert different < 0.5 < same
