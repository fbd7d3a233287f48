"""The backbone: a pre-LayerNorm decoder with rotary positions, as in the released K-Forcing checkpoints."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from kforcing_jax.models.attention import IMPLEMENTATIONS, Causal, group_attention
from kforcing_jax.models.keys import ATTENDED, KeyValue, Past
from kforcing_jax.models.layers import LAYER_NORM_EPSILON, Output, rotary_angles, rotate
from kforcing_jax.sharding import ROWS, constrain

# What the backward pass of a block finds in memory, from least to most; the rest is computed again.
#   blocks: the block's input. attention: also what attention gave, the dearest part to repeat on long texts.
#   matmuls: also every product with a weight. nothing: everything is kept, nothing is repeated.
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
    """Shape of a model. `mask_id` is the id that is never drawn (its logit is -1000).

    `dtype` is the compute dtype of the blocks; parameters, normalisation, logits and softmax are always f32.
    `remat` is what the backward pass finds in memory, one of `REMAT_POLICIES`. `attention` is how attention over
    a text is computed where that can be, one of `attention.IMPLEMENTATIONS`. Neither changes a result beyond rounding.
    """

    vocab_size: int
    mask_id: int
    num_layers: int
    d_model: int
    num_heads: int
    dtype: str = "float32"
    remat: str = "blocks"
    attention: str = "auto"

    def __post_init__(self):
        for name, choices in (("remat", REMAT_POLICIES), ("attention", IMPLEMENTATIONS)):
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

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads


class Block(nn.Module):
    """One layer. Returns its output and the keys and values of its own tokens.

    Every product with a weight says how its result is split (rows, and heads or columns over `tensor`): left alone, XLA
    gathers the rows of a batch as soon as that is less than the weights that `fsdp` has split.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BxAxGxD, prefix: KeyValue | None, past: KeyValue | None, where: "Where"):
        cfg = self.cfg
        dense = functools.partial(nn.DenseGeneral, dtype=cfg.dtype)
        norm = functools.partial(nn.LayerNorm, epsilon=LAYER_NORM_EPSILON, use_bias=False)

        h = norm(name="attn_norm")(x_BxAxGxD).astype(cfg.dtype)
        qkv = dense((3, cfg.num_heads, cfg.head_width), use_bias=False, name="attn_qkv")(h)
        qkv = constrain(qkv, ROWS, None, None, None, "tensor")
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        cos, sin = where.angles
        q, keys = rotate(q, cos, sin), KeyValue(rotate(k, cos, sin), v)
        own = keys
        if prefix is None:
            # The first token of every group is the text itself, and the text is the prefix.
            prefix, own = (jax.tree.map(lambda kv, at=at: kv[:, :, at], keys) for at in (0, slice(1, None)))
        past = None if past is None else Past(past, where.past_length)
        attended = group_attention(q, own, prefix, where.reach, past, cfg.attention)
        attended = constrain(attended, ROWS, None, None, "tensor")
        x_BxAxGxD += constrain(dense(cfg.d_model, axis=(-2, -1), use_bias=False, name="attn_out")(attended), ROWS)

        h = norm(name="mlp_norm")(x_BxAxGxD).astype(cfg.dtype)
        h = constrain(dense(4 * cfg.d_model, name="mlp_in")(h), ROWS, None, None, "tensor")
        x_BxAxGxD += constrain(dense(cfg.d_model, name="mlp_out")(nn.gelu(h, approximate=True)), ROWS)
        return x_BxAxGxD, keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
    """Where the groups of one pass sit: rotary angles, which prefix keys they see, and real past tokens (or None)."""

    angles: tuple[jax.Array, jax.Array]
    reach: Causal | jax.Array
    past_length: jax.Array | None


class Backbone(nn.Module):
    """Token embedding, L blocks under one `nn.scan` (parameters stacked on a leading axis), final normalisation."""

    cfg: ModelConfig

    def setup(self):
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
        self.output = Output(cfg.d_model, cfg.vocab_size, cfg.mask_id)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return constrain(self.embedding(tokens), ROWS)

    def __call__(
        self,
        x_BxAxGxD: jax.Array,
        positions_BxAxG: jax.Array,
        reach: Causal | jax.Array,
        prefix: KeyValue | None = None,
        past: Past | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """Runs the blocks over groups that hang off a prefix.

        Args:
          x_BxAxGxD: embedded tokens and noise.
          positions_BxAxG: absolute positions.
          reach: which prefix tokens each group sees, as in `group_attention`.
          prefix: keys and values (L, B, S, H, C). None: the first token of each group is the text itself.
          past: earlier tokens at the same anchors, (L, B, A, P, H, C).

        Returns:
          x_BxAxGxD after the final normalisation, f32: the input of the output layer. And the keys and values
          (L, B, A, G, H, C) of these tokens.
        """
        where = Where(
            angles=rotary_angles(positions_BxAxG, self.cfg.head_width),
            reach=reach,
            past_length=None if past is None else past.length,
        )
        x_BxAxGxD, keys = self.blocks(x_BxAxGxD, prefix, None if past is None else past.tokens, where)
        return self.final_norm(x_BxAxGxD.astype(jnp.float32)), keys
