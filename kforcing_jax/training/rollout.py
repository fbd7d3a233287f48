"""Rolling a teacher out at every position of a text at once: the targets of self-forcing (paper, section 3.3)."""

import jax
import jax.numpy as jnp

from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.models.keys import Causal, KeyValue, Known, Past
from kforcing_jax.models.lm import Rows, consecutive, text_positions


def rollout(
    model: CausalLM | PushForwardLM,
    params: dict,
    tokens_BxN: jax.Array,
    noise_BxNxK: jax.Array,
    tau_B: jax.Array,
    chunk: int,
    segments_BxN: jax.Array | None = None,
    top_p: float = 1.0,
    text: Rows | None = None,
) -> jax.Array:
    """The K tokens that a teacher generates after every position, for the given noise: tokens_BxNxK, int32.

    Each pass extends every position's own window by `chunk` tokens: 1 for a CausalLM, the trained window for a
    PushForwardLM. The context of a window is real text up to its position and then the teacher's own tokens.

    Args:
      model: CausalLM or PushForwardLM.
      params: its parameters.
      tokens_BxN: real text.
      noise_BxNxK: K uniforms after every position.
      tau_B: temperature of each sequence.
      chunk: tokens per teacher pass; divides K.
      segments_BxN: segment ids of the text, where rows hold several documents.
      top_p: of a CausalLM's draws, see `CausalLM.pick`; a PushForwardLM has its own from training.
      text: the known rows of the teacher's pass over the text, where there was one; of a CausalLM or a gated student.

    Raises:
      ValueError: the chunk does not divide K.
    """
    batch, length, window = noise_BxNxK.shape
    if window % chunk:
        raise ValueError(f"chunk = {chunk} does not divide the window of {window} tokens")
    tau_Bx1x1 = tau_B[:, None, None]
    noise_IxBxNxC = jnp.moveaxis(noise_BxNxK.reshape(batch, length, window // chunk, chunk), 2, 0)

    def call(method, *args):
        return model.apply({"params": params}, *args, method=method)

    def draw(result, noise_BxNxC):
        return call("draw", model.drawable(result), noise_BxNxC, tau_Bx1x1, top_p)

    if text is None:
        read = call("begin", tokens_BxN, noise_IxBxNxC[0], tau_B, segments_BxN)
    else:
        read = call("resume", text, noise_IxBxNxC[0], tau_B, segments_BxN)
    first_chunk = draw(read, noise_IxBxNxC[0])
    if window == chunk:
        return first_chunk

    prefix = Known(read.text_keys, Causal(segments_BxN))
    next_position_BxN = text_positions((batch, length), segments_BxN) + 1
    group = chunk if isinstance(model, CausalLM) else 2 * chunk

    def one_pass(carry, step_and_noise):
        tokens_BxNxC, cache = carry
        step, noise_BxNxC = step_and_noise
        done = step * chunk
        positions_BxNxG = consecutive(next_position_BxN + done, group)
        result = call("extend", tokens_BxNxC, noise_BxNxC, tau_B, positions_BxNxG, prefix, Past(cache, done))
        cache = jax.tree.map(
            lambda kept, new: jax.lax.dynamic_update_slice_in_dim(kept, new, done, axis=3), cache, result.known.keys
        )
        tokens_BxNxC = draw(result, noise_BxNxC)
        return (tokens_BxNxC, cache), tokens_BxNxC

    later_passes = window // chunk - 1
    carry = (first_chunk, _empty_cache(prefix.keys, later_passes * chunk))
    _, later_chunks = jax.lax.scan(one_pass, carry, (jnp.arange(later_passes), noise_IxBxNxC[1:]))
    chunks_IxBxNxC = jnp.concatenate([first_chunk[None], later_chunks])
    return jnp.moveaxis(chunks_IxBxNxC, 0, 2).reshape(batch, length, window)


def _empty_cache(prefix: KeyValue, capacity: int) -> KeyValue:
    """Room for `capacity` window tokens at every position: (L, B, N, capacity, H, C)."""
    return jax.tree.map(lambda kv: jnp.zeros((*kv.shape[:3], capacity, *kv.shape[3:]), kv.dtype), prefix)
