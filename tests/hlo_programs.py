"""Programs whose collectives are known by arithmetic, compiled for TPUs that need not exist."""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T, D, F, L = 64, 128, 256, 6


def chain(x_TxD, w_LxDxD):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_TxD, w_LxDxD)[0]


def tpu_mesh() -> Mesh:
    """Eight TPU v5e chips along one axis "x"; programs can be compiled for them, not run."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened, so there is none to be locked
    from jax.experimental import topologies

    return Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices), "x")


def struct(shape, mesh: Mesh, spec=()) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def compiled_text(function: Callable, *arguments, out=None) -> str:
    return jax.jit(function, out_shardings=out).lower(*arguments).compile().as_text()


def all_reduce_text(mesh: Mesh) -> str:
    """Data parallelism: the gradient of (D, F) weights, summed over devices that hold T / 8 rows each."""
    gradient = jax.grad(lambda w_DxF, x_TxD: ((x_TxD @ w_DxF) ** 2).sum())
    replicated = NamedSharding(mesh, PartitionSpec())
    return compiled_text(gradient, struct((D, F), mesh), struct((T, D), mesh, ("x",)), out=replicated)


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
