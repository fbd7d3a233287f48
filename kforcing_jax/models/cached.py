"""A pass over a chunk of tokens at the end of every request's cache: how decoding runs a model.

The keys of all tokens of a chunk, known ones and noise, are written first, then the chunk attends over what the cache
holds. So known tokens, noise and drafts need no rules of their own, and what is discarded is overwritten: slots at and
beyond the length that a caller goes on from hold nothing that is ever seen.

Every layer has its own arrays, and its own weights: a loop over passes updates them in place.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kforcing_jax.models.backbone import Appended, Block, ModelConfig
from kforcing_jax.models.cache import Cache, Seen
from kforcing_jax.models.gated import base_params, own_params, with_own
from kforcing_jax.models.layers import MASK_LOGIT, Delta, masked
from kforcing_jax.models.lm import CausalLM, PushForwardLM
from kforcing_jax.models.rotary import rotary_angles
from kforcing_jax.sharding import parameter_shardings


class Weights(NamedTuple):
    """The parameters of a model as decoding wants them: the blocks one by one, in the compute dtype."""

    blocks: tuple[dict, ...]
    # Of the output layer, in the dtype of the parameters: a CPU multiplies a few rows with it in half the time of
    # (D, V).
    head_VxD: jax.Array
    rest: dict  # embedding, final normalisation, bias of the output layer, noise encoder: as in the parameters


# By what they were made of; forgotten with the parameters that they were made from.
_MADE: dict[tuple, Weights] = {}


def weights(cfg: ModelConfig, params: dict, mesh: Mesh | None = None) -> Weights:
    """Takes the stacked blocks apart and casts their matrices: once for the same arrays, as long as they live.

    Of a gated student its teacher's and its own are made apart: students of one teacher hold that once. Arrays of numpy
    may change, so what is made of them is made again.
    """
    if not cfg.is_gated:
        return _made(cfg, params, mesh)
    base, own = (_made(cfg, part, mesh) for part in (base_params(params), own_params(params)))
    blocks = tuple(ours | added for ours, added in zip(base.blocks, own.blocks, strict=True))
    return Weights(blocks, base.head_VxD, with_own(base.rest, own.rest))


def _made(cfg, params, mesh) -> Weights:
    leaves = jax.tree.leaves(params)
    if not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return _placed(split(cfg, params), mesh)
    key = cfg.dtype, cfg.cdf_order, mesh, *map(id, leaves)  # all that `split` reads of `cfg`
    if key not in _MADE:
        made = _MADE[key] = _placed(split(cfg, params), mesh)
        for leaf in leaves:  # once one of them is gone, its id may be another array's
            weakref.finalize(leaf, _MADE.pop, key, None)
        return made
    return _MADE[key]


@contextlib.contextmanager
def weights_forgotten_after() -> Iterator[None]:
    """What `weights` makes in this context is forgotten at its end, though its parameters live on: they are trained."""
    before = set(_MADE)
    try:
        yield
    finally:
        for key in set(_MADE) - before:
            _MADE.pop(key, None)


def _placed(made, mesh):
    return made if mesh is None else jax.device_put(made, weight_shardings(made, mesh))


def split(cfg: ModelConfig, params: dict) -> Weights:
    """`weights`, of arrays that may be abstract. Of a student's own part alone there is no output layer: None."""
    backbone = dict(params["backbone"])
    stacked, output = backbone.pop("blocks"), dict(backbone.pop("output", {}))
    head_VxD: Any = None
    if "kernel" in output:
        head_VxD = jnp.swapaxes(output.pop("kernel"), 0, 1)
    elif "embedding" in backbone:
        head_VxD = cfg.ordered_rows(backbone["embedding"]["embedding"])

    def one(layer):
        return jax.tree_util.tree_map_with_path(lambda path, x: _cast(cfg, path, x[layer]), stacked)

    backbone |= {"output": output} if output else {}
    rest = jax.tree.map(jnp.asarray, params | {"backbone": backbone})
    return Weights(tuple(map(one, range(cfg.num_layers))), head_VxD, rest)


def _cast(cfg, path, x):
    return x if "norm" in jax.tree_util.keystr(path) else x.astype(cfg.dtype)


def weight_shardings(whole: Weights, mesh: Mesh) -> Any:
    """`Weights` of shardings: as `sharding.RULES` say for the stacked blocks, less their first axis."""

    def one(block):
        stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), block)
        shardings = parameter_shardings({"blocks": stacked}, mesh)["blocks"]
        return jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(*s.spec[1:])), shardings)

    # (V, D), as an embedding is.
    head: Any = parameter_shardings({"embedding": {"embedding": whole.head_VxD}}, mesh)["embedding"]["embedding"]
    return Weights(tuple(map(one, whole.blocks)), head, parameter_shardings(whole.rest, mesh))


def append(
    model: CausalLM | PushForwardLM,
    params: Weights,
    x_BxGxD: jax.Array,
    caches: tuple[Cache, ...],
    start_B: jax.Array,
    live: int,
    rows_BxR: jax.Array | None = None,
    is_noise_BxG: jax.Array | None = None,
    windows: "Windows | None" = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Runs the blocks over a chunk of embedded tokens.

    Args:
      caches: of every layer.
      start_B: how many tokens come before the chunk; its keys go to the slots from there on.
      live: no row holds anything beyond this slot, the chunk included.
      rows_BxR: the tokens of the chunk whose hidden states are wanted, by default all. In the last layer the others
        give keys and values only.
      is_noise_BxG: which tokens are noise; None where that makes no difference to the weights, or none of them is.
      windows: where the chunk ends with windows that hang off tokens in it; by default it is one text.

    Returns:
      hidden_BxRxD after the final normalisation, f32, and the caches.
    """
    cfg, written = model.cfg, []
    block = Block(cfg)
    positions_BxG, seen = _places(cfg, start_B, x_BxGxD.shape[1], windows)
    angles = rotary_angles(positions_BxG[:, None], cfg.rope, cfg.head_width)
    for layer, (block_params, cache) in enumerate(zip(params.blocks, caches, strict=True)):
        wanted = rows_BxR if layer == len(caches) - 1 else None
        where = Appended(angles, seen, is_noise_BxG, wanted)
        result: Any = block.apply({"params": block_params}, x_BxGxD, cache, start_B, live, where, method="append")
        x_BxGxD, cache = result
        written.append(cache)
    return call(model, params, "normalise", x_BxGxD), tuple(written)


class Windows(NamedTuple):
    """Windows of `width` tokens each, one after the other at the end of a chunk, after tokens of the chunk itself."""

    after_BxW: jax.Array  # the token that each of them hangs off, counted from the beginning of the chunk
    width: int


def _places(cfg, start_B, size, windows) -> tuple[jax.Array, Seen]:
    """positions_BxG of a chunk, and what its tokens see."""
    slots_BxG = start_B[:, None] + jnp.arange(size)
    if windows is None:
        first = slots_BxG - cfg.sliding_window + 1 if cfg.sliding_window else None
        return slots_BxG, Seen(slots_BxG, first)
    count = windows.after_BxW.shape[1]
    known = size - count * windows.width
    offset_W = jnp.tile(jnp.arange(windows.width), count)
    last_BxW = start_B[:, None] + jnp.repeat(windows.after_BxW, windows.width, axis=1)
    positions_BxG = jnp.concatenate([slots_BxG[:, :known], last_BxW + 1 + offset_W], axis=1)
    last_BxG = jnp.concatenate([slots_BxG[:, :known], last_BxW], axis=1)
    # Of a known token its own slot, which it sees anyhow.
    begins_BxG = slots_BxG - jnp.concatenate([jnp.zeros(known, jnp.int32), offset_W])
    if not cfg.sliding_window:
        return positions_BxG, Seen(last_BxG, None, begins_BxG, slots_BxG)
    nearest = jnp.maximum(begins_BxG, slots_BxG - cfg.sliding_window + 1)
    return positions_BxG, Seen(last_BxG, positions_BxG - cfg.sliding_window + 1, nearest, slots_BxG)


def ordered_logits(model: CausalLM | PushForwardLM, params: Weights, hidden_xD: jax.Array) -> jax.Array:
    """f32 logits_xV in the order of the CDF; of a gated student those of noise rows."""
    cfg, backbone = model.cfg, params.rest["backbone"]
    # A bf16 matrix is made f32 here, as in `Output`: what other products round could be another token than training's.
    logits_xV = jnp.einsum("...D,VD->...V", hidden_xD, params.head_VxD, precision=cfg.precision)
    if cfg.output_bias:
        logits_xV += backbone["output"]["bias"]
    if cfg.is_gated:
        return with_delta(model, params, logits_xV, hidden_xD)
    return masked(cfg, logits_xV, MASK_LOGIT)


def with_delta(model: CausalLM | PushForwardLM, params: Weights, text_xV: jax.Array, hidden_xD: jax.Array) -> jax.Array:
    """Ordered logits of noise rows of a gated student, from what its teacher makes of their hidden states."""
    cfg = model.cfg
    delta = Delta((cfg.d_model,), (cfg.vocab_size,), cfg.adapter_rank, cfg.precision)
    added: Any = delta.apply({"params": params.rest["backbone"]["output_delta"]}, hidden_xD)
    return masked(cfg, text_xV + added, MASK_LOGIT)


def call(model: CausalLM | PushForwardLM, params: Weights, method: str, *args: Any) -> Any:
    """A method of the model that needs none of its blocks."""
    return model.apply({"params": params.rest}, *args, method=method)
