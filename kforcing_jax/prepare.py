"""Tokenises and packs the text of a configuration into shards, in parallel. Interrupted, the same command goes on.

python -m kforcing_jax.prepare --config=configs/lm1b.py --workdir=runs/lm1b
python -m kforcing_jax.prepare --config=configs/lm1b.py --config.data.prepared=/data/lm1b

The second form is for several runs that share their data. Training needs neither the text nor the tokenizer after this.
"""

import time
from collections.abc import Sequence

from absl import flags

from kforcing_jax import cli
from kforcing_jax.data.places import expanded
from kforcing_jax.errors import ConfigError

_CONFIG = flags.DEFINE_string(
    "config", None, "A file, or an installed one's name (tiny); fields by --config.data.seq_len=128."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory, unless data.prepared says where.")
_WORKERS = flags.DEFINE_integer("workers", None, "Processes; one per core by default.", lower_bound=1)


def main(_: Sequence[str]) -> None:
    """Prepares the data, or verifies what is there, and prints its statistics. Raises ConfigError without a place."""
    config = cli.config_from_flag(_CONFIG)
    path = _WORKDIR.value
    if not config.data.prepared and path is None:
        raise ConfigError("--workdir is missing; or say where the data goes with --config.data.prepared=FOLDER")

    import jax

    from kforcing_jax.data.pipeline import verify
    from kforcing_jax.data.preparation import is_prepared, prepare
    from kforcing_jax.interop.teachers import with_teacher
    from kforcing_jax.workdir import Workdir

    # Nothing is computed here, and a TPU belongs to the process that wakes it.
    jax.config.update("jax_platforms", "cpu")
    config = with_teacher(config, path)
    if config.data.prepared:
        directory = expanded(config.data.prepared)
    else:
        assert path is not None
        directory = Workdir.claim(path, config).data_path
    start = time.monotonic()
    was_there = is_prepared(directory)
    corpus = prepare(config.data, config.seed, directory, _WORKERS.value)
    if was_there:
        verify(directory)
    done = "was there" if was_there else f"prepared in {time.monotonic() - start:.0f} s"
    print(f"{directory}: {done}, every row verified\n{corpus.statistics()}")


if __name__ == "__main__":
    cli.run(main)
