"""Tokenizers that come along with a model: of folders, of GGUF files, kept with prepared data."""

import json
import shutil

import pytest
import tokenizers as hf
from interop.families import CHAT_TEMPLATE, TEACHER, byte_level_tokenizer, write_teacher, write_tokenizer

from kforcing_jax.config import DataConfig
from kforcing_jax.data import model_tokenizers
from kforcing_jax.data.gguf_tokenizers import gguf_tokenizer
from kforcing_jax.data.model_tokenizers import chat_template, has_model, load_model_tokenizer
from kforcing_jax.data.pretrained import load_configured, load_pretrained, local_files
from kforcing_jax.data.tokenizers import ModelTokens, Tokenizer
from kforcing_jax.errors import DataError, RunError

TEXTS = (
    "The cat sat on the mat.",
    "In 2024 it's 12345 naïve cafés: 日本語!\n\n  def f(x):\n\treturn x**2 \U0001f600",
    "  leading and   several spaces\r\nDON'T won't",
)


@pytest.fixture
def folder(tmp_path):
    return write_teacher(tmp_path / "model")


def test_it_has_the_ids_of_the_model_and_no_mask(folder):
    tokenizer = load_model_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.eos_id, tokenizer.bos_id) == (320, None, 2, None)
    assert "<mask>" not in tokenizer.backend.get_vocab()
    assert not tokenizer.begins_documents and tokenizer.encode_prompt("") == [2]
    assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]
    assert tokenizer.decode([319, *tokenizer.encode("cat")]) == "cat", "rows that stand for nothing"


def test_data_takes_it_as_it_is(folder):
    tokenizer = load_configured(DataConfig(tokenizer=str(folder), vocab_size=320))
    assert tokenizer.digest == load_pretrained(str(folder)).digest and tokenizer.mask_id is None
    assert {path.rpartition("/")[2] for path in local_files(str(folder))} == {
        *("config.json", "tokenizer.json", "tokenizer_config.json"),
    }


def test_a_folder_of_a_tokenizer_alone_has_a_mask_as_before(folder):
    (folder / "config.json").unlink()
    assert not has_model(folder) and load_pretrained(str(folder)).mask_id is not None
    (folder / "config.json").write_text('{"model_type": "bert", "vocab_size": 320}')
    assert not has_model(folder)


def test_it_is_kept_with_what_was_prepared(folder, tmp_path):
    tokenizer = load_model_tokenizer(folder)
    tokenizer.save(tmp_path / "tokenizer.json")
    kept = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (kept.of_model, kept.digest, kept.eos_id) == (tokenizer.of_model, tokenizer.digest, 2)
    assert kept.of_model.chat_template == CHAT_TEMPLATE
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(RunError, match="has no <mask>"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("settings", "begins"),
    [({"add_bos_token": True}, True), ({"add_bos_token": None}, False), ({"bos_token": None}, False)],
)
def test_texts_begin_with_bos_where_the_model_says_so(folder, settings, begins):
    write_tokenizer(folder, **settings)
    tokenizer = load_model_tokenizer(folder)
    assert tokenizer.begins_documents == begins
    assert (tokenizer.encode_prompt("cat")[0] == 1) == begins


def test_what_is_put_around_a_text_says_it_too(folder):
    backend = write_tokenizer(folder, add_bos_token=None)
    backend.post_processor = hf.processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    assert load_model_tokenizer(folder).begins_documents


@pytest.mark.parametrize("settings", [None, {"bos_token": None, "eos_token": None}], ids=["none", "null"])
@pytest.mark.parametrize("named", [True, False])
def test_beginning_and_end_are_those_of_the_config_where_settings_name_none(folder, settings, named):
    backend = byte_level_tokenizer()
    begin, end = ("<|im_start|>", 1), 2
    backend.post_processor = hf.processors.TemplateProcessing(f"{begin[0]} $A", special_tokens=[begin])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {"bos_token_id": 1, "eos_token_id": end} if named else {"eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(TEACHER | ids))
    tokenizer = load_model_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode_prompt("cat") == [1, *tokenizer.encode("cat")]


def test_a_beginning_that_is_named_but_not_put_before_texts_is_none(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(TEACHER | {"bos_token_id": 1, "eos_token_id": 2}))
    tokenizer = load_model_tokenizer(folder)
    assert tokenizer.bos_id is None and tokenizer.eos_id == 2


def test_the_end_is_that_of_the_config_where_settings_are_silent(folder):
    (folder / "tokenizer_config.json").unlink()
    assert load_model_tokenizer(folder).eos_id is None
    (folder / "config.json").write_text(json.dumps(TEACHER | {"eos_token_id": [1, 0]}))
    assert load_model_tokenizer(folder).eos_id == 1


def test_chat_templates_are_found(folder):
    assert chat_template(folder) == CHAT_TEMPLATE
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    write_tokenizer(folder, chat_template=named)
    assert chat_template(folder) == "y"
    (folder / "chat_template.jinja").write_text("z")
    assert chat_template(folder) == "z"
    write_tokenizer(folder, chat_template=None)
    (folder / "chat_template.jinja").unlink()
    assert chat_template(folder) is None


def test_more_tokens_than_the_model_has_ids_are_refused(folder):
    (folder / "config.json").write_text(json.dumps(TEACHER | {"vocab_size": 270}))
    with pytest.raises(DataError, match=r"the tokenizer has ids up to \d+, its model 270 ids"):
        load_model_tokenizer(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "the folder has no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"), "tokenizer.model alone is not read"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
        (lambda f: (f / "tokenizer_config.json").write_text("[1"), "is not a JSON object"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "is not a JSON object"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"eos_token": 3}'), "eos_token = 3 should be a text"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"chat_template": {"a": 1}}'), "chat_template = {'a': 1}"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "vocab_size = None"),
    ],
)
def test_what_cannot_be_read_is_named(folder, change, said):
    change(folder)
    with pytest.raises(DataError, match=said) as raised:
        load_model_tokenizer(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def gguf_values(backend, pre, model="gpt2", **more):
    """What a GGUF file says of a tokenizer."""
    content = json.loads(backend.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    return {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
    } | {f"tokenizer.ggml.{name}": value for name, value in more.items()}


def rebuilt(values):
    return Tokenizer(*gguf_tokenizer(values, 320))


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# The pre-tokenizers that these models' own tokenizer.json have.
OWN = {
    "gpt-2": hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": hf.pre_tokenizers.Sequence(
        [hf.pre_tokenizers.Digits(individual_digits=True), hf.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": hf.pre_tokenizers.Sequence([hf.pre_tokenizers.Split(hf.Regex(LLAMA3), "isolated"), BYTES]),
    "qwen2": hf.pre_tokenizers.Sequence(
        [hf.pre_tokenizers.Split(hf.Regex(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), "isolated"), BYTES]
    ),
}


@pytest.mark.parametrize("pre", OWN)
def test_a_rebuilt_tokenizer_cuts_as_the_models_own(pre):
    backend = byte_level_tokenizer()
    tokenizer = rebuilt(gguf_values(backend, pre))
    backend.pre_tokenizer = OWN[pre]
    for text in TEXTS:
        assert tokenizer.encode(text) == backend.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_marked("<|im_start|>cat<|im_end|>")[:1] == [1]
    assert 1 not in tokenizer.encode("<|im_start|>cat")


def test_what_a_file_says_of_its_tokens():
    backend = byte_level_tokenizer()
    tokenizer = rebuilt(gguf_values(backend, "smollm") | {"tokenizer.chat_template": "x"})
    assert tokenizer.of_model == ModelTokens(
        320, (("bos_token", "<|im_start|>"), ("eos_token", "<|im_end|>")), False, "x"
    )
    assert rebuilt(gguf_values(backend, "llama-bpe")).begins_documents
    assert not rebuilt(gguf_values(backend, "llama-bpe", add_bos_token=False)).begins_documents


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre = 'tekken' is not known here"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model = 'bert' is not a tokenizer that is read"),
        ({"tokenizer.ggml.tokens": []}, "is not a tokenizer that is read"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores has 0 entries"),
    ],
)
def test_kinds_that_are_not_known_are_refused_by_name(values, said):
    with pytest.raises(DataError, match=said):
        gguf_tokenizer(gguf_values(byte_level_tokenizer(), "gpt-2") | values, 320)


def test_pieces_with_scores_are_merged_best_first():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "c", "a", "t"]
    pieces += ["at", "▁c", "▁ca", "ca", "cat"]
    scores = [0.0] * 259 + [-20.0] * 4 + [-1.0, -2.0, -3.0, -0.5, -4.0]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 9,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = rebuilt(values)
    assert [pieces[i] for i in tokenizer.encode("cat")] == ["▁ca", "t"]  # ca is the best pair, and ▁ca better than cat
    assert tokenizer.begins_documents and tokenizer.encode_prompt("cat")[0] == 1
    assert tokenizer.decode(tokenizer.encode("cat é")) == "cat é", "bytes of what is no piece"


def test_the_hub_is_not_asked_for_what_is_here(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "here")
    assert load_pretrained("./here").vocab_size == 320
    assert model_tokenizers.has_model("./here") and not has_model("./nowhere")
