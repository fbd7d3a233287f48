"""Every field of every configuration of `configs/`, with its value: so that a changed default shows in a diff.

    python tests/golden_configs.py

writes `golden/`, after a change that is meant.
"""

import dataclasses
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path

from kforcing_jax.config import parse

REPOSITORY = Path(__file__).parents[1]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))


def golden_path(config_path: Path) -> Path:
    return REPOSITORY / "tests/golden" / f"{config_path.stem}.txt"


def text_of(config_path: Path) -> str:
    """One line per field, `path = value`."""
    config = parse(runpy.run_path(str(config_path))["get_config"]())
    return "".join(f"{path} = {value!r}\n" for path, value in _fields(dataclasses.asdict(config)))


def _fields(values: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


if __name__ == "__main__":
    for path in CONFIGS:
        golden_path(path).write_text(text_of(path), encoding="utf-8")
