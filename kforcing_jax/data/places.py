"""Folders that belong to the user: the home, and what is kept in its cache."""

import os
from pathlib import Path

from kforcing_jax.errors import DataError


def expanded(path: str | Path) -> Path:
    """A path with `~` expanded. Raises DataError when nobody says where home is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DataError(f"{path} is in a home folder, and there is none; give a path without ~, or set HOME") from None


def cache_folder(name: str = "") -> Path:
    """Where what was downloaded or computed once is kept; `name` is a folder or file in it.

    Raises:
      DataError: there is neither XDG_CACHE_HOME nor a home folder.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        raise DataError("there is no home folder to keep a cache in; set XDG_CACHE_HOME to a writable folder") from None
    return cache / "kforcing_jax" / name
