"""What lies beside a tokenizer.json: settings, with tokens that mean something, and a chat template."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kforcing_jax.data.tokenizers import SETTINGS
from kforcing_jax.errors import DataError

TEMPLATE = "chat_template.jinja"


def read_text(file: Path) -> str:
    """The content of a file. Raises DataError."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; nothing where there is no such file. Raises DataError."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not a JSON object ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} is not a JSON object")
    return content


def template_in(folder: Path) -> str | None:
    """The chat template of a folder: a file of its own, or in the settings. Raises DataError where it is damaged."""
    if (folder / TEMPLATE).is_file():
        return read_text(folder / TEMPLATE)
    template = read_object(folder / SETTINGS).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = (entry for entry in template if isinstance(entry, dict))
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    return _text(template, folder, "chat_template")


def token_in(settings: Mapping[str, Any], name: str, folder: Path) -> str | None:
    """A token of the settings of a folder, which is its text or an object with it. Raises DataError for another."""
    token = settings.get(name)
    return _text(token.get("content") if isinstance(token, dict) else token, folder, name) or None


def _text(value, folder, name) -> str | None:
    if value and not isinstance(value, str):
        raise DataError(f"{folder / SETTINGS}: {name} = {value!r:.60} should be a text")
    return value if isinstance(value, str) else None
