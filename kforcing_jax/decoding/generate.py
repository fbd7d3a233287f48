"""Text from a teacher or a student: prefill, then one compiled loop of window passes over a KV cache."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.config import check_tau
from kforcing_jax.decoding import cache as kv_cache
from kforcing_jax.errors import DataError
from kforcing_jax.models import CausalLM
from kforcing_jax.models.keys import KeyValue, Known, UpTo
from kforcing_jax.models.lm import consecutive
from kforcing_jax.noise import LARGEST_UNIFORM, position_noise
from kforcing_jax.sharding import to_host


@dataclasses.dataclass(frozen=True)
class Generation:
    """Decoded requests.

    `tokens` (B, longest prompt + max_new_tokens): prompt, new tokens, then padding (`eos_id`, or the mask id
    when decoding without one). `lengths` (B,): real tokens, the prompt and a final EOS included. `passes` (B,):
    forward passes that each request took.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    passes: np.ndarray


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
) -> Generation:
    """Continues every prompt by up to `max_new_tokens` tokens, k per forward pass.

    A request's output is a function of its prompt, seed and settings alone, whatever else is in the batch; and
    since noise belongs to positions, a teacher and its students decode the same seed to coupled texts.

    Args:
      model: CausalLM (one token per pass, `k` is ignored) or PushForwardLM.
      params: its parameters.
      prompts: token ids, at least one each; lengths may differ.
      max_new_tokens: T, an upper bound on the new tokens of each request.
      k: tokens per pass, at most the window that the student was trained with.
      tau: temperature, one or one per request, in [1e-6, 1000].
      seeds: one per request, in [0, 2^32); not needed when the noise is given.
      noise_BxT: the uniforms of the T new tokens of every request, instead of seeds.
      frequency_penalty: subtracted from a token's logit for every time it was generated in this request.
      eos_id: stops a request; the loop ends when all have stopped.

    Raises:
      DataError: an empty prompt, an id outside the vocabulary, seeds or ids that are not integers, noise outside
        [0, 1), arguments that do not fit each other; or, after decoding began, logits that are not finite.
    """
    prompts = _checked_prompts(prompts, model.cfg.vocab_size)
    k = 1 if isinstance(model, CausalLM) else k
    if k < 1 or max_new_tokens < 1:
        raise DataError(f"k = {k} and max_new_tokens = {max_new_tokens} should be at least 1")
    batch, width = len(prompts), max(len(prompt) for prompt in prompts)
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    tau_B = _checked_tau(tau, batch)
    if not _is_finite_number(frequency_penalty):
        raise DataError(f"frequency_penalty = {frequency_penalty!r} should be a finite number")
    if noise_BxT is None:
        noise_BxT = _seeded_noise(seeds, lengths_B, max_new_tokens)
    else:
        noise_BxT = _checked_noise(noise_BxT, (batch, max_new_tokens))

    new_BxT, finite_B = _decode(
        model,
        params,
        np.stack([np.pad(prompt, (0, width - len(prompt))) for prompt in prompts]),
        lengths_B,
        jnp.pad(jnp.asarray(noise_BxT, jnp.float32), [(0, 0), (0, -max_new_tokens % k)]),
        tau_B,
        jnp.float32(frequency_penalty),
        jnp.int32(-1 if eos_id is None else eos_id),
        k=k,
        penalised=frequency_penalty != 0,
    )
    _check_finite(to_host(finite_B))
    return _assemble(prompts, to_host(new_BxT)[:, :max_new_tokens], k, eos_id, model.cfg.mask_id)


class _State(NamedTuple):
    """What one pass hands to the next."""

    step: jax.Array  # passes done
    cache: KeyValue  # (L, B, S, H, C): everything but the last pass's tokens
    emitted_BxK: jax.Array  # the last pass's tokens
    tokens_BxT: jax.Array  # all new tokens
    counts_BxV: jax.Array  # how often each was generated, in the order of the logits
    done_B: jax.Array  # EOS seen
    finite_B: jax.Array  # all logits so far were


@functools.partial(jax.jit, static_argnames=("model", "k", "penalised"))
def _decode(model, params, prompts_BxP, lengths_B, noise_BxT, tau_B, penalty, eos_id, *, k, penalised):
    """New tokens_BxT, T a multiple of k, and whether all logits of each request were finite.

    What follows a request's EOS is arbitrary.
    """
    batch, total = noise_BxT.shape
    capacity = prompts_BxP.shape[1] + total

    def call(method, *args):
        return model.apply({"params": params}, *args, method=method)

    def one_pass(state: _State, known_BxT, start_B) -> _State:
        """Hangs the known tokens and k fresh noise tokens off the first `start` cached ones."""
        noise_BxK = jax.lax.dynamic_slice_in_dim(noise_BxT, state.step * k, k, axis=1)
        prefix = Known(state.cache, UpTo(start_B[:, None]))
        group = known_BxT.shape[1] + (0 if isinstance(model, CausalLM) else k)
        positions_Bx1xG = consecutive(start_B[:, None], group)
        result = call("extend", known_BxT[:, None], noise_BxK[:, None], tau_B, positions_Bx1xG, prefix)
        logits_BxKxV = call("ordered_logits", model.drawable(result)[:, 0])
        emitted_BxK, counts_BxV = _draw(model, logits_BxKxV, noise_BxK, tau_B, state.counts_BxV, penalty, penalised)
        return _State(
            step=state.step + 1,
            cache=kv_cache.write(state.cache, jax.tree.map(lambda kv: kv[:, :, 0], result.known.keys), start_B),
            emitted_BxK=emitted_BxK,
            tokens_BxT=jax.lax.dynamic_update_slice_in_dim(state.tokens_BxT, emitted_BxK, state.step * k, axis=1),
            counts_BxV=counts_BxV,
            done_B=state.done_B | (emitted_BxK == eos_id).any(axis=1),
            finite_B=state.finite_B & (state.done_B | _is_finite(logits_BxKxV)),
        )

    def next_pass(state: _State) -> _State:
        return one_pass(state, state.emitted_BxK, lengths_B + (state.step - 1) * k)

    def unfinished(state: _State):
        return (state.step < total // k) & ~state.done_B.all() & state.finite_B.all()

    prompt = call("begin", prompts_BxP, jnp.zeros((*prompts_BxP.shape, 0)), tau_B)
    start = _State(
        step=jnp.int32(0),
        cache=kv_cache.allocate(prompt.text_keys, capacity),
        emitted_BxK=jnp.zeros((batch, k), jnp.int32),
        tokens_BxT=jnp.zeros((batch, total), jnp.int32),
        counts_BxV=jnp.zeros((batch, model.cfg.vocab_size if penalised else 0)),
        done_B=jnp.zeros(batch, bool),
        finite_B=jnp.ones(batch, bool),
    )
    last_Bx1 = jnp.take_along_axis(prompts_BxP, lengths_B[:, None] - 1, axis=1)
    end = jax.lax.while_loop(unfinished, next_pass, one_pass(start, last_Bx1, lengths_B - 1))
    return end.tokens_BxT, end.finite_B


def _is_finite(logits_BxKxV):
    """Of every request. A NaN passes through the maximum."""
    return jnp.isfinite(jnp.max(jnp.abs(logits_BxKxV), axis=(1, 2)))


def _draw(model, logits_BxKxV, noise_BxK, tau_B, counts_BxV, penalty, penalised):
    """Tokens_BxK of one window and the updated counts; a window's own tokens count for its later ones."""
    if not penalised:
        return model.pick(logits_BxKxV, noise_BxK, tau_B[:, None]), counts_BxV

    def one_offset(counts_BxV, logits_and_u):
        logits_BxV, u_B = logits_and_u
        token_B = model.pick(logits_BxV - penalty * counts_BxV, u_B, tau_B)
        return counts_BxV + jax.nn.one_hot(model.cfg.column_of(token_B), counts_BxV.shape[1]), token_B

    offsets_first = jnp.moveaxis(logits_BxKxV, 1, 0), noise_BxK.T
    counts_BxV, tokens_KxB = jax.lax.scan(one_offset, counts_BxV, offsets_first)
    return tokens_KxB.T, counts_BxV


def _seeded_noise(seeds, lengths_B, max_new_tokens):
    if seeds is None or len(seeds) != len(lengths_B):
        given = "none" if seeds is None else len(seeds)
        raise DataError(f"one seed for each of {len(lengths_B)} prompts is needed, {given} given")
    seeds_B = _whole_numbers(seeds, "seeds", 2**32)
    positions_BxT = lengths_B[:, None] + np.arange(max_new_tokens)
    return position_noise(jnp.asarray(seeds_B.astype(np.uint32)), jnp.asarray(positions_BxT))


def _checked_noise(noise_BxT, shape):
    noise_BxT = np.asarray(noise_BxT)
    if noise_BxT.dtype.kind not in "fiu":
        raise DataError(f"noise has dtype {noise_BxT.dtype}; expected numbers")
    if noise_BxT.shape != shape:
        raise DataError(f"noise has shape {noise_BxT.shape}, expected {shape}")
    outside = noise_BxT[~((noise_BxT >= 0) & (noise_BxT < 1))]
    if outside.size:
        raise DataError(f"noise holds {outside.flat[0]}; uniforms are in [0, 1)")
    # An f64 just below 1 is no f32 below 1.
    return jnp.minimum(jnp.asarray(noise_BxT, jnp.float32), LARGEST_UNIFORM)


def _checked_tau(tau, batch):
    tau_B = np.asarray(tau)
    if tau_B.dtype.kind not in "fiu" or tau_B.shape not in ((), (batch,)):
        raise DataError(f"tau = {tau!r} should be one number, or one for each of {batch} prompts")
    for value in tau_B.flat:
        check_tau("tau", float(value))
    return np.broadcast_to(tau_B.astype(np.float32), (batch,))


def _is_finite_number(value):
    return np.ndim(value) == 0 and np.asarray(value).dtype.kind in "fiu" and bool(np.isfinite(value))


def _whole_numbers(values, name, end) -> np.ndarray:
    """A list of what are integers in [0, end) already, int64. Anything else would be cut without a word."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.empty(0)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DataError(f"{name} should be a list of integers, not {values!r}")
    outside = array[(array < 0) | (array >= end)]
    if outside.size:
        raise DataError(f"{name} has {outside[0]}, which is not in [0, {end})")
    return array.astype(np.int64)


def _checked_prompts(prompts, vocab_size) -> list[np.ndarray]:
    if not len(prompts):
        raise DataError("no prompts given")
    for row, prompt in enumerate(prompts):
        if not np.size(prompt):
            raise DataError(f"prompt {row} is empty; start from a token, such as EOS")
    return [_whole_numbers(prompt, f"prompt {row}", vocab_size).astype(np.int32) for row, prompt in enumerate(prompts)]


def _check_finite(finite_B):
    if not finite_B.all():
        raise DataError(
            f"the logits of prompt {int(np.argmin(finite_B))} are not finite: the weights are damaged, or were trained "
            "with a learning rate that was too high"
        )


def _assemble(prompts, new_BxT, k, eos_id, mask_id):
    """Puts every request's new tokens right after its prompt and pads what follows its end."""
    new_lengths_B = np.full(len(prompts), new_BxT.shape[1])
    if eos_id is not None:
        ended = new_BxT == eos_id
        new_lengths_B = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, new_lengths_B)
    width = max(len(prompt) for prompt in prompts) + new_BxT.shape[1]
    tokens = np.full((len(prompts), width), mask_id if eos_id is None else eos_id, np.int32)
    for row, prompt in enumerate(prompts):
        text = np.concatenate([prompt, new_BxT[row, : new_lengths_B[row]]])
        tokens[row, : len(text)] = text
    lengths_B = np.array([len(prompt) for prompt in prompts]) + new_lengths_B
    return Generation(tokens=tokens, lengths=lengths_B, passes=-(-new_lengths_B // k))
