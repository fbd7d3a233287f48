"""Chat templates: how messages become the text that a model was trained on, for training and for serving."""

import dataclasses
import datetime
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kforcing_jax.data.beside_tokenizers import TEMPLATE, read_object, read_text, template_in, token_in
from kforcing_jax.data.places import expanded
from kforcing_jax.data.tokenizers import SETTINGS, SPECIAL, Tokenizer
from kforcing_jax.data.whole_file import write_text
from kforcing_jax.errors import DataError

# Around what `{% generation %}` encloses, until the text is done: no text has them, Unicode keeps them for such a use.
_OPENS, _CLOSES = "\ufdd0", "\ufdd1"

Messages = Sequence[dict[str, str]]


class Rendered(NamedTuple):
    """A text, and where in it answers are: (first character, the one after the last) of each, in order."""

    text: str
    answers: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template as tokenizers carry it. It runs in a sandbox: it comes with files of others."""

    source: str
    tokens: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "ChatTemplate":
        """From a file with the template alone, or a folder as `find` takes.

        Raises:
          DataError: the file cannot be read, or is no template; a folder has none.
        """
        found = cls.find(path) if path.is_dir() else cls(read_text(path))
        if found is None:
            raise DataError(f"{path} has no chat template: neither {TEMPLATE} nor a {SETTINGS} with one")
        return found

    @classmethod
    def find(cls, folder: Path) -> "ChatTemplate | None":
        """That of a tokenizer's folder: chat_template.jinja, or `chat_template` of its tokenizer_config.json.

        Raises:
          DataError: it is damaged.
        """
        source, settings = template_in(folder), read_object(folder / SETTINGS)
        tokens = {name: token for name in SPECIAL if (token := token_in(settings, name, folder))}
        return None if source is None else cls(source, tokens)

    def __post_init__(self):
        _compiled(self.source)

    def save(self, folder: Path) -> None:
        """Writes what `find` finds; settings that are there stay, with their tokens. Raises OSError."""
        if not (folder / SETTINGS).exists():
            write_text(folder / SETTINGS, json.dumps(self.tokens, indent=2) + "\n")
        write_text(folder / TEMPLATE, self.source)

    def of(self, tokenizer: Tokenizer) -> "ChatTemplate":
        """The template with the beginning and end of texts of a tokenizer, where its own folder names none.

        A model's tokenizer says all of them, so that training and serving take the same.
        """
        if tokenizer.of_model:
            return dataclasses.replace(self, tokens=self.tokens | dict(tokenizer.of_model.tokens))
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        known = {name: tokenizer.backend.id_to_token(i) for name, i in ids.items() if i is not None}
        return dataclasses.replace(self, tokens={name: text for name, text in known.items() if text} | self.tokens)

    def render(self, messages: Messages) -> str:
        """The text before the assistant's answer. Raises DataError where the template refuses the messages."""
        return _unmarked(self._render(messages, answers=True)).text

    def render_whole(self, messages: Messages) -> str:
        """The text of a chat that has its answers. Raises DataError where the template refuses the messages."""
        return _unmarked(self._render(messages)).text

    def render_answers(self, messages: Messages) -> Rendered:
        """The text of a chat, and where the assistant's answers are in it.

        They are what a template encloses in `{% generation %}`. Of one that does not, they are what is there beyond the
        text before an answer, up to the end of its turn.

        Raises:
          DataError: the template refuses the messages, or gives no such text, so that answers cannot be told.
        """
        rendered = _unmarked(self._render(messages))
        if rendered.answers:
            return rendered
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return rendered._replace(answers=[self._answer(rendered.text, messages, i) for i in turns])

    def _answer(self, text, messages, turn) -> tuple[int, int]:
        before, after = self.render(messages[:turn]), self.render_whole(messages[: turn + 1])
        end = len(after)
        if not text.startswith(after):
            # Some leave out, once a chat goes on, what an answer began with. What ends it is still the same.
            content = messages[turn]["content"].strip()
            ending = content + after.rpartition(content)[2] if content else after
            found = text.find(ending, len(before))
            end = found + len(ending) if found >= 0 else -1
        if not text.startswith(before) or end < len(before):
            raise DataError(
                f"message {turn + 1}: the chat template does not tell where this answer is: the text up to it is "
                "another one once it is given; mark answers by {% generation %} in a template of your own"
            )
        return len(before), end

    def _render(self, messages, answers=False) -> str:
        """`answers`: up to where one is to begin. Others' templates may ask for tools and documents."""
        given: dict[str, Any] = {"tools": None, "documents": None} | self.tokens
        try:
            return _compiled(self.source).render(messages=messages, add_generation_prompt=answers, **given)
        except Exception as error:  # a template may do whatever it likes with messages that it did not expect
            raise DataError(f"messages: the chat template refuses them ({error})") from None


def template_files(path: str) -> list[str]:
    """The files that `ChatTemplate.load` reads, as far as they are there."""
    place = expanded(path)
    return [str(file) for file in (place, place / TEMPLATE, place / SETTINGS) if file.is_file()]


def _unmarked(marked: str) -> Rendered:
    """A text without the marks around its answers."""
    text, answers = "", []
    for part in marked.split(_OPENS):
        answer, closes, rest = part.partition(_CLOSES)
        if closes:
            answers.append((len(text), len(text) + len(answer)))
        text += answer + rest
    return Rendered(text, answers)


@functools.lru_cache(maxsize=8)
def _compiled(source: str):
    jinja2 = _jinja2()
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template is no Jinja template ({error})") from None


@functools.lru_cache(maxsize=1)
def _environment():
    jinja2 = _jinja2()
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}`: what the assistant says."""

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller):
            return f"{_OPENS}{caller()}{_CLOSES}"

    Generation.tags = {"generation"}
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _today
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment


def _jinja2():
    try:
        import jinja2
    except ImportError:
        raise DataError(
            "chat templates need jinja2, which is not installed; pip install 'kforcing-jax[chat]'"
        ) from None
    return jinja2


def _today(form):
    return datetime.datetime.now().strftime(form)


def _refuse(message):
    raise _jinja2().TemplateError(message)
