"""Chat templates: how messages become the text that a model was trained on."""

import dataclasses
import datetime
import json
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kforcing_jax.errors import DataError


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
        found = cls.find(path) if path.is_dir() else cls(_read(path))
        if found is None:
            raise DataError(
                f"{path} has no chat template: neither chat_template.jinja nor a tokenizer_config.json with one"
            )
        return found

    @classmethod
    def find(cls, folder: Path) -> "ChatTemplate | None":
        """That of a tokenizer's folder: chat_template.jinja, or `chat_template` of its tokenizer_config.json.

        Raises:
          DataError: it is damaged.
        """
        settings, alone = {}, folder / "chat_template.jinja"
        if (folder / "tokenizer_config.json").is_file():
            try:
                settings = json.loads(_read(folder / "tokenizer_config.json"))
            except ValueError as error:
                raise DataError(f"{folder / 'tokenizer_config.json'} is not JSON ({error})") from None
        source = _read(alone) if alone.is_file() else _default(settings.get("chat_template"))
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: _content(settings[name]) for name in names if settings.get(name)}
        return None if source is None else cls(source, tokens)

    def __post_init__(self):
        self._compiled()

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text before the assistant's answer. Raises DataError where the template refuses the messages."""
        try:
            return self._compiled().render(messages=messages, add_generation_prompt=True, **self.tokens)
        except Exception as error:  # a template may do whatever it likes with messages that it did not expect
            raise DataError(f"messages: the chat template refuses them ({error})") from None

    def _compiled(self):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _today
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template is no Jinja template ({error})") from None


def _today(form):
    return datetime.datetime.now().strftime(form)


def _refuse(message):
    raise jinja2.TemplateError(message)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _default(template) -> str | None:
    """Some tokenizers have several, by name."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        return named.get("default")
    return template


def _content(token) -> str:
    return token["content"] if isinstance(token, dict) else token
