"""The two language models. They share a backbone and an interface, and differ in where randomness enters.

`CausalLM` (the teacher) gives logits, and a uniform picks a token by inverse CDF outside the network.
`PushForwardLM` (the student) takes the uniforms in as noise tokens, and its tokens are the argmax.

Rollout and decoding use only the interface that both have:

- `begin(tokens, noise, tau)`: a pass over text, with one window of fresh noise after every position;
- `extend(tokens, noise, tau, ...)`: a pass over groups of tokens (then noise) that hang off a known prefix;
- `draw(hidden, u, tau)`: hidden states and uniforms to tokens.

Passes give hidden states, not logits: `per_token` applies the output layer and what follows it (a loss, a draw) to a
few positions at a time, so that nobody ever holds the logits of a whole batch.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kforcing_jax.models.attention import Causal
from kforcing_jax.models.backbone import Backbone, ModelConfig
from kforcing_jax.models.keys import KeyValue, Past
from kforcing_jax.models.layers import NoiseEncoder
from kforcing_jax.noise import inverse_cdf


def group_positions(first_BxA: jax.Array, group: int) -> jax.Array:
    """Consecutive positions_BxAxG from the position of each group's first token."""
    return first_BxA[..., None] + jnp.arange(group)


def text_positions(shape_BxN: tuple[int, int], segments_BxN: jax.Array | None) -> jax.Array:
    """positions_BxN of a text; they start again at 0 in every segment."""
    index_BxN = jnp.broadcast_to(jnp.arange(shape_BxN[1]), shape_BxN)
    if segments_BxN is None:
        return index_BxN
    is_first_BxN = jnp.pad(segments_BxN[:, 1:] != segments_BxN[:, :-1], [(0, 0), (1, 0)])
    return index_BxN - jax.lax.cummax(jnp.where(is_first_BxN, index_BxN, 0), axis=1)


class LanguageModel(nn.Module):
    """What the two models share: the way from hidden states to logits and tokens."""

    cfg: ModelConfig

    def logits(self, hidden_xD: jax.Array) -> jax.Array:
        """f32 logits_xV, the mask id at -1000."""
        return self.backbone.output(hidden_xD)

    def per_token(self, function, hidden_BxAxGxD: jax.Array, *arrays_BxAxG: jax.Array):
        """function(logits, *arrays) of every token, in chunks; see `Output.per_token`."""
        return self.backbone.output.per_token(function, hidden_BxAxGxD, *arrays_BxAxG)

    def draw(self, hidden_BxAxGxD: jax.Array, u_BxAxG: jax.Array, tau_Bx1x1: jax.Array) -> jax.Array:
        """tokens_BxAxG at temperature tau (broadcastable to u)."""
        return self.per_token(self.pick, hidden_BxAxGxD, u_BxAxG, tau_Bx1x1)


class CausalLM(LanguageModel):
    """Autoregressive teacher: tokens in, next-token logits out."""

    def setup(self):
        self.backbone = Backbone(self.cfg)

    def __call__(self, tokens_BxN: jax.Array) -> jax.Array:
        """logits_BxNxV; position n predicts token n + 1."""
        hidden_BxNx1xD, _ = self.begin(tokens_BxN)
        return self.logits(hidden_BxNx1xD[:, :, 0])

    def begin(
        self, tokens_BxN: jax.Array, noise_BxNx1=None, tau_B=None, segments_BxN: jax.Array | None = None
    ) -> tuple[jax.Array, KeyValue]:
        """hidden_BxNx1xD after every position, and the text's keys and values (L, B, N, H, C).

        Noise and tau are accepted for the sake of the shared interface, unused. Tokens see their own segment.
        """
        del noise_BxNx1, tau_B
        positions_BxNx1 = text_positions(tokens_BxN.shape, segments_BxN)[..., None]
        x_BxNx1xD = self.backbone.embed(tokens_BxN)[:, :, None]
        hidden_BxNx1xD, keys = self.backbone(x_BxNx1xD, positions_BxNx1, Causal(segments_BxN))
        return hidden_BxNx1xD, first_of_group(keys)

    def extend(
        self,
        tokens_BxAxT: jax.Array,
        noise_BxAx1,
        tau_B,
        prefix: KeyValue,
        reach: Causal | jax.Array,
        first_BxA: jax.Array,
        past: Past | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """hidden_BxAxTxD after every one of T tokens, and their keys and values (L, B, A, T, H, C).

        Args:
          tokens_BxAxT: tokens at positions first, first + 1, ... of each anchor.
          noise_BxAx1, tau_B: accepted for the sake of the shared interface, unused.
          prefix: keys and values (L, B, S, H, C).
          reach: which of them each anchor sees, as in `group_attention`.
          past: earlier tokens at the same anchors.
        """
        del noise_BxAx1, tau_B
        positions_BxAxT = group_positions(first_BxA, tokens_BxAxT.shape[2])
        return self.backbone(self.backbone.embed(tokens_BxAxT), positions_BxAxT, reach, prefix, past)

    def pick(self, logits_xV: jax.Array, u_x: jax.Array, tau_x: jax.Array) -> jax.Array:
        """Inverse-CDF sample at temperature tau (broadcastable to u); the mask id is never drawn at any tau."""
        # At a high temperature a logit of -1000 is no longer impossible, so the mask is excluded here again.
        scaled_xV = (logits_xV / tau_x[..., None]).at[..., self.cfg.mask_id].set(-jnp.inf)
        return inverse_cdf(scaled_xV, u_x)


class PushForwardLM(LanguageModel):
    """Student: context tokens and k uniforms in, logits of k tokens out of one pass (paper, section 3.2).

    The weights do not depend on k; the window of a pass is the last axis of the noise that it is given.
    """

    def setup(self):
        self.backbone = Backbone(self.cfg)
        self.noise_encoder = NoiseEncoder(self.cfg.d_model)

    def __call__(self, tokens_BxN: jax.Array, noise_BxNxK: jax.Array, tau_B: jax.Array) -> jax.Array:
        """logits_BxNxKxV of one window after every position; window j of position n is token n + 1 + j."""
        hidden_BxNxKxD, _ = self.begin(tokens_BxN, noise_BxNxK, tau_B)
        return self.logits(hidden_BxNxKxD)

    def begin(
        self,
        tokens_BxN: jax.Array,
        noise_BxNxK: jax.Array,
        tau_B: jax.Array,
        segments_BxN: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """hidden_BxNxKxD of the window after every position, and the text's keys and values (L, B, N, H, C).

        Text and windows see their own segment.
        """
        x_BxNxGxD = self._embed_group(tokens_BxN[:, :, None], noise_BxNxK, tau_B)
        positions_BxNxG = group_positions(text_positions(tokens_BxN.shape, segments_BxN), x_BxNxGxD.shape[2])
        hidden_BxNxGxD, keys = self.backbone(x_BxNxGxD, positions_BxNxG, Causal(segments_BxN))
        return hidden_BxNxGxD[:, :, 1:], first_of_group(keys)

    def extend(
        self,
        tokens_BxAxT: jax.Array,
        noise_BxAxK: jax.Array,
        tau_B: jax.Array,
        prefix: KeyValue,
        reach: Causal | jax.Array,
        first_BxA: jax.Array,
        past: Past | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """hidden_BxAxKxD of the K tokens after T known ones, and the keys and values (L, B, A, T, H, C) of those.

        Arguments as in `CausalLM.extend`; the noise sits at the positions right after the T tokens.
        """
        known = tokens_BxAxT.shape[2]
        x_BxAxGxD = self._embed_group(tokens_BxAxT, noise_BxAxK, tau_B)
        positions_BxAxG = group_positions(first_BxA, x_BxAxGxD.shape[2])
        hidden_BxAxGxD, keys = self.backbone(x_BxAxGxD, positions_BxAxG, reach, prefix, past)
        return hidden_BxAxGxD[:, :, known:], jax.tree.map(lambda kv: kv[:, :, :, :known], keys)

    def pick(self, logits_xV: jax.Array, u_x: jax.Array, tau_x: jax.Array) -> jax.Array:
        """Argmax: the student's randomness is in its input. Noise and tau only complete the interface."""
        del u_x, tau_x
        return jnp.argmax(logits_xV, axis=-1).astype(jnp.int32)

    def _embed_group(self, tokens_BxAxT, noise_BxAxK, tau_B):
        tau_BxAxK = jnp.broadcast_to(tau_B[:, None, None], noise_BxAxK.shape)
        noise_BxAxKxD = self.noise_encoder(noise_BxAxK, tau_BxAxK)
        return jnp.concatenate([self.backbone.embed(tokens_BxAxT), noise_BxAxKxD], axis=2)


def init_params(model: CausalLM | PushForwardLM, key: jax.Array) -> dict:
    """Fresh parameters. Shapes do not depend on the inputs, so the smallest ones serve."""
    tokens_BxN = jnp.zeros((1, 1), jnp.int32)
    inputs = (tokens_BxN, jnp.zeros((1, 1, 1)), jnp.ones(1)) if isinstance(model, PushForwardLM) else (tokens_BxN,)
    return model.init(key, *inputs)["params"]


def first_of_group(keys: KeyValue) -> KeyValue:
    """Keys and values (L, B, A, H, C) of the first token of every group: the text of a pass over text."""
    return jax.tree.map(lambda kv: kv[:, :, :, 0], keys)
