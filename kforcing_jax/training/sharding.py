"""The device mesh and how arrays lie on it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kforcing_jax.config import MeshConfig
from kforcing_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over all devices.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or parameters would need splitting.
    """
    sizes = tuple(getattr(config, axis) for axis in AXES)
    devices = jax.device_count()
    if config.fsdp * config.tensor != 1:
        raise ConfigError(
            f"mesh.fsdp = {config.fsdp} and mesh.tensor = {config.tensor} should be 1: parameters are not sharded yet"
        )
    if config.data != devices:
        raise ConfigError(
            f"mesh.data = {config.data} should be {devices}, the number of {jax.default_backend()} devices"
        )
    # Linen modules break under Explicit axes, which `make_mesh` defaults to.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())
