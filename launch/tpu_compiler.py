"""The TPU compiler on a machine without a TPU: devices, their memory, and programs that are compiled once."""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path

import counting
import jax
import jax.numpy as jnp
import traffic
from jax.experimental import topologies

from kforcing_jax.data.places import cache_folder
from kforcing_jax.data.whole_file import write_text
from kforcing_jax.errors import ConfigError

# Larger than any chip's memory, so that the compiler says how large that is.
_TOO_LARGE = 2**40


def devices_of(topology: str) -> list:
    """The devices of a slice. Raises ConfigError when it is unknown or libtpu is missing."""
    try:
        # A chip by itself has to be told from four of a host.
        alone = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone).devices
    except Exception as error:  # the plugin raises whatever its C++ status maps to
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--topology={topology} cannot be compiled for ({reason}); it should be like v5e:1x1, v5e:2x4, v5p:2x2x1 "
            'or v6e:4x4, and libtpu installed: pip install -e ".[tpu]"'
        ) from None


def hbm_limit(device) -> int:
    """Bytes of memory that a program may use on a device: what the compiler says when it runs out of them."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((_TOO_LARGE,), jnp.int8, sharding=sharding)
    try:
        jax.jit(lambda x: jnp.cumsum(x) + x[::-1]).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        return _needed_and_available(error)[1]
    raise ConfigError(f"the compiler does not say how much memory a {device.device_kind} has")


def _needed_and_available(error) -> tuple[int, int]:
    """(bytes of temporaries, bytes there are) from the compiler's message. Raises the error if it is about neither."""
    found = re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", str(error))
    if not found:
        raise error
    unit = {letter: 2 ** (10 * (i + 1)) for i, letter in enumerate("KMGT")}
    return tuple(int(float(found[i]) * unit[found[i + 1]]) for i in (1, 3))


def compiled_once(lowered, arguments: int, analyse: Callable[[str], dict], topology: str) -> dict:
    """What the compiler says of a program: `compiles`, `argument_bytes`, `temporary_bytes`, and `analyse(HLO)`.

    Of one that does not fit, `arguments`, which have no padding, and no analysis. Kept in the user's cache folder for
    the same program, compiler and scripts.
    """
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "kforcing-jax")]
    ours = [Path(file).read_text() for file in (__file__, counting.__file__, traffic.__file__)]
    text = "\n".join([topology, analyse.__name__, *versions, *ours, lowered.as_text()])
    path = cache_folder("compile_for_tpu") / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    if path.exists():
        return json.loads(path.read_text())
    result = _compile(lowered, arguments, analyse)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result))
    return result


def _compile(lowered, arguments, analyse):
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, _ = _needed_and_available(error)
        return {"compiles": False, "argument_bytes": arguments, "temporary_bytes": needed}
    memory = compiled.memory_analysis()
    # Outputs that are not donated arguments are the metrics.
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "compiles": True,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes + max(outputs, 0),
    } | analyse(compiled.as_text())
