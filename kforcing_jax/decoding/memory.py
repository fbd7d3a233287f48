"""Whether slots fit into the memory of a device, before they are allocated."""

import jax

from kforcing_jax.errors import RunError


def check_memory(state: int, temporary: int, slots: int, positions: int, device: jax.Device):
    """Raises RunError when slots with their caches, and what programs need besides, do not fit what a device has left.

    `state` and `temporary` are bytes on that device.
    """
    left = _bytes_left(device)
    if left is None or state + temporary <= left:
        return
    possible = int(max(left, 0) / (state + temporary) * slots)
    raise RunError(
        f"{slots} slots of {positions} positions take {_gb(state + temporary)} ({_gb(state)} of them caches), and "
        f"{_gb(left)} are left on {device.device_kind}; about {possible} slots would fit"
    )


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
