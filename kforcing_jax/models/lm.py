"""The two language models. They share a backbone and an interface, and differ in where randomness enters.

`CausalLM` (the teacher) gives logits, and a uniform picks a token by inverse CDF outside the network.
`PushForwardLM` (the student) takes the uniforms in as noise tokens, and its tokens are the argmax.

Rollout and decoding use only the interface that both have:

- `begin(tokens, noise, tau)`: a pass over text, with one window of fresh noise after every position;
- `extend(tokens, noise, tau, ...)`: a pass over groups of tokens (then noise) that hang off a known prefix;
- `draw(logits, u, tau)`: logits and uniforms to tokens.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kforcing_jax.models.attention import KeyValue, Past
from kforcing_jax.models.transformer import LAYER_NORM_EPSILON, Backbone, ModelConfig
from kforcing_jax.noise import inverse_cdf

NOISE_BASE = 10_000.0


def group_positions(first_BxA: jax.Array, group: int) -> jax.Array:
    """Consecutive positions_BxAxG from the position of each group's first token."""
    return first_BxA[..., None] + jnp.arange(group)


def text_stops(batch: int, length: int) -> jax.Array:
    """stop_BxN of a pass over text: the token at t sees the t tokens before it (and itself)."""
    return jnp.broadcast_to(jnp.arange(length), (batch, length))


class CausalLM(nn.Module):
    """Autoregressive teacher: tokens in, next-token logits out."""

    cfg: ModelConfig

    def setup(self):
        self.backbone = Backbone(self.cfg)

    def __call__(self, tokens_BxN: jax.Array) -> jax.Array:
        """logits_BxNxV; position n predicts token n + 1."""
        logits_BxNx1xV, _ = self.begin(tokens_BxN)
        return logits_BxNx1xV[:, :, 0]

    def begin(self, tokens_BxN: jax.Array, noise_BxNx1=None, tau_B=None) -> tuple[jax.Array, KeyValue]:
        """logits_BxNx1xV of the token after every position, and the text's keys and values (L, B, N, H, C).

        Noise and tau are accepted for the sake of the shared interface; the logits do not depend on them.
        """
        del noise_BxNx1, tau_B
        stop_BxN = text_stops(*tokens_BxN.shape)
        x_BxNx1xD = self.backbone.embed(tokens_BxN)[:, :, None]
        x_BxNx1xD, own = self.backbone(x_BxNx1xD, group_positions(stop_BxN, 1), stop_BxN)
        return self.backbone.logits(x_BxNx1xD), first_of_group(own)

    def extend(
        self,
        tokens_BxAxT: jax.Array,
        noise_BxAx1,
        tau_B,
        prefix: KeyValue,
        stop_BxA: jax.Array,
        first_BxA: jax.Array,
        past: Past | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """logits_BxAxTxV after every one of T tokens, and their keys and values (L, B, A, T, H, C).

        Args:
          tokens_BxAxT: tokens at positions first, first + 1, ... of each anchor.
          noise_BxAx1, tau_B: accepted for the sake of the shared interface, unused.
          prefix: keys and values (L, B, S, H, C), of which each anchor sees the first `stop_BxA`.
          past: earlier tokens at the same anchors.
        """
        del noise_BxAx1, tau_B
        positions_BxAxT = group_positions(first_BxA, tokens_BxAxT.shape[2])
        x_BxAxTxD, own = self.backbone(self.backbone.embed(tokens_BxAxT), positions_BxAxT, stop_BxA, prefix, past)
        return self.backbone.logits(x_BxAxTxD), own

    def draw(self, logits_xV: jax.Array, u_x: jax.Array, tau_x: jax.Array) -> jax.Array:
        """Inverse-CDF sample at temperature tau, (broadcastable to u); the mask id is never drawn at any tau."""
        # At a high temperature a logit of -1000 is no longer impossible, so the mask is excluded here again.
        scaled_xV = (logits_xV / tau_x[..., None]).at[..., self.cfg.mask_id].set(-jnp.inf)
        return inverse_cdf(scaled_xV, u_x)


class PushForwardLM(nn.Module):
    """Student: context tokens and k uniforms in, logits of k tokens out of one pass (paper, section 3.2).

    The weights do not depend on k; the window of a pass is the last axis of the noise that it is given.
    """

    cfg: ModelConfig

    def setup(self):
        self.backbone = Backbone(self.cfg)
        self.noise_encoder = NoiseEncoder(self.cfg.d_model)

    def __call__(self, tokens_BxN: jax.Array, noise_BxNxK: jax.Array, tau_B: jax.Array) -> jax.Array:
        """logits_BxNxKxV of one window after every position; window j of position n is token n + 1 + j."""
        logits_BxNxKxV, _ = self.begin(tokens_BxN, noise_BxNxK, tau_B)
        return logits_BxNxKxV

    def begin(self, tokens_BxN: jax.Array, noise_BxNxK: jax.Array, tau_B: jax.Array) -> tuple[jax.Array, KeyValue]:
        """logits_BxNxKxV of the window after every position, and the text's keys and values (L, B, N, H, C)."""
        stop_BxN = text_stops(*tokens_BxN.shape)
        x_BxNxGxD = self._embed_group(tokens_BxN[:, :, None], noise_BxNxK, tau_B)
        x_BxNxGxD, own = self.backbone(x_BxNxGxD, group_positions(stop_BxN, x_BxNxGxD.shape[2]), stop_BxN)
        return self.backbone.logits(x_BxNxGxD[:, :, 1:]), first_of_group(own)

    def extend(
        self,
        tokens_BxAxT: jax.Array,
        noise_BxAxK: jax.Array,
        tau_B: jax.Array,
        prefix: KeyValue,
        stop_BxA: jax.Array,
        first_BxA: jax.Array,
        past: Past | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """logits_BxAxKxV of the K tokens after T known ones, and the keys and values (L, B, A, T, H, C) of those.

        Arguments as in `CausalLM.extend`; the noise sits at the positions right after the T tokens.
        """
        known = tokens_BxAxT.shape[2]
        x_BxAxGxD = self._embed_group(tokens_BxAxT, noise_BxAxK, tau_B)
        positions_BxAxG = group_positions(first_BxA, x_BxAxGxD.shape[2])
        x_BxAxGxD, own = self.backbone(x_BxAxGxD, positions_BxAxG, stop_BxA, prefix, past)
        return self.backbone.logits(x_BxAxGxD[:, :, known:]), jax.tree.map(lambda kv: kv[:, :, :, :known], own)

    def draw(self, logits_xV: jax.Array, u_x: jax.Array, tau_x: jax.Array) -> jax.Array:
        """Argmax: the student's randomness is in its input. Noise and tau only complete the interface."""
        del u_x, tau_x
        return jnp.argmax(logits_xV, axis=-1).astype(jnp.int32)

    def _embed_group(self, tokens_BxAxT, noise_BxAxK, tau_B):
        tau_BxAxK = jnp.broadcast_to(tau_B[:, None, None], noise_BxAxK.shape)
        noise_BxAxKxD = self.noise_encoder(noise_BxAxK, tau_BxAxK)
        return jnp.concatenate([self.backbone.embed(tokens_BxAxT), noise_BxAxKxD], axis=2)


class NoiseEncoder(nn.Module):
    """Embeds a uniform and a temperature as one token of width D: e(u, tau). Always f32."""

    d_model: int

    @nn.compact
    def __call__(self, u_x: jax.Array, tau_x: jax.Array) -> jax.Array:
        features_xF = jnp.concatenate([fourier_features(u_x, self.d_model), fourier_features(tau_x, self.d_model)], -1)
        x_xD = nn.Dense(self.d_model, name="project")(features_xF)
        h = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name="norm")(x_xD)
        h = nn.gelu(nn.Dense(4 * self.d_model, name="mlp_in")(h), approximate=False)
        return x_xD + nn.Dense(self.d_model, name="mlp_out")(h)


def init_params(model: CausalLM | PushForwardLM, key: jax.Array) -> dict:
    """Fresh parameters. Shapes do not depend on the inputs, so the smallest ones serve."""
    tokens_BxN = jnp.zeros((1, 1), jnp.int32)
    inputs = (tokens_BxN, jnp.zeros((1, 1, 1)), jnp.ones(1)) if isinstance(model, PushForwardLM) else (tokens_BxN,)
    return model.init(key, *inputs)["params"]


def fourier_features(value_x: jax.Array, width: int) -> jax.Array:
    """[cos(2 pi f v), sin(2 pi f v)] at width / 2 frequencies 10000^(-i / (width / 2)), f32."""
    half = width // 2
    frequencies = NOISE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = 2 * jnp.pi * value_x[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def first_of_group(own: KeyValue) -> KeyValue:
    """Keys and values (L, B, A, H, C) of the first token of every group: the text of a pass over text."""
    return jax.tree.map(lambda kv: kv[:, :, :, 0], own)
