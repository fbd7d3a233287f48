"""Text from a teacher, a student, or both: prompts in, texts out, by an engine with as many slots as it takes."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from kforcing_jax.config import check_tau
from kforcing_jax.decoding.engine import Engine, Update
from kforcing_jax.decoding.requests import (
    Request,
    check_confidence,
    check_mode,
    check_noise,
    is_finite_number,
    whole_numbers,
)
from kforcing_jax.errors import DataError
from kforcing_jax.models import CausalLM

# More requests than this take turns.
_MOST_SLOTS = 64
# Lengths are rounded up, so that calls share programs: to powers of two between these, then to multiples.
_LEAST_LENGTH, _LENGTH_UNIT = 128, 1024


@dataclasses.dataclass(frozen=True)
class Generation:
    """Decoded requests.

    `tokens` (B, longest prompt + max_new_tokens): prompt, new tokens, then padding (`eos_id`, or the mask id
    when decoding without one). `lengths` (B,): real tokens, the prompt and a final EOS included. `passes` (B,):
    forward passes that each request took, of either model; `student_passes` and `teacher_passes` tell them apart.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    student_passes: np.ndarray
    teacher_passes: np.ndarray

    @property
    def passes(self) -> np.ndarray:
        return self.student_passes + self.teacher_passes


def generate(
    model,
    params,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    *,
    max_new_tokens: int,
    k: int = 1,
    tau: float | Sequence[float] = 1.0,
    seeds: Sequence[int] | None = None,
    noise_BxT: np.ndarray | None = None,
    frequency_penalty: float = 0.0,
    eos_id: int | None = None,
    mode: str = "student",
    teacher: tuple | None = None,
    confidence: float = 0.0,
    dtype: str | None = None,
    slots: int | None = None,
) -> Generation:
    """Continues every prompt by up to `max_new_tokens` tokens.

    A request's output is a function of its prompt, seed and settings alone, whatever else is in the batch; and
    since noise belongs to positions, a teacher and its students decode the same seed to coupled texts.

    Programs are compiled for the next power of two of the batch and of the longest text (128 and more): another call
    that needs no more than these compiles nothing.

    Args:
      model: CausalLM (one token per pass, `k` is ignored) or PushForwardLM.
      params: its parameters.
      prompts: token ids, at least one each; lengths may differ.
      max_new_tokens: T, an upper bound on the new tokens of each request.
      k: tokens of a window, at most the window that the student was trained with.
      tau: temperature, one or one per request, in [1e-6, 1000].
      seeds: one per request, in [0, 2^32); not needed when the noise is given.
      noise_BxT: the uniforms of the T new tokens of every request, instead of seeds.
      frequency_penalty: subtracted from a token's logit for every time it was generated in this request.
      eos_id: ends a request.
      mode: "student"; "ar": the teacher alone; "exact": the teacher's own sample, from windows that the student drafts.
        A CausalLM decodes in mode "ar".
      teacher: (CausalLM, params) for modes "ar" and "exact" of a student.
      confidence: in mode "student", how likely the kept part of a window has to be (`strides.confident`); 0 keeps all.
      dtype: compute dtype of the blocks instead of the model's own.
      slots: requests at a time; by default all, up to 64.

    Raises:
      DataError: an empty prompt, an id outside the vocabulary, seeds or ids that are not integers, noise outside
        [0, 1), arguments that do not fit each other; or, after decoding began, logits that are not finite.
    """
    mode, models = _models(model, params, mode, teacher)
    prompts = _checked_prompts(prompts, model.cfg.vocab_size)
    if k < 1 or max_new_tokens < 1:
        raise DataError(f"k = {k} and max_new_tokens = {max_new_tokens} should be at least 1")
    tau_B = _checked_tau(tau, len(prompts))
    check_confidence("confidence", confidence, mode)
    if not is_finite_number(frequency_penalty):
        raise DataError(f"frequency_penalty = {frequency_penalty!r} should be a finite number")
    sources = _seeds(seeds, len(prompts)) if noise_BxT is None else _noise(noise_BxT, (len(prompts), max_new_tokens))
    requests = [
        Request(
            prompt,
            max_new_tokens,
            mode=mode,
            tau=float(tau),
            confidence=float(confidence),
            frequency_penalty=float(frequency_penalty),
            end_ids=() if eos_id is None else (eos_id,),
            **source,
        )
        for prompt, tau, source in zip(prompts, tau_B, sources, strict=True)
    ]
    slots = _rounded_slots(len(prompts)) if slots is None else slots
    engine = Engine(**models, slots=slots, max_length=_rounded_length(requests), k=k, dtype=dtype)
    return _assemble(requests, _run(engine, requests), eos_id, model.cfg.mask_id)


def stream(
    model, params, prompt: Sequence[int], *, max_new_tokens: int, passes: int = 1, **settings
) -> Iterator[list[int]]:
    """The new tokens of one request as they come, those of `passes` passes at a time.

    `settings` are those of a `Request`, and `teacher`, `dtype` as of `generate`.
    """
    of_model = {name: settings.pop(name, None) for name in ("teacher", "dtype")}
    mode, models = _models(model, params, settings.pop("mode", "student"), of_model["teacher"])
    k = settings.pop("k", 1)
    request = Request(prompt, max_new_tokens, mode=mode, **settings)
    engine = Engine(**models, slots=1, max_length=_rounded_length([request]), k=k, dtype=of_model["dtype"])
    engine.insert(request)
    while engine.free_slots == 0:
        (update,) = engine.step(passes)
        if update.error:
            raise update.error
        yield update.tokens


def _models(model, params, mode, teacher):
    """(the mode, the models that it needs as an engine takes them)"""
    check_mode(mode)
    if isinstance(model, CausalLM):
        if mode == "exact":
            raise DataError("mode = 'exact' needs a student that drafts; the model is a CausalLM")
        return "ar", {"teacher": (model, params)}
    if mode == "student":
        return mode, {"student": (model, params)}
    if teacher is None:
        raise DataError(f"mode = {mode!r} needs teacher=(model, params)")
    return mode, {"teacher": teacher} if mode == "ar" else {"student": (model, params), "teacher": teacher}


def _run(engine: Engine, requests: list[Request]) -> list[Update]:
    """The last update of every request, with all of its tokens."""
    waiting, running, done = list(enumerate(requests))[::-1], {}, {}
    tokens = [[] for _ in requests]
    while waiting or running:
        while waiting and engine.free_slots:
            index, request = waiting.pop()
            running[engine.insert(request)] = index
        for update in engine.step(wait=not waiting):
            index = running[update.slot]
            if update.error:
                raise DataError(str(update.error).replace("the logits", f"the logits of prompt {index}", 1))
            tokens[index] += update.tokens
            if update.is_finished:
                done[running.pop(update.slot)] = update
    engine.release()
    return [dataclasses.replace(done[index], tokens=tokens[index]) for index in range(len(requests))]


def _rounded_slots(batch: int) -> int:
    return min(1 << (batch - 1).bit_length(), _MOST_SLOTS)


def _rounded_length(requests) -> int:
    longest = max(max(request.end for request in requests), _LEAST_LENGTH)
    return min(1 << (longest - 1).bit_length(), longest + -longest % _LENGTH_UNIT)


def _seeds(seeds, batch) -> list[dict]:
    if seeds is None or len(seeds) != batch:
        given = "none" if seeds is None else len(seeds)
        raise DataError(f"one seed for each of {batch} prompts is needed, {given} given")
    return [{"seed": int(seed)} for seed in whole_numbers(seeds, "seeds", 2**32)]


def _noise(noise_BxT, shape) -> list[dict]:
    noise_BxT = np.asarray(noise_BxT)
    check_noise(noise_BxT, shape)
    return [{"noise": noise_T} for noise_T in noise_BxT]


def _checked_tau(tau, batch):
    tau_B = np.asarray(tau)
    if tau_B.dtype.kind not in "fiu" or tau_B.shape not in ((), (batch,)):
        raise DataError(f"tau = {tau!r} should be one number, or one for each of {batch} prompts")
    for value in tau_B.flat:
        check_tau("tau", float(value))
    return np.broadcast_to(tau_B, (batch,))


def _checked_prompts(prompts, vocab_size) -> list[np.ndarray]:
    if not len(prompts):
        raise DataError("no prompts given")
    for row, prompt in enumerate(prompts):
        if not np.size(prompt):
            raise DataError(f"prompt {row} is empty; start from a token, such as EOS")
    return [whole_numbers(prompt, f"prompt {row}", vocab_size).astype(np.int32) for row, prompt in enumerate(prompts)]


def _assemble(requests: list[Request], updates: list[Update], eos_id, mask_id) -> Generation:
    """Every request's new tokens right after its prompt, and padding after its end."""
    width = max(request.end for request in requests)
    tokens = np.full((len(requests), width), mask_id if eos_id is None else eos_id, np.int32)
    texts = [[*request.prompt, *update.tokens] for request, update in zip(requests, updates, strict=True)]
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    student, teacher = ([update.passes.get(name, 0) for update in updates] for name in ("student", "teacher"))
    return Generation(tokens, np.array([len(text) for text in texts]), np.array(student), np.array(teacher))
