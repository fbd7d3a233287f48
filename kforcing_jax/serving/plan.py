"""From the fields of a request to what the engine is asked for."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from kforcing_jax.config import check_tau
from kforcing_jax.data.chat_template import ChatTemplate
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.decoding.requests import Request, top_p_for
from kforcing_jax.errors import UserError
from kforcing_jax.serving.errors import ApiError
from kforcing_jax.serving.protocol import ChatRequest, CompletionRequest, Sampling

_DIGITS = 10  # of an id at most
# Characters of a prompt that is tokenised: so many for every token of the context, or what is always possible.
_CHARACTERS_A_TOKEN, _CHARACTERS_ALWAYS = 64, 2**16


class _Engine(Protocol):
    """What is asked of an engine here."""

    @property
    def modes(self) -> tuple[str, ...]: ...
    @property
    def max_length(self) -> int: ...
    @property
    def models(self) -> Any: ...
    def check(self, request: Request) -> None: ...


@dataclasses.dataclass(frozen=True)
class Served:
    """What a server offers.

    Attributes:
      name: of the model.
      engine: says what it can; of `models` only `k` is used.
      tokenizer: None where only ids are known.
      eos_id: ends a text, unless a request ignores it.
      mode: of requests that do not say.
      confidence: of the student's requests that do not say.
      tau_range: temperatures that the student was trained with; None where nothing says so.
      top_p: of the nucleus that the student's tokens are from; 1 where nothing says so. Also of requests in modes `ar`
        and `exact` that do not say.
      most_texts: that one request may ask for.
      chat_template: None where the tokenizer has none.
      tau: of requests that do not say, in every mode; by default 1, or the nearest in `tau_range`.
    """

    name: str
    engine: _Engine
    tokenizer: Tokenizer | None
    eos_id: int | None
    mode: str
    confidence: float
    tau_range: tuple[float, float] | None
    most_texts: int
    chat_template: ChatTemplate | None
    top_p: float = 1.0
    tau: float | None = None

    @property
    def usual_tau(self) -> float:
        """The temperature of requests that do not say."""
        least, most = self.tau_range or (1.0, 1.0)
        return min(max(1.0, least), most) if self.tau is None else self.tau

    @property
    def ids(self) -> dict[str, str]:
        """The mode of every model id: the name alone, and with each mode."""
        return {self.name: self.mode} | {f"{self.name}:{mode}": mode for mode in self.engine.modes}


@dataclasses.dataclass(frozen=True)
class Text:
    """One text that is wanted.

    Attributes:
      request: for the engine.
      room: tokens of it that are wanted; the engine always draws one.
      stop: strings that end it.
      echo: whether the prompt is told again, before it.
      prompt_text: of the prompt, where it came as text.
    """

    request: Request
    room: int
    stop: tuple[str, ...]
    echo: bool = False
    prompt_text: str | None = None


def plan_completion(request: CompletionRequest, served: Served) -> list[Text]:
    """Texts of a completion, those of a prompt next to each other.

    Raises:
      ApiError: what cannot be served, by field.
    """
    _check_count(request, served, len(request.prompts))
    prompts = [_prompt_ids(prompt, request.add_special_tokens, served) for prompt in request.prompts]
    texts = []
    for given, ids in zip(request.prompts, prompts, strict=True):
        text = given if isinstance(given, str) else None
        echo = {"echo": bool(request.echo), "prompt_text": text}
        texts += _texts(request, served, ids, **echo)
    return texts


def plan_chat(request: ChatRequest, served: Served) -> list[Text]:
    """Texts of an answer. Raises ApiError: what cannot be served, by field; 404 without a chat template."""
    if served.chat_template is None or served.tokenizer is None:
        raise ApiError(
            404,
            f"{served.name} has no chat template: it continues text, see /v1/completions; a template can be given when "
            "the server is started",
        )
    _check_count(request, served, 1)
    try:
        text = served.chat_template.render([message.plain() for message in request.messages])
        _check_size(text, served, "messages")
        ids = served.tokenizer.encode_marked(text)
    except UserError as error:
        raise ApiError(400, str(error), "messages") from None
    return _texts(request, served, ids)


def _check_count(request, served, prompts):
    if prompts * request.choices > served.most_texts:
        raise ApiError(
            400,
            f"{prompts} prompts with n = {request.choices} are {prompts * request.choices} texts; one request may have "
            f"{served.most_texts}",
            "n" if request.choices > 1 else "prompt",
        )


def _prompt_ids(prompt: str | list[int], with_beginning: bool | None, served: Served) -> list[int]:
    if isinstance(prompt, str):
        if served.tokenizer is None:
            raise ApiError(400, "prompt should be token ids: this server has no tokenizer", "prompt")
        _check_size(prompt, served, "prompt")
        try:
            encode = served.tokenizer.encode if with_beginning is False and prompt else served.tokenizer.encode_prompt
            prompt = encode(prompt)
        except UserError as error:
            raise ApiError(400, str(error), "prompt") from None
    if not prompt:
        raise ApiError(400, "prompt is empty; start from a token, such as that which ends documents", "prompt")
    return prompt


def _check_size(text: str, served: Served, field: str):
    """Raises ApiError for a text that is far longer than a context: tokenising megabytes takes gigabytes."""
    most = max(_CHARACTERS_A_TOKEN * served.engine.max_length, _CHARACTERS_ALWAYS)
    if len(text) > most:
        said = f"{field} has {len(text):,} characters; the limit is {most:,}, for a context of"
        raise ApiError(400, f"{said} {served.engine.max_length} tokens", field, "context_length_exceeded")


def _texts(request: Sampling, served: Served, prompt: Sequence[int], **more) -> list[Text]:
    mode = _mode(request, served)
    _check_mode(request, served, mode)
    room = _room(request, served, prompt)
    seed = secrets.randbits(32) if request.seed is None else request.seed
    ends = () if request.ignore_eos or served.eos_id is None else (served.eos_id,)
    alternatives = request.alternatives
    asked = Request(
        prompt=prompt,
        max_new_tokens=max(room, 1),
        mode=mode,
        k=request.k,
        tau=_tau(request, served, mode),
        confidence=_confidence(request, served, mode),
        frequency_penalty=request.frequency_penalty or 0.0,
        end_ids=tuple(dict.fromkeys((*ends, *(request.stop_token_ids or ())))),
        top_p=_top_p(request, served, mode),
        top_k=_top_k(request),
        logit_bias=_bias(request),
        logprobs=alternatives,
        prompt_logprobs=alternatives is not None and more.get("echo", False),
    )
    _check(asked, request, served)
    if request.stops and served.tokenizer is None:
        raise ApiError(400, "stop has no effect: this server has no tokenizer; see stop_token_ids", "stop")
    seeds = [(seed + choice) % 2**32 for choice in range(request.choices)]
    return [Text(dataclasses.replace(asked, seed=seed), room, request.stops, **more) for seed in seeds]


def _mode(request, served) -> str:
    named = served.ids.get(request.model or served.name)
    if named is None:
        raise ApiError(
            404,
            f"there is no model {request.model[:100]!r} here; there are {', '.join(served.ids)}",
            "model",
            "model_not_found",
        )
    if request.mode is None:
        return named
    if request.model not in (None, served.name) and request.mode != named:
        raise ApiError(400, f"mode = {request.mode!r} is not that of the model {request.model!r}", "mode")
    if request.mode not in served.engine.modes:
        raise ApiError(400, f"mode = {request.mode!r} is not to be had here; {_listed(served.engine.modes)} is", "mode")
    return request.mode


def _check_mode(request, served, mode):
    """Refuses what a mode cannot honour, or has no use for."""
    able = [other for other in served.engine.modes if other != "student"]
    can = f"mode {_listed(able)} can" if able else "an AR teacher could, and this server has none"
    asked = {
        "top_k": request.top_k not in (None, 0, -1),
        "logit_bias": bool(request.logit_bias),
        "logprobs": request.alternatives is not None,
    }
    for name, is_asked in asked.items():
        if is_asked and mode == "student":
            raise ApiError(
                400,
                f"{name} = {getattr(request, name)} is not possible in mode student, whose tokens are settled by the "
                f"noise that goes in: {can}",
                name,
            )
    if request.confidence and mode != "student":
        raise ApiError(400, f"confidence = {request.confidence} has no effect in mode {mode}", "confidence")
    if request.k is not None and mode == "ar":
        raise ApiError(400, f"k = {request.k} has no effect in mode ar, which draws one token a pass", "k")


def _top_p(request, served, mode) -> float:
    try:
        return top_p_for(mode, request.top_p, served.top_p)
    except UserError as error:
        raise ApiError(400, f"{error}{_others_take_any(served)}", "top_p") from None


def _others_take_any(served) -> str:
    others = [mode for mode in served.engine.modes if mode != "student"]
    return f"; mode {_listed(others)} takes any" if others else ""


def _tau(request, served, mode) -> float:
    wanted, trained = request.temperature, served.tau_range
    if wanted is None:
        return served.usual_tau
    if mode == "student" and (wanted == 0 or (trained and not trained[0] <= wanted <= trained[1])):
        raise ApiError(400, _untrained(wanted, trained, served), "temperature")
    if wanted == 0:
        return 1.0  # of the likeliest token alone, see `_top_k`
    try:
        check_tau("temperature", wanted)
    except UserError as error:
        raise ApiError(400, str(error), "temperature") from None
    return wanted


def _untrained(wanted, trained, served) -> str:
    known = " (" + " to ".join(f"{tau:g}" for tau in dict.fromkeys(trained)) + ")" if trained else ""
    return f"temperature = {wanted:g} is none that the student was trained with{known}{_others_take_any(served)}"


def _top_k(request) -> int:
    """At temperature 0 the likeliest token, and nothing else."""
    return 1 if request.temperature == 0 else max(request.top_k or 0, 0)


def _confidence(request, served, mode) -> float:
    if mode != "student":
        return 0.0
    return served.confidence if request.confidence is None else request.confidence


def _bias(request) -> dict[int, float]:
    for key in request.logit_bias or {}:
        if len(key) > _DIGITS or not key.isascii() or not key.isdecimal() or str(int(key)) != key:
            raise ApiError(400, f"logit_bias has {key[:50]!r}, which is no token id", "logit_bias")
    return {int(key): bias for key, bias in (request.logit_bias or {}).items()}


def _room(request, served, prompt) -> int:
    """New tokens: what is wanted, or all that fit."""
    length, most = len(prompt), served.engine.max_length
    wanted = request.wanted_tokens
    if length + max(wanted or 0, 1) > most:
        new = f" and max_tokens = {wanted} exceed" if length < most else " leaves no room in"
        said = f"a prompt of {length} token{'s' * (length != 1)}{new} the context of {most} tokens"
        raise ApiError(400, said, "prompt" if length >= most else "max_tokens", "context_length_exceeded")
    return most - length if wanted is None else wanted


def _check(asked: Request, request: Sampling, served):
    try:
        served.engine.check(asked)
    except UserError as error:
        name, _, rest = str(error).partition(" ")
        name = {"end_ids": "stop_token_ids", "tau": "temperature"}.get(name, name)
        is_field = name in type(request).model_fields
        raise ApiError(400, f"{name} {rest}", name if is_field else None) from None


def _listed(names: Sequence[str]) -> str:
    return " or ".join(names)
