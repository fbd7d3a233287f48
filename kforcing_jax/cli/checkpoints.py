"""What the commands share that take a released checkpoint or complete a file of prefixes: their flags."""

import os
from pathlib import Path

from absl import flags

from kforcing_jax.data.places import expanded
from kforcing_jax.errors import ConfigError

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A released .ckpt, or a model folder or GGUF file (Llama family), instead of a run directory."
)
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Of --checkpoint: a name or path; by default what came along, or by its vocabulary."
)
BASE = flags.DEFINE_string(
    "base", None, "Of a --checkpoint that adds to a teacher (a gated student): that model; by default the one it names."
)
WEIGHTS = flags.DEFINE_enum("weights", "state_dict", ["state_dict", "ema"], "Which weights of --checkpoint.")
PREFIX_FILE = flags.DEFINE_string("prefix_file", None, 'Lines {"prefix": ...} to complete.')
PREFIX_LENGTH = flags.DEFINE_integer(
    "prefix_length", None, "Tokens of each that are kept; by default 6 for LM1B, 64 for OpenWebText.", lower_bound=1
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Prefixes that are completed at a time.", lower_bound=1)
K = flags.DEFINE_integer("k", None, "Tokens per pass; the (largest) trained window by default.", lower_bound=1)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "How many continuations (of every prefix).", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "As many as the context holds by default, 1,024 at most.", lower_bound=1
)


def check_one_model(workdir: str | None) -> None:
    """Raises ConfigError unless either --workdir or --checkpoint is given."""
    if (workdir is None) == (CHECKPOINT.value is None):
        raise ConfigError("give one of --workdir (a trained run) and --checkpoint (a released .ckpt, a model)")


def check_readable(flag: str, path: str) -> None:
    """Raises ConfigError when the file that a flag names is not there to be read."""
    if not expanded(path).exists():
        raise ConfigError(f"--{flag}={path} cannot be read: no such file")
    if not expanded(path).is_file() or not os.access(expanded(path), os.R_OK):
        raise ConfigError(f"--{flag}={path} cannot be read: it is no file, or not readable")


def check_output_dir(folder: str | Path) -> None:
    """Raises ConfigError when it is clear before decoding that nothing can be written there. Writes nothing."""
    folder = expanded(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"--output_dir={folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir={folder}: the folder {there} is not writable")
