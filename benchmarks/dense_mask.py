"""Windows over a text as the released code computes them: all tokens under one square mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.models.keys import KeyValue


def mask_attention(q_BxNxGxHxC, own, text, reach, past=None, implementation="auto", precision="highest", sliding=None):
    """`attention.group_attention` over a text, by laying out all text, then all windows."""
    del reach, past, implementation, precision, sliding  # the public function has no precision; on a CPU there is one
    batch, length, group, heads, width = q_BxNxGxHxC.shape

    def flat(text_BxNxHxC, windows):
        return jnp.concatenate([text_BxNxHxC, windows.reshape(batch, -1, heads, width)], axis=1)

    q_BxTxHxC = flat(q_BxNxGxHxC[:, :, 0], q_BxNxGxHxC[:, :, 1:])
    keys = KeyValue(*(flat(t, w) for t, w in zip(text, own, strict=True)))
    out_BxTxHxC = jax.nn.dot_product_attention(
        q_BxTxHxC, keys.key, keys.value, mask=jnp.asarray(window_mask(length, group - 1))[None, None]
    )
    windows = out_BxTxHxC[:, length:].reshape(batch, length, group - 1, heads, width)
    return jnp.concatenate([out_BxTxHxC[:, :length, None], windows], axis=2)


@functools.cache
def window_mask(length: int, k: int) -> np.ndarray:
    """Who sees whom among N text tokens and then N windows of k: (T, T), T = (1 + k) N."""
    position = np.concatenate([np.arange(length), np.repeat(np.arange(length), k)])
    offset = np.concatenate([np.zeros(length, int), np.tile(np.arange(1, k + 1), length)])
    to_text = (offset == 0) & (position <= position[:, None])
    return to_text | ((offset > 0) & (position == position[:, None]) & (offset <= offset[:, None]))
