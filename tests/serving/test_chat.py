"""Chat templates out of tokenizers' folders."""

import json

import pytest

from kforcing_jax.errors import DataError
from kforcing_jax.serving.chat import ChatTemplate

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
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON"):
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
