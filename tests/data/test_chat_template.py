"""Chat templates out of tokenizers' folders."""

import json

import pytest

from kforcing_jax.config import DataConfig
from kforcing_jax.data.chat_template import ChatTemplate
from kforcing_jax.data.tokenizers import ModelTokens, Tokenizer, train_tokenizer
from kforcing_jax.errors import DataError

SOURCE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


def write(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "template",
    [SOURCE, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": SOURCE}]],
    ids=["one", "several, by name"],
)
@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "special": True}], ids=["text", "object"])
def test_the_template_and_the_tokens_of_a_tokenizer_are_found(tmp_path, template, eos):
    found = ChatTemplate.find(write(tmp_path, chat_template=template, eos_token=eos, pad_token=None))
    assert found.render(MESSAGES) == "[system]be brief</s>[user]hi</s>>"


def test_a_file_of_its_own_comes_before_the_settings(tmp_path):
    write(tmp_path, chat_template="old", eos_token="!")
    (tmp_path / "chat_template.jinja").write_text(SOURCE)
    assert ChatTemplate.find(tmp_path).render(MESSAGES[1:]) == "[user]hi!>"
    assert ChatTemplate.load(tmp_path / "chat_template.jinja").render(MESSAGES[1:]) == "[user]hi>"


def test_a_folder_without_one_has_none(tmp_path):
    assert ChatTemplate.find(tmp_path) is None
    assert ChatTemplate.find(write(tmp_path, eos_token="!")) is None
    with pytest.raises(DataError, match=r"chat_template\.jinja"):
        ChatTemplate.load(tmp_path)


def test_a_template_may_refuse_messages(tmp_path):
    template = ChatTemplate(
        "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}x"
    )
    assert template.render(MESSAGES[1:]) == "x"
    with pytest.raises(DataError, match="begin with the user"):
        template.render(MESSAGES)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% nothing %}"])
def test_what_is_no_template_is_refused_when_it_is_read(source):
    with pytest.raises(DataError, match="no Jinja template"):
        ChatTemplate(source)


def test_damaged_settings_and_missing_files_are_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not a JSON object"):
        ChatTemplate.find(tmp_path)
    with pytest.raises(DataError, match=r"nowhere\.jinja cannot be read"):
        ChatTemplate.load(tmp_path / "nowhere.jinja")


def test_a_template_of_somebody_else_reaches_nothing_but_the_messages():
    """It comes with a file from elsewhere, so it runs in a sandbox."""
    assert ChatTemplate("{{ raise_exception.__globals__ }}").render(MESSAGES) == ""
    for source in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(DataError):
            ChatTemplate(source).render(MESSAGES)


def test_the_functions_and_filters_that_templates_of_the_hub_use_are_there():
    source = "{{ messages | tojson }}{{ strftime_now('%Y') | length }}{% for m in messages %}{% break %}{% endfor %}"
    assert ChatTemplate(source).render(MESSAGES[1:]) == '[{"role": "user", "content": "hi"}]4'


CHAT = [*MESSAGES, {"role": "assistant", "content": "yo"}, MESSAGES[1], {"role": "assistant", "content": ""}]


def said(source, messages=CHAT):
    text, answers = ChatTemplate(source, {"eos_token": "!"}).render_answers(messages)
    return text, [text[first:end] for first, end in answers]


def test_answers_are_what_comes_after_the_text_before_them():
    opened = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    source = opened + "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert said(source) == ("[system]be brief![user]hi![assistant]yo![user]hi![assistant]!", ["yo!", "!"])


def test_a_template_may_mark_its_answers_and_the_marks_are_no_text():
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}."
        "{% else %}<{{ m.content }}>{% endif %}{% endfor %}{{ '>' if add_generation_prompt }}"
    )
    assert said(source) == ("<be brief><hi>yo.<hi>.", ["yo", ""])
    assert ChatTemplate(source).render(CHAT[:3]) == "<be brief><hi>yo.>"
    assert ChatTemplate(source).render_whole(CHAT[:3]) == "<be brief><hi>yo."


def test_answers_are_found_where_a_template_drops_what_earlier_ones_began_with():
    """As Qwen3's, in which only the last answer has a place for thoughts."""
    source = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}</>{% endfor %}"
        "{{ '<assistant>' if add_generation_prompt }}"
    )
    text, answers = said(source, [*CHAT[1:4], {"role": "assistant", "content": "bye"}])
    assert answers == ["yo</>", "<think></think>bye</>"] and text.startswith("<user>hi</><assistant>yo</>")


def test_answers_that_cannot_be_told_are_refused():
    with pytest.raises(
        DataError, match=r"message 3: the chat template does not tell .* mark answers by \{% generation"
    ):
        said("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")


def test_the_names_of_special_tokens_come_from_the_tokenizer_where_the_folder_has_none(tmp_path):
    tokenizer = train_tokenizer(DataConfig(), ["abc"])
    assert ChatTemplate(SOURCE).of(tokenizer).render(MESSAGES[1:]) == "[user]hi<eos>>"
    template = ChatTemplate(SOURCE, {"eos_token": "!"}).of(tokenizer)
    assert template.render(MESSAGES[1:]) == "[user]hi!>"
    template.save(tmp_path)
    assert ChatTemplate.find(tmp_path) == template


def test_a_models_tokenizer_says_the_names_in_training_as_in_serving(tmp_path):
    """Also one that it does not put before texts, and where a template's own folder has another."""
    said = ModelTokens(8, (("bos_token", "<s>"), ("eos_token", "</s>")), adds_bos=False)
    tokenizer = Tokenizer(train_tokenizer(DataConfig(), ["abc"]).backend, said)
    template = ChatTemplate("{{ bos_token }}" + SOURCE, {"eos_token": "!"}).of(tokenizer)
    assert template.render(MESSAGES[1:]) == "<s>[user]hi</s>>"
    tokenizer.save(tmp_path / "tokenizer.json")
    template.save(tmp_path)
    assert ChatTemplate.find(tmp_path).render(MESSAGES[1:]) == "<s>[user]hi</s>>"
