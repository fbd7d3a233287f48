"""Group attention over a text on a TPU: JAX's splash attention kernel over the prefix, merged with the group itself.

The tokens of a group are further query rows over the same keys, so the kernel's causal mask, with every position
repeated once per group token, skips the future. What the group sees of itself is a few keys per query: too small for
a kernel, and computed beside it. The two softmaxes are merged by their log-sum-exps.

The backward pass gives the kernel's own backward kernels the *merged* output and log-sum-exp. exp(score - lse) is then
the merged weight of a prefix key, so they return the gradients of the whole softmax with respect to that prefix, and
no gradient of a log-sum-exp is needed (ring attention uses the same identity). The stock kernel has no public entry for
this: `_splash_attention_bwd` is called by its private name, here and nowhere else.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.sharding import PartitionSpec

from kforcing_jax.models.keys import ATTENDED, KeyValue, Past
from kforcing_jax.sharding import ROWS, per_device, platform

_LANES = 128
# Rows times keys of one tile: several f32 copies of it, and the blocks themselves, share the vector memory.
_MOST_TILE = 1280 * 256
# Of the rows of the smallest tile. Compiled for v5e, forward and backward: 2,048 rows of 128 f32 channels go in, 2,560
# do not; of bfloat16 4,096 do.
_MOST_ROW_BYTES = 1 << 20


def fits(q_BxNxGxHxC: jax.Array, sharing: int = 1) -> bool:
    """Whether the kernel can tile such groups over a text of N positions, `sharing` heads over the same keys."""
    _, length, group, _, width = q_BxNxGxHxC.shape
    row_bytes = _LANES * group * sharing * width * q_BxNxGxHxC.dtype.itemsize
    return length % _LANES == 0 and row_bytes <= _MOST_ROW_BYTES


def tile(length: int, group: int) -> tuple[int, int]:
    """(positions, keys) of a tile: at most a quarter of the text, so at most 1.25 times the causal pairs.

    A tile of p positions has p * group rows.
    """
    size = max(_LANES, min(512, length // 4 // _LANES * _LANES))
    while length % size or (size * size * group > _MOST_TILE and size > _LANES):
        size -= _LANES
    return size, size


def pairs(length: int, group: int) -> int:
    """Query-key pairs that the kernel computes for one head over one text."""
    positions, keys = tile(length, group)
    visited = sum((start + positions - 1) // keys + 1 for start in range(0, length, positions))
    return visited * positions * keys * group


def group_attention(
    q_BxNxGxHxC: jax.Array,
    own: KeyValue,
    text: KeyValue,
    segments_BxN: jax.Array | None,
    past: Past | None,
    precision: str,
    sharing: int = 1,
) -> jax.Array:
    """out_BxNxGxHxC: `attention.group_attention` over a text, with a `Causal` reach.

    Each token of a group is `sharing` rows, one for each query head that sees the same keys.
    """
    beside, seen_GxM = _beside(q_BxNxGxHxC.shape[2] // sharing, own, past)
    seen_GxM = jnp.repeat(seen_GxM, sharing, axis=0)
    return _merged_attention(
        precision, q_BxNxGxHxC * q_BxNxGxHxC.shape[-1] ** -0.5, text, beside, seen_GxM, segments_BxN
    )


def _beside(group, own, past):
    """Keys and values (B, N, M, H, C) of a group's own and past tokens, and which of them each query sees."""
    members = own.key.shape[2]
    causal_GxM = jnp.tril(jnp.ones((group, members), bool), k=members - group)
    if past is None:
        return own, causal_GxM
    capacity = past.tokens.key.shape[2]
    real_GxP = jnp.broadcast_to(jnp.arange(capacity) < past.length, (group, capacity))
    together = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), past.tokens, own)
    return together, jnp.concatenate([real_GxP, causal_GxM], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merged_attention(precision, q, text, beside, seen_GxM, segments_BxN):
    return _forward(precision, q, text, beside, seen_GxM, segments_BxN)[0]


def _forward(precision, q, text, beside, seen_GxM, segments_BxN):
    # The kernels take the precision of their products from the context in which they are traced.
    with jax.default_matmul_precision(precision):
        out, lse = _over_text(q, text, segments_BxN)
    if beside.key.shape[2]:
        out, lse = _merge(out, lse, _scores(q, beside.key, seen_GxM), beside.value)
    # The backward pass starts from these two, so a policy that keeps them spares the kernel a second run.
    out, lse = checkpoint_name(out, ATTENDED), checkpoint_name(lse, ATTENDED)
    return out, (q, text, beside, seen_GxM, segments_BxN, out, lse)


def _merge(out, lse, scores, values):
    """The softmax over the text and the one over what is beside it as one: (out, lse)."""
    merged_lse = jnp.logaddexp(lse, jax.nn.logsumexp(scores, axis=3))
    merged = _weighted_sum(jnp.exp(scores - merged_lse[:, :, :, None]), values)
    merged += jnp.exp(lse - merged_lse)[..., None] * out.astype(jnp.float32)
    return merged.astype(out.dtype), merged_lse


def _backward(precision, residuals, d_out):
    q, text, beside, seen_GxM, segments_BxN, out, lse = residuals
    with jax.default_matmul_precision(precision):
        d_q, d_text = _over_text_gradients(q, text, segments_BxN, out, lse, d_out)
    if beside.key.shape[2]:
        d_q_beside, d_beside = _beside_gradients(q, beside, seen_GxM, out, lse, d_out)
        d_q = (d_q.astype(jnp.float32) + d_q_beside).astype(q.dtype)
    else:
        d_beside = jax.tree.map(jnp.zeros_like, beside)
    return d_q, d_text, d_beside, None, None


_merged_attention.defvjp(_forward, _backward)


def _beside_gradients(q, beside, seen_GxM, out, lse, d_out):
    d_out, weights = d_out.astype(jnp.float32), jnp.exp(_scores(q, beside.key, seen_GxM) - lse[:, :, :, None])
    mean = jnp.sum(d_out * out.astype(jnp.float32), axis=-1)
    d_scores = weights * (_products(d_out, beside.value) - mean[:, :, :, None])
    gradients = KeyValue(_summed_over_group(d_scores, q), _summed_over_group(weights, d_out))
    return _weighted_sum(d_scores, beside.key), jax.tree.map(lambda d, x: d.astype(x.dtype), gradients, beside)


# The contractions over a handful of group tokens are products and sums, not matmuls: a TPU pads a matmul of five rows
# to its tiles, which took 7 times the memory and 3 times the estimated time (v5e, bf16, N = 1024, k = 4).


def _scores(q_BxNxGxHxC, k_BxNxMxHxC, seen_GxM):
    """f32 scores_BxNxGxMxH of pre-scaled queries."""
    return jnp.where(seen_GxM[..., None], _products(q_BxNxGxHxC, k_BxNxMxHxC), -jnp.inf)


def _products(a_BxNxGxHxC, b_BxNxMxHxC):
    wide = a_BxNxGxHxC[:, :, :, None].astype(jnp.float32) * b_BxNxMxHxC[:, :, None].astype(jnp.float32)
    return jnp.sum(wide, axis=-1)


def _weighted_sum(weights_BxNxGxMxH, x_BxNxMxHxC):
    return jnp.sum(weights_BxNxGxMxH[..., None] * x_BxNxMxHxC[:, :, None].astype(jnp.float32), axis=3)


def _summed_over_group(weights_BxNxGxMxH, x_BxNxGxHxC):
    return jnp.sum(weights_BxNxGxMxH[..., None] * x_BxNxGxHxC[:, :, :, None].astype(jnp.float32), axis=2)


def _over_text(q, text, segments_BxN):
    """Attention over the text alone: out_BxNxGxHxC, and its log-sum-exp (B, N, G, H), f32."""
    group = q.shape[2]

    def of_one_row(q_BxHxRxC, k_BxHxNxC, v_BxHxNxC, segments_BxN):
        kernel = _kernel(q_BxHxRxC.shape, group, save_residuals=True)
        in_axes = (0, 0, 0, None if segments_BxN is None else 0)
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, _segment_ids(ids, group)), in_axes)(
            q_BxHxRxC, k_BxHxNxC, v_BxHxNxC, segments_BxN
        )

    heads, rows = PartitionSpec(ROWS, "tensor"), PartitionSpec(ROWS)
    run = per_device(of_one_row, (heads, heads, heads, rows), (heads, (heads,)))
    out, (lse,) = run(*_heads_first(q, text), segments_BxN)
    return _heads_last(out, group), _heads_last(lse, group)


def _over_text_gradients(q, text, segments_BxN, out, lse, d_out):
    """The part of the gradients that goes through the text's keys: (d_q, d_text)."""
    group = q.shape[2]

    def of_one_row(q_BxHxRxC, k, v, segments_BxN, out, lse, d_out):
        kernel = _kernel(q_BxHxRxC.shape, group, save_residuals=False)
        settings = dict(kernel.kwargs)

        def one(q, k, v, ids, out, lse, d_out):
            ids = _segment_ids(ids, group)
            residuals = (q, k, v, ids, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
            return kernel_lib._splash_attention_bwd(res=residuals, do=d_out, **settings)[3:6]

        in_axes = (0, 0, 0, None if segments_BxN is None else 0, 0, 0, 0)
        return jax.vmap(one, in_axes)(q_BxHxRxC, k, v, segments_BxN, out, lse, d_out)

    heads, rows = PartitionSpec(ROWS, "tensor"), PartitionSpec(ROWS)
    run = per_device(of_one_row, (heads, heads, heads, rows, heads, heads, heads), (heads, heads, heads))
    d_q, d_k, d_v = run(*_heads_first(q, text), segments_BxN, *(_rows_by_head(x) for x in (out, lse, d_out)))
    return _heads_last(d_q, group), KeyValue(d_k.swapaxes(1, 2), d_v.swapaxes(1, 2))


def _heads_first(q_BxNxGxHxC, text):
    return _rows_by_head(q_BxNxGxHxC), text.key.swapaxes(1, 2), text.value.swapaxes(1, 2)


def _rows_by_head(x_BxNxGxHx):
    """(B, H, N * G, ...): the rows of the kernel, groups side by side."""
    x_BxHxNxGx = jnp.moveaxis(x_BxNxGxHx, 3, 1)
    return x_BxHxNxGx.reshape(*x_BxHxNxGx.shape[:2], -1, *x_BxHxNxGx.shape[4:])


def _heads_last(x_BxHxRx, group):
    x_BxHxNxGx = x_BxHxRx.reshape(*x_BxHxRx.shape[:2], -1, group, *x_BxHxRx.shape[3:])
    return jnp.moveaxis(x_BxHxNxGx, 1, 3)


def _segment_ids(segments_N, group):
    if segments_N is None:
        return None
    return kernel_lib.SegmentIds(q=jnp.repeat(segments_N, group), kv=segments_N)


def _kernel(shape_BxHxRxC, group, save_residuals):
    _, heads, rows, _ = shape_BxHxRxC
    length = rows // group
    positions, keys = tile(length, group)
    blocks = kernel_lib.BlockSizes(
        block_q=positions * group,
        block_kv=keys,
        block_q_dkv=positions * group,
        block_kv_dkv=keys,
        block_q_dq=positions * group,
        block_kv_dq=keys,
    )
    mask = mask_lib.MultiHeadMask([_GroupedCausalMask(length, group)] * heads)
    return kernel_lib.make_splash_mha(
        mask,
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        save_residuals=save_residuals,
        interpret=platform() != "tpu",  # in tests
    )


class _GroupedCausalMask(mask_lib.CausalMask):
    """Causal in positions, where every position has `group` rows."""

    def __init__(self, length: int, group: int):
        super().__init__((length * group, length))
        self.q_sequence = np.arange(length * group, dtype=self.q_sequence.dtype) // group


# Matmuls per query-key pair in each kernel: scores and sum; scores, d_v, d_p and d_k; scores, d_p and d_q.
_MATMULS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}


def kernel_flops(kernel: str, q_BxHxRxC: tuple[int, ...], length: int) -> int:
    """FLOPs of one call of a compiled kernel on R = length * group rows; 0 for a kernel that is not of this file.

    XLA's cost analysis does not look into kernels.
    """
    matmuls = next((count for name, count in _MATMULS.items() if kernel.startswith(name)), 0)
    batch, heads, rows, width = q_BxHxRxC
    return 2 * matmuls * width * batch * heads * pairs(length, rows // length) if matmuls else 0
