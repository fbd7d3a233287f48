"""Whether slots fit into the memory of a device, before they are allocated, and how many do."""

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import jax

from kforcing_jax.errors import RunError

if TYPE_CHECKING:
    from kforcing_jax.decoding.engine import Engine


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on a device.

    Attributes:
      weights: of the models as decoding holds them.
      caches: slots and their caches, allocated or not.
      programs: the most that one of the compiled programs needs besides.
      left: what the device has left; None where nothing says it.
    """

    weights: int
    caches: int
    programs: int
    left: int | None


def slots_that_fit(engine_of: Callable[[int], "Engine"], most: int, modes: Iterable[str] | None = None) -> int:
    """The largest of `most`, `most` / 2, ... 1 slots that fit what the device has left beside the weights.

    Programs are compiled first (those that run, and the largest that read prompts), so that what they need is known.
    An engine that has these slots does not compile them again.

    Args:
      engine_of: an engine, as yet without requests, with a number of slots.
      modes: what will be asked of it; by default all that its models allow.

    Raises:
      RunError: not even one slot fits.
    """
    while True:
        engine = engine_of(most)
        try:
            _check_engine(engine, engine.modes if modes is None else modes)
        except RunError:
            if most == 1:
                raise
            most //= 2
        else:
            return most


def _check_engine(engine, modes):
    """Raises RunError when its slots do not fit; compiles nothing where they do not fit by themselves."""
    programs = engine.programs
    check_memory(programs.state_bytes, 0, programs.slots, programs.positions, engine.device)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        temporary = max(pool.map(lambda key: programs.temporary_bytes(*key), engine.largest_programs(modes)))
    check_memory(programs.state_bytes, temporary, programs.slots, programs.positions, engine.device)


def sharded_bytes(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Bytes that one device has of an array, abstract or not."""
    sharding = getattr(x, "sharding", None)
    return math.prod(x.shape if sharding is None else sharding.shard_shape(x.shape)) * x.dtype.itemsize


def check_memory(state: int, temporary: int, slots: int, positions: int, device: jax.Device) -> None:
    """Raises RunError when slots with their caches, and what programs need besides, do not fit what a device has left.

    `state` and `temporary` are bytes on that device.
    """
    left = bytes_left(device)
    if left is None or state + temporary <= left:
        return
    possible = int(max(left, 0) / (state + temporary) * slots)
    raise RunError(
        f"{slots} slots of {positions} positions take {_gb(state + temporary)} ({_gb(state)} of them caches), and "
        f"{_gb(left)} are left on {device.device_kind}; about {possible} slots would fit"
    )


def bytes_left(device: jax.Device) -> int | None:
    """Bytes that a device has left (a CPU: the machine); None where nothing says it."""
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
