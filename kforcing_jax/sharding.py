"""The device mesh, and how parameters, optimiser state, batches and what is computed lie on it.

`jax.set_mesh` makes a mesh current. What models know of it is at the end of this file; without a current mesh nothing
there does anything.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kforcing_jax.config import Config, MeshConfig
from kforcing_jax.errors import ConfigError, RunError

AXES = ("data", "fsdp", "tensor")
# The axes over which the rows of a batch are split.
ROWS = ("data", "fsdp")
_MODEL = ("fsdp", "tensor")

# The first rule whose pattern is found in a parameter's path says how its axes are split; no rule: not at all. Shapes
# are (L, ...) inside the blocks. Attention heads and MLP columns are split over `tensor`, as in Megatron-LM, the other
# large axis over `fsdp`. The vocabulary is never split (30,522 and 50,258 have few divisors, and whole rows of logits
# are what loss and inverse CDF need): embedding and output layer are split along the model's width.
RULES = (
    (r"blocks/attn_qkv/kernel$", (None, "fsdp", None, "tensor", None)),  # L, D, 3, H, C
    (r"blocks/attn_qkv/bias$", (None, None, "tensor", None)),  # L, 3, H, C
    (r"blocks/attn_q/kernel$", (None, "fsdp", "tensor", None)),  # L, D, H, C
    (r"blocks/attn_q/bias$", (None, "tensor", None)),  # L, H, C
    (r"blocks/attn_kv/kernel$", (None, "fsdp", None, "tensor", None)),  # L, D, 2, KV, C
    (r"blocks/attn_kv/bias$", (None, None, "tensor", None)),  # L, 2, KV, C
    (r"blocks/attn_out/kernel$", (None, "tensor", None, "fsdp")),  # L, H, C, D
    (r"blocks/mlp_(in|gate)/kernel$", (None, "fsdp", "tensor")),  # L, D, F
    (r"blocks/mlp_(in|gate)/bias$", (None, "tensor")),  # L, F
    (r"blocks/mlp_out/kernel$", (None, "tensor", "fsdp")),  # L, F, D
    (r"embedding/embedding$", (None, _MODEL)),  # V, D
    (r"output/kernel$", (_MODEL, None)),  # D, V
    # Of deltas of low rank what lies along the model or its columns is split over `fsdp`: they are small, their
    # averages and moments three times as much.
    (r"blocks/\w+_delta/(down|full)$", (None, "fsdp", None, None)),  # L, inputs, parts, rank or columns
    (r"blocks/\w+_delta/up$", (None, None, None, "fsdp")),  # L, parts, rank, columns
    (r"output_delta/(down|full)$", ("fsdp", None, None)),  # D, 1, rank or V
    (r"noise_encoder/project/kernel$", (None, _MODEL)),  # 2D, D
    (r"noise_encoder/mlp_(in|out)/kernel$", (_MODEL, None)),  # D, 4D and 4D, D
)


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Sizes of the axes data, fsdp and tensor; a size of -1 takes what the others leave.

    Raises:
      ConfigError: the sizes do not fit the number of devices.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    described = ", ".join(f"mesh.{axis} = {size}" for axis, size in zip(AXES, sizes, strict=True))
    if -1 in sizes and devices % given:
        raise ConfigError(f"{described}: {given} does not divide the {devices} devices")
    data, fsdp, tensor = (devices // given if size == -1 else size for size in sizes)
    needed = data * fsdp * tensor
    if needed > devices:
        raise ConfigError(f"{described}: {needed} devices are needed, {devices} are here")
    return data, fsdp, tensor


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over all devices, or over the first ones if it needs fewer.

    Raises:
      ConfigError: the sizes do not fit the number of devices, or leave out some of another process.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(config, len(devices))
    used = math.prod(sizes)
    if used < len(devices) and jax.process_count() > 1:
        raise ConfigError(
            f"mesh.data * mesh.fsdp * mesh.tensor = {used} should be {len(devices)}, all devices of the "
            f"{jax.process_count()} processes; mesh.data = -1 takes what is there"
        )
    # Linen modules break under Explicit axes, which `make_mesh` defaults to.
    types = (AxisType.Auto,) * len(AXES)
    if used < len(devices):
        # `jax.make_mesh` arranges whole slices by their wiring, and refuses odd parts of one.
        return Mesh(np.array(devices[:used]).reshape(sizes), AXES, axis_types=types)
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)


def make_mesh_that_fits(config: Config) -> Mesh:
    """The mesh of a run, or one over the devices that are here, for a trained run that is used elsewhere."""
    try:
        return make_mesh(config.mesh)
    except ConfigError:
        return make_mesh(MeshConfig(data=1 if jax.process_count() == 1 else -1))


def check_divisible(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError when a batch of a stage that trains, or the model, cannot be split evenly over the mesh."""
    rows, fsdp, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["fsdp"], mesh.shape["tensor"]
    heads = "num_kv_heads" if config.model.num_kv_heads else "num_heads"
    if config.model.kv_heads % tensor:
        raise ConfigError(f"model.{heads} = {config.model.kv_heads} is not divisible by mesh.tensor = {tensor}")
    if config.model.mlp_width % tensor:
        raise ConfigError(f"model.d_mlp = {config.model.mlp_width} is not divisible by mesh.tensor = {tensor}")
    if config.model.d_model % (fsdp * tensor):
        raise ConfigError(
            f"model.d_model = {config.model.d_model} is not divisible by mesh.fsdp * mesh.tensor = {fsdp * tensor}"
        )
    for name, stage in config.stages.items():
        field = f"stages.{name.replace('-', '_')}"
        if stage.last_step and stage.batch_size % (rows * stage.accumulation):
            raise ConfigError(
                f"{field}.batch_size = {stage.batch_size} is not divisible by mesh.data * mesh.fsdp * "
                f"{field}.accumulation = {rows} * {stage.accumulation}"
            )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree with the sharding of every leaf by `RULES`: of parameters, and of anything that holds trees like them.

    An axis that does not divide evenly is whole everywhere.
    """

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for pattern, spec in RULES if re.search(pattern, name)), ())
        axes = (axis if size % _parts(mesh, axis) == 0 else None for axis, size in zip(spec, leaf.shape, strict=False))
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(one, tree)


def _parts(mesh, axis) -> int:
    """Into how many an array's axis is split over some axes of a mesh."""
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[name] for name in names)


def abstract_on(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree (`jax.ShapeDtypeStruct`), laid out by a tree of shardings (or one for all of it)."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def process_share(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """(index, count): this process's devices hold part `index` of a batch cut into `count` equal parts.

    Processes that differ only along `tensor` hold the same rows, and share an index.

    Raises:
      RunError: the rows of this process are not neighbours.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    slices = [rows[0].indices(batch_size) for rows in indices.values() if rows is not None]
    first, end = min(start for start, _, _ in slices), max(stop for _, stop, _ in slices)
    if len({start for start, _, _ in slices}) * (slices[0][1] - slices[0][0]) != end - first:
        raise RunError("the devices of this process do not hold neighbouring rows of a batch; make mesh.data larger")
    return first // (end - first), batch_size // (end - first)


def put_batch(batch: Any, mesh: Mesh, batch_size: int) -> Any:
    """A tree of arrays on the mesh, `batch_size` rows each, from one of arrays with the rows of `process_share`."""

    def put(rows_RxN):
        return jax.make_array_from_process_local_data(
            batch_sharding(mesh), np.asarray(rows_RxN), (batch_size, *rows_RxN.shape[1:])
        )

    return jax.tree.map(put, batch)


def put_validation(batches: Any, mesh: Mesh) -> Any:
    """A tree of batches (I, B, N) that every process has whole, on the mesh: by rows where they divide evenly."""
    whole = jax.tree.leaves(batches)[0].shape[1] % (mesh.shape["data"] * mesh.shape["fsdp"])
    sharding = replicated(mesh) if whole else NamedSharding(mesh, PartitionSpec(None, ROWS))
    return jax.device_put(batches, sharding)


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array, on every process. All processes that hold a part of it have to call this together."""
    if not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """Lays an array out by a PartitionSpec on the current mesh. XLA chooses well for most arrays, not for all."""
    if current_mesh().size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def per_device(function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
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
    """The mesh that `jax.set_mesh` made current, without its devices; `empty` where there is none."""
    return jax.sharding.get_abstract_mesh()
