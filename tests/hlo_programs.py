"""Programs whose work is known by arithmetic, compiled for the CPU or, without having one, for a TPU."""

import dataclasses
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

B, H, T, S, C, D, F, L = 4, 12, 64, 96, 32, 128, 256, 6
PRODUCT = 2 * T * D * D


def scores(q_BxTxHxC, k_BxSxHxC):
    return jnp.einsum("bthc,bshc->bhts", q_BxTxHxC, k_BxSxHxC)


def squared_scores(q_BxTxHxC, k_BxSxHxC):
    return (scores(q_BxTxHxC, k_BxSxHxC) ** 2).sum()


def chain(x_TxD, w_LxDxD):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_TxD, w_LxDxD)[0]


def remat_chain(x_TxD, w_LxDxD):
    @jax.checkpoint
    def two_products(x_TxD, w_DxD):
        return jnp.tanh(jnp.tanh(x_TxD @ w_DxD) @ w_DxD), None

    return jax.lax.scan(two_products, x_TxD, w_LxDxD)[0].sum()


def nested_chain(x_BxTxD, w_LxDxD):
    def rows(x_BxTxD, w_DxD):
        return jax.lax.map(lambda x_TxD: jnp.tanh(x_TxD @ w_DxD), x_BxTxD), None

    return jax.lax.scan(rows, x_BxTxD, w_LxDxD)[0]


def either(flag, x_TxD, w_DxD):
    return jax.lax.cond(flag, lambda x: x @ w_DxD, lambda x: (x @ w_DxD) @ w_DxD, x_TxD)


def until_large(x_TxD, w_DxD):
    return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ w_DxD, x_TxD)


@dataclasses.dataclass(frozen=True)
class Known:
    """A function, the shapes of its f32 arguments, and the FLOPs of one call."""

    function: Callable
    shapes: tuple[tuple[int, ...], ...]
    flops: int


KNOWN = {
    "product": Known(jnp.matmul, ((T, D), (D, F)), 2 * T * D * F),
    "batched": Known(scores, ((B, T, H, C), (B, S, H, C)), 2 * B * H * T * S * C),
    "batched_gradient": Known(
        jax.grad(squared_scores, (0, 1)), ((B, T, H, C), (B, S, H, C)), 3 * 2 * B * H * T * S * C
    ),
    "scan": Known(chain, ((T, D), (L, D, D)), L * PRODUCT),
    "scan_gradient": Known(
        jax.grad(lambda x, w: chain(x, w).sum(), (0, 1)), ((T, D), (L, D, D)), 3 * L * PRODUCT
    ),  # per layer: forward, and a product for each of the two gradients
    "remat_gradient": Known(jax.grad(remat_chain, (0, 1)), ((T, D), (L, D, D)), 2 * 4 * L * PRODUCT),
    "nested": Known(nested_chain, ((B, T, D), (L, D, D)), B * L * PRODUCT),
    "conditional": Known(either, ((), (T, D), (D, D)), 2 * PRODUCT),
    "unknown_trips": Known(until_large, ((T, D), (D, D)), PRODUCT),
}


def tpu_mesh() -> Mesh:
    """Eight TPU v5e chips that need not exist, along one axis "x"; programs can be compiled for them, not run."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened, so there is none to be locked
    from jax.experimental import topologies

    return Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices), "x")


def struct(shape, mesh: Mesh | None = None, spec=(), dtype="float32") -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, PartitionSpec(*spec)) if mesh else None
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def compiled_text(function: Callable, *arguments, out=None) -> str:
    return jax.jit(function, out_shardings=out).lower(*arguments).compile().as_text()


def compiled(name: str, mesh: Mesh | None = None) -> str:
    """HLO text of one of `KNOWN`, for the CPU or for a mesh of TPUs (every one doing the same)."""
    known = KNOWN[name]
    dtypes = ["float32" if shape else "bool" for shape in known.shapes]
    arguments = [struct(shape, mesh, dtype=dtype) for shape, dtype in zip(known.shapes, dtypes, strict=True)]
    return compiled_text(known.function, *arguments)


def all_reduce_text(mesh: Mesh) -> str:
    """Data parallelism: the gradient of (D, F) weights, summed over devices that hold T / 8 rows each."""
    gradient = jax.grad(lambda w_DxF, x_TxD: ((x_TxD @ w_DxF) ** 2).sum())
    replicated = NamedSharding(mesh, PartitionSpec())
    return compiled_text(gradient, struct((D, F), mesh), struct((T, D), mesh, ("x",)), out=replicated)


def all_gather_text(mesh: Mesh) -> str:
    """Every device gets the (T, D) array of which it holds T / 8 rows."""
    return compiled_text(lambda x: x, struct((T, D), mesh, ("x",)), out=NamedSharding(mesh, PartitionSpec()))


def permute_text(mesh: Mesh) -> str:
    """Every device passes its T / 8 rows on."""
    ring = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]
    shift = jax.shard_map(
        lambda x: jax.lax.ppermute(x, "x", ring), mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x")
    )
    return compiled_text(shift, struct((T, D), mesh, ("x",)))


def sharded_chain_text(mesh: Mesh) -> str:
    """Fully sharded data parallelism: L layers of 8D x 8D weights, gathered in both passes; gradients are scattered."""
    rows = NamedSharding(mesh, PartitionSpec(None, "x"))
    gradient = jax.grad(lambda w, x: chain(x, w).sum())
    return compiled_text(
        gradient, struct((L, 8 * D, 8 * D), mesh, (None, "x")), struct((T, 8 * D), mesh, ("x",)), out=rows
    )


def pallas_text(mesh: Mesh) -> str:
    """A Pallas kernel inside a loop of B steps, on one device of the mesh."""
    from jax.experimental import pallas as pl

    def kernel(x_ref, y_ref, out_ref):
        out_ref[...] = x_ref[...] * y_ref[...]

    times = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((D, D), jnp.float32), name="times_kernel")
    one = Mesh(mesh.devices[:1], "x")
    return compiled_text(
        lambda x_BxDxD, y_DxD: jax.lax.map(lambda x_DxD: times(x_DxD, y_DxD), x_BxDxD),
        struct((B, D, D), one),
        struct((D, D), one),
    )
