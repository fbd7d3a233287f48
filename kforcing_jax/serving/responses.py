"""The JSON of answers: completions and chats, whole and in events."""

import itertools
import json
import time
from collections.abc import Sequence

from kforcing_jax.serving.choices import Choice, Delta, Scored, total
from kforcing_jax.serving.text import INCOMPLETE


class Completions:
    """Answers of `/v1/completions`."""

    prefix, kind, event_kind = "cmpl", "text_completion", "text_completion"

    def begin(self, choice: Choice) -> dict | None:
        """What an event says before the first text of a choice, if anything."""
        return None

    def event(self, delta: Delta) -> dict:
        """What an event says of a choice."""
        return {"text": delta.text, "logprobs": self.scores(delta.scores)}

    def whole(self, text: str, scores: Sequence[Scored]) -> dict:
        """What the answer says of a choice."""
        return {"text": text, "logprobs": self.scores(scores)}

    def scores(self, scores: Sequence[Scored]) -> dict | None:
        """Log-probabilities, where they are wanted."""
        if not scores:
            return None
        return {
            "tokens": [score.text for score in scores],
            "token_logprobs": [score.value for score in scores],
            "top_logprobs": [self._by_text(score) for score in scores],
            "text_offset": [score.offset for score in scores],
        }

    def _by_text(self, score) -> dict[str, float] | None:
        """The likeliest tokens, and the token itself. Of several with one text, bytes of characters, the likeliest."""
        if score.top is None:
            return None
        return dict([(score.text, score.value), *score.top[::-1]])


class Chats(Completions):
    """Answers of `/v1/chat/completions`."""

    prefix, kind, event_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, choice: Choice) -> dict | None:
        """The role of who answers."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def event(self, delta: Delta) -> dict:
        """What an event says of a choice: new text alone."""
        return {"delta": {"content": delta.text} if delta.text else {}, "logprobs": self.scores(delta.scores)}

    def whole(self, text: str, scores: Sequence[Scored]) -> dict:
        """What the answer says of a choice: a message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": self.scores(scores)}

    def scores(self, scores: Sequence[Scored]) -> dict | None:
        """Log-probabilities with the bytes of their tokens, where they are wanted."""
        if not scores:
            return None

        def named(text, value):
            is_whole = INCOMPLETE not in text  # otherwise the text does not say which bytes they are
            return {"token": text, "logprob": value, "bytes": list(text.encode()) if is_whole else None}

        def entry(score):
            return named(score.text, score.value) | {"top_logprobs": list(itertools.starmap(named, score.top))}

        return {"content": list(map(entry, scores)), "refusal": None}


class Answer:
    """The answer to one request, whole or as a stream of server-sent events."""

    def __init__(self, form: Completions, number: str, model: str, choices: Sequence[Choice]):
        self._form, self._choices = form, choices
        self._head = {"id": f"{form.prefix}-{number}", "created": int(time.time()), "model": model}

    def whole(self, parts: Sequence[Sequence[Delta]]) -> dict:
        """Of the deltas of every choice."""
        choices = []
        for choice, deltas in zip(self._choices, parts, strict=True):
            scores = [score for delta in deltas for score in delta.scores]
            said = self._form.whole("".join(delta.text for delta in deltas), scores)
            choices.append({"index": choice.index, "finish_reason": choice.reason, "seed": choice.seed} | said)
        return self._head | {"object": self._form.kind, "choices": choices, "usage": total(self._choices).json()}

    def first_events(self) -> bytes:
        """What comes before any text."""
        begun = [(choice, self._form.begin(choice)) for choice in self._choices]
        return b"".join(
            self._event([{"index": choice.index, "finish_reason": None} | said]) for choice, said in begun if said
        )

    def event(self, choice: Choice, delta: Delta, with_usage: bool) -> bytes:
        """Of one choice's delta."""
        said = {"index": choice.index, "finish_reason": delta.reason, "tokens": delta.tokens, "seed": choice.seed}
        usage = {"usage": total(self._choices).json()} if with_usage else {}
        return self._event([said | {"passes": choice.usage.passes} | self._form.event(delta)], **usage)

    def usage_event(self) -> bytes:
        """The last one, of a request that wants it."""
        return self._event([], usage=total(self._choices).json())

    def _event(self, choices: list, **more) -> bytes:
        return event_of(self._head | {"object": self._form.event_kind, "choices": choices} | more)


def event_of(content: dict) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


LAST_EVENT = b"data: [DONE]\n\n"
