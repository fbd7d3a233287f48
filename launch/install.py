"""Installs this repository where it runs, and leaves the JAX that is there as it is when its version fits.

    python launch/install.py

For runtimes such as Colab's, which bring a JAX that knows their GPU or TPU. Where there is none, or one that does not
fit, that of the accelerator is installed.
"""

import glob
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[1]


def main() -> None:
    """Says what happens to JAX, and runs pip. Ends with what pip says when it fails."""
    here, wanted = installed("jax", "libtpu"), jax_range()
    keeps = "jax" in here and here["jax"] in wanted
    kept = [f"{name}=={version}" for name, version in here.items()] if keeps else []
    if keeps:
        print(f"keeps {', '.join(kept)}")
    else:
        print(f"installs JAX {wanted}; here is {here.get('jax', 'none')}")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(kept))
        constraints.flush()
        package = f"{REPOSITORY}{'' if keeps else extra_of_device()}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", f"--constraint={constraints.name}", "-e", package]
        done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"pip failed:\n{done.stderr[-2000:]}")


def installed(*beginnings: str) -> dict[str, str]:
    """Versions of the installed packages whose names begin so."""
    found = ((package.metadata["Name"] or "", package.version) for package in importlib.metadata.distributions())
    return {name: version for name, version in found if name.lower().startswith(beginnings)}


def jax_range():
    """The versions of JAX that pyproject.toml asks for, a SpecifierSet."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(need.specifier for need in map(Requirement, project["dependencies"]) if need.name == "jax")


def extra_of_device() -> str:
    """The extra that brings JAX for the accelerator of this machine; "" for none."""
    if glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"):
        return "[tpu]"
    if glob.glob("/dev/nvidia[0-9]*"):
        smi = shutil.which("nvidia-smi")
        says = subprocess.run([smi], capture_output=True, text=True).stdout if smi else ""
        driver = re.search(r"CUDA Version: (\d+)", says)
        return "[cuda13]" if driver and int(driver[1]) >= 13 else "[cuda12]"
    return ""


if __name__ == "__main__":
    main()
