"""The backbone: a pre-LayerNorm decoder with rotary positions, as in the released K-Forcing checkpoints."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from kforcing_jax.models.attention import KeyValue, Past, group_attention

LAYER_NORM_EPSILON = 1e-5
ROPE_BASE = 10_000.0
MASK_LOGIT = -1000.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model. `mask_id` is the id that is never drawn (its logit is -1000).

    `dtype` is the compute dtype of the blocks; parameters, normalisation, logits and softmax are always f32.
    """

    vocab_size: int
    mask_id: int
    num_layers: int
    d_model: int
    num_heads: int
    dtype: str = "float32"

    def __post_init__(self):
        if self.d_model % self.num_heads:
            raise ValueError(f"model.d_model = {self.d_model} is not divisible by model.num_heads = {self.num_heads}")
        if (self.d_model // self.num_heads) % 2:
            raise ValueError(
                f"model.d_model / model.num_heads = {self.head_width} is odd; rotary positions need an even head width"
            )
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"model.mask_id = {self.mask_id} is not in [0, {self.vocab_size})")

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads


def rotary_frequencies(head_width: int) -> jax.Array:
    """Radians per position of each of the C / 2 channel pairs, f32."""
    return ROPE_BASE ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)


def rotary_angles(positions: jax.Array, head_width: int) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of shape (*positions.shape, 1, C / 2), f32; the 1 broadcasts over heads."""
    angles = positions[..., None, None].astype(jnp.float32) * rotary_frequencies(head_width)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_xHxC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the rotate-half convention: channel c pairs with channel c + C/2."""
    first, second = jnp.split(x_xHxC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_xHxC.dtype)


class Block(nn.Module):
    """One layer. Returns its output and the keys and values of its own tokens."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BxAxGxD, prefix: KeyValue | None, past: KeyValue | None, where: "Where"):
        cfg = self.cfg
        dense = functools.partial(nn.DenseGeneral, dtype=cfg.dtype)
        norm = functools.partial(nn.LayerNorm, epsilon=LAYER_NORM_EPSILON, use_bias=False)

        h = norm(name="attn_norm")(x_BxAxGxD).astype(cfg.dtype)
        qkv = dense((3, cfg.num_heads, cfg.head_width), use_bias=False, name="attn_qkv")(h)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        cos, sin = where.angles
        q, own = rotate(q, cos, sin), KeyValue(rotate(k, cos, sin), v)
        # Without a cache the first token of every group is the text itself, and the text is the prefix.
        shared = prefix if prefix is not None else KeyValue(own.key[:, :, 0], own.value[:, :, 0])
        attended = group_attention(q, own, shared, where.stop, None if past is None else Past(past, where.past_length))
        x_BxAxGxD += dense(cfg.d_model, axis=(-2, -1), use_bias=False, name="attn_out")(attended)

        h = norm(name="mlp_norm")(x_BxAxGxD).astype(cfg.dtype)
        h = nn.gelu(dense(4 * cfg.d_model, name="mlp_in")(h), approximate=True)
        x_BxAxGxD += dense(cfg.d_model, name="mlp_out")(h)
        return x_BxAxGxD, own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
    """Where the groups of one pass sit: rotary angles, prefix keys seen (B, A), and real past tokens (or None)."""

    angles: tuple[jax.Array, jax.Array]
    stop: jax.Array
    past_length: jax.Array | None


class Backbone(nn.Module):
    """Token embedding, L blocks under one `nn.scan` (parameters stacked on a leading axis), output layer."""

    cfg: ModelConfig

    def setup(self):
        cfg = self.cfg
        self.embedding = nn.Embed(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            length=cfg.num_layers,
        )(cfg)
        self.final_norm = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, use_bias=False)
        self.output = nn.Dense(cfg.vocab_size)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding(tokens)

    def __call__(
        self,
        x_BxAxGxD: jax.Array,
        positions_BxAxG: jax.Array,
        stop_BxA: jax.Array,
        prefix: KeyValue | None = None,
        past: Past | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """Runs the blocks over groups that hang off a prefix.

        Args:
          x_BxAxGxD: embedded tokens and noise.
          positions_BxAxG: absolute positions.
          stop_BxA: how many prefix tokens each group sees.
          prefix: keys and values (L, B, S, H, C). None: the first token of each group is the text itself.
          past: earlier tokens at the same anchors, (L, B, A, P, H, C).

        Returns:
          x_BxAxGxD before the output layer, and the keys and values (L, B, A, G, H, C) of these tokens.
        """
        where = Where(
            angles=rotary_angles(positions_BxAxG, self.cfg.head_width),
            stop=stop_BxA,
            past_length=None if past is None else past.length,
        )
        return self.blocks(x_BxAxGxD, prefix, None if past is None else past.tokens, where)

    def logits(self, x_xD: jax.Array) -> jax.Array:
        """f32 logits_xV, the mask id at -1000."""
        logits_xV = self.output(self.final_norm(x_xD.astype(jnp.float32)))
        return logits_xV.at[..., self.cfg.mask_id].set(MASK_LOGIT)
