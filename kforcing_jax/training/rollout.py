"""Rolling a teacher out at every position of a text at once: the targets of self-forcing (paper, section 3.3)."""

import jax
import jax.numpy as jnp

from kforcing_jax.models.attention import KeyValue, Past


def rollout(model, params, tokens_BxN, noise_BxNxK, tau_B, chunk: int):
    """The K tokens that a teacher generates after every position, for the given noise: tokens_BxNxK.

    Each pass extends every position's own window by `chunk` tokens: 1 for a CausalLM, the trained window for a
    PushForwardLM. The context of a window is real text up to its position and then the teacher's own tokens.

    Args:
      model: CausalLM or PushForwardLM.
      params: its parameters.
      tokens_BxN: real text.
      noise_BxNxK: K uniforms after every position.
      tau_B: temperature of each sequence.
      chunk: tokens per teacher pass; divides K.
    """
    batch, length, window = noise_BxNxK.shape
    if window % chunk:
        raise ValueError(f"chunk = {chunk} does not divide the window of {window} tokens")
    tau_Bx1x1 = tau_B[:, None, None]
    noise_IxBxNxC = jnp.moveaxis(noise_BxNxK.reshape(batch, length, window // chunk, chunk), 2, 0)

    def call(method, *args):
        return model.apply({"params": params}, *args, method=method)

    logits, prefix = call("begin", tokens_BxN, noise_IxBxNxC[0], tau_B)
    first_chunk = model.draw(logits, noise_IxBxNxC[0], tau_Bx1x1)
    if window == chunk:
        return first_chunk

    next_position_BxN = jnp.broadcast_to(jnp.arange(1, length + 1), (batch, length))

    def one_pass(carry, step_and_noise):
        tokens_BxNxC, cache = carry
        step, noise_BxNxC = step_and_noise
        done = step * chunk
        logits, own = call(
            "extend",
            tokens_BxNxC,
            noise_BxNxC,
            tau_B,
            prefix,
            next_position_BxN,
            next_position_BxN + done,
            Past(cache, done),
        )
        cache = jax.tree.map(lambda kept, new: jax.lax.dynamic_update_slice_in_dim(kept, new, done, axis=3), cache, own)
        tokens_BxNxC = model.draw(logits, noise_BxNxC, tau_Bx1x1)
        return (tokens_BxNxC, cache), tokens_BxNxC

    later_passes = window // chunk - 1
    carry = (first_chunk, _empty_cache(prefix, later_passes * chunk))
    _, later_chunks = jax.lax.scan(one_pass, carry, (jnp.arange(later_passes), noise_IxBxNxC[1:]))
    chunks_IxBxNxC = jnp.concatenate([first_chunk[None], later_chunks])
    return jnp.moveaxis(chunks_IxBxNxC, 0, 2).reshape(batch, length, window)


def _empty_cache(prefix: KeyValue, capacity: int) -> KeyValue:
    """Room for `capacity` window tokens at every position: (L, B, N, capacity, H, C)."""
    return jax.tree.map(lambda kv: jnp.zeros((*kv.shape[:3], capacity, *kv.shape[3:]), kv.dtype), prefix)
