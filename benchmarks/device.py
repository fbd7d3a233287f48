"""What a benchmark ran on."""

import os
import platform

import jax


def device_text() -> str:
    """Platform, kind and versions, without which figures mean nothing."""
    device = jax.devices()[0]
    kind = f"{os.cpu_count()} cores, {platform.machine()}" if device.platform == "cpu" else device.device_kind
    return f"{device.platform} ({kind}), jax {jax.__version__}"
