"""Where figures come from: the device, and the revision of this package."""

import subprocess
from pathlib import Path

import jax
from jax.sharding import Mesh

from kforcing_jax import __version__

_PACKAGE = Path(__file__).resolve().parents[1]


def device(mesh: Mesh) -> str:
    """Number and kind of a mesh's devices, and the version of JAX."""
    first = mesh.devices.flat[0]
    return f"{mesh.size} x {first.device_kind} ({first.platform}), jax {jax.__version__}"


def revision() -> str:
    """What git says of the checkout that this package is in, with -dirty where it was changed; else its version."""
    command = ["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty", "--tags"]
    try:
        if (_PACKAGE.parent / ".git").exists():
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass  # no git here, or a checkout of somebody else
    return f"version {__version__}"
