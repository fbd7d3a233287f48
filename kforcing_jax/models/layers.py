"""The pieces of the models: rotary positions, the noise encoder, the output layer."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kforcing_jax.sharding import ROWS, constrain, row_shards

LAYER_NORM_EPSILON = 1e-5
ROPE_BASE = 10_000.0
NOISE_BASE = 10_000.0
MASK_LOGIT = -1000.0

# f32 logits that one device holds at a time, 128 MB; loss and inverse CDF take a few times as much.
_MOST_LOGITS = 2**25


def rotary_frequencies(head_width: int) -> jax.Array:
    """Radians per position of each of the C / 2 channel pairs, f32."""
    return ROPE_BASE ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)


def rotary_angles(positions: jax.Array, head_width: int) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of shape (*positions.shape, 1, C / 2), f32; the 1 broadcasts over heads."""
    angles = positions[..., None, None].astype(jnp.float32) * rotary_frequencies(head_width)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_xHxC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotated x_xHxC of the same dtype, cos and sin as of `rotary_angles`: channel c pairs with channel c + C/2."""
    first, second = jnp.split(x_xHxC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_xHxC.dtype)


class NoiseEncoder(nn.Module):
    """Embeds a uniform and a temperature as one token of width D: e(u, tau). Always f32."""

    d_model: int
    precision: str

    def setup(self) -> None:
        dense = functools.partial(nn.Dense, precision=self.precision)
        self.project = dense(self.d_model)
        self.norm = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON)
        self.mlp_in, self.mlp_out = dense(4 * self.d_model), dense(self.d_model)

    def __call__(self, u_x: jax.Array, tau_x: jax.Array) -> jax.Array:
        """e(u, tau), (x, D)."""
        features_xF = jnp.concatenate([fourier_features(u_x, self.d_model), fourier_features(tau_x, self.d_model)], -1)
        return self._mix(self.project(features_xF))

    def of_tau(self, tau_x: jax.Array) -> jax.Array:
        """What a temperature adds, (x, D): for `of_noise`."""
        projection = self.project.variables["params"]
        part_xD = jnp.dot(
            fourier_features(tau_x, self.d_model), projection["kernel"][self.d_model :], precision=self.precision
        )
        return part_xD + projection["bias"]

    def of_noise(self, u_x: jax.Array, of_tau_xD: jax.Array) -> jax.Array:
        """e(u, tau), (x, D), with `of_tau` of the temperature."""
        kernel_DxD = self.project.variables["params"]["kernel"][: self.d_model]
        part_xD = jnp.dot(fourier_features(u_x, self.d_model), kernel_DxD, precision=self.precision)
        return self._mix(part_xD + of_tau_xD)

    def _mix(self, x_xD):
        x_xD = constrain(x_xD, ROWS)
        h = constrain(self.mlp_in(self.norm(x_xD)), ROWS)
        return x_xD + constrain(self.mlp_out(exact_gelu(h)), ROWS)


@jax.custom_vjp
def exact_gelu(x: jax.Array) -> jax.Array:
    """x P(standard normal <= x). Its backward pass needs x alone; the derived one keeps three arrays of this size."""
    return jax.nn.gelu(x, approximate=False)


def _exact_gelu_gradient(x, d_out):
    density = jnp.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return (d_out * (jax.scipy.special.ndtr(x) + x * density),)


exact_gelu.defvjp(lambda x: (exact_gelu(x), x), _exact_gelu_gradient)


def fourier_features(value_x: jax.Array, width: int) -> jax.Array:
    """[cos(2 pi f v), sin(2 pi f v)] at width / 2 frequencies 10000^(-i / (width / 2)), f32."""
    half = width // 2
    frequencies = NOISE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = 2 * jnp.pi * value_x[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Output(nn.Module):
    """The output layer: hidden states to f32 logits, a few positions at a time. One column is the mask's."""

    d_model: int
    vocab_size: int
    mask_column: int
    precision: str

    def setup(self) -> None:
        shape = (self.d_model, self.vocab_size)
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        self.bias = self.param("bias", nn.initializers.zeros_init(), (self.vocab_size,), jnp.float32)

    def __call__(self, x_xD: jax.Array) -> jax.Array:
        """logits_xV, the mask at -1000."""
        return self._logits(x_xD, self.kernel, self.bias)

    def per_token(self, function: Callable[..., Any], x_BxAxGxD: jax.Array, *arrays_BxAxG: jax.Array) -> Any:
        """function(logits_BxAxGxV, *arrays_BxAxG), which works on every token by itself, over chunks of anchors.

        The logits of one chunk are alive at a time, in the backward pass too: memory does not depend on A * V.
        Arrays, and what the function returns (one or a tree of them), have shape (B, A, G); an axis of size 1 is
        repeated.
        """
        # Gathered and summed once, not once a chunk, where the parameters are spread over devices.
        kernel_DxV, bias_V = constrain(self.kernel), constrain(self.bias)

        def one_chunk(x_and_arrays):
            x_BxAxGxD, *arrays_BxAxG = x_and_arrays
            # The vocabulary is never split: a tensor axis takes positions here.
            x_BxAxGxD = constrain(x_BxAxGxD, ROWS, "tensor")
            return function(self._logits(x_BxAxGxD, kernel_DxV, bias_V), *arrays_BxAxG)

        shape = x_BxAxGxD.shape[:3]
        inputs = (x_BxAxGxD, *(jnp.broadcast_to(array, shape) for array in arrays_BxAxG))
        size = chunk_size(shape, self.vocab_size)
        if size == shape[1]:
            return one_chunk(inputs)
        outputs = jax.lax.map(jax.checkpoint(one_chunk, prevent_cse=False), _split_anchors(inputs, size))
        return jax.tree.map(lambda out: _join_anchors(out, shape[1]), outputs)

    def _logits(self, x_xD, kernel_DxV, bias_V):
        logits_xV = jnp.dot(x_xD, kernel_DxV, precision=self.precision) + bias_V
        return logits_xV.at[..., self.mask_column].set(MASK_LOGIT)


def chunk_size(shape_BxAxG: tuple[int, ...], vocab_size: int) -> int:
    """How many of A anchors to work on at a time, so that their logits stay within `_MOST_LOGITS` per device.

    As even as whole numbers allow: the last chunk lacks fewer anchors than there are chunks.
    """
    batch, anchors, group = shape_BxAxG
    per_anchor = -(-batch // row_shards()) * group * vocab_size
    chunks = -(-anchors // max(_MOST_LOGITS // max(per_anchor, 1), 1))
    return -(-anchors // max(chunks, 1))


def _split_anchors(tree, size):
    """(B, A, ...) to (chunks, B, size, ...), padded with zeros."""

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _join_anchors(x_IxBxAxG, anchors):
    """The inverse of `_split_anchors`."""
    x_BxIxAxG = jnp.moveaxis(x_IxBxAxG, 0, 1)
    return x_BxIxAxG.reshape(x_BxIxAxG.shape[0], -1, x_BxIxAxG.shape[3])[:, :anchors]
