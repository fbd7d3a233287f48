"""Whether slots fit into the memory of a device, before they are allocated."""

import jax
import numpy as np

from kforcing_jax.errors import RunError


def check_memory(state, slots: int, positions: int, temporary: int, device: jax.Device):
    """Raises RunError when caches and what programs need besides do not fit what is left on a device.

    Args:
      state: abstract arrays; those of a mesh with their shardings.
      temporary: bytes that the largest program needs besides its arguments.
    """
    left = _bytes_left(device)
    state_bytes = sum(map(_bytes_on_a_device, jax.tree.leaves(state)))
    if left is None or state_bytes + temporary <= left:
        return
    possible = int(max(left, 0) / (state_bytes + temporary) * slots)
    raise RunError(
        f"{slots} slots of {positions} positions take {_gb(state_bytes + temporary)} ({_gb(state_bytes)} of them caches), "
        f"and {_gb(left)} are left on {device.device_kind}; about {possible} slots would fit"
    )


def _bytes_on_a_device(x) -> int:
    shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
    return int(np.prod(shape)) * x.dtype.itemsize


def _bytes_left(device) -> int | None:
    """None where nothing says it."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024 if device.platform == "cpu" else None
    except (OSError, KeyError, ValueError):
        return None


def _gb(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"
