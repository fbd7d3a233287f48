"""Chats: messages out of JSON lines, and the rows of what a chat template makes of them."""

import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kforcing_jax.config import DataConfig
from kforcing_jax.data import packing
from kforcing_jax.data.chat_template import ChatTemplate, Rendered
from kforcing_jax.data.files import checked_text, json_entries
from kforcing_jax.data.packing import Rows
from kforcing_jax.data.paths import matching_files
from kforcing_jax.data.places import expanded
from kforcing_jax.data.tokenizers import Tokenizer, is_trained
from kforcing_jax.data.units import Reader, Units, in_parts, split_at_random
from kforcing_jax.errors import DataError

ROLES = ("system", "user", "assistant")
_log = logging.getLogger("kforcing_jax")


class Chat(NamedTuple):
    """Messages, as a template takes them, and the file and line where they are."""

    where: str
    messages: tuple[dict[str, str], ...]

    @property
    def characters(self) -> int:
        """Of all messages."""
        return sum(len(message["content"]) for message in self.messages)


@dataclasses.dataclass(frozen=True)
class ChatDocuments:
    """Chats that are in memory. With `answers` rows know which tokens are an assistant's."""

    given: tuple[Chat, ...]
    template: ChatTemplate
    answers: bool

    def texts(self) -> Iterator[str]:
        """Chats as text. Raises DataError, naming file and line, where the template refuses one."""
        return (_rendered(self.template, chat, answers=False).text for chat in self.given)

    def rows(self, tokenizer: Tokenizer, how: str, seq_len: int) -> Rows:
        """Rows of the chats, with nothing between them but what the template gives.

        Those without an answer are left out where only answers are learnt.

        Raises:
          DataError: the template refuses a chat, or its text is none of the vocabulary; names file and line.
        """
        template, kept = self.template.of(tokenizer), list(self.given)
        if self.answers:
            kept = [chat for chat in kept if any(message["role"] == "assistant" for message in chat.messages)]
        rendered = [_rendered(template, chat, self.answers) for chat in kept]
        encoded = list(tokenizer.encode_marked_documents([text for text, _ in rendered]))
        padding = tokenizer.eos_id or 0
        frame = (padding if tokenizer.bos_id is None else tokenizer.bos_id, padding)
        ids = [np.array(tokens, tokenizer.dtype) for tokens, _ in encoded]
        rows = packing.pack(ids, how, seq_len, padding, frame)
        answers_RxN = None
        if self.answers:
            masks = [_in_answers(spans, chat.answers) for (_, spans), chat in zip(encoded, rendered, strict=True)]
            # Of the same lengths, so they come to lie as the tokens do.
            answers_RxN = packing.pack(masks, how, seq_len, 0, (0, 0)).tokens_RxN.astype(bool)
        unknown_id = tokenizer.unknown_id
        unknown = 0 if unknown_id is None else sum(tokens.count(unknown_id) for tokens, _ in encoded)
        return dataclasses.replace(
            rows, unknown_tokens=unknown, skipped=len(self.given) - len(kept), answers_RxN=answers_RxN
        )


class Chats(Reader):
    """A user's files of chats, each line {"messages": [{"role": ..., "content": ...}, ...]}."""

    @functools.cached_property
    def _given_tokenizer(self) -> Tokenizer | None:
        return super().tokenizer()

    def tokenizer(self) -> Tokenizer | None:
        """That of the configuration, read once."""
        return self._given_tokenizer

    def files(self) -> Sequence[str]:
        """All that `data.path` stands for."""
        return matching_files(self.config.path, quiet=True)

    def template(self) -> ChatTemplate:
        """That of `data.chat_template`, or the one that comes along with the tokenizer.

        Raises:
          DataError: there is none, or it cannot be read or is none.
        """
        tokenizer = self.tokenizer()
        found = _template(self.config, tokenizer)
        if found is None:
            raise DataError(
                f'data.source = "chat" needs a chat template, and data.tokenizer = {self.config.tokenizer!r} comes '
                "with none: set data.chat_template to a .jinja file, or a folder that has one"
            )
        return found if tokenizer is None else found.of(tokenizer)

    def units(self) -> Units:
        """Units of distinct chats that fit into memory, in random order, a random part of them for validation.

        Raises:
          DataError: a line that is no chat; fewer than two chats.
        """
        template, answers = self.template(), self.config.loss_on == "answers"
        chats = _distinct(chat for path in matching_files(self.config.path) for chat in _chats(path))
        if len(chats) < 2:
            raise DataError(
                f"data.path = {self.config.path!r} holds {len(chats)} distinct chats, and one is needed for training "
                "and one for validation; give more"
            )
        parts = zip(("train", "validation"), split_at_random(self.config, self.seed, chats), strict=True)
        return {
            split: [
                ChatDocuments(part, template, answers) for part in in_parts(documents, lambda chat: chat.characters)
            ]
            for split, documents in parts
        }

    def save_beside(self, directory: Path, tokenizer: Tokenizer) -> None:
        """The template, so that what is trained can be served with it."""
        self.template().of(tokenizer).save(directory)


def _template(config: DataConfig, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    if config.chat_template:
        return ChatTemplate.load(expanded(config.chat_template))
    if tokenizer and tokenizer.of_model:
        source = tokenizer.of_model.chat_template
        return ChatTemplate(source, dict(tokenizer.of_model.tokens)) if source else None
    place = expanded(config.tokenizer)
    if is_trained(config) or not place.exists():
        return None
    return ChatTemplate.find(place if place.is_dir() else place.parent)


def _chats(path: str) -> Iterator[Chat]:
    """The chats of a file. Raises DataError for an entry that is none, naming file and line."""
    return (Chat(where, _messages(entry, where)) for where, entry in json_entries(path))


def _messages(entry, where) -> tuple[dict[str, str], ...]:
    messages = entry.get("messages") if isinstance(entry, dict) else None
    if not isinstance(messages, list) or not messages:
        like = '{"messages": [{"role": "user", "content": "..."}, ...]}'
        raise DataError(f'{where} has no list "messages"; each line should be {like}')
    return tuple(_message(message, f"{where}, message {number}") for number, message in enumerate(messages, start=1))


def _message(message, where) -> dict[str, str]:
    role, content = (message.get(name) if isinstance(message, dict) else None for name in ("role", "content"))
    if role not in ROLES:
        raise DataError(f"{where}: role = {role!r} is not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where}: content = {str(content)[:60]!r} should be text")
    return {"role": role, "content": checked_text(content, where) or ""}


def _distinct(chats) -> list[Chat]:
    """Each of them once, in their order."""
    given = list(chats)
    once = {json.dumps(chat.messages): chat for chat in reversed(given)}
    if len(once) < len(given):
        _log.info("left out %d of %d chats, which are there twice", len(given) - len(once), len(given))
    return list(once.values())[::-1]


def _rendered(template, chat, answers) -> Rendered:
    try:
        if answers:
            return template.render_answers(list(chat.messages))
        return Rendered(template.render_whole(list(chat.messages)), [])
    except DataError as error:
        raise DataError(f"{chat.where}: {error}") from None


def _in_answers(spans_Tx2, answers) -> np.ndarray:
    """Which tokens have a character of an answer, uint8 (T,)."""
    start_T, stop_T = spans_Tx2.T
    # Some tokenizers say that a token of white space has no characters, at its end.
    is_blank_T, found_T = start_T == stop_T, np.zeros(len(spans_Tx2), np.uint8)
    for first, end in answers:
        found_T |= np.where(is_blank_T, (start_T > first) & (start_T <= end), (stop_T > first) & (start_T < end))
    return found_T
