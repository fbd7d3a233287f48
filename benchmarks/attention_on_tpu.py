"""Two ways to windows over a text with the stock TPU kernel, compared by what compiles; no TPU is needed.

python benchmarks/attention_on_tpu.py --topology=v5e:1x1

  merged    what models/splash.py does: the windows of a position are further rows over the same keys, and what a window
            sees of itself is merged by log-sum-exp
  one mask  all text, then all first window tokens, all second ones, ..., under one block-sparse mask: windows see the
            text causally and each other along diagonals, of which the kernel visits whole blocks

For each: query-key pairs that the kernel computes over those that are needed, temporary memory of a forward and a
backward pass, and the number of kernel tiles.
"""

import os

# Before jax is imported: TPUs are compiled for, not looked for.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kforcing_jax.models import splash
from kforcing_jax.models.attention import Causal, group_attention
from kforcing_jax.models.keys import KeyValue
from kforcing_jax.sharding import AXES
from kforcing_jax.training.flops import attended_pairs

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:1x1", "One device of this kind.")
_LENGTHS = flags.DEFINE_list("lengths", ["512", "1024"], "Positions per row.")
_KS = flags.DEFINE_list("ks", ["1", "2", "4"], "Windows.")
_ROWS = flags.DEFINE_integer("rows", 8, "Rows.")
_HEADS, _WIDTH = 12, 64
_JSON = flags.DEFINE_bool("json", False, "End with one JSON object on one line.")


def main(_):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=_TOPOLOGY.value).devices[:1]
    mesh = Mesh(np.array(devices).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    print(f"{'N':>5} {'k':>2}  {'way':<14} {'pairs / needed':>14} {'temporary MB':>12} {'tiles':>6}")
    results = []
    for length in map(int, _LENGTHS.value):
        for k in map(int, _KS.value):
            ways = [("merged", merged, None), *(("one mask", one_mask, block) for block in (128, 256))]
            for name, way, block in ways:
                result = {"length": length, "k": k, "way": name, "block": block} | way(mesh, length, k, block)
                results.append(result)
                title = f"{name} {block or ''}"
                print(
                    f"{length:>5} {k:>2}  {title:<14} {result['pairs_over_needed']:>14.2f} "
                    f"{result['temporary_bytes'] / 2**20:>12.0f} {result['tiles']:>6}",
                    flush=True,
                )
    if _JSON.value:
        print(json.dumps({"topology": _TOPOLOGY.value, "jax": jax.__version__, "results": results}))


def merged(mesh, length: int, k: int, _) -> dict:
    group = 1 + k
    positions, keys = splash.tile(length, group)
    pairs = splash.pairs(length, group) + length * group * k

    def attend(q, own, text):
        return group_attention(q, own, text, Causal(), None, "splash", "default")

    shapes = [(_ROWS.value, length, group), (_ROWS.value, length, k), (_ROWS.value, length)]
    q, own, text = (_arrays(mesh, *shape, _HEADS, _WIDTH) for shape in shapes)
    return {
        "pairs_over_needed": pairs / attended_pairs(length, group),
        "temporary_bytes": _temporary_bytes(mesh, attend, q, KeyValue(own, own), KeyValue(text, text)),
        "tiles": splash.pairs(length, group) // (positions * keys * group),
    }


def one_mask(mesh, length: int, k: int, block: int) -> dict:
    mask = mask_lib.NumpyMask(_offset_major_mask(length, k))
    sizes = kernel_lib.BlockSizes(**{name: block for name in _BLOCK_SIZES})
    kernel = kernel_lib.make_splash_mha(
        mask_lib.MultiHeadMask([mask] * _HEADS), block_sizes=sizes, head_shards=1, q_seq_shards=1
    )
    tokens = length * (1 + k)
    blocks = mask[:, :].reshape(tokens // block, block, tokens // block, block).any(axis=(1, 3)).sum()
    q = _arrays(mesh, _ROWS.value, _HEADS, tokens, _WIDTH)
    return {
        "pairs_over_needed": float(blocks * block**2 / attended_pairs(length, 1 + k)),
        "temporary_bytes": _temporary_bytes(mesh, lambda q, k, v: jax.vmap(kernel)(q, k, v), q, q, q),
        "tiles": int(blocks),
    }


_BLOCK_SIZES = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")


def _offset_major_mask(length, k):
    """(T, T), T = (1 + k) N: token (offset j, position t) sees the text up to t and the offsets 1..j of t."""
    position, offset = np.tile(np.arange(length), 1 + k), np.repeat(np.arange(1 + k), length)
    to_text = (offset == 0) & (position <= position[:, None])
    return to_text | ((offset > 0) & (position == position[:, None]) & (offset <= offset[:, None]))


def _arrays(mesh, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))


def _temporary_bytes(mesh, attend, *inputs) -> int:
    """Of the gradient with respect to all inputs."""
    with jax.set_mesh(mesh):
        gradient = jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), argnums=tuple(range(len(inputs))))
        return jax.jit(gradient).lower(*inputs).compile().memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    app.run(main)
