"""The backbone: a pre-LayerNorm decoder with rotary positions, as in the released K-Forcing checkpoints."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.config import ATTENTIONS, PRECISIONS, REMATS
from kforcing_jax.models.attention import group_attention
from kforcing_jax.models.cache import Cache, attention, write
from kforcing_jax.models.keys import ATTENDED, Causal, KeyValue, Known, Past, Text, UpTo
from kforcing_jax.models.layers import LAYER_NORM_EPSILON, Output, rotary_angles, rotate
from kforcing_jax.noise import CdfOrder
from kforcing_jax.sharding import ROWS, constrain

# What the backward pass of a block finds in memory; `config.REMATS` says what each keeps.
REMAT_POLICIES = {
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENDED),
    "matmuls": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENDED),
    ),
    "nothing": jax.checkpoint_policies.everything_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a model is, but for its weights.

    Attributes:
      mask_id: the id that is never drawn (its logit is -1000).
      dtype: compute dtype of the blocks; parameters, normalisation, noise features, logits and softmax are always f32.
      precision: of every product of f32 numbers, wherever it is traced, one of `config.PRECISIONS`.
      remat, attention: how the same is computed, see `config.REMATS` and `config.ATTENTIONS`.
      cdf_order: how tokens lie on [0, 1) for inverse-CDF draws; None is vocabulary order. Column r of the output layer
        belongs to token `cdf_order.tokens_V[r]`, so that draws need no permutation.

    Raises:
      ValueError: a field is not what it may be, or does not fit another; the message names it.
    """

    vocab_size: int
    mask_id: int
    num_layers: int
    d_model: int
    num_heads: int
    dtype: str = "float32"
    precision: str = "highest"
    remat: str = "blocks"
    attention: str = "auto"
    cdf_order: CdfOrder | None = None

    def __post_init__(self):
        for name, choices in (("remat", REMATS), ("attention", ATTENTIONS), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"model.{name} = {getattr(self, name)!r} is not one of {', '.join(choices)}")
        if self.d_model % self.num_heads:
            raise ValueError(f"model.d_model = {self.d_model} is not divisible by model.num_heads = {self.num_heads}")
        if (self.d_model // self.num_heads) % 2:
            raise ValueError(
                f"model.d_model / model.num_heads = {self.head_width} is odd; rotary positions need an even head width"
            )
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"model.mask_id = {self.mask_id} is not in [0, {self.vocab_size})")
        if self.cdf_order is not None and len(self.cdf_order.tokens_V) != self.vocab_size:
            raise ValueError(f"cdf_order has {len(self.cdf_order.tokens_V)} ids, the vocabulary {self.vocab_size}")

    @property
    def head_width(self) -> int:
        """Channels of one head, C; even."""
        return self.d_model // self.num_heads

    def column_of(self, tokens: Any) -> Any:
        """The columns of the output layer (ranks in the CDF's order) of tokens: an int, or an array of any shape."""
        return tokens if self.cdf_order is None else _look_up(self.cdf_order.ranks_V, tokens)

    def token_at(self, columns: Any) -> Any:
        """The inverse of `column_of`."""
        return columns if self.cdf_order is None else _look_up(self.cdf_order.tokens_V, columns)


def _look_up(table_V, index):
    return table_V[index] if isinstance(index, (int, np.ndarray)) else jnp.asarray(table_V)[index]


class Block(nn.Module):
    """One layer: of a pass over groups that hang off a prefix, or of a chunk at the end of a cache.

    Every product with a weight says how its result is split (rows, and heads or columns over `tensor`): left alone, XLA
    gathers the rows of a batch as soon as that is less than the weights that `fsdp` has split.
    """

    cfg: ModelConfig

    def setup(self) -> None:
        cfg = self.cfg
        dense = functools.partial(nn.DenseGeneral, dtype=cfg.dtype, precision=cfg.precision)
        norm = functools.partial(nn.LayerNorm, epsilon=LAYER_NORM_EPSILON, use_bias=False)
        self.attn_norm = norm()
        self.attn_qkv = dense((3, cfg.num_heads, cfg.head_width), use_bias=False)
        self.attn_out = dense(cfg.d_model, axis=(-2, -1), use_bias=False)
        self.mlp_norm = norm()
        self.mlp_in = dense(4 * cfg.d_model)
        self.mlp_out = dense(cfg.d_model)

    def __call__(
        self, x_BxAxGxD: jax.Array, known: KeyValue | None, past: KeyValue | None, where: "Where"
    ) -> tuple[jax.Array, KeyValue]:
        """The layer's output x_BxAxGxD, and the keys and values (B, A, G, H, C) of its own tokens."""
        cfg = self.cfg
        q, keys = self._project(x_BxAxGxD, where.angles)
        prefix, own = (known, keys) if known is not None else _text_and_windows(keys)
        earlier = None if past is None or where.past_length is None else Past(past, where.past_length)
        attended = group_attention(q, own, prefix, where.reach, earlier, cfg.attention, cfg.precision)
        return self._mix(x_BxAxGxD, attended), keys

    def append(
        self,
        x_BxGxD: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        cache: Cache,
        start_B: jax.Array,
        live: int,
        rows_BxR: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Writes the keys of a chunk of tokens from slot `start` of a cache on, then attends over what is live.

        Args:
          x_BxGxD: the chunk.
          angles: cos and sin of its positions, (B, 1, G, 1, C / 2) each.
          cache: keys and values (B, H, S, C), `start + G <= S`.
          start_B: tokens before the chunk.
          live: slots that hold anything, of all rows, the chunk included.
          rows_BxR: the tokens whose output is wanted, all by default.

        Returns:
          x_BxRxD, and the cache with the chunk.
        """
        q, keys = self._project(x_BxGxD[:, None], angles)
        cache = write(cache, jax.tree.map(lambda kv: kv[:, 0], keys), start_B)
        q_BxGxHxC, row_BxG = q[:, 0], jnp.arange(x_BxGxD.shape[1])[None]
        if rows_BxR is not None:
            row_BxG = rows_BxR
            x_BxGxD, q_BxGxHxC = (take_rows(rows, rows_BxR) for rows in (x_BxGxD, q_BxGxHxC))
        attended = attention(q_BxGxHxC, cache, start_B[:, None] + row_BxG, live, self.cfg.precision)
        return self._mix(x_BxGxD[:, None], attended[:, None])[:, 0], cache

    def _project(self, x_BxAxGxD, angles):
        """Queries, and keys with values, rotated to their positions."""
        h = self.attn_norm(x_BxAxGxD).astype(self.cfg.dtype)
        qkv = constrain(self.attn_qkv(h), ROWS, None, None, None, "tensor")
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        return rotate(q, *angles), KeyValue(rotate(k, *angles), v)

    def _mix(self, x_BxAxGxD, attended_BxAxGxHxC):
        """What comes after attention: its output projection, and the MLP."""
        attended = constrain(attended_BxAxGxHxC, ROWS, None, None, "tensor")
        x_BxAxGxD += constrain(self.attn_out(attended), ROWS)
        h = self.mlp_norm(x_BxAxGxD).astype(self.cfg.dtype)
        h = constrain(self.mlp_in(h), ROWS, None, None, "tensor")
        return x_BxAxGxD + constrain(self.mlp_out(nn.gelu(h, approximate=True)), ROWS)


def take_rows(x_BxGxX: jax.Array, rows_BxR: jax.Array) -> jax.Array:
    """Some tokens (B, R, ...) of every row."""
    return jnp.take_along_axis(x_BxGxX, rows_BxR.reshape(*rows_BxR.shape, *[1] * (x_BxGxX.ndim - 2)), axis=1)


def _text_and_windows(keys: KeyValue) -> tuple[KeyValue, KeyValue]:
    """Of groups that begin with the text itself: the text is the prefix, the rest the groups' own."""
    text, windows = (jax.tree.map(lambda kv, at=at: kv[:, :, at], keys) for at in (0, slice(1, None)))
    return text, windows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
    """Where the groups of one pass sit: rotary angles, which prefix keys they see, and real past tokens (or None)."""

    angles: tuple[jax.Array, jax.Array]
    reach: Causal | UpTo
    past_length: jax.Array | None


class Backbone(nn.Module):
    """Token embedding, L blocks under one `nn.scan` (parameters stacked on a leading axis), final normalisation."""

    cfg: ModelConfig

    def setup(self) -> None:
        cfg = self.cfg
        self.embedding = nn.Embed(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.scan(
            nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[cfg.remat]),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            length=cfg.num_layers,
        )(cfg)
        self.final_norm = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, use_bias=False)
        self.output = Output(cfg.d_model, cfg.vocab_size, int(cfg.column_of(cfg.mask_id)), cfg.precision)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embedded tokens (*tokens.shape, D), f32."""
        return constrain(self.embedding(tokens), ROWS)

    def __call__(
        self, x_BxAxGxD: jax.Array, positions_BxAxG: jax.Array, prefix: Text | Known, past: Past | None = None
    ) -> tuple[jax.Array, KeyValue]:
        """Runs the blocks over groups that hang off a prefix.

        Args:
          x_BxAxGxD: embedded tokens and noise.
          positions_BxAxG: absolute positions.
          prefix: what the groups hang off.
          past: earlier tokens at the same anchors, (L, B, A, P, H, C).

        Returns:
          x_BxAxGxD after the final normalisation, f32: the input of the output layer. And the keys and values
          (L, B, A, G, H, C) of these tokens.
        """
        known, reach = (None, Causal(prefix.segments_BxN)) if isinstance(prefix, Text) else prefix
        where = Where(
            angles=rotary_angles(positions_BxAxG, self.cfg.head_width),
            reach=reach,
            past_length=None if past is None else past.length,
        )
        x_BxAxGxD, keys = self.blocks(x_BxAxGxD, known, None if past is None else past.tokens, where)
        return self.final_norm(x_BxAxGxD.astype(jnp.float32)), keys
