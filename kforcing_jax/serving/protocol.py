"""The fields of requests: OpenAI's, those that load tools and other servers add, and ours."""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kforcing_jax.serving.errors import ApiError

MOST_CHOICES = 128


def _listed(value):
    """A text alone is a list of one: of a union each member would say that it is not it."""
    return [value] if isinstance(value, str) else value


_Count = Annotated[int, Field(ge=0, lt=2**31)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
# What other servers would do, and this one does not: their fields, and the values that ask for nothing.
_NEUTRAL = {
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "length_penalty": (None, 1),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "use_beam_search": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "priority": (None, 0),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "store": (None, False),
}
# What changes nothing that is answered.
_UNREAD = ("user", "metadata", "request_id", "safety_identifier", "service_tier", "prompt_cache_key")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream tells besides text. Obfuscation is never added, whatever is asked."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(_Strict):
    """What completions and chats share. None is as if the field was not there."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    best_of: int | None = None
    max_tokens: _Count | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[_Stop], Field(max_length=16), BeforeValidator(_listed)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    mode: Literal["student", "ar", "exact"] | None = None
    k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    confidence: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            raise ApiError(400, "the body should be a JSON object")
        for name, neutral in _NEUTRAL.items():
            if fields.get(name) not in neutral:
                raise ApiError(
                    400, f"{name} = {_shown(fields[name])} is not supported; leave it out, or {neutral[-1]!r}", name
                )
        for name in fields.keys() - cls.model_fields.keys() - _NEUTRAL.keys() - set(_UNREAD):
            near = difflib.get_close_matches(name, cls.model_fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ApiError(400, f"{_plain(name)} is no field of this request{hint}", _plain(name))
        return {name: value for name, value in fields.items() if name in cls.model_fields}

    @model_validator(mode="after")
    def _fitting(self):
        if self.best_of not in (None, self.choices):
            raise ApiError(400, f"best_of = {self.best_of} is not supported beside n = {self.choices}", "best_of")
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options has no effect without stream", "stream_options")
        return self

    @property
    def choices(self) -> int:
        """Texts for every prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a text."""
        return tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every event of a stream has the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to tell beside each; None where no log-probabilities are wanted."""
        raise NotImplementedError

    @property
    def wanted_tokens(self) -> int | None:
        """Of every text at most; None for the room that there is."""
        return self.max_tokens


class CompletionRequest(Sampling):
    """A body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_kind_of_prompt(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            prompt = fields.get("prompt")
            if prompt is None:
                raise ApiError(400, "prompt is missing: text, token ids, or a list of either", "prompt")
            kinds = {type(part) for part in prompt} if isinstance(prompt, list) else {type(prompt)}
            if kinds not in ({str}, {int}, {list}) or (kinds == {int} and not isinstance(prompt, list)):
                raise ApiError(400, "prompt should be text, token ids, or a list of either", "prompt")
            if kinds == {list} and any(type(i) is not int for ids in prompt for i in ids):
                raise ApiError(400, "prompt should be text, token ids, or a list of either", "prompt")
        return fields

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to tell beside each; None where no log-probabilities are wanted."""
        return self.logprobs

    @property
    def prompts(self) -> list:
        """Texts or lists of ids."""
        return self.prompt if isinstance(self.prompt, list) and type(self.prompt[0]) is not int else [self.prompt]


class Part(_Strict):
    """Of a message in parts; only text is read."""

    type: Literal["text"]
    text: str


def _in_parts(content):
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Strict):
    """Of a chat."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, fields: Any) -> Any:
        """Answers come back as they were given: with fields that say that there is nothing."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if name in cls.model_fields or value not in (None, [])}

    role: Annotated[str, Field(min_length=1, max_length=50)]
    content: Annotated[list[Part], BeforeValidator(_in_parts)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        text = "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class ChatRequest(Sampling):
    """A body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _log_probabilities(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs has no effect without logprobs = true", "top_logprobs")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to tell beside each; None where no log-probabilities are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        """Of the answer at most, by either field; None for the room that there is."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def parse(kind: type[Sampling], fields: Any) -> Sampling:
    """A request of decoded JSON.

    Raises:
      ApiError: 400, naming the first field that is wrong, and its value.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else None
        said = re.sub("^(Input|String|List) | after validation.*", "", first["msg"])
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"{where} is no field of this request", name) from None
        if first["type"] == "missing":
            raise ApiError(400, f"{where} is missing", name) from None
        raise ApiError(400, f"{where} = {_shown(first['input'])} {said}", name) from None


def _plain(name: str) -> str:
    """Of what a client sent, and may be no text."""
    return name[:50].encode("ascii", "backslashreplace").decode()


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
