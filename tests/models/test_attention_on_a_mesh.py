"""Every implementation over a text that blocks and kernels can cut, on a mesh of all three axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kforcing_jax.config import MeshConfig
from kforcing_jax.models.attention import Causal, group_attention
from kforcing_jax.models.keys import KeyValue
from kforcing_jax.sharding import ROWS, make_mesh

BATCH, LENGTH, GROUP, HEADS, WIDTH = 4, 128, 3, 4, 8
# Rows over data and fsdp, heads over tensor: as a step lays them out.
QUERIES = PartitionSpec(ROWS, None, None, "tensor")


def value_and_gradients(implementation):
    """The jitted function of q, k and v (B, N, G, H, C), the cotangent and segments (B, N) or None."""

    def attend(q, k, v, segments):
        text, windows = KeyValue(k[:, :, 0], v[:, :, 0]), KeyValue(k[:, :, 1:], v[:, :, 1:])
        return group_attention(q, windows, text, Causal(segments), None, implementation)

    @jax.jit
    def both(q, k, v, cotangent, segments):
        out, pull_back = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
        return out, *pull_back(cotangent)

    return both


@pytest.mark.parametrize("segmented", [False, True], ids=["one text", "segments"])
@pytest.mark.parametrize("implementation", ["dense", "blockwise", "splash"])
def test_attention_on_a_mesh_is_dense_attention_on_one_device(rng, implementation, segmented):
    inputs = [rng.normal(size=(BATCH, LENGTH, GROUP, HEADS, WIDTH)).astype(np.float32) for _ in range(4)]
    segments = np.sort(rng.integers(1, 4, size=(BATCH, LENGTH)), axis=1).astype(np.int32) if segmented else None
    expected = value_and_gradients("dense")(*map(jnp.asarray, inputs), segments)

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    laid_out = [jax.device_put(x, NamedSharding(mesh, QUERIES)) for x in inputs]
    if segmented:
        segments = jax.device_put(segments, NamedSharding(mesh, PartitionSpec(ROWS)))
    with jax.set_mesh(mesh):
        actual = value_and_gradients(implementation)(*laid_out, segments)
    for name, got, wanted in zip(("out", "d_q", "d_k", "d_v"), actual, expected, strict=True):
        assert len(got.sharding.device_set) == 8, name
        np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=name)
