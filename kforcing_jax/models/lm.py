"""The two language models. They share a backbone and an interface, and differ in where randomness enters.

`CausalLM` (the teacher) gives logits, and a uniform picks a token by inverse CDF outside the network.
`PushForwardLM` (the student) takes the uniforms in as noise tokens, and its tokens are the argmax.

Rollout and evaluation use only the interface that both have (decoding: `models/cached.py`):

- `begin(tokens, noise, tau)`: a pass over text, with one window of fresh noise after every position; `resume` is the
  same from known rows that were computed before;
- `extend(tokens, noise, tau, ...)`: a pass over groups of tokens (then noise) that hang off a known prefix;
- `drawable(pass)`: the hidden states from which the next tokens are drawn;
- `draw(hidden, u, tau)`: hidden states and uniforms to tokens.

Passes give hidden states, not logits: `per_token` applies the output layer and what follows it (a loss, a draw) to a
few positions at a time, so that nobody ever holds the logits of a whole batch. Its logits are in the order in which
tokens lie on [0, 1) (`ModelConfig.cdf_order`); those of `logits` and of calling a model are in vocabulary order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kforcing_jax import noise
from kforcing_jax.models.backbone import Backbone, ModelConfig
from kforcing_jax.models.gated import in_weights_dtype
from kforcing_jax.models.keys import Causal, KeyValue, Known, Past, Text
from kforcing_jax.models.layers import NoiseEncoder, masked
from kforcing_jax.models.truncation import nucleus


class Rows(NamedTuple):
    """Some rows of the groups of a pass: hidden states (B, A, T, D), and keys and values (L, B, A, T, H, C)."""

    hidden: jax.Array
    keys: KeyValue


class Pass(NamedTuple):
    """What a pass gives back of all its rows: the known tokens first, then the noise (none under a `CausalLM`)."""

    known: Rows
    noise: Rows

    @property
    def text_keys(self) -> KeyValue:
        """Keys and values (L, B, A, H, C) of the first token of every group: the text of a pass over text."""
        return jax.tree.map(lambda kv: kv[:, :, :, 0], self.known.keys)


def consecutive(first_BxA: jax.Array, group: int) -> jax.Array:
    """positions_BxAxG of groups that begin at `first` and have no gaps."""
    return first_BxA[..., None] + jnp.arange(group)


def text_positions(shape_BxN: tuple[int, ...], segments_BxN: jax.Array | None) -> jax.Array:
    """positions_BxN of a text; they start again at 0 in every segment."""
    index_BxN = jnp.broadcast_to(jnp.arange(shape_BxN[1]), shape_BxN)
    if segments_BxN is None:
        return index_BxN
    is_first_BxN = jnp.pad(segments_BxN[:, 1:] != segments_BxN[:, :-1], [(0, 0), (1, 0)])
    return index_BxN - jax.lax.cummax(jnp.where(is_first_BxN, index_BxN, 0), axis=1)


class LanguageModel(nn.Module):
    """What the two models share: passes, and the way from hidden states to logits and tokens."""

    cfg: ModelConfig

    def begin(
        self,
        tokens_BxN: jax.Array,
        noise_BxNxK: jax.Array | None = None,
        tau_B: jax.Array | None = None,
        segments_BxN: jax.Array | None = None,
    ) -> Pass:
        """A pass over text, with a window of noise after every position. Text and windows see their own segment."""
        x_BxNxGxD = self.embed_groups(tokens_BxN[:, :, None], noise_BxNxK, tau_B)
        positions_BxNxG = consecutive(text_positions(tokens_BxN.shape, segments_BxN), x_BxNxGxD.shape[2])
        return self._pass(x_BxNxGxD, positions_BxNxG, 1, Text(segments_BxN))

    def extend(
        self,
        tokens_BxAxT: jax.Array,
        noise_BxAxK: jax.Array | None,
        tau_B: jax.Array | None,
        positions_BxAxG: jax.Array,
        prefix: Known,
        past: Past | None = None,
    ) -> Pass:
        """A pass over T known tokens at every anchor of a known prefix, and the K noise tokens after them.

        Args:
          tokens_BxAxT, noise_BxAxK: the groups.
          tau_B: temperature of each row.
          positions_BxAxG: absolute positions of tokens, then noise (G = T under a `CausalLM`, otherwise T + K).
          prefix: what the groups hang off.
          past: earlier tokens at the same anchors.
        """
        x_BxAxGxD = self.embed_groups(tokens_BxAxT, noise_BxAxK, tau_B)
        return self._pass(x_BxAxGxD, positions_BxAxG, tokens_BxAxT.shape[2], prefix, past)

    def _pass(self, x_BxAxGxD, positions_BxAxG, known, prefix, past=None):
        """The first `known` tokens of every group are known, the rest is noise."""
        group = x_BxAxGxD.shape[2]
        is_noise_G = jnp.arange(group) >= known if self.cfg.is_gated and group > known else None
        hidden, keys = self.backbone(x_BxAxGxD, positions_BxAxG, prefix, past, is_noise_G)

        def rows(part):
            return Rows(hidden[:, :, part], jax.tree.map(lambda kv: kv[:, :, :, part], keys))

        return Pass(rows(slice(None, known)), rows(slice(known, None)))

    def logits(self, hidden_xD: jax.Array) -> jax.Array:
        """f32 logits_xV in vocabulary order, the mask id at -1000.

        A gated student's are those of noise rows; of its known rows `text_model` has them.
        """
        ordered_xV, order = self.ordered_logits(hidden_xD), self.cfg.cdf_order
        return ordered_xV if order is None else ordered_xV[..., order.ranks_V]

    def ordered_logits(self, hidden_xD: jax.Array) -> jax.Array:
        """f32 logits_xV in the order of the CDF."""
        return self.backbone.logits(hidden_xD)

    def embed(self, tokens_x: jax.Array) -> jax.Array:
        """Embedded tokens (x, D)."""
        return self.backbone.embed(tokens_x)

    def normalise(self, x_xD: jax.Array) -> jax.Array:
        """hidden_xD that the output layer takes, f32, from what the blocks give."""
        return self.backbone.normalise(x_xD)

    def per_token(self, function: Callable[..., Any], hidden_BxAxGxD: jax.Array, *arrays_BxAxG: jax.Array) -> Any:
        """function(ordered logits, *arrays) of every token, in chunks; see `Output.per_token`."""
        return self.backbone.per_token(function, hidden_BxAxGxD, *arrays_BxAxG)

    def draw(
        self, hidden_BxAxGxD: jax.Array, u_BxAxG: jax.Array, tau_Bx1x1: jax.Array, top_p: float = 1.0
    ) -> jax.Array:
        """tokens_BxAxG, int32, at temperature tau (broadcastable to u) and `top_p`, see `pick`."""
        pick = self.pick if top_p == 1 else functools.partial(self.pick, top_p=top_p)
        return self.per_token(pick, hidden_BxAxGxD, u_BxAxG, tau_Bx1x1)

    def tempered(self, ordered_xV: jax.Array, tau_x: jax.Array, top_p: float = 1.0) -> jax.Array:
        """logits_xV at temperature tau, f32: their maximum at 0 and the mask at -inf, however hot or cold.

        With `top_p` below 1 also what is outside the nucleus is at -inf, see `truncation.nucleus`.
        """
        possible_xV = self._possible(ordered_xV)
        tempered_xV = (possible_xV - jnp.max(possible_xV, axis=-1, keepdims=True)) / tau_x[..., None]
        return tempered_xV if top_p == 1 else nucleus(tempered_xV, top_p)

    def _possible(self, ordered_xV):
        """At tau = 1000, or next to others as low, a logit of -1000 is not impossible."""
        return masked(self.cfg, ordered_xV, -jnp.inf)


class CausalLM(LanguageModel):
    """Autoregressive teacher: tokens in, next-token logits out. Noise and tau of passes are ignored."""

    def setup(self) -> None:
        self.backbone = Backbone(self.cfg)

    def __call__(self, tokens_BxN: jax.Array) -> jax.Array:
        """logits_BxNxV; position n predicts token n + 1."""
        return self.logits(self.begin(tokens_BxN).known.hidden[:, :, 0])

    def embed_groups(
        self, tokens_BxAxT: jax.Array, noise_BxAxK: jax.Array | None, tau_B: jax.Array | None
    ) -> jax.Array:
        """x_BxAxTxD: the tokens alone."""
        del noise_BxAxK, tau_B
        return self.backbone.embed(tokens_BxAxT)

    def resume(
        self, text: Rows, noise_BxNxK: jax.Array | None, tau_B: jax.Array | None, segments_BxN: jax.Array | None = None
    ) -> Pass:
        """What `begin` gives, from the known rows that it gave before."""
        del noise_BxNxK, tau_B, segments_BxN
        return Pass(text, jax.tree.map(lambda x: x[..., :0, :, :] if x.ndim > 4 else x[:, :, :0], text))

    def drawable(self, result: Pass) -> jax.Array:
        """hidden_BxAx1xD of the last known token, which predicts the next one."""
        return result.known.hidden[:, :, -1:]

    def pick(self, ordered_xV: jax.Array, u_x: jax.Array, tau_x: jax.Array, top_p: float = 1.0) -> jax.Array:
        """tokens_x by inverse CDF at temperature tau (broadcastable to u); the mask is never drawn at any tau.

        Out of the fewest of the likeliest tokens that have the probability `top_p` together at that temperature.
        """
        return self.cfg.token_at(noise.inverse_cdf(self.tempered(ordered_xV, tau_x, top_p), u_x))

    def invert_noise(self, logits_BxNxV: jax.Array, tokens_BxN: jax.Array, key: jax.Array) -> jax.Array:
        """u_BxN-1 of `noise.invert_noise` in the order of this model; the logits are in vocabulary order."""
        order = self.cfg.cdf_order
        ordered = logits_BxNxV if order is None else logits_BxNxV[..., order.tokens_V]
        return noise.invert_noise(ordered, self.cfg.column_of(tokens_BxN), key)


class PushForwardLM(LanguageModel):
    """Student: context tokens and k uniforms in, logits of k tokens out of one pass (paper, section 3.2).

    The weights do not depend on k; the window of a pass is the last axis of the noise that it is given.

    A gated student (`cfg.adapter_rank`) has its teacher's weights, and `models/gated.py` for what noise rows add to
    them: its known tokens are computed as the teacher's, whatever is added, and `text_model` is that teacher.
    """

    def setup(self) -> None:
        self.backbone = Backbone(self.cfg)
        self.noise_encoder = NoiseEncoder(self.cfg.d_model, self.cfg.precision)

    @property
    def text_model(self) -> CausalLM:
        """The teacher that a gated student contains: it takes the student's parameters."""
        return CausalLM(dataclasses.replace(self.cfg, adapter_rank=0))

    def begin(
        self,
        tokens_BxN: jax.Array,
        noise_BxNxK: jax.Array | None = None,
        tau_B: jax.Array | None = None,
        segments_BxN: jax.Array | None = None,
    ) -> Pass:
        """As of any model. In a gated student the text has a pass of its own, that of the teacher."""
        if not self.cfg.is_gated or noise_BxNxK is None or tau_B is None:
            return super().begin(tokens_BxN, noise_BxNxK, tau_B, segments_BxN)
        positions_BxNx1 = text_positions(tokens_BxN.shape, segments_BxN)[..., None]
        text = self._pass(self.backbone.embed(tokens_BxN)[:, :, None], positions_BxNx1, 1, Text(segments_BxN))
        return self.resume(text.known, noise_BxNxK, tau_B, segments_BxN)

    def resume(
        self, text: Rows, noise_BxNxK: jax.Array, tau_B: jax.Array, segments_BxN: jax.Array | None = None
    ) -> Pass:
        """What `begin` of a gated student gives, from known rows: its own, or its teacher's, which are the same."""
        shape_BxN, no_tokens = noise_BxNxK.shape[:2], jnp.zeros((*noise_BxNxK.shape[:2], 0), jnp.int32)
        positions_BxNxK = consecutive(text_positions(shape_BxN, segments_BxN) + 1, noise_BxNxK.shape[2])
        text_keys = jax.tree.map(lambda kv: kv[:, :, :, 0], text.keys)
        windows = self.extend(no_tokens, noise_BxNxK, tau_B, positions_BxNxK, Known(text_keys, Causal(segments_BxN)))
        return Pass(text, windows.noise)

    def __call__(self, tokens_BxN: jax.Array, noise_BxNxK: jax.Array, tau_B: jax.Array) -> jax.Array:
        """logits_BxNxKxV of one window after every position; window j of position n is token n + 1 + j."""
        return self.logits(self.begin(tokens_BxN, noise_BxNxK, tau_B).noise.hidden)

    def embed_groups(self, tokens_BxAxT: jax.Array, noise_BxAxK: jax.Array, tau_B: jax.Array) -> jax.Array:
        """x_BxAxGxD: the tokens, then the noise at the row's temperature; G = T + K."""
        tau_BxAxK = jnp.broadcast_to(tau_B[:, None, None], noise_BxAxK.shape)
        noise_BxAxKxD = self.noise_encoder(noise_BxAxK, tau_BxAxK)
        return jnp.concatenate([self.backbone.embed(tokens_BxAxT), noise_BxAxKxD], axis=2)

    def of_tau(self, tau_B: jax.Array) -> jax.Array:
        """What `embed_noise` needs of a temperature, (B, D)."""
        return self.noise_encoder.of_tau(tau_B)

    def embed_noise(self, u_BxK: jax.Array, of_tau_BxD: jax.Array) -> jax.Array:
        """Embedded noise tokens (B, K, D)."""
        return self.noise_encoder.of_noise(u_BxK, of_tau_BxD[:, None])

    def drawable(self, result: Pass) -> jax.Array:
        """hidden_BxAxKxD of the noise tokens."""
        return result.noise.hidden

    def pick(self, ordered_xV: jax.Array, u_x: jax.Array, tau_x: jax.Array, top_p: float = 1.0) -> jax.Array:
        """tokens_x by argmax, never the mask: the randomness is in the input, the rest completes the interface."""
        del u_x, tau_x, top_p
        return self.cfg.token_at(noise.argmax(self._possible(ordered_xV)))

    def probability(self, ordered_xV: jax.Array) -> jax.Array:
        """prob_x of the token that `pick` gives, f32."""
        possible_xV = self._possible(ordered_xV)
        return 1 / jnp.sum(jnp.exp(possible_xV - jnp.max(possible_xV, axis=-1, keepdims=True)), axis=-1)


def init_params(model: CausalLM | PushForwardLM, key: jax.Array) -> dict:
    """Fresh parameters, f32 or as `cfg.weights_dtype` says. Shapes do not depend on the inputs: the smallest serve."""
    tokens_BxN = jnp.zeros((1, 1), jnp.int32)
    inputs = (tokens_BxN, jnp.zeros((1, 1, 1)), jnp.ones(1)) if isinstance(model, PushForwardLM) else (tokens_BxN,)
    return in_weights_dtype(model.cfg.weights_dtype, model.init(key, *inputs)["params"])
