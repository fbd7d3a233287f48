"""A text as a client sees it, grown from what the engine's steps give."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.decoding import Logprobs, Update
from kforcing_jax.serving.finish import trim
from kforcing_jax.serving.plan import Text
from kforcing_jax.serving.text import IdStream, TextStream, prompt_text

# What OpenAI's servers say where the logarithm of 0 is no JSON.
_IMPOSSIBLE = -9999.0


class Scored(NamedTuple):
    """A token with its log-probability, in nats, under the teacher at temperature 1.

    `offset` is that of its text in the text of the choice. `value` and `top`, the likeliest tokens' texts and values in
    descending order, are None of a prompt's first token, which nothing predicts.
    """

    text: str
    offset: int
    value: float | None
    top: list[tuple[str, float]] | None


class Delta(NamedTuple):
    """What an update added to a text: text and tokens; `scores` where they are wanted; `reason` where it ended."""

    text: str
    tokens: int
    scores: list[Scored]
    reason: str | None


@dataclasses.dataclass
class Usage:
    """Tokens and passes of one text, or of several."""

    prompt: int = 0
    completion: int = 0
    student_passes: int = 0
    teacher_passes: int = 0

    @property
    def passes(self) -> int:
        """Of either model."""
        return self.student_passes + self.teacher_passes

    def json(self) -> dict[str, int]:
        """OpenAI's fields, and passes."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "passes": self.passes,
            "student_passes": self.student_passes,
            "teacher_passes": self.teacher_passes,
        }


class Choice:
    """One text: what of it is certain, and what it took."""

    def __init__(self, index: int, wanted: Text, tokenizer: Tokenizer | None):
        prompt = wanted.request.prompt
        self.index, self.wanted, self.usage = index, wanted, Usage(prompt=len(prompt))
        self.reason: str | None = None
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, prompt) if tokenizer else IdStream(prompt)
        self._held, self._offset = "", 0
        self._prompt_scores: Logprobs | None = None
        self._is_told = not wanted.echo

    @property
    def seed(self) -> int:
        """Of its noise: the same request with it gives the same text."""
        return self.wanted.request.seed

    def add(self, update: Update) -> Delta:
        """What an update of the engine adds to the text."""
        if update.prompt_logprobs is not None:
            self._prompt_scores = update.prompt_logprobs
        tokens = update.tokens[: self.wanted.room - self.usage.completion]
        if not tokens and not update.is_finished:
            return Delta("", 0, [], None)
        echo, scores = self._echo()
        pieces = [self._stream.push(token) for token in tokens]
        trimmed = trim(
            tokens,
            pieces,
            room=self.wanted.room - self.usage.completion,
            end_ids=self.wanted.request.end_ids,
            stop=self.wanted.stop,
            held=self._held,
        )
        self.reason, self._held = trimmed.reason, trimmed.held
        self.usage.completion += trimmed.kept
        self.usage.student_passes = update.passes.get("student", 0)
        self.usage.teacher_passes = update.passes.get("teacher", 0)
        if update.logprobs is not None:
            scores += self._scored(tokens[: trimmed.kept], pieces, update.logprobs)
        rest = self._stream.finish() if trimmed.reason and not trimmed.is_cut else ""
        return Delta(echo + trimmed.text + rest, trimmed.kept, scores, trimmed.reason)

    def _echo(self) -> tuple[str, list[Scored]]:
        """The prompt, before the first tokens."""
        if self._is_told:
            return "", []
        self._is_told = True
        prompt = self.wanted.request.prompt
        scores: list[Scored] = []
        if self._prompt_scores is not None:
            stream = TextStream(self._tokenizer, ()) if self._tokenizer else IdStream(())
            pieces = [stream.push(token) for token in prompt]
            scores = [Scored(self._text(prompt[0]), 0, None, None)]
            self._offset = len(pieces[0])
            scores += self._scored(prompt[1:], pieces[1:], self._prompt_scores)
        given = self.wanted.prompt_text
        echo = prompt_text(self._tokenizer, prompt) if given is None else given
        self._offset = len(echo)  # a vocabulary may not give a text back as it was given
        return echo, scores

    def _scored(self, tokens: Sequence[int] | np.ndarray, pieces: Sequence[str], logprobs: Logprobs) -> list[Scored]:
        scores = []
        for row, token in enumerate(tokens):
            value, text = _number(logprobs.token_N[row]), self._text(token)
            likeliest = zip(logprobs.top_ids_NxT[row], logprobs.top_NxT[row], strict=True)
            top = [(self._text(int(other)), _number(of_other)) for other, of_other in likeliest]
            scores.append(Scored(text, self._offset, value, top))
            self._offset += len(pieces[row])
        return scores

    def _text(self, token) -> str:
        return self._tokenizer.decode([token], show_special=True) if self._tokenizer else str(token)


def total(choices: Sequence[Choice]) -> Usage:
    """Of the choices of one request; a prompt counts once, however many choices it has."""
    usages = [choice.usage for choice in choices]
    prompts = {id(choice.wanted.request.prompt): choice.usage.prompt for choice in choices}
    return Usage(
        sum(prompts.values()),
        sum(usage.completion for usage in usages),
        sum(usage.student_passes for usage in usages),
        sum(usage.teacher_passes for usage in usages),
    )


def _number(value) -> float:
    return float(value) if value > _IMPOSSIBLE else _IMPOSSIBLE  # nor is what is no number JSON
