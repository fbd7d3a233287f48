"""Text from a teacher, a student, or both: prompts in, texts out, by an engine with as many slots as it takes."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kforcing_jax.config import check_tau
from kforcing_jax.decoding.engine import Engine, Update, has_teacher
from kforcing_jax.decoding.logprobs import Logprobs
from kforcing_jax.decoding.requests import (
    Request,
    check_confidence,
    check_count,
    check_mode,
    check_noise,
    check_penalty,
    check_truncation,
    whole_numbers,
)
from kforcing_jax.errors import DataError
from kforcing_jax.models import CausalLM, PushForwardLM

# Sizes are rounded up, so that calls share programs. One request has a slot to itself; more than the most take turns.
_LEAST_SLOTS, _MOST_SLOTS = 4, 64
# Of texts: powers of two between these, then multiples.
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
        """(B,): forward passes of either model."""
        return self.student_passes + self.teacher_passes


def generate(
    model: CausalLM | PushForwardLM,
    params: dict,
    prompts: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
    *,
    max_new_tokens: int,
    k: int = 1,
    tau: float | Sequence[float] | np.ndarray = 1.0,
    seeds: Sequence[int] | np.ndarray | None = None,
    noise_BxT: np.ndarray | None = None,
    frequency_penalty: float = 0.0,
    eos_id: int | None = None,
    mode: str = "student",
    teacher: tuple | None = None,
    confidence: float = 0.0,
    dtype: str | None = None,
    slots: int | None = None,
    top_p: float = 1.0,
    exact_windows: int | None = None,
) -> Generation:
    """Continues every prompt by up to `max_new_tokens` tokens.

    A request's output is a function of its prompt, seed and settings alone, whatever else is in the batch; and
    since noise belongs to positions, a teacher and its students decode the same seed to coupled texts.

    Programs are compiled for 1, 4, 8, 16, 32 or 64 requests at a time, and for texts of up to 128, 256, 512 or a
    multiple of 1,024 tokens: another call within the same sizes compiles nothing.

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
      teacher: (CausalLM, params) for modes "ar" and "exact" of a student; a gated one has its own.
      confidence: in mode "student", how likely the kept part of a window has to be (`strides.confident`); 0 keeps all.
      dtype: compute dtype of the blocks instead of the model's own.
      slots: requests at a time; by default all, up to 64.
      top_p: in modes "ar" and "exact", draw from the fewest likeliest tokens that have this probability together. A
        student's tokens are from the nucleus that it was trained with.
      exact_windows: in mode "exact" of a gated student, how many windows a pass drafts beside what it verifies, by
        default k; see `Engine`.

    Raises:
      DataError: an empty prompt, an id outside the vocabulary, seeds or ids that are not integers, noise outside
        [0, 1), arguments that do not fit each other; or, after decoding began, logits that are not finite.
    """
    check_mode(mode)
    checked = _checked_prompts(prompts, model.cfg.vocab_size)
    k = 1 if isinstance(model, CausalLM) else k
    check_count("k", k)
    check_count("max_new_tokens", max_new_tokens)
    tau_B = _checked_tau(tau, len(checked))
    check_penalty("frequency_penalty", frequency_penalty)
    check_truncation(0, top_p)
    sources = _seeds(seeds, len(checked)) if noise_BxT is None else _noise(noise_BxT, (len(checked), max_new_tokens))
    longest = max(map(len, checked)) + max_new_tokens
    sizes = len(checked), longest
    made: dict[str, Any] = {
        "k": k,
        "mode": mode,
        "teacher": teacher,
        "dtype": dtype,
        "slots": slots,
        "exact_windows": exact_windows,
    }
    mode, engine = engine_for(model, params, sizes, **made)
    check_confidence("confidence", confidence, mode)
    shared: dict[str, Any] = {
        "mode": mode,
        "end_ids": () if eos_id is None else (eos_id,),
        "confidence": float(confidence),
        "frequency_penalty": float(frequency_penalty),
        "top_p": float(top_p),
    }
    rows = zip(checked, tau_B, sources, strict=True)
    requests = [Request(prompt, max_new_tokens, tau=float(tau), **source, **shared) for prompt, tau, source in rows]
    engine.prepare(mode, longest)
    updates = dict(decode(engine, requests))
    engine.release()
    return _assemble(requests, [updates[row] for row in range(len(requests))], eos_id, model.cfg.mask_id)


def stream(
    model: CausalLM | PushForwardLM,
    params: dict,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    passes: int = 1,
    **settings: Any,
) -> Iterator[list[int]]:
    """The new tokens of one request as they come, those of `passes` passes at a time.

    `settings` are those of a `Request`, and `teacher`, `dtype`, `exact_windows` as of `generate`.

    Raises:
      DataError: what no engine takes, before the first pass; or logits that are not finite.
      ConfigError: a temperature that no engine takes.
    """
    check_count("passes", passes)
    check_count("max_new_tokens", max_new_tokens)
    names = "k", "mode", "teacher", "dtype", "exact_windows"
    loaded = {name: settings.pop(name) for name in names if name in settings}
    mode, engine = engine_for(model, params, (1, len(prompt) + max_new_tokens), **loaded)
    engine.insert(Request(prompt, max_new_tokens, mode=mode, **settings))
    is_finished = False
    while not is_finished:
        (update,) = engine.step(passes)
        if update.error:
            raise update.error
        is_finished = update.is_finished
        yield update.tokens


def engine_for(
    model: CausalLM | PushForwardLM,
    params: dict,
    sizes: tuple[int, int],
    *,
    k: int = 1,
    mode: str = "student",
    teacher: tuple | None = None,
    dtype: str | None = None,
    slots: int | None = None,
    exact_windows: int | None = None,
) -> tuple[str, Engine]:
    """(the mode of the requests, an engine for them), arguments as of `generate`.

    `sizes` are the number of requests and the longest text. So that calls share programs, slots are 1, 4, 8, 16, 32 or
    64 (of more requests the others wait), and lengths 128, 256, 512 or multiples of 1,024.

    Raises:
      DataError: a mode that these models do not allow.
    """
    mode, models = _models(model, params, mode, teacher)
    requests, longest = sizes
    if slots is None:
        slots = 1 if requests == 1 else min(max(1 << (requests - 1).bit_length(), _LEAST_SLOTS), _MOST_SLOTS)
    longest = max(longest, _LEAST_LENGTH)
    longest = min(1 << (longest - 1).bit_length(), longest + -longest % _LENGTH_UNIT)
    if mode != "exact" and exact_windows is not None:
        raise DataError(f"exact_windows = {exact_windows!r} has no effect in mode {mode!r}")
    made: dict[str, Any] = {"slots": slots, "max_length": longest, "k": 1 if mode == "ar" else k}
    return mode, Engine(**models, **made, dtype=dtype, exact_windows=exact_windows)


def _models(model, params, mode, teacher):
    """(the mode, the models that it needs as an engine takes them)"""
    check_mode(mode)
    if isinstance(model, CausalLM):
        if mode == "exact":
            raise DataError("mode = 'exact' needs a student that drafts; the model is a CausalLM")
        return "ar", {"teacher": (model, params)}
    if mode == "student" or (model.cfg.is_gated and (teacher is None or has_teacher((model, params), teacher))):
        return mode, {"student": (model, params)}
    if teacher is None:
        raise DataError(f"mode = {mode!r} needs teacher=(model, params)")
    return mode, {"teacher": teacher} if mode == "ar" else {"student": (model, params), "teacher": teacher}


def decode(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[int, Update]]:
    """(index, update with all new tokens) of every request, as they end; as many at a time as there are slots.

    Raises:
      DataError, ConfigError: a request that the engine cannot serve, before any is decoded; an engine that has others.
      DataError: logits of a request that are not finite.
    """
    if engine.free_slots < engine.slots:
        raise DataError(f"{engine.slots - engine.free_slots} of the engine's slots have requests of somebody else")
    for request in requests:
        engine.check(request)
    waiting = list(enumerate(requests))[::-1]
    running: dict[int, int] = {}  # by slot: index of the request
    updates: list[list[Update]] = [[] for _ in requests]
    while waiting or running:
        while waiting and engine.free_slots:
            index, request = waiting.pop()
            running[engine.insert(request)] = index
        for update in engine.step(wait=not waiting):
            index = running[update.slot]
            if update.error:
                engine.release()
                raise DataError(str(update.error).replace("the logits", f"the logits of prompt {index}", 1))
            updates[index].append(update)
            if update.is_finished:
                yield running.pop(update.slot), _joined(updates[index])


def _joined(updates: list[Update]) -> Update:
    """The last one of a request, with what all of them told."""
    parts = [update.logprobs for update in updates if update.logprobs is not None]
    of_prompt = (update.prompt_logprobs for update in updates if update.prompt_logprobs is not None)
    return dataclasses.replace(
        updates[-1],
        tokens=[token for update in updates for token in update.tokens],
        logprobs=Logprobs.joined(parts) if parts else None,
        prompt_logprobs=next(of_prompt, None),
    )


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
    filling = next((token for token in (eos_id, mask_id) if token is not None), 0)
    tokens = np.full((len(requests), width), filling, np.int32)
    texts = [[*request.prompt, *update.tokens] for request, update in zip(requests, updates, strict=True)]
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    student, teacher = ([update.passes.get(name, 0) for update in updates] for name in ("student", "teacher"))
    return Generation(tokens, np.array([len(text) for text in texts]), np.array(student), np.array(teacher))
