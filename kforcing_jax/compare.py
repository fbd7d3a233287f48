"""Compares runs: settings that differ, curves over each other, final figures; a page, and tables on the terminal.

python -m kforcing_jax.compare runs/a runs/b
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from kforcing_jax import cli
from kforcing_jax.data.places import expanded
from kforcing_jax.errors import ConfigError

_OUTPUT = flags.DEFINE_string("output", "comparison.html", "The page; one that is there is replaced.")
_JSON = flags.DEFINE_bool("json", False, "Print what the tables show as one object.")


def main(argv: Sequence[str]) -> None:
    """Writes the page of the runs in argv[1:], and prints their tables."""
    page = _writable(_OUTPUT.value)

    from kforcing_jax.evaluation.comparison import as_json, open_runs
    from kforcing_jax.evaluation.comparison_page import write_comparison
    from kforcing_jax.evaluation.comparison_tables import comparison_text

    runs = open_runs(argv[1:])
    write_comparison(runs, page)
    print(json.dumps(as_json(runs)) if _JSON.value else f"{comparison_text(runs)}\n\nPage: {page}")


def _writable(output: str) -> Path:
    """The path of the page. Raises ConfigError where it can be no page: nothing but pages is replaced."""
    path = expanded(output)
    if path.suffix != ".html" or path.is_dir():
        raise ConfigError(f"--output={output} should be the name of a page, such as comparison.html")
    if not path.parent.is_dir():
        raise ConfigError(f"--output={output} cannot be written: there is no folder {path.parent}")
    return path


if __name__ == "__main__":
    cli.run(main, positional=True)
