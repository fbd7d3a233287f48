"""What a request asks for, and whether it can be had."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kforcing_jax.config import check_tau
from kforcing_jax.errors import DataError

# Who decodes: the student alone, the AR teacher alone, or the teacher what the student drafts.
MODES = ("student", "ar", "exact")
# End ids that a request may have.
MOST_END_IDS = 8
# Of a token's logit, for each time that it was generated.
MOST_PENALTY = 1e6
# Tokens whose logits a request may change, and by how much either way.
MOST_BIASES = 64
MOST_BIAS = 100.0
# Alternatives of a token whose log-probabilities a request may ask for.
MOST_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to continue.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: at most this many new ones.
      seed: of the noise, in [0, 2^32).
      noise: the uniforms of the new tokens, instead of the seed.
      mode: one of `MODES`.
      k: tokens of a window, at most what the engine has; by default that.
      tau: temperature, in [1e-6, 1000].
      confidence: of the confident stride, in [0, 1]; 0 keeps whole windows. Of mode `student` only.
      frequency_penalty: subtracted from a token's logit for every time it was generated.
      end_ids: tokens that end the text.
      top_k: draw from the so many likeliest tokens only, and those as likely as the last of them; 0 is all.
      top_p: then from the fewest likeliest that have this probability together, in (0, 1]. In mode `student` 1: its
        tokens are from the nucleus of its training already, see `top_p_for`.
      logit_bias: added to the logits of tokens, by id.
      logprobs: report the log-probability of every new token, and of so many alternatives. They are the teacher's own:
        at temperature 1, before bias, penalty and truncation.
      prompt_logprobs: the same for the tokens of the prompt but the first.

    What comes after `end_ids` is the teacher's: of modes `ar` and `exact` only.
    """

    prompt: Sequence[int] | np.ndarray
    max_new_tokens: int
    seed: int = 0
    noise: Sequence[float] | np.ndarray | None = None
    mode: str = "student"
    k: int | None = None
    tau: float = 1.0
    confidence: float = 0.0
    frequency_penalty: float = 0.0
    end_ids: Sequence[int] = ()
    top_k: int = 0
    top_p: float = 1.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: bool = False

    @property
    def end(self) -> int:
        """The longest text, prompt included."""
        return len(self.prompt) + self.max_new_tokens

    def check(self, vocab_size: int) -> None:
        """Raises DataError or ConfigError for a value that no engine takes."""
        if not len(whole_numbers(self.prompt, "prompt", vocab_size)):
            raise DataError("prompt is empty; start from a token, such as EOS")
        whole_numbers([self.seed], "seed", 2**32)
        whole_numbers(self.end_ids, "end_ids", vocab_size)
        if len(self.end_ids) > MOST_END_IDS:
            raise DataError(f"end_ids has {len(self.end_ids)} ids; at most {MOST_END_IDS} are possible")
        check_count("max_new_tokens", self.max_new_tokens)
        if self.k is not None:
            check_count("k", self.k)
        if not is_finite_number(self.tau):
            raise DataError(f"tau = {self.tau!r} should be one number")
        check_tau("tau", self.tau)
        check_mode(self.mode)
        check_confidence("confidence", self.confidence, self.mode)
        check_penalty("frequency_penalty", self.frequency_penalty)
        if self.noise is not None:
            check_noise(self.noise, (self.max_new_tokens,))
        check_truncation(self.top_k, self.top_p)
        check_bias(self.logit_bias, vocab_size)
        self._check_logprobs()
        if self.mode == "student":
            self._check_student()

    def _check_logprobs(self):
        if self.logprobs is not None and not (is_whole_number(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS):
            raise DataError(f"logprobs = {self.logprobs!r} should be a whole number from 0 to {MOST_LOGPROBS}, or None")
        if not isinstance(self.prompt_logprobs, (bool, np.bool_)):
            raise DataError(f"prompt_logprobs = {self.prompt_logprobs!r} should be True or False")
        if self.prompt_logprobs and self.logprobs is None:
            raise DataError("prompt_logprobs = True needs logprobs, the number of alternatives, at least 0")

    def _check_student(self):
        """A student's tokens are argmaxes that know their uniform already: no distribution to cut or report."""
        for name, default in _OF_TEACHERS.items():
            value = getattr(self, name)
            if value != default:
                raise DataError(f"{name} = {value!r} is not possible in mode 'student'; modes ar and exact can")


_OF_TEACHERS = {"top_k": 0, "top_p": 1.0, "logit_bias": {}, "logprobs": None, "prompt_logprobs": False}


def top_p_for(mode: str, wanted: float | None, trained: float = 1.0) -> float:
    """The `top_p` of a request, from what is wanted and what the student was trained with.

    A student's tokens are from that nucleus, so nothing is left to cut from them. Modes `ar` and `exact` take any, by
    default the student's: a draft from a nucleus stands if the teacher draws from it, and `exact` is what `ar` gives.

    Raises:
      DataError: in mode `student`, another one than the student was trained with.
    """
    if mode == "student":
        if wanted not in (None, trained):
            raise DataError(
                f"top_p = {wanted:g} is none that the student was trained with ({trained:g}), and its tokens are "
                "settled by the noise that goes in"
            )
        return 1.0
    return trained if wanted is None else wanted


def check_count(name: str, value: int) -> None:
    """Raises DataError for what is no whole number from 1 on."""
    if not is_whole_number(value) or value < 1:
        raise DataError(f"{name} = {value!r} should be a whole number, at least 1")


def check_penalty(name: str, penalty: float) -> None:
    """Raises DataError for a penalty that is no number, or as good as infinite in f32."""
    if not is_finite_number(penalty) or abs(penalty) > MOST_PENALTY:
        raise DataError(f"{name} = {penalty!r} should be a finite number, of at most {MOST_PENALTY:g} either way")


def check_truncation(top_k: int, top_p: float) -> None:
    """Raises DataError for what is no number of tokens, or no probability to keep."""
    if not is_whole_number(top_k) or top_k < 0:
        raise DataError(f"top_k = {top_k!r} should be a whole number, at least 1, or 0 for all tokens")
    if not is_finite_number(top_p) or not 0 < top_p <= 1:
        raise DataError(f"top_p = {top_p!r} is not in (0, 1]")


def check_bias(bias: Mapping[int, float], vocab_size: int) -> None:
    """Raises DataError for biases that are not small numbers by id, or too many."""
    if not isinstance(bias, Mapping):
        raise DataError(f"logit_bias = {bias!r} should be numbers by token id")
    whole_numbers(list(bias), "logit_bias", vocab_size)
    if len(bias) > MOST_BIASES:
        raise DataError(f"logit_bias has {len(bias)} ids; at most {MOST_BIASES} are possible")
    for token, value in bias.items():
        if not is_finite_number(value) or abs(value) > MOST_BIAS:
            raise DataError(
                f"logit_bias has {value!r} for {token}; expected a number from -{MOST_BIAS:g} to {MOST_BIAS:g}"
            )


def check_mode(mode: str) -> None:
    """Raises DataError for what is none of `MODES`."""
    if not isinstance(mode, str) or mode not in MODES:
        raise DataError(f"mode = {mode!r} is not one of {', '.join(MODES)}")


def check_confidence(name: str, confidence: float, mode: str) -> None:
    """Raises DataError for a confidence that is no probability, or that a mode has no use for."""
    if not is_finite_number(confidence) or not 0 <= confidence <= 1:
        raise DataError(f"{name} = {confidence!r} is not in [0, 1]")
    if confidence and mode != "student":
        raise DataError(f"{name} = {confidence} has no effect in mode {mode!r}: only a student's tokens are weighed")


def check_noise(noise: Any, shape: tuple[int, ...]) -> None:
    """Raises DataError unless these are uniforms of that shape."""
    try:
        noise = np.asarray(noise)
    except ValueError:  # lists of different lengths
        raise DataError(f"noise should be an array of numbers of shape {shape}") from None
    if noise.dtype.kind not in "fiu":
        raise DataError(f"noise has dtype {noise.dtype}; expected numbers")
    if noise.shape != shape:
        raise DataError(f"noise has shape {noise.shape}, expected {shape}")
    outside = noise[~((noise >= 0) & (noise < 1))]
    if outside.size:
        raise DataError(f"noise holds {outside.flat[0]}; uniforms are in [0, 1)")


def is_whole_number(value: object) -> bool:
    """Whether this is an integer, of Python or numpy; True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def is_finite_number(value: object) -> bool:
    """Whether this is one number that is neither infinite nor NaN; True and False are none."""
    array = np.asarray(value, object) if isinstance(value, (list, tuple)) else np.asarray(value)
    return array.ndim == 0 and array.dtype.kind in "fiu" and bool(np.isfinite(array))


def whole_numbers(values: Any, name: str, end: int) -> np.ndarray:
    """A list of what are integers in [0, end) already, int64.

    Raises:
      DataError: anything else, which would be cut without a word.
    """
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        shown = repr(values)
        raise DataError(f"{name} should be a list of integers, not {shown[:60]}{'...' * (len(shown) > 60)}")
    outside = array[(array < 0) | (array >= end)]
    if outside.size:
        raise DataError(f"{name} has {outside[0]}, which is not in [0, {end})")
    return array.astype(np.int64)
