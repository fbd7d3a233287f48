"""The uniform noise, and the map between a uniform and a token (inverse CDF) in both directions.

Noise belongs to the position: the uniform of a request at absolute position p is a function of (seed, p)
alone, so decoding with any k, in any batch, uses the same one.

Drawing is a search, not a scan. `min { v : F(v) > u }` needs the sums of sqrt(V) blocks and the running sum inside the
one block in which F crosses u.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Granularity of the uniforms: the largest one, 1 - 2^-24, is the f32 below 1.
_UNIFORM_BITS = 24
LARGEST_UNIFORM = 1.0 - 2.0**-_UNIFORM_BITS

# |F_f32(v) - F_f64(v)| stays below this, two ulps of 1, for every v and V up to 50,258 (measured by test_noise.py).
CDF_ERROR_BOUND = 2.0**-22

# f32 holds sums of up to 256 multiples of this, none above 1, exactly; longer blocks (V > 65,536) round once or twice.
_COARSE = 2.0**-16

# Named, so that a global setting of JAX cannot change a request's noise.
_GENERATOR = "threefry2x32"


def sample_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Independent uniforms in [0, 1) on the 2^-24 grid, f32 (`jax.random.uniform` only has 2^-23)."""
    return _on_the_grid(jax.random.bits(key, shape, jnp.uint32))


def position_noise(seeds_B: jax.Array, positions_BxT: jax.Array) -> jax.Array:
    """The uniforms u_BxT of requests `seeds_B` (uint32) at absolute positions: pure in (seed, position).

    Each is one block of Threefry: key (0, seed), counter (0, position), the first word of the result.
    """

    def one(seed, position):
        key = jax.random.fold_in(jax.random.key(seed, impl=_GENERATOR), position)
        # Not random.bits(key): how that spreads a key over an array is a global setting.
        return jax.random.key_data(key)[0]

    return _on_the_grid(jax.vmap(jax.vmap(one, (None, 0)))(seeds_B, positions_BxT))


def _on_the_grid(bits):
    return (bits >> (32 - _UNIFORM_BITS)).astype(jnp.float32) * 2.0**-_UNIFORM_BITS


class CdfOrder:
    """In which order the tokens of a vocabulary lie on [0, 1): a permutation that a model is trained for.

    Any order gives the same distribution, but not the same map: a random one is learnt better than that of the ids.
    Hashable, so that a model with it is a static argument of compiled programs.
    """

    def __init__(self, tokens: Sequence[int] | np.ndarray):
        """`tokens` are the ids in their order. Raises ValueError when they are not 0, 1, ... each once."""
        self.tokens_V = np.asarray(tokens, np.int32)
        if not np.array_equal(np.sort(self.tokens_V), np.arange(len(self.tokens_V))):
            raise ValueError(f"the order of a CDF should hold the ids 0 to {len(self.tokens_V) - 1}, each once")
        self.digest = hashlib.sha256(self.tokens_V.astype("<i4").tobytes()).hexdigest()

    @classmethod
    def shuffled(cls, vocab_size: int, seed: int) -> "CdfOrder":
        """A random order, the same under every version of numpy."""
        return cls(np.random.RandomState(seed).permutation(vocab_size))

    @functools.cached_property
    def ranks_V(self) -> np.ndarray:
        """The place of every token in the order, int32."""
        return np.argsort(self.tokens_V).astype(np.int32)

    def __eq__(self, other):
        return isinstance(other, CdfOrder) and self.digest == other.digest

    def __hash__(self):
        return hash(self.digest)

    def __repr__(self):
        return f"CdfOrder({self.digest[:12]})"


def argmax(x_xV: jax.Array) -> jax.Array:
    """The least index of the maximum, int32: `jnp.argmax` by two plain reductions, several times as fast on a CPU."""
    return _first(x_xV == jnp.max(x_xV, axis=-1, keepdims=True))


def _first(found_xV):
    """The least index at which `found` holds, V where it never does."""
    size = found_xV.shape[-1]
    return jnp.min(jnp.where(found_xV, jnp.arange(size, dtype=jnp.int32), size), axis=-1)


def inverse_cdf(logits_xV: jax.Array, u_x: jax.Array) -> jax.Array:
    """token(u) = min { v : F(v) > u }, in the order of the logits (paper, section 3.1).

    Args:
      logits_xV: logits, already divided by the temperature; -inf means probability zero.
      u_x: uniforms in [0, 1).

    Returns:
      tokens_x, int32. A token whose f32 probability is zero is never returned, at u = 0 or anywhere else.
      A token can differ from the exact one only where u is within `CDF_ERROR_BOUND` of a bin edge. Logits without a
      finite maximum have no distribution: what is returned for them means nothing.
    """
    blocks = _Blocks.of(logits_xV)
    target_x = u_x * blocks.total_x
    beyond_xM = (blocks.ends_xM > target_x[..., None]) & blocks.has_mass_xM
    block_x = _first_or_last(beyond_xM, blocks.has_mass_xM)
    weights_xW, sums_xW = blocks.within(block_x)
    possible_xW = weights_xW > 0
    offset_x = _first_or_last(possible_xW & (sums_xW > target_x[..., None]), possible_xW)
    return block_x * blocks.width + offset_x


def _first_or_last(found_xM, possible_xM):
    """The first index found, or else the last possible one: u * total can round up to the total."""
    first_x, size = _first(found_xM), found_xM.shape[-1]
    last_x = jnp.max(jnp.where(possible_xM, jnp.arange(size, dtype=jnp.int32), 0), axis=-1)
    return jnp.where(first_x < size, first_x, last_x)


class _Blocks(NamedTuple):
    """Unnormalised probabilities in M blocks of W ~ sqrt(V), and the running sums of whole blocks.

    Sums are pairs (value, rounding error). Plain f32 sums lose the tail behind a confident token, whose terms are below
    the rounding of the sum: an error of 2.5e-6 at V = 50,258. Dividing by the last sum, not by exp(logsumexp), makes F
    end at 1.
    """

    weights_xMxW: jax.Array
    sums: tuple[jax.Array, jax.Array]  # up to and with each block, (x, M)
    has_mass_xM: jax.Array

    @classmethod
    def of(cls, logits_xV) -> "_Blocks":
        logits_xV = logits_xV.astype(jnp.float32)
        weights_xV = jnp.exp(logits_xV - jnp.max(logits_xV, axis=-1, keepdims=True))
        *batch, vocab = weights_xV.shape
        width = math.isqrt(vocab - 1) + 1
        padding = [(0, 0)] * len(batch) + [(0, -vocab % width)]
        weights_xMxW = jnp.pad(weights_xV, padding).reshape(*batch, -1, width)
        # The coarse parts add up without rounding, and what they leave is too small for its rounding to matter.
        coarse_xMxW = jnp.floor(weights_xMxW * (1 / _COARSE)) * _COARSE
        fine_xM = jnp.sum(weights_xMxW - coarse_xMxW, axis=-1)
        block = _add((jnp.sum(coarse_xMxW, axis=-1), jnp.zeros_like(fine_xM)), (fine_xM, jnp.zeros_like(fine_xM)))
        return cls(weights_xMxW, _running_sums(block), block[0] > 0)

    @property
    def width(self) -> int:
        return self.weights_xMxW.shape[-1]

    @property
    def ends_xM(self) -> jax.Array:
        total, error = self.sums
        return total + error

    @property
    def total_x(self) -> jax.Array:
        return self.ends_xM[..., -1]

    def within(self, block_x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(weights_xW, sums_xW) of one block: its tokens' weights, and the running sums of all tokens up to each."""
        weights_xW = jnp.take_along_axis(self.weights_xMxW, block_x[..., None, None], axis=-2)[..., 0, :]
        before = tuple(_at_or_zero(part_xM, block_x - 1)[..., None] for part_xM in self.sums)
        total, error = _add(before, _running_sums((weights_xW, jnp.zeros_like(weights_xW))))
        # The same sums in another order: none of this block may lie beyond its end.
        return weights_xW, jnp.minimum(total + error, _at(self.ends_xM, block_x)[..., None])


def _at(values_xM, index_x):
    return jnp.take_along_axis(values_xM, index_x[..., None], axis=-1)[..., 0]


def _at_or_zero(values_xM, index_x):
    return jnp.where(index_x < 0, 0.0, _at(values_xM, jnp.maximum(index_x, 0)))


def _running_sums(pairs):
    return jax.lax.associative_scan(_add, pairs, axis=-1)


def _add(a, b):
    """Sum of two (value, error) pairs, with the rounding error of the sum kept (Knuth's two-sum)."""
    (a, a_error), (b, b_error) = a, b
    total = a + b
    part_of_b = total - a
    error = ((a - (total - part_of_b)) + (b - part_of_b)) + (a_error + b_error)
    rounded = total + error
    return rounded, error - (rounded - total)


def noise_within_bins(logits_xV: jax.Array, tokens_x: jax.Array, fraction_x: jax.Array) -> jax.Array:
    """The uniform that lies `fraction_x` (in [0, 1)) of the way through the bin of each token: u_x."""
    blocks = _Blocks.of(logits_xV)
    block_x, offset_x = jnp.divmod(tokens_x, blocks.width)
    weights_xW, sums_xW = blocks.within(block_x)
    lower_x = jnp.where(offset_x > 0, _at_or_zero(sums_xW, offset_x - 1), _at_or_zero(blocks.ends_xM, block_x - 1))
    u_x = (lower_x + fraction_x * _at(weights_xW, offset_x)) / blocks.total_x
    u_x = _clip_to_bin(u_x, lower_x, _at(sums_xW, offset_x), blocks.total_x)
    return jnp.clip(u_x, 0.0, LARGEST_UNIFORM)


def _clip_to_bin(u_x, lower_x, upper_x, total_x):
    """Moves u, which rounding may have put on or past an edge, to where lower <= u * total < upper in f32."""
    least_x, most_x = lower_x / total_x, upper_x / total_x
    least_x = jnp.where(least_x * total_x < lower_x, jnp.nextafter(least_x, jnp.float32(1)), least_x)
    for _ in range(2):  # the quotient and the product round once each
        most_x = jnp.where(most_x * total_x >= upper_x, jnp.nextafter(most_x, jnp.float32(0)), most_x)
    return jnp.clip(u_x, least_x, most_x)


def invert_noise(logits_BxNxV: jax.Array, tokens_BxN: jax.Array, key: jax.Array) -> jax.Array:
    """Noise under which a teacher with these logits would have drawn the given text.

    `logits[:, n]` predict `tokens[:, n + 1]`, so the result u_BxN-1 belongs to tokens 1..N-1; within its bin
    each uniform is random (`key`). `inverse_cdf` maps it back to the tokens wherever a bin is wider than
    2 * CDF_ERROR_BOUND; narrower bins cannot be resolved in f32. In the order of the logits, like `inverse_cdf`: for a
    model with a `cdf_order` of its own see `CausalLM.invert_noise`. (The released code inverts in order of descending
    probability, which its own forward sampler does not use.)
    """
    targets_BxM = tokens_BxN[:, 1:]
    return noise_within_bins(logits_BxNxV[:, :-1], targets_BxM, sample_uniform(key, targets_BxM.shape))
