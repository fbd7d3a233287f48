"""Chats out of JSON lines: what is text, what is an answer, and how both come to lie in rows."""

import json

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, processors

from kforcing_jax.config import DataConfig
from kforcing_jax.data import files
from kforcing_jax.data.chat_template import ChatTemplate
from kforcing_jax.data.preparation import prepare
from kforcing_jax.data.units import reader
from kforcing_jax.errors import ConfigError, DataError, RunError
from kforcing_jax.evaluation.samples import prompts

SEED = 5
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def chat(*contents, system=None):
    """User and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(map(str, contents))]
    return ([{"role": "system", "content": system}] if system else []) + turns


CHATS = [chat(f"what is {i} + {i}?", f"it is {2 * i}", "sure?", f"yes, {2 * i}!", system="add") for i in range(8)] + [
    chat(f"hello {i}", f" hi {i} \u00e9 ") for i in range(8)
]


def write_lines(path, entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """Of bytes, with the names of roles as special tokens and a template beside it, as on the hub."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = hf.Tokenizer(
        models.BPE({symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # as of GPT-2: white space has no span
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture
def config(tokenizer_folder, tmp_path):
    return DataConfig(
        source="chat",
        path=str(write_lines(tmp_path / "chats.jsonl", [{"messages": messages} for messages in CHATS])),
        tokenizer=str(tokenizer_folder),
        vocab_size=256 + len(SPECIAL) + 1,
        seq_len=128,
        packing="segments",
        validation_fraction=0.25,
        loss_on="answers",
    )


def with_fields(config, **fields):
    return DataConfig(**{**config.__dict__, **fields})


def texts_of(corpus, split="train"):
    """(text, its answers as texts) of every segment, or row without segments."""
    for record in corpus._source(split):
        row = corpus._row(record)
        segments = row.get("segments", np.ones(corpus.seq_len, int))
        for segment in range(1, segments.max() + 1):
            tokens, answers = (row[name][segments == segment] for name in ("tokens", "answers"))
            parts = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(answers)) + 1)
            said = [corpus.tokenizer.decode(tokens[part], show_special=True) for part in parts if answers[part[0]]]
            yield corpus.tokenizer.decode(tokens, show_special=True), said


@pytest.mark.parametrize("packing", ["segments", "padded"])
def test_rows_are_what_the_template_gives_and_know_the_answers(config, tmp_path, packing):
    corpus = prepare(with_fields(config, packing=packing), SEED, tmp_path / "data")
    template = ChatTemplate(TEMPLATE)
    expected = {template.render_whole(messages): messages for messages in CHATS}
    found = [*texts_of(corpus), *texts_of(corpus, "validation")]
    assert {text for text, _ in found} == expected.keys() and len(found) == len(CHATS)
    for text, said in found:
        answers = [m["content"] for m in expected[text] if m["role"] == "assistant"]
        # With what ends the turn, so that this is learnt too.
        assert [each.strip() for each in said] == [f"{answer}<|end|>".strip() for answer in answers]


def test_special_tokens_of_the_template_are_ids_and_the_mask_never_is(config, tmp_path):
    entries = [{"messages": chat(f"say <mask> {i}", "<mask>")} for i in range(4)]
    config = with_fields(config, path=str(write_lines(tmp_path / "masks.jsonl", entries)))
    corpus = prepare(config, SEED, tmp_path / "data")
    ids = np.concatenate([corpus._row(record)["tokens"] for record in corpus._source("train")])
    backend = corpus.tokenizer.backend
    assert {backend.token_to_id("<|user|>"), backend.token_to_id("<|end|>")} <= set(ids)
    assert corpus.mask_id not in ids and all("<mask>" in said for _, (said,) in texts_of(corpus))


def test_end_to_end_rows_know_the_answers_too(config, tmp_path):
    corpus = prepare(with_fields(config, packing="wrapped", seq_len=32), SEED, tmp_path / "data")
    batch = next(corpus.train_batches(2, SEED))
    assert batch.segments is None and batch.answers.shape == (2, 32) and batch.answers.dtype == bool
    assert 0 < batch.answers.mean() < 1
    assert corpus.validation_batches(2, 1).answers.shape == (2, 1, 32)


@pytest.mark.parametrize("packing", ["segments", "wrapped"])
def test_prompts_of_evaluation_end_where_an_answer_begins(config, tmp_path, packing):
    corpus = prepare(with_fields(config, packing=packing), SEED, tmp_path / "data")
    texts = corpus.beginnings(3, 12)
    assert texts
    for text_M in texts:
        before, after = (corpus.tokenizer.decode(part, show_special=True) for part in (text_M[:12], text_M[12:]))
        assert before.endswith("<|assistant|>\n") and after.lstrip().startswith(("it is", "yes", "hi"))
    assert [len(prompt) for prompt in prompts(corpus, 3, 12)] == [12] * len(texts)
    with pytest.raises(DataError, match="no answer of a validation chat comes after so many tokens; shorten it"):
        corpus.beginnings(3, 128)


def test_without_the_option_all_is_learnt_and_rows_are_the_same(config, tmp_path):
    some, all_of_it = (prepare(with_fields(config, loss_on=on), SEED, tmp_path / on) for on in ("answers", "all"))
    first, second = (next(corpus.train_batches(4, SEED)) for corpus in (some, all_of_it))
    assert second.answers is None
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.segments, second.segments)
    assert some.data_digest != all_of_it.data_digest


def test_chats_without_an_answer_are_left_out_where_answers_are_learnt(config, tmp_path):
    entries = [{"messages": messages} for messages in [*CHATS, *(chat(f"nobody there? {i}") for i in range(20))]]
    config = with_fields(config, path=str(write_lines(tmp_path / "some.jsonl", entries)))
    for on, kept in (("answers", len(CHATS)), ("all", len(entries))):
        manifest = json.loads(
            (prepare(with_fields(config, loss_on=on), SEED, tmp_path / on).directory / "manifest.json").read_text()
        )
        assert sum(manifest[split]["documents"] for split in ("train", "validation")) == kept


def test_the_template_stays_with_the_prepared_data(config, tmp_path):
    corpus = prepare(config, SEED, tmp_path / "data")
    assert ChatTemplate.find(corpus.directory).render(CHATS[8][:1]) == "<|user|>\nhello 0<|end|>\n<|assistant|>\n"


def test_a_template_of_ones_own_and_a_vocabulary_of_the_text(config, tmp_path):
    template = tmp_path / "mine.jinja"
    turns = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    template.write_text(turns + "{{ 'a:' if add_generation_prompt }}")
    own = dict(tokenizer="characters", vocab_size=96, chat_template=str(template))
    corpus = prepare(with_fields(config, **own), SEED, tmp_path / "data")
    found = dict([*texts_of(corpus), *texts_of(corpus, "validation")])
    assert found["u:hello 0<eos>a: hi 0 \u00e9 <eos>"] == [" hi 0 \u00e9 <eos>"]
    kept = ChatTemplate.find(corpus.directory)
    assert kept.render([{"role": "user", "content": "x"}]) == "u:x<eos>a:"
    template.write_text("another")
    with pytest.raises(RunError, match=r"another data\.chat_template: .*mine\.jinja has changed"):
        prepare(with_fields(config, **own), SEED, tmp_path / "data")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"text": "x"}, 'line 2 has no list "messages"'),
        ({"messages": []}, 'line 2 has no list "messages"'),
        (["x"], 'line 2 has no list "messages"'),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "line 2, message 1: role = 'bot' is not one of system, user, assistant",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]},
            "line 2, message 2: content = 'None'",
        ),
        ({"messages": ["hi"]}, "line 2, message 1: role = None"),
    ],
)
def test_what_is_no_chat_is_named_by_file_and_line(config, tmp_path, line, says):
    path = write_lines(tmp_path / "bad.jsonl", [{"messages": CHATS[0]}, line])
    with pytest.raises(DataError) as error:
        prepare(with_fields(config, path=str(path)), SEED, tmp_path / "data")
    assert f"{path}, {says}" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_a_line_that_is_no_json_and_a_file_of_another_kind_are_named(config, tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    (tmp_path / "a.txt").write_text("hello")
    for name, says in (
        ("a.jsonl", r"a\.jsonl, line 1 is not JSON"),
        ("a.txt", r"a\.txt is \.txt; it should be lines of JSON"),
    ):
        with pytest.raises(DataError, match=says):
            reader(with_fields(config, path=str(tmp_path / name)), SEED).units()


def test_a_template_that_refuses_a_chat_is_told_with_its_line(config, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text("{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}x")
    with pytest.raises(
        DataError, match=r"chats\.jsonl, line \d: messages: the chat template refuses them \(too long\)"
    ):
        prepare(with_fields(config, chat_template=str(template)), SEED, tmp_path / "data")


def test_without_a_template_anywhere_it_is_said_where_one_goes(config, tmp_path):
    own = with_fields(config, tokenizer="characters", vocab_size=96)
    with pytest.raises(DataError, match=r"data\.tokenizer = 'characters' comes with none: set data\.chat_template"):
        reader(own, SEED).units()
    with pytest.raises(DataError, match=r"nowhere\.jinja cannot be read"):
        reader(with_fields(own, chat_template=str(tmp_path / "nowhere.jinja")), SEED).units()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"loss_on": "questions"}, "data.loss_on = 'questions' is not one of all, answers"),
        (
            {"source": "news", "chat_template": ""},
            'data.loss_on = answers is for data.source = "chat"; "news" does without',
        ),
        ({"path": ""}, 'data.path is empty; data.source = "chat" needs a file'),
    ],
)
def test_fields_that_do_not_fit_are_refused(config, fields, says):
    with pytest.raises(ConfigError, match=says):
        with_fields(config, **fields)


def test_chats_are_read_from_arrays_and_large_files_by_their_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BYTES_PER_RANGE", 10)
    (tmp_path / "a.json").write_text(json.dumps([{"messages": CHATS[0]}, 3]))
    places = [where for where, _ in files.json_entries(str(tmp_path / "a.json"))]
    assert places == [f"{tmp_path / 'a.json'}, entry {i}" for i in range(2)]
    lines = write_lines(tmp_path / "b.jsonl", [{"messages": messages} for messages in CHATS])
    assert [where for where, _ in files.json_entries(str(lines))][-1] == f"{lines}, line {len(CHATS)}"
