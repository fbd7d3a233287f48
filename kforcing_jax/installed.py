"""The configurations that come with the package: the files of the repository's `configs/`."""

from pathlib import Path

# In a checkout a link to the folder, in a wheel its files.
CONFIGS = Path(__file__).with_name("_configs")


def config_names() -> list[str]:
    """What `--config` takes without a path, in alphabetical order."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))
