"""The pieces of the models: normalisation, the noise encoder, what noise rows add to a matrix, the output layer."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kforcing_jax.architecture import Architecture
from kforcing_jax.config import FULL_RANK
from kforcing_jax.sharding import ROWS, constrain, row_shards

LAYER_NORM_EPSILON = 1e-5
NOISE_BASE = 10_000.0
MASK_LOGIT = -1000.0

# f32 logits that one device holds at a time, 128 MB; loss and inverse CDF take a few times as much.
_MOST_LOGITS = 2**25


def norm(architecture: Architecture) -> nn.Module:
    """The normalisation before a product, with a scale and no bias; f32."""
    if architecture.norm == "rms_norm":
        return nn.RMSNorm(epsilon=architecture.norm_epsilon)
    return nn.LayerNorm(epsilon=architecture.norm_epsilon, use_bias=False)


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


class Delta(nn.Module):
    """What noise rows add to the product with a matrix of the teacher: a product of low rank, zero at first.

    Attributes:
      inputs, outputs: axes of the matrix.
      rank: inner width, of each part; -1 for whole matrices.
      parts: how many matrices with a delta each there are, along the first axis of the outputs: queries, keys, ...
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rank: int
    precision: str
    dtype: DTypeLike = jnp.float32
    parts: int = 1

    def setup(self) -> None:
        inputs, columns = math.prod(self.inputs), math.prod(self.outputs) // self.parts
        zeros = nn.initializers.zeros_init()
        if self.rank == FULL_RANK:
            self.full = self.param("full", zeros, (inputs, self.parts, columns), jnp.float32)
        else:
            spread = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=2, batch_axis=1)
            self.down = self.param("down", spread, (inputs, self.parts, self.rank), jnp.float32)
            self.up = self.param("up", zeros, (self.parts, self.rank, columns), jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., *outputs) of x (..., *inputs)."""
        return self.function()(x)

    def function(self) -> Callable[[jax.Array], jax.Array]:
        """What calling does, as a function of arrays: for use inside JAX's transformations."""
        dot = functools.partial(jnp.einsum, precision=self.precision)
        matrices = [self.full] if self.rank == FULL_RANK else [self.down, self.up]
        first, *rest = (matrix.astype(self.dtype) for matrix in matrices)

        def added(x):
            x_xI = x.reshape(*x.shape[: x.ndim - len(self.inputs)], -1).astype(self.dtype)
            y = dot("...I,IPO->...PO", x_xI, first)
            for up_PxRxO in rest:
                y = dot("...PR,PRO->...PO", y, up_PxRxO)
            return y.reshape(*x_xI.shape[:-1], *self.outputs)

        return added


class Output(nn.Module):
    """The output layer: hidden states to f32 logits, a few positions at a time, in the order of the CDF.

    Of a model with tied embeddings its matrix is the embedding, which methods are given: `embedding_VxD`.
    """

    cfg: Any  # ModelConfig

    def setup(self) -> None:
        cfg = self.cfg
        if not cfg.tied_embeddings:
            shape = (cfg.d_model, cfg.vocab_size)
            self.kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        if cfg.output_bias:
            self.bias = self.param("bias", nn.initializers.zeros_init(), (cfg.vocab_size,), jnp.float32)

    def __call__(self, x_xD: jax.Array, embedding_VxD: jax.Array) -> jax.Array:
        """logits_xV, the mask at -1000."""
        return self._logits(x_xD, self._matrix(embedding_VxD), self._bias)

    def per_token(
        self,
        function: Callable[..., Any],
        added: Callable[[jax.Array], jax.Array] | None,
        embedding_VxD: jax.Array,
        x_BxAxGxD: jax.Array,
        *arrays_BxAxG: jax.Array,
    ) -> Any:
        """function(logits_BxAxGxV, *arrays_BxAxG), which works on every token by itself, over chunks of anchors.

        The logits of one chunk are alive at a time, in the backward pass too: memory does not depend on A * V.
        Arrays, and what the function returns (one or a tree of them), have shape (B, A, G); an axis of size 1 is
        repeated. `added` gives what is added to the logits of hidden states.
        """
        # Gathered and summed once, not once a chunk, where the parameters are spread over devices.
        kernel_DxV = constrain(self._matrix(embedding_VxD))
        bias_V = None if self._bias is None else constrain(self._bias)

        def one_chunk(x_and_arrays):
            x_BxAxGxD, *arrays_BxAxG = x_and_arrays
            # The vocabulary is never split: a tensor axis takes positions here.
            x_BxAxGxD = constrain(x_BxAxGxD, ROWS, "tensor")
            return function(self._logits(x_BxAxGxD, kernel_DxV, bias_V, added), *arrays_BxAxG)

        shape = x_BxAxGxD.shape[:3]
        inputs = (x_BxAxGxD, *(jnp.broadcast_to(array, shape) for array in arrays_BxAxG))
        size = chunk_size(shape, self.cfg.vocab_size)
        if size == shape[1]:
            return one_chunk(inputs)
        outputs = jax.lax.map(jax.checkpoint(one_chunk, prevent_cse=False), _split_anchors(inputs, size))
        return jax.tree.map(lambda out: _join_anchors(out, shape[1]), outputs)

    @property
    def _bias(self):
        return self.bias if self.cfg.output_bias else None

    def _matrix(self, embedding_VxD):
        """kernel_DxV, its columns in the order of the CDF."""
        return self.cfg.ordered_rows(embedding_VxD).T if self.cfg.tied_embeddings else self.kernel

    def _logits(self, x_xD, kernel_DxV, bias_V, added=None):
        logits_xV = jnp.dot(x_xD, kernel_DxV, precision=self.cfg.precision, preferred_element_type=jnp.float32)
        logits_xV = logits_xV if bias_V is None else logits_xV + bias_V
        return masked(self.cfg, logits_xV if added is None else logits_xV + added(x_xD), MASK_LOGIT)


def masked(cfg: Any, ordered_xV: jax.Array, value: float) -> jax.Array:
    """Logits in the order of the CDF with the mask's at a value, where there is a mask."""
    return ordered_xV if cfg.mask_column is None else ordered_xV.at[..., cfg.mask_column].set(value)


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
