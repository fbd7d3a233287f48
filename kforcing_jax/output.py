"""What commands write: files that are there whole or not at all, and folders that can be written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from kforcing_jax.errors import ConfigError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end. After an error nothing of it is left."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str):
    """Writes a text file, whole or not at all. Raises OSError."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_output_dir(folder: str | Path):
    """Raises ConfigError when it is clear before decoding that nothing can be written there. Writes nothing."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"--output_dir={folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir={folder}: the folder {there} is not writable")
