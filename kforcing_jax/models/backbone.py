"""The backbone: a pre-normalised decoder with rotary positions, of the pieces that an `Architecture` names."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.architecture import Architecture
from kforcing_jax.config import ATTENTIONS, FULL_RANK, PRECISIONS, REMATS, WEIGHTS_DTYPES
from kforcing_jax.models.attention import group_attention
from kforcing_jax.models.cache import Cache, Seen, attention, write
from kforcing_jax.models.keys import ATTENDED, Causal, KeyValue, Known, Past, Sliding, Text, UpTo
from kforcing_jax.models.layers import MASK_LOGIT, Delta, Output, masked, norm
from kforcing_jax.models.rotary import rotary_angles, rotate
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Architecture):
    """What a model is, but for its weights: an architecture, a vocabulary, and the arithmetic.

    Attributes:
      mask_id: the id that is never drawn (its logit is -1000); None where there is none.
      adapter_rank: of what noise rows add to every matrix, in a student that leaves its teacher's weights as they are;
        -1 for whole matrices, 0 for an ordinary student.
      dtype: compute dtype of the blocks; normalisation, noise features, logits and softmax are always f32.
      weights_dtype: of the matrices, but for those that a gated student adds; all else is f32. Products are of `dtype`.
      precision: of every product of f32 numbers, wherever it is traced, one of `config.PRECISIONS`.
      remat, attention: how the same is computed, see `config.REMATS` and `config.ATTENTIONS`.
      cdf_order: how tokens lie on [0, 1) for inverse-CDF draws; None is vocabulary order. Column r of the output layer
        belongs to token `cdf_order.tokens_V[r]`, so that draws need no permutation.

    Raises:
      ValueError: fields are not what they may be, or do not fit each other; the message names them all.
    """

    vocab_size: int
    mask_id: int | None
    adapter_rank: int = 0
    dtype: str = "float32"
    precision: str = "highest"
    remat: str = "blocks"
    attention: str = "auto"
    cdf_order: CdfOrder | None = None
    weights_dtype: str = "float32"

    def __post_init__(self):
        if problems := [*self.problems(), *self._wrong_choices()]:
            raise ValueError("; ".join(problems))

    def _wrong_choices(self):
        for name, choices in (
            ("remat", REMATS),
            ("attention", ATTENTIONS),
            ("precision", PRECISIONS),
            ("weights_dtype", WEIGHTS_DTYPES),
        ):
            if getattr(self, name) not in choices:
                yield f"model.{name} = {getattr(self, name)!r} is not one of {', '.join(choices)}"
        if self.adapter_rank < FULL_RANK:
            yield f"model.adapter_rank = {self.adapter_rank} should be at least {FULL_RANK}"
        if self.mask_id is not None and not 0 <= self.mask_id < self.vocab_size:
            yield f"model.mask_id = {self.mask_id} is not in [0, {self.vocab_size})"
        if self.cdf_order is not None and len(self.cdf_order.tokens_V) != self.vocab_size:
            yield f"cdf_order has {len(self.cdf_order.tokens_V)} ids, the vocabulary {self.vocab_size}"

    @property
    def is_gated(self) -> bool:
        """Whether noise rows have weights of their own beside those of all rows."""
        return self.adapter_rank != 0

    @property
    def mask_column(self) -> int | None:
        """The mask's column of the output layer."""
        return None if self.mask_id is None else int(self.column_of(self.mask_id))

    def column_of(self, tokens: Any) -> Any:
        """The columns of the output layer (ranks in the CDF's order) of tokens: an int, or an array of any shape."""
        return tokens if self.cdf_order is None else _look_up(self.cdf_order.ranks_V, tokens)

    def token_at(self, columns: Any) -> Any:
        """The inverse of `column_of`."""
        return columns if self.cdf_order is None else _look_up(self.cdf_order.tokens_V, columns)

    def ordered_rows(self, rows_VxD: jax.Array) -> jax.Array:
        """Rows by token id, in the order of the CDF."""
        return rows_VxD if self.cdf_order is None else rows_VxD[self.cdf_order.tokens_V]


def _look_up(table_V, index):
    return table_V[index] if isinstance(index, (int, np.ndarray)) else jnp.asarray(table_V)[index]


class Block(nn.Module):
    """One layer: of a pass over groups that hang off a prefix, or of a chunk at the end of a cache.

    Every product with a weight says how its result is split (rows, and heads or columns over `tensor`): left alone, XLA
    gathers the rows of a batch as soon as that is less than the weights that `fsdp` has split.
    """

    cfg: ModelConfig

    def setup(self) -> None:
        for name, piece in (_norms(self.cfg) | _products(self.cfg)).items():
            setattr(self, name, piece)

    def __call__(
        self, x_BxAxGxD: jax.Array, known: KeyValue | None, past: KeyValue | None, where: "Where"
    ) -> tuple[jax.Array, KeyValue]:
        """The layer's output x_BxAxGxD, and the keys and values (B, A, G, KV, C) of its own tokens."""
        cfg = self.cfg
        q, keys = self._project(x_BxAxGxD, where.angles, where.is_noise)
        prefix, own = (known, keys) if known is not None else _text_and_windows(keys)
        earlier = None if past is None or where.past_length is None else Past(past, where.past_length)
        sliding = _sliding(cfg, q, prefix, known is None, earlier)
        attended = group_attention(q, own, prefix, where.reach, earlier, cfg.attention, cfg.precision, sliding)
        return self._mix(x_BxAxGxD, attended, where.is_noise), keys

    def append(
        self, x_BxGxD: jax.Array, cache: Cache, start_B: jax.Array, live: int, where: "Appended"
    ) -> tuple[jax.Array, Cache]:
        """Writes the keys of a chunk of tokens from slot `start` of a cache on, then attends over what is live.

        Args:
          x_BxGxD: the chunk.
          cache: keys and values (B, KV, S, C), `start + G <= S`.
          start_B: tokens before the chunk.
          live: slots that hold anything, of all rows, the chunk included.
          where: positions of the chunk's tokens, what they see, and those of them whose output is wanted.

        Returns:
          x_BxRxD of what is wanted, and the cache with the chunk.
        """
        is_noise = where.is_noise_BxG
        q, keys = self._project(x_BxGxD[:, None], where.angles, None if is_noise is None else is_noise[:, None])
        cache = write(cache, jax.tree.map(lambda kv: kv[:, 0], keys), start_B)
        wanted = x_BxGxD, q[:, 0], where.seen, is_noise
        if (rows_BxR := where.rows_BxR) is not None:
            wanted = jax.tree.map(lambda rows: take_rows(rows, rows_BxR), wanted)
        x_BxRxD, q_BxRxHxC, seen, is_noise = wanted
        attended = attention(q_BxRxHxC, cache, seen, live, self.cfg.precision)
        return self._mix(x_BxRxD[:, None], attended[:, None], None if is_noise is None else is_noise[:, None])[
            :, 0
        ], cache

    def _project(self, x_BxAxGxD, angles, is_noise):
        """Queries, and keys with values, rotated to their positions."""
        cfg = self.cfg
        h = self.attn_norm(x_BxAxGxD).astype(cfg.dtype)
        if cfg.kv_heads == cfg.num_heads:
            qkv = constrain(self._product("attn_qkv", h, is_noise), ROWS, None, None, None, "tensor")
            q, k, v = (qkv[..., i, :, :] for i in range(3))
        else:
            q = constrain(self._product("attn_q", h, is_noise), ROWS, None, None, "tensor")
            kv = constrain(self._product("attn_kv", h, is_noise), ROWS, None, None, None, "tensor")
            k, v = kv[..., 0, :, :], kv[..., 1, :, :]
        if cfg.qk_norm:
            q, k = self.attn_q_norm(q).astype(cfg.dtype), self.attn_k_norm(k).astype(cfg.dtype)
        return rotate(q, *angles), KeyValue(rotate(k, *angles), v)

    def _mix(self, x_BxAxGxD, attended_BxAxGxHxC, is_noise):
        """What comes after attention: its output projection, and the MLP."""
        attended = constrain(attended_BxAxGxHxC, ROWS, None, None, "tensor")
        x_BxAxGxD += constrain(self._product("attn_out", attended, is_noise), ROWS)
        h = self.mlp_norm(x_BxAxGxD).astype(self.cfg.dtype)
        h = self._activated(h, is_noise)
        return x_BxAxGxD + constrain(self._product("mlp_out", h, is_noise), ROWS)

    def _activated(self, h, is_noise):
        """What the last matrix of the MLP takes, (B, A, G, F)."""
        inner = constrain(self._product("mlp_in", h, is_noise), ROWS, None, None, "tensor")
        if self.cfg.mlp == "gelu":
            return nn.gelu(inner, approximate=True)
        return nn.silu(constrain(self._product("mlp_gate", h, is_noise), ROWS, None, None, "tensor")) * inner

    def _product(self, name, x, is_noise):
        """The product with a matrix; that of noise rows with the sum of the matrix and its delta."""
        y = getattr(self, name)(x)
        if is_noise is None or not self.cfg.is_gated:
            return y
        added = getattr(self, f"{name}_delta")(x)
        of_row = is_noise.reshape(*is_noise.shape, *[1] * (y.ndim - 3))  # from the axis of the group on
        return y + jnp.where(of_row, added, 0)


def _norms(cfg) -> dict[str, nn.Module]:
    names = ["attn_norm", "mlp_norm", *(["attn_q_norm", "attn_k_norm"] if cfg.qk_norm else [])]
    return {
        name: nn.RMSNorm(epsilon=cfg.norm_epsilon) if name.endswith(("q_norm", "k_norm")) else norm(cfg)
        for name in names
    }


def _products(cfg) -> dict[str, nn.Module]:
    """The matrices of a layer, and with each of them, in gated students, its delta."""
    pieces: dict[str, nn.Module] = {}
    for name, (inputs, outputs, has_bias, parts) in cfg.products.items():
        axes = tuple(range(-len(inputs), 0))
        pieces[name] = nn.DenseGeneral(outputs, axis=axes, use_bias=has_bias, dtype=cfg.dtype, precision=cfg.precision)
        if cfg.is_gated:
            pieces[f"{name}_delta"] = Delta(inputs, outputs, cfg.adapter_rank, cfg.precision, cfg.dtype, parts)
    return pieces


def _sliding(cfg, q_BxAxGxHxC, prefix: KeyValue, is_text: bool, past: Past | None) -> Sliding | None:
    """How far back the groups of a pass see, where they do not see everything anyhow."""
    group, length = q_BxAxGxHxC.shape[2], prefix.key.shape[1]
    farthest = length + group + (0 if past is None else past.tokens.key.shape[2])
    if not cfg.sliding_window or cfg.sliding_window >= farthest:
        return None
    first = 0 if is_text else 1 + (0 if past is None else past.length)
    return Sliding(cfg.sliding_window, first + jnp.arange(group))


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
    """Where the groups of one pass sit: rotary angles, which prefix keys they see, and real past tokens (or None).

    `is_noise` (broadcastable to B, A, G) says which rows are noise, where these have weights of their own.
    """

    angles: tuple[jax.Array, jax.Array]
    reach: Causal | UpTo
    past_length: jax.Array | None
    is_noise: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Appended:
    """Where the tokens of a chunk at the end of a cache sit, and those whose output is wanted, all by default.

    Angles are of shape (B, 1, G, 1, C / 2); `is_noise_BxG` as in `Where`.
    """

    angles: tuple[jax.Array, jax.Array]
    seen: Seen
    is_noise_BxG: jax.Array | None = None
    rows_BxR: jax.Array | None = None


class Backbone(nn.Module):
    """Token embedding, L blocks under one `nn.scan` (parameters stacked on a leading axis), output layer."""

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
        self.final_norm = norm(cfg)
        self.output = Output(cfg)
        if cfg.is_gated:
            self.output_delta = Delta((cfg.d_model,), (cfg.vocab_size,), cfg.adapter_rank, cfg.precision)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embedded tokens (*tokens.shape, D), f32."""
        return constrain(self.embedding(tokens).astype(jnp.float32), ROWS)

    def normalise(self, x_xD: jax.Array) -> jax.Array:
        """hidden_xD that the output layer takes, f32, from what the blocks give."""
        return self.final_norm(x_xD.astype(jnp.float32))

    def logits(self, hidden_xD: jax.Array) -> jax.Array:
        """f32 logits_xV in the order of the CDF; those of noise rows in a gated student."""
        logits_xV = self.output(hidden_xD, self.embedding.embedding)
        if not self.cfg.is_gated:
            return logits_xV
        return masked(self.cfg, logits_xV + self.output_delta(hidden_xD), MASK_LOGIT)

    def per_token(self, function: Callable[..., Any], hidden_BxAxGxD: jax.Array, *arrays_BxAxG: jax.Array) -> Any:
        """function(logits, *arrays) of every token, in chunks; see `Output.per_token`."""
        added = self.output_delta.function() if self.cfg.is_gated else None
        return self.output.per_token(function, added, self.embedding.embedding, hidden_BxAxGxD, *arrays_BxAxG)

    def __call__(
        self,
        x_BxAxGxD: jax.Array,
        positions_BxAxG: jax.Array,
        prefix: Text | Known,
        past: Past | None = None,
        is_noise: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """Runs the blocks over groups that hang off a prefix.

        Args:
          x_BxAxGxD: embedded tokens and noise.
          positions_BxAxG: absolute positions.
          prefix: what the groups hang off.
          past: earlier tokens at the same anchors, (L, B, A, P, KV, C).
          is_noise: which rows are noise, broadcastable to (B, A, G); of gated students only.

        Returns:
          x_BxAxGxD after the final normalisation, f32: the input of the output layer. And the keys and values
          (L, B, A, G, KV, C) of these tokens.
        """
        known, reach = (None, Causal(prefix.segments_BxN)) if isinstance(prefix, Text) else prefix
        where = Where(
            angles=rotary_angles(positions_BxAxG, self.cfg.rope, self.cfg.head_width),
            reach=reach,
            past_length=None if past is None else past.length,
            is_noise=is_noise,
        )
        x_BxAxGxD, keys = self.blocks(x_BxAxGxD, known, None if past is None else past.tokens, where)
        return self.normalise(x_BxAxGxD), keys
