"""How arrays lie on the device mesh that `jax.set_mesh` has made current; without one, nothing here does anything."""

import jax
from jax.sharding import PartitionSpec

AXES = ("data", "fsdp", "tensor")
# The axes over which the rows of a batch are split.
ROWS = ("data", "fsdp")


def constrain(x: jax.Array, *spec) -> jax.Array:
    """Lays an array out by a PartitionSpec on the current mesh. XLA chooses well for most arrays, not for all."""
    if current_mesh().size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def per_device(function, in_specs: tuple, out_specs):
    """The function run on every device's own part of its arguments: for kernels, which XLA cannot partition."""
    if current_mesh().size <= 1:
        return function
    # Kernels do not say over which axes their outputs vary, so that cannot be checked.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def row_shards() -> int:
    """Into how many parts the rows of a batch are split."""
    mesh = current_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def platform() -> str:
    """The platform that is compiled for, `cpu`, `gpu` or `tpu`: that of the current mesh, which need not be here."""
    mesh = current_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return device.platform if device is not None else jax.default_backend()


def current_mesh() -> jax.sharding.AbstractMesh:
    return jax.sharding.get_abstract_mesh()
